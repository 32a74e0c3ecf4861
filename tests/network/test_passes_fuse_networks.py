"""Fusing exported programs, graphs, and networks of any kind."""

from __future__ import annotations

import io
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from benchmarks.networks import NETWORKS
from tests.network.patterns import MORE, SAMPLES, Fused, Net, with_statistics


# Exported programs
class Exported(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding="same"), nn.BatchNorm2d(8), nn.ReLU6(inplace=True))
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=4, bias=False), nn.BatchNorm2d(8))
        self.head = nn.Conv2d(8, 4, (3, 1), stride=(2, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.body(x)
        y += x
        return F.hardtanh(self.head(torch.relu_(y)), 0.0, 6.0)


@pytest.mark.parametrize("decomposed", [False, True])
def test_exported_programs(decomposed: bool) -> None:
    model = with_statistics(Exported())
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (SAMPLES,), dynamic_shapes=({0: batch},))
    if decomposed:
        program = program.run_decompositions()
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    result = Fused(torch.export.load(file).module(), SAMPLES, others=(SAMPLES[:1],))
    assert result.epilogues == {"stem.0": (False, "relu6"), "body.0": (True, "relu"), "head": (False, "relu6")}
    assert len(result.rest) <= 1  # torch.export's own check of the input's shape


def test_an_exported_resnet() -> None:
    model = with_statistics(NETWORKS["resnet18"].factory(num_classes=10))
    x = torch.randn(1, 3, 32, 32)
    result = Fused(torch.export.export(model, (x,)).module(), x)
    assert result.convs.keys() == {n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    assert Counter(result.epilogues.values()) == {(False, "relu"): 9, (True, "relu"): 8, (False, "none"): 3}


def test_a_graph_module_keeps_its_graph() -> None:
    graph_module = fx.symbolic_trace(Net(lambda net, x: net.relu(net.norm(net.conv(x)))))
    assert Fused(graph_module, SAMPLES).epilogues == {"conv": (False, "relu")}
    assert isinstance(graph_module.conv, nn.Conv2d)


# Any network
channels = st.integers(1, 4).map(lambda n: 2 * n)


@st.composite
def blocks(draw: st.DrawFn) -> nn.Module:
    """A chain of convolutions of any geometry, with any of the known and unknown things behind each."""

    class Block(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            kernel_size = draw(st.sampled_from([1, 3, (1, 3), 5]))
            groups = draw(st.sampled_from([1, 2, width]))
            bias = draw(st.booleans())
            self.conv = nn.Conv2d(width, width, kernel_size, padding="same", groups=groups, bias=bias)
            self.norm = draw(st.sampled_from([nn.Identity, lambda: nn.BatchNorm2d(width)]))()
            self.act = draw(st.sampled_from([nn.Identity, lambda: nn.ReLU(True), nn.ReLU6, nn.Tanh]))()
            self.residual = draw(st.sampled_from(["none", "before", "after", "pre", "inplace", "branch"]))

        def forward(self, x: Tensor) -> Tensor:
            if self.residual == "pre":
                return self.conv(self.act(self.norm(x))) + x
            y = self.norm(self.conv(x))
            if self.residual == "branch":
                return self.act(y) + self.norm(self.conv(torch.tanh(x)))
            if self.residual == "inplace":
                y = y.add_(x)
            elif self.residual == "before":
                y = x + y
            return self.act(y) + x if self.residual == "after" else self.act(y)

    width = draw(channels)
    first = nn.Conv2d(3, width, draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(0, 2)))
    return nn.Sequential(first, *(Block(width) for _ in range(draw(st.integers(1, 4)))))


@given(blocks())
@settings(deadline=None, max_examples=25)
def test_any_network_stays_equal(model: nn.Module) -> None:
    result = Fused(with_statistics(model), SAMPLES, others=(MORE,))
    assert not result.skipped
    assert {n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)} <= set(result.convs)
