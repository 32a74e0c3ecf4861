"""What a convolution of a saved program may ask of a kernel: each limit from both sides."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from escort.problem import Epilogue, Problem
from escort.runtime.saved.limits import MAX_COUNT, MAX_NUMBERS, MAX_PLANE, MAX_RECORDS, MAX_STAGE, MAX_WINDOW
from escort.runtime.saved.problems import (
    check_problem,
    check_together,
    lowered_numbers,
    multiply_adds,
    stage_numbers,
    stage_records,
)

SMALL = Problem(1, 1, 1, 1, 1, (1, 1))


def asking(**changes: Any) -> Problem:
    return replace(SMALL, **changes)


@pytest.mark.parametrize(
    ("allowed", "refused"),
    [
        (asking(height=1, width=MAX_PLANE), asking(height=1, width=MAX_PLANE + 1)),
        (asking(batch=MAX_NUMBERS), asking(batch=MAX_NUMBERS + 1)),
        (asking(batch=MAX_NUMBERS // 8, out_channels=8), asking(batch=MAX_NUMBERS // 8 + 1, out_channels=8)),
        (asking(in_channels=MAX_COUNT), asking(in_channels=MAX_COUNT + 1)),
        (asking(out_channels=MAX_COUNT), asking(out_channels=MAX_COUNT + 1)),
        (asking(padding=(MAX_WINDOW, 0, 0, 0)), asking(padding=(MAX_WINDOW + 1, 0, 0, 0))),
        (asking(padding=(0, 0, 0, MAX_WINDOW)), asking(padding=(0, 0, 0, 2**40))),
        (
            asking(width=MAX_WINDOW, kernel_size=(1, MAX_WINDOW)),
            asking(width=MAX_WINDOW + 1, kernel_size=(1, MAX_WINDOW + 1)),
        ),
        (asking(stride=(1, MAX_WINDOW)), asking(stride=(1, MAX_WINDOW + 1))),
        (asking(dilation=(1, MAX_WINDOW)), asking(dilation=(1, MAX_WINDOW + 1))),
        (asking(stride=(2**7, 2**7)), asking(stride=(2**13, 2**13))),
        (
            asking(height=2**11, width=2**11, kernel_size=(3, 3), dilation=(2, 2)),
            asking(height=2**11, width=2**11, kernel_size=(3, 3), dilation=(2**8, 1)),
        ),
        (
            asking(height=2**11, width=2**11, kernel_size=(2**4, 2**4), stride=(2**2, 2**2)),
            asking(height=2**11, width=2**11, kernel_size=(2**9, 2**9), stride=(2**3, 2**3)),
        ),
        (asking(), asking(precision="fp16")),
        (asking(), asking(epilogue=Epilogue(bias="yes"))),  # type: ignore[arg-type]
        (asking(), asking(height=1.0)),
        (asking(), asking(batch=True)),
        (asking(), asking(padding=(0, 0, 0))),
    ],
    ids=lambda problem: str(problem)[:60],
)
def test_problems_within_the_limits_and_beyond(allowed: Problem, refused: Problem) -> None:
    check_problem(allowed)
    with pytest.raises((ValueError, TypeError)):
        check_problem(refused)


def test_what_all_convolutions_lay_out_is_limited() -> None:
    one = asking(height=2**11, width=2**11, kernel_size=(3, 3))
    most = MAX_RECORDS // stage_records(one)
    assert most > 1
    check_together([one] * (2 * most))
    check_together([replace(one, dilation=(1, dilation)) for dilation in range(1, most)])
    with pytest.raises(ValueError, match=f"more than {MAX_RECORDS} pieces of rows"):
        check_together([replace(one, dilation=(1, dilation)) for dilation in range(1, most + 2)])


def test_what_networks_do_is_far_from_the_limits() -> None:
    stem = Problem(256, 3, 224, 224, 64, (7, 7), (2, 2), (3, 3, 3, 3))
    patches = Problem(64, 3, 512, 512, 1024, (32, 32), (32, 32))
    large = Problem(32, 64, 224, 224, 64, (31, 31), padding=(15, 15, 15, 15), groups=64)
    dilated = Problem(8, 512, 65, 65, 512, (3, 3), padding=(24, 24, 24, 24), dilation=(24, 24))
    for problem in (stem, patches, large, dilated):
        check_problem(problem)
        assert stage_numbers(problem) * 8 < MAX_STAGE and stage_records(problem) * 8 < MAX_RECORDS
    assert lowered_numbers(stem) == 256 * 3 * 49 * 112 * 112
    assert multiply_adds(stem) == 256 * 112 * 112 * 64 * 3 * 49
