"""What a converted model did besides its plan: counted on the ways that are slow anyway, and logged."""

from __future__ import annotations

import copy
import logging
import pickle
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import escort
from escort import methods
from escort.layers import SparseConv2d, counters
from escort.layers.counters import ANOTHER_SIZE, BROADCAST, BY_OPERATOR, OTHERS, Counters
from escort.methods import by_name
from escort.planner.machine import Machine
from escort.planner.plan import Plan
from tests.fakes import PROBLEM, Compiled, a_filter
from tests.network.models import pruned


@pytest.fixture
def model() -> escort.ConvertedModel:
    """A network of two layers, whatever won."""
    network = pruned(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)))
    return escort.convert(network, torch.randn(1, 3, 16, 16))


@pytest.fixture(autouse=True)
def converting_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    race = escort.network.choose.race  # type: ignore[attr-defined]

    def original_loses(runs: list[object], device: torch.device) -> object:
        times, timer = race(runs, device)
        return [2 * max(times), *times[1:]], timer

    monkeypatch.setattr("escort.network.choose.race", original_loses)


def test_what_goes_as_planned_counts_nothing(model: escort.ConvertedModel) -> None:
    for batch in (1, 3, 1):
        model(torch.randn(batch, 3, 16, 16))
    assert model.counters() == {}


def test_loading_counts_nothing(model: escort.ConvertedModel, tmp_path: Path) -> None:
    escort.save(model, tmp_path / "model.escort")
    for remeasure in (False, True):
        loaded = escort.load(tmp_path / "model.escort", remeasure=remeasure)
        loaded(torch.randn(1, 3, 16, 16))
        assert loaded.counters() == {}


def test_sizes_that_were_not_planned_are_counted_once_each(
    model: escort.ConvertedModel, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "escort"):
        for size in (16, 20, 20, 24):
            model(torch.randn(1, 3, size, size))
    assert model.counters() == {"0": {ANOTHER_SIZE: 2}, "2": {ANOTHER_SIZE: 2}}
    assert "layer 0, planned for inputs of (16, 16), is laid out for those of (20, 20)" in caplog.text


def test_calls_as_an_operator_are_counted(model: escort.ConvertedModel) -> None:
    torch.func.vmap(model.network)(torch.randn(2, 1, 3, 16, 16))
    assert model.counters() == {"0": {BY_OPERATOR: 1}, "2": {BY_OPERATOR: 1}}


def test_what_is_compiled_counts_nothing_and_stays_one_graph(model: escort.ConvertedModel) -> None:
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    compiled(torch.randn(1, 3, 16, 16))
    assert model.counters() == {}


class Widened(nn.Module):
    """Adds what has one row to what has many."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.relu(self.conv(x) + y)


def test_residuals_that_broadcast_are_counted() -> None:
    x, y = torch.randn(1, 3, 8, 8), torch.randn(1, 4, 8, 8)
    model = escort.convert(pruned(Widened()), (x, y))
    model(x, y)
    assert model.counters() == {}
    for _ in range(2):
        model(x, y[..., :1])
    assert model.counters() == {"conv": {BROADCAST: 2}}


def test_another_method_is_counted_with_its_reason(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(methods, "METHODS", (Compiled(60.0), by_name("dense")))
    plan = Plan(PROBLEM, "compiled", {"knob": 0}, (), Machine.here())
    layer = SparseConv2d(a_filter(), None, plan, "late")
    x = torch.randn(2, PROBLEM.in_channels, 12, 12)
    with pytest.warns(UserWarning, match="run by dense"), caplog.at_level(logging.WARNING, "escort"):
        layer(x)
        layer(x)
    reason = "compiling a compiled kernel for that size takes long"
    assert layer.counters() == {ANOTHER_SIZE: 1, f"run by dense: {reason}": 1}
    assert caplog.messages == [f"layer late, on inputs of (12, 12), is run by dense instead of its plan: {reason}"]


def test_copies_count_anew(model: escort.ConvertedModel) -> None:
    model(torch.randn(1, 3, 20, 20))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.counters() == {}
        other(torch.randn(1, 3, 20, 20))
        assert other.counters() == model.counters() != {}


def test_reasons_are_bounded_and_threads_lose_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counters, "_MOST_REASONS", 2)
    counts = Counters()

    def count_many() -> None:
        for number in range(4000):
            counts.count(f"reason {number % 4}")

    threads = [threading.Thread(target=count_many) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(counts().values()) == 16_000
    assert counts().keys() - {OTHERS} < {f"reason {number}" for number in range(4)} and len(counts()) == 3
