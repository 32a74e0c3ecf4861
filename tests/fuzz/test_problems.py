"""A few random problems in each run; `make fuzz` tries many."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from escort.methods import by_name
from escort.methods.base import Method, Prepared
from tests.fuzz import problems


@pytest.mark.parametrize("first", range(0, 30, 10))
def test_random_problems(first: int) -> None:
    for seed in range(first, first + 10):
        problems.run(seed)


def test_a_failure_says_how_to_run_it_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A method that forgets one output is found, and the same seed finds it again."""
    prepare = type(by_name("lowered")).prepare

    def forgetful(self: Method, *args: object) -> Prepared:
        run = prepare(self, *args).run

        def wrong(x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
            y = run(x, residual)
            y.flatten()[-1:] += 1.0
            return y

        return Prepared(wrong)

    monkeypatch.setattr(type(by_name("lowered")), "prepare", forgetful)
    messages = []
    for _ in range(2):
        with pytest.raises(AssertionError, match="lowered.*(?s:.*)run it again: python -m .* --first 3 ") as caught:
            problems.run(3)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def test_the_command_counts() -> None:
    command = [sys.executable, "-m", "tests.fuzz.problems", "--first", "5", "--count", "2"]
    assert "2 random problems, from seed 5: all right" in subprocess.run(command, capture_output=True, text=True).stdout
