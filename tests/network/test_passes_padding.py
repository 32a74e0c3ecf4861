"""Padding by what the input holds: the same numbers, and the same errors, as torch's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
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
