"""Fixtures of the tests of whole networks."""

from __future__ import annotations

from typing import Any

import pytest

from escort.planner import timing


@pytest.fixture
def always_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small networks need not win on a busy machine: the first contestant, the original, always loses."""
    race = timing.race

    def ordered(runs: Any, **options: Any) -> list[float]:
        times = race(runs, **{**options, "rounds": 1})
        return [2 * max(times), *times[1:]]

    monkeypatch.setattr(timing, "race", ordered)
