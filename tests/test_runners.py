"""What runs a layer on an input size: the plan's choice, or what does where that does not fit; how long it is kept."""

from __future__ import annotations

import json
import weakref
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch

from escort import methods, reference
from escort.filter import SparseFilter
from escort.layers import SparseConv2d, runners
from escort.layers.counters import Counters
from escort.layers.runners import Choice, RunnerCache
from escort.methods import Prepared, by_name
from escort.planner.machine import Machine
from escort.planner.plan import Plan
from escort.problem import Epilogue, Problem
from tests.fakes import PROBLEM, Compiled, NoSettings, Rounded, Trying, a_filter


class Picky(Rounded):
    """Takes one config, up to a width, and nothing tall."""

    name = "picky"

    def unsupported(self, problem: Problem) -> str | None:
        return "too tall" if problem.height > 20 else None

    def prepare(
        self,
        problem: Problem,
        sparse_filter: SparseFilter,
        bias: torch.Tensor | None,
        config: NoSettings,
        slope: torch.Tensor | None = None,
    ) -> Prepared:
        if problem.width > 20:
            raise ValueError("too wide")
        return super().prepare(problem, sparse_filter, bias, config)


@pytest.mark.parametrize(("height", "width"), [(9, 9), (9, 30), (30, 9)])
def test_a_size_that_the_plan_does_not_fit_runs_by_another_method(
    monkeypatch: pytest.MonkeyPatch, height: int, width: int
) -> None:
    picky = Picky()
    monkeypatch.setattr(methods, "METHODS", (*methods.METHODS, picky))
    problem = Problem(1, 6, 9, 9, 8, (3, 3))
    weight = torch.randn(problem.weight_shape) * (torch.rand(problem.weight_shape) < 0.3)
    layer = SparseConv2d(SparseFilter.from_dense(weight), None, Plan(problem, "picky", {}, (), Machine.here()), "late")
    x = torch.randn(2, 6, height, width)
    expected = reference.conv2d(layer.problem(2, height, width), x, weight)
    assert reference.compare(layer(x), expected) < 1e-5
    monkeypatch.setattr(methods, "METHODS", (picky,))
    layer._runners.clear()
    if max(height, width) > 20:
        with pytest.raises(ValueError, match="late: too (tall|wide)"):
            layer(x)


def test_what_takes_long_to_try_is_tried_for_the_planned_size_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    trying = Trying()
    monkeypatch.setattr(methods, "METHODS", (trying,))
    layer = SparseConv2d(a_filter(), None, Plan(PROBLEM, "cudnn", {"knob": 0}, (), Machine.here()))
    for shape in ((2, 6, 9, 9), (2, 6, 12, 9), (3, 6, 9, 9), (2, 6, 30, 30)):
        layer(torch.randn(shape))
    assert trying.knobs == [0, 1, 1]


class Compiling(Picky):
    """One that would compile a kernel for each filter."""

    name = "compiling"
    compiles_per_filter = True

    def unsupported(self, problem: Problem) -> str | None:
        return None

    def compile_s(self, problem: Problem, sparse_filter: SparseFilter, config: NoSettings) -> float:
        return 60.0

    def prepare(
        self,
        problem: Problem,
        sparse_filter: SparseFilter,
        bias: torch.Tensor | None,
        config: NoSettings,
        slope: torch.Tensor | None = None,
    ) -> Prepared:
        pytest.fail("compiled where another method would do")


def test_nothing_is_compiled_for_a_size_that_another_method_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "METHODS", (Picky(), Compiling(), *methods.METHODS))
    problem = Problem(1, 6, 9, 9, 8, (3, 3))
    sparse_filter = SparseFilter.from_dense(torch.randn(problem.weight_shape))
    layer = SparseConv2d(sparse_filter, None, Plan(problem, "picky", {}, (), Machine.here()))
    assert layer(torch.randn(1, 6, 30, 30)).shape == (1, 8, 28, 28)


@pytest.mark.parametrize(
    ("seconds", "planned", "runs"),
    [
        (60.0, (PROBLEM.height, PROBLEM.width), "compiled"),
        (0.1, (PROBLEM.height + 1, PROBLEM.width), "compiled"),
        (60.0, (PROBLEM.height + 1, PROBLEM.width), "dense"),
    ],
)
def test_a_call_does_not_wait_for_a_kernel_of_a_size_that_was_not_planned(
    monkeypatch: pytest.MonkeyPatch, seconds: float, planned: tuple[int, int], runs: str
) -> None:
    method, sparse_filter = Compiled(seconds), a_filter()
    monkeypatch.setattr(methods, "METHODS", (method, by_name("dense")))
    choice = Choice(replace(PROBLEM, height=planned[0], width=planned[1]), "compiled", {"knob": 0})
    warning = pytest.warns(UserWarning, match=r"^layer layer1.conv, .* run by dense, as compiling")
    with warning if runs == "dense" else nullcontext():
        run = runners.prepare(PROBLEM, sparse_filter, None, choice, "layer1.conv")
    assert method.prepared == (runs == "compiled")
    x = torch.randn(PROBLEM.input_shape)
    assert reference.compare(run(x), reference.conv2d(PROBLEM, x, sparse_filter.to_dense())) < 1e-5


class Uncompiled(Compiled):
    """Its kernel is not compiled yet, and there is no compiler."""

    def prepare(
        self,
        problem: Problem,
        sparse_filter: SparseFilter,
        bias: torch.Tensor | None,
        config: Any,
        slope: torch.Tensor | None = None,
    ) -> Prepared:
        raise ImportError("kernel.cu is not compiled for sm_90 yet")


def test_without_a_compiler_another_size_runs_by_another_method(monkeypatch: pytest.MonkeyPatch) -> None:
    sparse_filter, counters = a_filter(), Counters()
    monkeypatch.setattr(methods, "METHODS", (Uncompiled(0.0), by_name("dense")))
    planned = Choice(PROBLEM, "compiled", {"knob": 0})
    with pytest.raises(ImportError, match="kernel.cu is not compiled"):
        runners.prepare(PROBLEM, sparse_filter, None, planned, "layer1.conv")
    other = replace(PROBLEM, height=PROBLEM.height + 1)
    with pytest.warns(
        UserWarning, match=r"^layer layer1.conv, .* run by dense, as kernel.cu is not compiled for sm_90"
    ):
        run = runners.prepare(other, sparse_filter, None, planned, "layer1.conv", counters)
    assert "run by dense: kernel.cu is not compiled for sm_90 yet" in counters()
    x = torch.randn(other.input_shape)
    assert reference.compare(run(x), reference.conv2d(other, x, sparse_filter.to_dense())) < 1e-5


def test_a_choice_survives_json() -> None:
    problem = replace(PROBLEM, stride=(2, 1), precision="tf32", epilogue=Epilogue(True, True, "relu6"))
    choice = Choice(problem, "direct", {"words": 4, "packed": True})
    assert Choice.from_json(choice.to_json()) == choice
    fields = json.loads(choice.to_json())
    assert fields["problem"]["precision"] == "tf32" and fields["problem"]["kernel_size"] == [3, 3]


def test_the_oldest_runner_makes_room() -> None:
    cache: RunnerCache[str] = RunnerCache(2)
    for name in "abc":
        cache.add(name, name.upper())
    assert dict(cache) == {"b": "B", "c": "C"}


def test_a_layer_holds_runners_for_a_bounded_number_of_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("escort.layers.conv._MOST_SIZES", 2)
    monkeypatch.setattr(methods, "METHODS", (*methods.METHODS, Rounded()))
    sparse_filter = a_filter()
    layer = SparseConv2d(sparse_filter, None, Plan(PROBLEM, "rounded", {}, (), Machine.here()))
    for height in (5, 6, 7, 5):
        x = torch.randn(1, 6, height, 9)
        expected = reference.conv2d(layer.problem(1, height, 9), x, sparse_filter.to_dense())
        assert reference.compare(layer(x), expected) < 1e-5
        assert len(layer._runners) <= 2


class Evicted:
    """What a cache lets go of, to be found again."""


def test_of_two_threads_that_lay_out_a_size_at_once_neither_loses_its_runner(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both launch what they made, and a GPU may read its tables when the call has returned."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    cache, found = RunnerCache[Evicted](2), list[weakref.ref[Evicted]]()
    for _ in range(2):
        entry = Evicted()
        found.append(weakref.ref(entry))
        cache.add("size", entry)
        del entry
    assert cache["size"] is found[0]() and found[1]() is not None


@pytest.mark.parametrize(("on_gpu", "waits", "kept"), [(False, True, 0), (True, True, 3), (True, False, 19)])
def test_runners_that_go_stay_for_a_while_where_another_stream_may_run_them(
    on_gpu: bool, waits: bool, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many there are within the while, none goes before the GPU was waited for."""
    waited = list[list[int]]()

    def wait() -> bool:
        waited.append([number for number, ref in enumerate(found) if ref() is not None])
        return waits

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: on_gpu)
    monkeypatch.setattr(runners, "_MOST_LEAVING", 3)
    monkeypatch.setattr(runners, "wait_for_gpus", wait)
    cache, found = RunnerCache[Evicted](1), list[weakref.ref[Evicted]]()
    for size in range(20):
        entry = Evicted()
        found.append(weakref.ref(entry))
        cache.add(size, entry)
        del entry
    assert sum(ref() is not None for ref in found) == 1 + kept
    if kept == 3:  # the older half went each time, behind a wait that found them there
        assert waited[:2] == [[0, 1, 2, 3, 4], [2, 3, 4, 5, 6]]
