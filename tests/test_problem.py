"""Problem: shapes as torch computes them, and errors that say what is wrong."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import escort
from escort.problem import Activation, Epilogue, Problem, explicit_padding


@given(
    size=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    kernel_size=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.integers(1, 3),
    padding=st.sampled_from([0, 1, (2, 1), "same", "valid"]),
    dilation=st.integers(1, 3),
)
def test_shapes_are_torchs(
    size: tuple[int, int], kernel_size: tuple[int, int], stride: int, padding: Any, dilation: int
) -> None:
    stride = 1 if padding == "same" else stride
    conv = nn.Conv2d(4, 6, kernel_size, stride, padding, dilation, groups=2)
    x = torch.zeros(3, 4, *size)
    try:
        expected = conv(x).shape
    except RuntimeError:
        with pytest.raises(ValueError, match="smaller than the kernel"):
            Problem.of(conv, x.shape)
        return
    problem = Problem.of(conv, x.shape)
    assert problem.output_shape == expected
    assert problem.weight_shape == conv.weight.shape
    assert Problem.from_json(json.loads(json.dumps(problem.to_json()))) == problem


def test_same_pads_an_even_kernel_at_the_end() -> None:
    assert explicit_padding("same", (4, 2), (1, 3)) == (1, 2, 1, 2)


def test_zeros_in_front_are_added_to_the_padding() -> None:
    problem = Problem.of(nn.Conv2d(4, 6, 3, stride=2, padding=(1, 0)), (1, 4, 1, 2), zeros=(0, 1, 2, 3))
    assert problem.padding == (1, 2, 2, 3) and problem.output_shape == (1, 6, 1, 3)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"groups": 2}, "divisible by groups 2"),
        ({"kernel_size": (9, 3)}, "smaller than the kernel, which spans 9x3"),
        ({"stride": (0, 1)}, "positive"),
        ({"padding": (0, 0, 0, -1)}, "not negative"),
        ({"precision": "int8"}, "precision is one of"),
    ],
)
def test_an_impossible_problem_says_why(change: dict[str, Any], says: str) -> None:
    fields: dict[str, Any] = {
        "batch": 1, "in_channels": 3, "height": 8, "width": 8, "out_channels": 4, "kernel_size": (3, 3), **change,
    }  # fmt: skip
    with pytest.raises(ValueError, match=says):
        Problem(**fields)


def test_a_problem_prints_what_is_asked() -> None:
    problem = Problem(1, 64, 56, 56, 128, (3, 3), (2, 2), (1, 1, 1, 1), epilogue=Epilogue(True, True, "relu"))
    assert str(problem) == (
        "1x64x56x56 -> 128, kernel 3x3, fp32 on cpu, stride (2, 2), padding (1, 1, 1, 1), then bias+residual+relu"
    )


@pytest.mark.parametrize("shape", [(1, 3, 8), (1, 4, 8, 8)])
def test_of_refuses_another_rank_or_channel_count(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="got shape"):
        Problem.of(nn.Conv2d(3, 4, 3), shape)


@pytest.mark.parametrize("data", [{}, {"batch": 1}, {**Problem(1, 1, 4, 4, 1, (1, 1)).to_json(), "colour": 1}])
def test_from_json_refuses_what_is_no_problem(data: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="not a problem"):
        Problem.from_json(data)


def test_an_unknown_activation_is_refused() -> None:
    with pytest.raises(ValueError, match="activation is one of"):
        Epilogue(activation="exp")  # type: ignore[arg-type]


@pytest.mark.parametrize("slope", [float("nan"), float("inf"), -1e39, 10**400, True, "0.1", None])
def test_a_slope_is_a_number_that_kernels_can_hold(slope: Any) -> None:
    with pytest.raises(ValueError, match="negative_slope is a finite float32"):
        Epilogue(activation="leaky_relu", negative_slope=slope)


def test_a_slope_goes_with_leaky_relu_alone() -> None:
    with pytest.raises(ValueError, match="negative_slope goes with leaky_relu, got 0.1 with relu"):
        Epilogue(activation="relu", negative_slope=0.1)


def test_an_epilogue_is_written_as_it_always_was_unless_it_has_a_slope() -> None:
    assert Problem(1, 1, 4, 4, 1, (1, 1), epilogue=Epilogue(True, False, "relu6")).to_json()["epilogue"] == {
        "bias": True,
        "residual": False,
        "activation": "relu6",
    }
    for epilogue in (Epilogue(activation="silu"), Epilogue(True, True, "leaky_relu", 0.2)):
        problem = Problem(1, 1, 4, 4, 1, (1, 1), epilogue=epilogue)
        assert Problem.from_json(problem.to_json()) == problem
    assert str(Epilogue(True, activation="leaky_relu", negative_slope=0.2)) == "bias+leaky_relu(0.2)"


def test_kernels_number_the_activations_alike() -> None:
    """C++ by the places in its enum."""
    text = (Path(escort.__file__).parent / "kernels" / "cpu" / "activation.hpp").read_text()
    enum = re.search(r"enum class Activation : int32_t {([^}]*)}", text)
    assert enum and tuple(re.findall(r"\w+", enum.group(1))) == get_args(Activation)
