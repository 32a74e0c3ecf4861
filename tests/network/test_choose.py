"""The original and the converted networks race, and the fastest is kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import escort
from escort.layers import SparseConv2d
from escort.network.choose import race
from escort.planner import timing
from escort.planner.timing import Timing
from tests.network.models import Small, pruned


def test_a_slower_network_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    model = pruned(Small())
    monkeypatch.setattr(timing, "race", lambda runs, **_: [float(i + 1) for i in range(len(runs))])
    fast = escort.convert(model, torch.randn(1, 3, 8, 8))
    assert fast.plan.kept_dense and fast.plan.speedup == 1.0
    assert fast.plan.reason is not None and "the original is kept" in fast.plan.reason
    assert not any(isinstance(module, SparseConv2d) for module in fast.modules())
    assert all(a is not b for a, b in zip(fast.parameters(), model.parameters(), strict=True))


def test_whole_networks_are_all_timed_in_the_same_way(monkeypatch: pytest.MonkeyPatch) -> None:
    captures: list[bool] = []

    def timed(runs: Any, device: Any, *, capture: bool = True, **_: Any) -> list[Timing]:
        captures.append(capture)
        return [Timing(3.0 if capture else 5.0, "graph" if capture and run is able else "events") for run in runs]

    monkeypatch.setattr(timing, "race_on_gpu", timed)
    able, unable = lambda: None, lambda: None
    gpu = torch.device("cuda:0")
    assert race([able, able], gpu) == ([3.0, 3.0], "graph") and captures == [True]
    assert race([able, unable], gpu) == ([5.0, 5.0], "events") and captures == [True, True, False]
    monkeypatch.setattr(timing, "race_on_gpu", lambda *_, **__: [Timing(None, reason="out of device memory: 2 GiB")])
    with pytest.raises(RuntimeError, match="cannot be timed: out of device memory: 2 GiB; pass .*smaller batch"):
        race([able], gpu)
