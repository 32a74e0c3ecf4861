"""Run by `make wheel-test` in an environment that holds the built wheel and nothing of this repository."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import nn

import escort
from escort.cuda import compiler


def main() -> None:
    """Prunes, converts, saves and loads a small network, and compares with the original."""
    assert Path(sys.prefix) in Path(escort.__file__).parents, f"escort comes from {escort.__file__}, not from the wheel"
    assert (compiler.KERNELS / "direct.cu").is_file(), "the wheel brings the sources that are compiled on users' GPUs"
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 8, 3, stride=2)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= torch.rand_like(parameter) < 0.1
    x = torch.randn(2, 3, 20, 20)
    fast = escort.convert(model, x)
    torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)
    print(f"escort {escort.__version__} converts: {', '.join(plan.method for plan in fast.plan.layers.values())}")


if __name__ == "__main__":
    main()
