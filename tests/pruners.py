"""The blocks of docs/pruners.md, and what they are tried on."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import escort

DOCUMENT = (Path(__file__).parent.parent / "docs" / "pruners.md").read_text()
#: By the library that it is about.
BLOCKS = dict(re.findall(r"^## (.*?)\n.*?^```python\n(.*?)^```", DOCUMENT, re.DOTALL | re.MULTILINE))
SPARSITY = 0.9


class Net(nn.Module):
    """A norm and a residual; the second convolution can lose channels with the first alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.second = nn.Conv2d(16, 16, 3, padding=1)
        self.blocks = nn.ModuleList([nn.Conv2d(16, 32, 3, stride=2)])
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(x)))
        x = torch.relu(self.second(x) + x)
        return self.head(torch.relu(self.blocks[0](x)).mean((2, 3)))


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def follow(library: str) -> dict[str, Any]:
    """Runs a block as it stands. Returns its names; fast computes what the block's model does, by sparse layers."""
    names: dict[str, Any] = {"torch": torch, "escort": escort, "model": net(), "example": torch.randn(2, 3, 12, 12)}
    block = BLOCKS[library]
    assert len(block.rstrip().rpartition("\n\n")[2].splitlines()) <= 3, "from the pruner to convert in three lines"
    exec(compile(block, library, "exec"), names)
    fast, model = names["fast"], names.get("stripped", names["model"])
    assert list(fast.plan.layers) == ["first", "second", "blocks.0"] and not fast.plan.not_tried
    x = torch.randn(3, 3, 12, 12)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)
    return names


def zeros(fast: escort.ConvertedModel) -> float:
    """The share of zeros in the layers of a converted network."""
    weights = [fast.get_submodule(f"network.{name}").weight for name in fast.plan.layers]
    return sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)
