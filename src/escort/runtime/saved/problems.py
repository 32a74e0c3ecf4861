"""What a convolution of a saved program may ask of a kernel, and how much work measuring it is."""

from __future__ import annotations

import math
from collections.abc import Iterable

from escort.problem import Problem
from escort.runtime.saved.limits import MAX_COUNT, MAX_NUMBERS, MAX_PLANE, MAX_RECORDS, MAX_STAGE, MAX_WINDOW

_TILE = 256  # positions; about what kernels compute at a time


def check_problem(problem: Problem) -> None:
    """Raises ValueError for a problem that a kernel or an allocation should never see."""
    sizes = (*problem.input_shape, problem.out_channels, problem.groups)
    windows = (*problem.kernel_size, *problem.stride, *problem.dilation, *problem.padding)
    lengths = len(problem.kernel_size), len(problem.stride), len(problem.dilation), len(problem.padding)
    flags = problem.epilogue.bias, problem.epilogue.residual
    shapes = problem.input_shape, problem.output_shape
    if (
        lengths != (2, 2, 2, 4)
        or not all(type(number) is int for number in (*sizes, *windows))
        or not all(type(flag) is bool for flag in flags)
        or (problem.device == "cpu" and problem.precision != "fp32")
        or max(windows) > MAX_WINDOW
        or max(problem.in_channels, problem.out_channels) > MAX_COUNT
        or max(math.prod(shape[2:]) for shape in shapes) > MAX_PLANE
        or max(math.prod(shape) for shape in shapes) > MAX_NUMBERS
        or stage_numbers(problem) > MAX_STAGE
    ):
        raise ValueError(f"no network asks for {problem}")
    check_together([problem])


def check_together(problems: Iterable[Problem]) -> None:
    """Raises ValueError where the convolutions of a network lay out more than networks do. Equal planes count once."""
    planes = {(p.height, p.width, p.kernel_size, p.stride, p.padding, p.dilation): stage_records(p) for p in problems}
    if sum(planes.values()) > MAX_RECORDS:
        raise ValueError(f"its convolutions stage their inputs in more than {MAX_RECORDS} pieces of rows")


def multiply_adds(problem: Problem) -> int:
    """Of the dense convolution."""
    return math.prod(problem.weight_shape) * problem.batch * problem.out_height * problem.out_width


def lowered_numbers(problem: Problem) -> int:
    """Of the input, written out patch by patch."""
    return problem.batch * problem.in_channels * math.prod(problem.kernel_size) * problem.out_height * problem.out_width


def stage_numbers(problem: Problem) -> int:
    """About how many numbers of an input channel a tile's stage holds: a plane for each phase of the stride."""
    _, reach = _pitch_and_reach(problem)
    return math.prod(problem.stride) * (_TILE + reach)


def stage_records(problem: Problem) -> int:
    """About how many pieces of rows are laid out: for each tile and phase those that the tile reads."""
    if math.prod((*problem.kernel_size, *problem.stride)) == 1:
        return 0  # it reads its input in place
    pitch, reach = _pitch_and_reach(problem)
    phases = math.prod(min(pair) for pair in zip(problem.kernel_size, problem.stride, strict=True))
    tiles = problem.out_height * pitch // _TILE + 1
    return phases * tiles * ((_TILE + reach) // pitch + 2)


def _pitch_and_reach(problem: Problem) -> tuple[int, int]:
    """Positions from a row to the next one, and from a tile's last one to the last that it reads."""
    down, right = (
        (taps - 1) * dilation // stride
        for taps, dilation, stride in zip(problem.kernel_size, problem.dilation, problem.stride, strict=True)
    )
    pitch = max(problem.width, problem.out_width) if problem.stride[1] == 1 else problem.out_width + right
    return pitch, down * pitch + right
