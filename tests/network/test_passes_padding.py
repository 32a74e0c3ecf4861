"""Padding by what the input holds and padding by zeros: the same numbers, and the same errors, as torch's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.network.rewritten import Rewritten, converted, settled

MODES = ["reflect", "replicate", "circular"]


@st.composite
def padded(draw: st.DrawFn) -> tuple[Any, list[int]]:
    """A convolution with one or two axes that pads by what its input holds, and an input size that it takes."""
    axes, groups = draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 2]))
    sizes = [draw(st.integers(1, 4)) for _ in range(axes)]
    strides, dilations = ([draw(st.integers(1, 2)) for _ in range(axes)] for _ in range(2))
    padding: Any = tuple(draw(st.integers(0, 3)) for _ in range(axes))
    if draw(st.booleans()):
        strides, padding = [1] * axes, "same"
    conv = (nn.Conv1d, nn.Conv2d)[axes - 1](
        groups * draw(st.integers(1, 2)),
        groups * draw(st.integers(1, 2)),
        tuple(sizes),
        tuple(strides),
        padding,
        tuple(dilations),
        groups,
        padding_mode=draw(st.sampled_from(MODES)),
    )
    spans = [(size - 1) * step + 1 for size, step in zip(sizes, dilations, strict=True)]
    return conv, [max(span, 4) + draw(st.integers(0, 4)) for span in spans]


@given(padded(), st.integers(1, 3), st.booleans())
@settings(max_examples=60, deadline=None)
def test_any_geometry(problem: tuple[Any, list[int]], batch: int, exported: bool) -> None:
    conv, size = problem
    model = settled(nn.Sequential(conv, nn.ReLU()), density=0.5)
    shapes = (batch, size), (3, [n + 2 for n in size]), (0, size), (1, [1] * len(size)), (1, [3] * len(size))
    x, *others = (torch.randn(n, conv.in_channels, *sizes) for n, sizes in shapes)
    result = Rewritten(model, x, *others, exported=exported)
    assert set(result.convs) == {"0"} and result.convs["0"].activation == "relu" and not result.skipped


@pytest.mark.parametrize("mode", MODES[:1] + MODES[2:])
def test_an_input_that_is_too_small_has_the_error_of_torch(mode: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 5, padding=2, padding_mode=mode)).eval()
    x = torch.randn(1, 3, 8, 8)
    result = Rewritten(model, x)
    small = torch.randn(1, 3, 1, 1)
    with pytest.raises(RuntimeError) as expected:
        model(small)
    with pytest.raises(RuntimeError) as raised:
        result.network(small)
    assert str(raised.value) == str(expected.value)


@pytest.mark.usefixtures("always_faster", "direct_wins")
def test_a_whole_conversion(tmp_path: Path) -> None:
    model = nn.Sequential(
        *(nn.Conv2d(3, 6, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(6), nn.ReLU()),
        *(nn.Conv2d(6, 6, (3, 5), padding="same", padding_mode="circular", groups=2), nn.ReLU6(), nn.Flatten(2)),
        *(nn.Conv1d(6, 4, 4, 2, padding=(3,), padding_mode="replicate"), nn.BatchNorm1d(4), nn.ReLU()),
    )
    inputs = [torch.randn(n, 3, h, w) for n, h, w in ((2, 8, 9), (1, 12, 7), (3, 5, 5), (0, 8, 9))]
    fast = converted(settled(model), inputs[0], tmp_path, *inputs[1:])
    assert set(fast.plan.layers) == {"0", "3", "6"} and not fast.plan.skipped
    assert [plan.problem.epilogue.activation for plan in fast.plan.layers.values()] == ["relu", "relu6", "relu"]


#: Pads, and the zeros (top, bottom, left, right) that they add.
ZEROS: dict[str, tuple[Any, tuple[int, int, int, int]]] = {
    "function": (lambda x: F.pad(x, (1, 2, 0, 3)), (0, 3, 1, 2)),
    "of channels and samples": (lambda x: F.pad(x, [1, 0, 0, 1, 0, 0, 0, 0], value=0.0), (0, 1, 1, 0)),
    "by names": (lambda x: F.pad(input=x, pad=(2, 1), mode="constant", value=None), (0, 0, 2, 1)),
    "operator": (lambda x: torch.constant_pad_nd(x, (0, 1, 1, 0)), (1, 0, 0, 1)),
    "exported operator": (lambda x: torch.ops.aten.constant_pad_nd.default(x, [0, 1, 1, 0], 0), (1, 0, 0, 1)),
    "module": (nn.ZeroPad2d((1, 2, 0, 3)), (0, 3, 1, 2)),
    "module of one axis": (nn.ZeroPad1d((3, 0)), (0, 0, 3, 0)),
    "module of a constant": (nn.ConstantPad2d((1, 2, 2, 0), 0.0), (2, 0, 1, 2)),
    "several": (nn.Sequential(nn.ZeroPad2d(1), nn.Dropout(), nn.ConstantPad2d((0, 1, 0, 1), 0)), (1, 2, 1, 2)),
}


class Padded(nn.Module):
    """A strided convolution behind a pad, and one with padding of its own that reads what the pad makes, too."""

    def __init__(self, pad: Any) -> None:
        super().__init__()
        self.pad = pad
        self.conv = nn.Conv2d(4, 6, 3, stride=2)
        self.depthwise = nn.Conv2d(4, 4, (3, 2), padding="same", groups=4)

    def forward(self, x: torch.Tensor) -> Any:
        x = self.pad(x.relu())
        return self.conv(x).relu(), self.depthwise(x)


@pytest.mark.parametrize("exported", [False, True])
@pytest.mark.parametrize("spelling", ZEROS)
def test_convolutions_add_the_zeros_in_front_of_them(spelling: str, exported: bool) -> None:
    pad, zeros = ZEROS[spelling]
    x, *others = (torch.randn(*shape) for shape in ((2, 4, 6, 7), (1, 4, 5, 5), (0, 4, 6, 7), (1, 4, 1, 1)))
    result = Rewritten(settled(Padded(pad), density=0.5), x, *others, exported=exported)
    assert result.rest == ["relu.default" if exported else "relu"]
    assert [conv.zeros for conv in result.convs.values()] == [zeros, zeros]


class Pattern(nn.Module):
    """A convolution in a pattern around it, a function of this module and x (N, 4, H, W)."""

    def __init__(self, pattern: Callable[[Any, torch.Tensor], Any]) -> None:
        super().__init__()
        self.pattern = pattern
        self.conv = nn.Conv2d(4, 4, 3)
        self.hooked = nn.Conv2d(4, 4, 3)
        self.hooked.register_forward_pre_hook(lambda module, args: (args[0] + 1.0,))
        self.pad = nn.ZeroPad2d(1)
        self.pad.register_forward_hook(lambda module, args, output: output * 2.0)

    def forward(self, x: torch.Tensor) -> Any:
        return self.pattern(self, x)


def in_two_ways(net: Any, x: torch.Tensor) -> Any:
    padded = F.pad(x, (1, 1, 1, 1))
    return net.conv(padded) + padded[:, :, 1:-1, 1:-1]


def written_between(net: Any, x: torch.Tensor) -> Any:
    x = x.abs()
    padded = F.pad(x, (1, 1, 1, 1))
    x.add_(1.0)
    return net.conv(padded) + x


@pytest.mark.parametrize(
    "pattern",
    [
        lambda net, x: net.conv(F.pad(x, (1, 1, 1, 1), value=0.5)),
        lambda net, x: net.conv(F.pad(x, (1, 1, 1, 1), mode="reflect")),
        lambda net, x: net.conv(F.pad(x, (-1, 1, 1, 1))),
        lambda net, x: net.conv(F.pad(x[:, 1:], (0, 0, 0, 0, 1, 0))),
        lambda net, x: net.conv(F.pad(x, (x.shape[3] // 4,) * 4)),
        lambda net, x: net.conv(net.pad(x)),
        lambda net, x: net.hooked(F.pad(x, (1, 1, 1, 1))),
        lambda net, x: net.conv(x) + F.pad(x, (0, 0, 0, 0))[:, :, 1:-1, 1:-1],
        in_two_ways,
        written_between,
    ],
)
def test_other_pads_stay(pattern: Callable[[Any, torch.Tensor], Any]) -> None:
    model = settled(Pattern(pattern), density=0.5)
    result = Rewritten(model, torch.randn(2, 4, 7, 6), torch.randn(1, 4, 9, 9))
    assert {"pad", "ZeroPad2d"} & set(result.rest) and not any(any(conv.zeros) for conv in result.convs.values())


def test_a_pad_of_a_residual_is_no_pad_of_the_input() -> None:
    model = settled(Pattern(lambda net, x: net.conv(x) + F.pad(x[:, :, 2:, 2:], (0, 0, 0, 0))), density=0.5)
    result = Rewritten(model, torch.randn(2, 4, 7, 6))
    assert result.convs["conv"].residual and result.convs["conv"].zeros == (0, 0, 0, 0)


@pytest.mark.parametrize("exported", [False, True])
def test_causal_convolutions_of_rows(exported: bool) -> None:
    model = nn.Sequential(
        *(nn.ConstantPad1d((4, 0), 0.0), nn.Conv1d(3, 6, 3, dilation=2), nn.BatchNorm1d(6), nn.ReLU()),
        *(nn.ZeroPad1d((2, 1)), nn.Conv1d(6, 4, 4, stride=2), nn.ReLU()),
    )
    x, *others = torch.randn(2, 3, 9), torch.randn(1, 3, 1), torch.randn(3, 3, 12)
    result = Rewritten(settled(model, density=0.5), x, *others, exported=exported)
    assert [conv.zeros for conv in result.convs.values()] == [(0, 0, 4, 0), (0, 0, 2, 1)]
    assert set(result.rest) <= {"getitem"} and result.rest.count("getitem") == 2


@pytest.mark.usefixtures("always_faster", "direct_wins")
def test_a_whole_conversion_with_zeros(tmp_path: Path) -> None:
    model = nn.Sequential(
        *(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(3, 8, 3, 2), nn.ReLU6(), nn.ConstantPad2d((1, 2, 2, 1), 0.0)),
        *(nn.Conv2d(8, 8, 5, 2, groups=8), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1)),
    )
    inputs = [torch.randn(n, 3, h, w) for n, h, w in ((2, 9, 8), (1, 14, 7), (0, 9, 8), (1, 2, 2))]
    fast = converted(settled(model), inputs[0], tmp_path, *inputs[1:])
    assert [plan.problem.padding for plan in fast.plan.layers.values()] == [(0, 1, 0, 1), (2, 1, 1, 2), (0, 0, 0, 0)]
    assert fast.network.get_submodule("1").padding == (0, 1, 0, 1)
