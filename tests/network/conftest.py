"""Fixtures of the tests of whole networks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from escort.planner import measure, planner, timing


def let_win(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    """Lets a method win in every layer where it is among the candidates."""
    monkeypatch.setattr(measure, "_HOPELESS", float("inf"))
    monkeypatch.setattr(
        measure,
        "_race",
        lambda problem, contenders, *_: [
            replace(one.candidate, time_us=1.0 if one.candidate.method == method else 2.0) for one in contenders
        ],
    )


@pytest.fixture
def always_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small networks need not win on a busy machine: the first contestant, the original, always loses."""
    race = timing.race

    def ordered(runs: Any, **options: Any) -> list[float]:
        times = race(runs, **{**options, "rounds": 1})
        return [2 * max(times), *times[1:]]

    monkeypatch.setattr(timing, "race", ordered)


@pytest.fixture
def direct_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every layer runs by the sparse method `direct`, however small it is."""
    planner._remembered.clear()
    let_win(monkeypatch, "direct")
