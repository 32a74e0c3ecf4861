"""Transposed convolutions as ordinary ones: every geometry, and what stands behind them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.network.rewritten import Rewritten, converted, settled


@st.composite
def transposes(draw: st.DrawFn) -> tuple[nn.ConvTranspose2d, tuple[int, int]]:
    """A transposed convolution of any geometry, padding beyond its reach included, and an input size."""
    pairs = st.tuples(st.integers(1, 4), st.integers(1, 4))
    kernel_size, stride, dilation = draw(pairs), draw(st.tuples(*[st.integers(1, 3)] * 2)), draw(pairs)
    reaches = [(size - 1) * step for size, step in zip(kernel_size, dilation, strict=True)]
    padding = draw(st.tuples(*(st.integers(0, reach + 1) for reach in reaches)))
    output_padding = draw(
        st.tuples(*(st.integers(0, max(step, hole) - 1) for step, hole in zip(stride, dilation, strict=True)))
    )
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    conv = nn.ConvTranspose2d(
        groups * draw(st.integers(1, 2)),
        groups * draw(st.integers(1, 3)),
        kernel_size,
        stride,
        padding,
        output_padding,
        groups,
        bias=draw(st.booleans()),
        dilation=dilation,
    )
    return conv, draw(st.tuples(st.integers(1, 6), st.integers(1, 6)))


def takes(conv: nn.ConvTranspose2d, size: tuple[int, int]) -> bool:
    try:  # in float64, as float32 lets outputs without positions pass
        copy.deepcopy(conv).double()(torch.zeros(1, conv.in_channels, *size, dtype=torch.float64))
    except RuntimeError:
        return False
    return True


@given(transposes(), st.integers(1, 3), st.booleans())
@settings(max_examples=150, deadline=None)
def test_any_geometry(problem: tuple[nn.ConvTranspose2d, tuple[int, int]], batch: int, exported: bool) -> None:
    conv, (height, width) = problem
    while not takes(conv, (height, width)):
        height, width = height + 1, width + 1
    model = settled(nn.Sequential(conv), density=0.2)
    sizes = (batch, height, width), (3, height + 2, width + 1), (1, 1, 1), (0, height, width)
    x, *others = (torch.randn(n, conv.in_channels, h, w) for n, h, w in sizes)
    result = Rewritten(model, x, *others, exported=exported)
    zeros = 1.0 - conv.weight.count_nonzero() / conv.weight.numel()
    if zeros < 0.7 and conv.stride != (1, 1):
        assert "of its weights are zero" in result.skipped["0"] and not result.convs
    else:
        assert set(result.convs) == {"0"} and not result.skipped


@pytest.mark.parametrize(
    ("arguments", "kernel_size", "padding", "steps"),
    [
        ({"kernel_size": 4, "stride": 2, "padding": 1}, (3, 3), "same", ["pixel_shuffle"]),
        ({"kernel_size": 2, "stride": 2}, (1, 1), "same", ["pixel_shuffle"]),
        ({"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1}, (2, 2), "same", ["pixel_shuffle"]),
        ({"kernel_size": 3, "stride": 2, "padding": 1}, (2, 2), "same", ["pixel_shuffle", "getitem"]),
        ({"kernel_size": 5, "padding": 1, "dilation": 2}, (5, 5), (7, 7), []),
        (
            {"kernel_size": 3, "stride": (1, 2), "padding": 1},
            (3, 2),
            "same",
            ["unflatten", "permute", *["flatten"] * 2],
        ),
    ],
)
def test_usual_geometries_take_few_steps(
    arguments: Any, kernel_size: tuple[int, int], padding: Any, steps: list[str]
) -> None:
    result = Rewritten(settled(nn.Sequential(nn.ConvTranspose2d(3, 4, **arguments))), torch.randn(2, 3, 6, 5))
    conv = result.convs["0"].conv
    assert (conv.kernel_size, conv.padding) == (kernel_size, padding)
    assert result.rest[: len(steps)] == steps and set(result.rest[len(steps) :]) <= {"getitem"}


class Upsampling(nn.Module):
    """The end of a generator or of a U-Net: transposed convolutions with norms and activations, and a skip."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 8, 3, 2, 1)
        self.up = nn.ConvTranspose2d(8, 6, 4, 2, 1, groups=2, bias=False)
        self.norm, self.relu = nn.BatchNorm2d(6), nn.ReLU(inplace=True)
        self.again = nn.ConvTranspose2d(9, 4, 3, 1, 1)
        self.last = nn.Sequential(nn.ConvTranspose2d(4, 3, 5, 3), nn.Dropout2d(), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.norm(self.up(F.relu(self.down(x)))))
        y = torch.cat([y, x], 1)
        y = F.relu6(self.again(y))
        return self.last(y)


@pytest.mark.parametrize("exported", [False, True])
def test_norms_and_activations_behind_are_fused(exported: bool) -> None:
    result = Rewritten(settled(Upsampling()), torch.randn(2, 3, 8, 10), torch.randn(1, 3, 16, 6), exported=exported)
    epilogues = {name: conv.activation for name, conv in result.convs.items()}
    assert epilogues == {"down": "relu", "up": "relu", "again": "relu6", "last.0": "tanh"} and not result.skipped
    assert [name for name in result.rest if name not in ("Tanh", "tanh.default")][1:] in (
        ["cat", "pixel_shuffle", "getitem"],
        ["cat.default", "pixel_shuffle", "getitem"],
    )


@pytest.mark.parametrize(
    "pattern",
    [
        lambda net, x: F.batch_norm(F.relu(net.up(x)), net.norm.running_mean, net.norm.running_var),
        lambda net, x: (lambda y: net.norm(y) + y)(net.up(x)),
        lambda net, x: (lambda y: y.relu_() * y)(net.up(x)),
        lambda net, x: net.up(x) * net.norm.weight[:, None, None],
        lambda net, x: net.up(x) + net.up(-x),
        lambda net, x: F.batch_norm(net.up(x), None, None, training=True),
        lambda net, x: F.conv_transpose2d(x, net.up.weight * 2, net.up.bias, 2, padding=1).relu() + net.up.bias.sum(),
    ],
)
def test_what_stands_behind_them_stays_right(pattern: Any) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.norm = nn.ConvTranspose2d(3, 4, 3, 2), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return pattern(self, x)

    assert Rewritten(settled(Net()), torch.randn(2, 3, 4, 5), torch.randn(3, 3, 5, 4)).convs


def test_what_is_left_alone_says_why() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.sized, self.dense = nn.ConvTranspose2d(3, 4, 3, 2), nn.ConvTranspose2d(4, 4, 2, 2)
            self.solid = nn.ConvTranspose3d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.solid(self.dense(self.sized(x, output_size=(10, 9)))[:, :, None])

    model = settled(Net())
    with torch.no_grad():
        model.dense.weight.fill_(1.0)
    skipped = Rewritten(model, torch.randn(2, 3, 4, 4)).skipped
    assert skipped["sized"] == "it is called with output_size; give the layer an output_padding instead"
    assert skipped["dense"].startswith("0% of its weights are zero") and "prune it further" in skipped["dense"]
    assert skipped["solid"].startswith("a transposed 3-d convolution is out of scope")


@pytest.mark.usefixtures("always_faster", "direct_wins")
def test_a_whole_conversion(tmp_path: Path) -> None:
    inputs = [torch.randn(n, 3, h, w) for n, h, w in ((2, 8, 10), (1, 16, 6), (3, 4, 4), (0, 8, 8))]
    fast = converted(settled(Upsampling()), inputs[0], tmp_path, *inputs[1:])
    assert set(fast.plan.layers) == {"down", "up", "again", "last.0"} and not fast.plan.skipped
