"""Fixtures that make conversion quick and its result certain."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from escort.methods import by_name
from escort.planner import compile_budget, planner, search, timing


@pytest.fixture(autouse=True)
def strict_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(autouse=True)
def quick_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans look at each method's first config only, and the first contestant of a race, the original, loses."""
    race = timing.race_on_gpu

    def ordered(runs: Any, device: Any, **options: Any) -> list[timing.Timing]:
        timings = race(runs, device, **{**options, "rounds": 3, "budget_s": 0.0})
        worst = max(taken.time_us or 0.0 for taken in timings)
        return timings if len(timings) == 1 else [replace(timings[0], time_us=2 * worst), *timings[1:]]

    monkeypatch.setattr(timing, "race_on_gpu", ordered)
    monkeypatch.setattr(search, "_MOST_CONFIGS", 1)
    monkeypatch.setattr(compile_budget, "_FURTHER_SAVE", ())
    monkeypatch.setattr(planner, "_remembered", {})


@pytest.fixture(autouse=True)
def no_rivals(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch.compile makes of a network is tested once, as it takes long, and small networks need not win calls."""
    module = sys.modules["escort.network.convert"]
    monkeypatch.setattr(module, "compare_with_compiled", lambda chosen, *_: chosen.plan)
    monkeypatch.setattr(module, "compare_with_eager", lambda chosen, *_: chosen)


@pytest.fixture(autouse=True)
def memory_formats(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    """Those in which networks are tried: NCHW where a test does not name others."""
    formats: tuple[str, ...] = getattr(request, "param", ("contiguous",))
    module: Any = sys.modules["escort.network.convert"]
    tried = module.in_memory_formats

    def some(*args: Any) -> tuple[dict[str, nn.Module], dict[str, str]]:
        networks, not_tried = tried(*args)
        return {name: network for name, network in networks.items() if name in formats}, not_tried

    monkeypatch.setattr(module, "in_memory_formats", some)
    return formats


@pytest.fixture
def only(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Leaves the planner one method to choose."""
    return lambda name: monkeypatch.setattr(planner, "for_device", lambda device: (by_name(name, device),))
