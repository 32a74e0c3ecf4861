"""Layers planned and swapped: within a budget for compiling, and errors name the layer."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch

import escort
from escort import methods
from escort.filter import SparseFilter
from escort.methods import Prepared
from escort.methods.cpu.dense import Dense, DenseConfig
from escort.network import swap
from escort.network.check import Request
from escort.network.progress import Estimate
from escort.network.swap import Unplanned
from escort.planner import cores, planner, timing
from escort.planner.plan import Layer
from escort.problem import MemoryFormat, Problem
from tests.network.conftest import let_win
from tests.network.models import Small, pruned, three_convolutions


def test_running_out_of_memory_names_the_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    example_inputs = timing.example_inputs

    def draw(problem: Problem, most: int) -> Any:
        if problem.epilogue.residual:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has 4 bytes free.")
        return example_inputs(problem, most=most)

    planner._remembered.clear()
    monkeypatch.setattr(timing, "example_inputs", draw)
    with pytest.raises(torch.OutOfMemoryError, match="^layer second: .* allocate 20.00 GiB; .*smaller batch$"):
        escort.convert(pruned(Small()), torch.randn(1, 3, 8, 8))
    monkeypatch.undo()
    assert set(escort.convert(pruned(Small()), torch.randn(1, 3, 8, 8)).plan.layers) == {"first", "second"}


class Compiled(Dense):
    """A method that takes ten seconds of all cores to compile each of its two configs."""

    name = "compiled"
    is_dense = False
    compiles_per_filter = True

    def __init__(self) -> None:
        self.prepared: list[str] = []

    def compile_s(self, problem: Problem, sparse_filter: SparseFilter, config: DenseConfig) -> float:
        return 10.0 * cores.count()

    def prepare(
        self,
        problem: Problem,
        sparse_filter: SparseFilter,
        bias: torch.Tensor | None,
        config: DenseConfig,
        slope: torch.Tensor | None = None,
    ) -> Prepared:
        self.prepared.append(config.memory_format)
        return super().prepare(problem, sparse_filter, bias, config)


@pytest.mark.usefixtures("always_faster")
def test_kernels_are_compiled_within_a_budget_and_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled, shown = Compiled(), list[tuple[int, int]]()
    monkeypatch.setattr(methods, "METHODS", (compiled, Dense()))
    let_win(monkeypatch, "compiled")
    monkeypatch.setattr(Estimate, "kernels", lambda estimate, done, total: shown.append((done, total)))
    x = torch.randn(1, 4, 8, 8)
    # One config for each layer, then the second one for the first of those that are alike: 50 s.
    fast = escort.convert(three_convolutions(), x, effort=75.0, progress=True)
    assert [plan.method for plan in fast.plan.layers.values()] == ["compiled"] * 3
    first, like = fast.plan.layers["0"], fast.plan.layers["1"]
    assert (like.config, like.times_from, like.time_us) == (first.config, "equal layer", first.time_us)
    assert "The times of 1 of 3 layers are from equal layers." in re.sub(r"\s+", " ", str(fast.plan))
    # Four candidates are compiled before any is timed, then the choice that is taken over; the layers run these.
    assert len(compiled.prepared) == 4 + 1
    with torch.no_grad():
        fast(x)
    assert len(compiled.prepared) == 4 + 1
    assert shown == [(done, 4) for done in range(5)]
    # Now the second config of the last layer is too much.
    planner._remembered.clear()
    again = escort.replan(fast, effort=45.0)
    assert [plan.method for plan in again.plan.layers.values()] == ["compiled"] * 3
    left_out = [c.reason for plan in again.plan.layers.values() for c in plan.candidates if c.reason]
    assert len(left_out) == 1 and "takes about 10 s" in left_out[0] and "more than the 5 s left" in left_out[0]
    compiled.prepared.clear()
    without = escort.replan(fast, effort=0.0)
    assert {plan.method for plan in without.plan.layers.values()} == {"dense"} and not compiled.prepared
    with torch.no_grad():
        assert torch.allclose(without(x), fast(x), atol=1e-5)


def test_a_memory_format_that_is_predicted_to_be_slow_is_not_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only layers of mostly zeros count, and only those that both have: a squeeze-excitation's are a launch in one."""
    weight = torch.eye(4).reshape(4, 4, 1, 1)
    sparse, dense = (Layer(Problem(1, 4, 8, 8, 4, (1, 1)), SparseFilter.from_dense(w)) for w in (weight, weight + 1.0))
    networks: dict[MemoryFormat, Unplanned] = {
        name: Unplanned(torch.nn.Identity(), {"a": sparse, "b": dense, "c": sparse}, {})
        for name in ("contiguous", "channels_last")
    }
    more = {**networks["contiguous"].layers, "d": sparse}
    networks["contiguous"] = Unplanned(torch.nn.Identity(), more, {})
    predicted: list[list[float | None]] = []
    known: list[list[float] | None] = []

    def predict(layers: list[Layer], methods: object) -> list[float | None]:
        assert layers == [sparse, sparse]
        return predicted.pop(0)

    monkeypatch.setattr(swap, "predicted_us", predict)
    monkeypatch.setattr(swap, "known_us", lambda layers, methods: known.pop(0) if known else None)
    request = Request(torch.device("cpu"), "fp16")
    kept: dict[MemoryFormat, Unplanned] = {"channels_last": networks["channels_last"]}
    predicted[:] = [[7.0, 9.0], [10.0, 10.0]]
    reason = "its layers are predicted to take 0.80 of the time in channels_last; effort='best' tries it"
    assert swap.likely(networks, request) == (kept, {"contiguous": reason})
    predicted[:] = [[9.0, None], [10.0, None]]
    assert swap.likely(networks, request)[0] == kept
    predicted[:] = [[2.0, 8.0], [10.0, 10.0]]
    reason = "layers in NCHW are predicted to take 0.50 of its time; effort='best' tries it"
    in_nchw = {"contiguous": networks["contiguous"]}
    assert swap.likely(networks, request) == (in_nchw, {"channels_last": reason})
    predicted[:] = [[20.0, 10.0], [10.0, None]]  # up to 20 us there
    reason = "its layers are predicted to take at least 1.00 of the time in channels_last; effort='best' tries it"
    assert swap.likely(networks, request) == (kept, {"contiguous": reason})
    predicted[:] = [[2.0, None], [10.0, 1.0]]
    reason = "layers in NCHW are predicted to take at most 0.36 of its time; effort='best' tries it"
    assert swap.likely(networks, request) == (in_nchw, {"channels_last": reason})
    for times in ([[5.0, 9.0], [10.0, 10.0]], [[6.0, 4.0], [10.0, None]], [[None] * 2, [10.0] * 2], [[None] * 2] * 2):
        predicted[:] = times  # close, or not comparable
        assert swap.likely(networks, request) == (networks, {})
    assert swap.likely(networks, replace(request, compile_budget_s=1.0)) == (networks, {})
    known[:] = [None, [3.0] * 3]  # chosen before
    reason = "the plans of all layers are known in channels_last alone; effort='best' tries it"
    assert swap.likely(networks, request) == (kept, {"contiguous": reason})
    known[:] = [[4.0] * 3 + [99.0], [3.0] * 3]
    reason = "its layers took 1.33 of the time in channels_last; effort='best' tries it"
    assert swap.likely(networks, request) == (kept, {"contiguous": reason})
    known[:] = [[2.0] * 3 + [99.0], [3.0] * 3]
    reason = "layers in NCHW took 0.67 of its time; effort='best' tries it"
    assert swap.likely(networks, request) == (in_nchw, {"channels_last": reason})
    known[:] = [[3.0] * 3 + [99.0], [3.0] * 3]
    assert swap.likely(networks, request) == (networks, {})
    predicted[:] = [[7.0] * 2, [10.0] * 2]
    assert swap.likely(networks, replace(request, remeasure=True)) == (networks, {})
