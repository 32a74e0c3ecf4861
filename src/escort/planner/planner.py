"""From a problem to a plan: refuse with reasons, rank by heuristic, validate against the reference, time, remember."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch

from escort import reference
from escort.filter import SparseFilter
from escort.methods import Method, Prepared, Runner, by_name, dense_for, for_device
from escort.planner import timing as bench
from escort.planner.machine import Machine
from escort.planner.timing import Timer
from escort.problem import Problem

#: A candidate whose first runs take this much longer than the fastest one's is not timed further.
_HOPELESS = 1.6
#: On a GPU first runs hold up to so many microseconds of waiting for the host, which a graph does not.
_HOST_US = 60.0
#: Most configs of a method that are tried, and the seconds after which only the first of each method still is.
_MOST_CONFIGS = 24
_SEARCH_S = 20.0
#: Seconds after which a layer's race stops at three rounds per candidate.
_BUDGET_S = 0.3


@dataclass(frozen=True)
class Candidate:
    """One way to run a problem and what became of it: timed, or refused for a reason.

    Attributes:
        config: the method's Config as JSON values; None where the method refused the problem, or for configs that
            were not tried.
        time_us: median time of a call.
        rel_error: ``||out - ref|| / ||ref||`` against the float64 reference, None where it is not finite.
        reason: why it was refused or not timed, None where it was timed.
        timer: how it was timed; on a GPU "events" where it was hopeless, or cannot be captured.
        compile_s: seconds of one core that compiling its kernel took, whenever that was; None where nothing says so.
        code_bytes: size of that kernel's binary; None likewise.
        remainder_share: of the filter's nonzeros, that a method for structured filters adds separately, else None.
    """

    method: str
    config: dict[str, Any] | None = None
    time_us: float | None = None
    rel_error: float | None = None
    reason: str | None = None
    timer: Timer = "calls"
    compile_s: float | None = None
    code_bytes: int | None = None
    remainder_share: float | None = None


@dataclass(frozen=True)
class Plan:
    """What was chosen for a problem, and every candidate that was weighed for it, on which machine."""

    problem: Problem
    method: str
    config: dict[str, Any]
    candidates: tuple[Candidate, ...]
    machine: Machine

    @property
    def time_us(self) -> float | None:
        """Median time of the choice; None if it was never timed here."""
        chosen = (c.time_us for c in self.candidates if (c.method, c.config) == (self.method, self.config))
        return next(chosen, None)

    @property
    def dense_time_us(self) -> float | None:
        """Median time of the fastest dense candidate."""
        return self.best_us(dense_for(self.problem.device).name)

    def best_us(self, method: str) -> float | None:
        """Median time of that method's fastest candidate, None where none was timed."""
        times = [c.time_us for c in self.candidates if c.method == method and c.time_us is not None]
        return min(times, default=None)

    def runner(self, problem: Problem, sparse_filter: SparseFilter, bias: torch.Tensor | None) -> Prepared:
        """The choice, prepared for this filter and for a problem that may have another batch or input size."""
        method = by_name(self.method, problem.device)
        return method.prepare(problem, sparse_filter, bias, method.config_type(**self.config))

    def to_json(self) -> dict[str, Any]:
        return {
            "problem": self.problem.to_json(),
            "method": self.method,
            "config": self.config,
            "candidates": [asdict(candidate) for candidate in self.candidates],
            "machine": self.machine.to_json(),
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Plan:
        """The plan behind :meth:`to_json`. Raises ValueError where the data is not one that this version can run."""
        try:
            plan = cls(
                Problem.from_json(data["problem"]),
                data["method"],
                dict(data["config"]),
                tuple(Candidate(**candidate) for candidate in data["candidates"]),
                Machine.from_json(data["machine"]),
            )
            by_name(plan.method, plan.problem.device).config_type(**plan.config)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a plan: {error}") from error
        return plan


def plan_layer(
    problem: Problem,
    sparse_filter: SparseFilter,
    bias: torch.Tensor | None = None,
    *,
    methods: Sequence[Method] | None = None,
    budget_s: float = _BUDGET_S,
    compile_budget_s: float = 60.0,
) -> Plan:
    """Measure the ways to run a convolution on this machine and choose the fastest that is right.

    A layer of the same problem and nearly the same number of nonzeros as one planned before takes over its plan. It is
    measured anew where compiling the choice for its filter exceeds the budget, and where the budget cut the search for
    that plan short and is now at least twice as large.

    Args:
        methods: the candidates, by default all methods of the problem's device.
        budget_s: seconds after which timing stops at three rounds per candidate.
        compile_budget_s: seconds that compiling kernels for this filter may take, by the methods' estimates and with
            all cores at work. A config beyond it is not tried, and its candidate says so; 0 rules out the methods that
            compile for each filter. What other methods compile is not counted.

    Raises:
        ValueError: where no method can run the problem; the message holds each one's reason.
        torch.OutOfMemoryError: where the device cannot even hold the problem's input.
    """
    check_compile_budget(compile_budget_s)
    methods = for_device(problem.device) if methods is None else methods
    key = _key(problem, sparse_filter, methods)
    if recalled := _recall(key, problem, sparse_filter, methods, compile_budget_s):
        return recalled[0]
    space = _search_space(problem, sparse_filter, methods, compile_budget_s)
    return _remember(key, space, _measure(problem, sparse_filter, bias, space, budget_s))


def plan_layers(
    layers: Sequence[tuple[Problem, SparseFilter, torch.Tensor | None]],
    compile_budget_s: float,
    preparing: Callable[[int, int], None] = lambda done, total: None,
    *,
    methods: Sequence[Method] | None = None,
) -> Iterator[Plan]:
    """The plans of a network's layers one by one, as :func:`plan_layer` makes them.

    What all of them will try on a GPU is prepared before the first is timed, since that means to compile it, and every
    core has work then. Each layer that has something to compile for its filter gets an equal share of what is left of
    the budget, and what it does not need goes to those behind it. A layer that takes over a plan compiles no more than
    the choice, when it is first run.

    Args:
        layers: problem, filter and bias of each.
        compile_budget_s: as of a layer, for all of them together.
        preparing: is told how many candidates are prepared, and of how many.
        methods: the candidates of every layer, by default all methods of its problem's device.

    Raises:
        ValueError, torch.OutOfMemoryError: as `plan_layer`, where the layer's plan is due.
    """
    check_compile_budget(compile_budget_s)
    spaces, shares = _share_out(layers, compile_budget_s, methods)
    jobs = [
        partial(_prepare_ahead, space, method, *layers[index], config)
        for index, space in spaces.items()
        for method, configs in space.tried
        for config in configs
        if method.compiles_per_filter or layers[index][0].device_type == "cuda"
    ]
    on_all_cores(jobs, preparing)
    jobs.clear()
    for index, layer in enumerate(layers):
        if space := spaces.pop(index, None):
            key = _key(*layer[:2], for_device(layer[0].device) if methods is None else methods)
            yield _remember(key, space, _measure(*layer, space, _BUDGET_S))
        else:
            yield plan_layer(*layer, methods=methods, compile_budget_s=shares[index])


def on_all_cores(
    jobs: Sequence[Callable[[], object]], done: Callable[[int, int], None] = lambda done, total: None
) -> None:
    """Runs jobs that spend their time outside Python's lock. The first error is raised, and what had not begun is not.

    Args:
        done: is told how many are done, and of how many.
    """
    if jobs:
        done(0, len(jobs))
    with _threads() as pool:
        for count, future in enumerate(as_completed([pool.submit(job) for job in jobs]), 1):
            future.result()
            done(count, len(jobs))


def check_compile_budget(compile_budget_s: float) -> None:
    """Raises ValueError for what is no number of seconds."""
    if not compile_budget_s >= 0.0:
        raise ValueError(f"compile_budget_s is a number of seconds, 0 to compile nothing, got {compile_budget_s}")


@dataclass(frozen=True)
class _Known:
    """A plan that like layers take over, and the compile budget that it was made with."""

    plan: Plan
    compile_budget_s: float
    is_cut: bool


@dataclass(frozen=True)
class _Space:
    """What is tried of the methods' search spaces.

    Attributes:
        tried: methods with their configs, best guess first.
        refused: the candidates that are not tried.
        compile_s: of each config that is tried and compiled, about how long all cores together take.
        is_cut: whether a larger compile budget would let more be tried.
        runners: those that were prepared ahead, by method and config.
    """

    tried: list[tuple[Method, list[Any]]]
    refused: list[Candidate]
    compile_s: list[float]
    compile_budget_s: float
    is_cut: bool
    runners: dict[tuple[str, Any], Prepared] = field(default_factory=dict)


_remembered: dict[Any, _Known] = {}


def _key(problem: Problem, sparse_filter: SparseFilter, methods: Sequence[Method]) -> Any:
    """The same for layers that share a plan."""
    names, machine = tuple(method.name for method in methods), Machine.here(problem.device)
    return problem, round(math.log(sparse_filter.nnz + 1) / 0.05), names, machine


def _remember(key: Any, space: _Space, plan: Plan) -> Plan:
    _remembered[key] = _Known(plan, space.compile_budget_s, space.is_cut)
    return plan


def _recall(
    key: Any, problem: Problem, sparse_filter: SparseFilter, methods: Sequence[Method], compile_budget_s: float
) -> tuple[Plan, float] | None:
    """The plan to take over, if any, and about how long all cores together compile its choice."""
    known = _remembered.get(key)
    if known is None or _is_outgrown(known, compile_budget_s):
        return None
    method = next(method for method in methods if method.name == known.plan.method)
    if not method.compiles_per_filter:
        return known.plan, 0.0
    needed_s = _compile_s(method, problem, sparse_filter, method.config_type(**known.plan.config))
    return (known.plan, needed_s) if _fits(needed_s, compile_budget_s) else None


def _is_outgrown(before: _Known | _Space, compile_budget_s: float) -> bool:
    """Whether a budget is worth another search. The shares of a network's layers differ, but mostly by little."""
    return before.is_cut and compile_budget_s > before.compile_budget_s * 2.0


def _share_out(
    layers: Sequence[tuple[Problem, SparseFilter, torch.Tensor | None]],
    compile_budget_s: float,
    methods: Sequence[Method] | None,
) -> tuple[dict[int, _Space], list[float]]:
    """What is tried for the layers, by their index, that will not take over a plan; and each one's share."""
    all_methods = [for_device(problem.device) if methods is None else methods for problem, _, _ in layers]
    wanting = [
        any(method.compiles_per_filter and method.unsupported(layer[0]) is None for method in choice)
        for layer, choice in zip(layers, all_methods, strict=True)
    ]
    left_s = compile_budget_s
    spaces, shares = dict[int, _Space](), list[float]()
    first: dict[Any, _Space] = {}  # of those layers whose plans others will take over
    for index, (problem, sparse_filter, _) in enumerate(layers):
        share = left_s / max(sum(wanting[index:]), 1)
        shares.append(share)
        if not wanting[index] and problem.device_type == "cpu":
            continue  # nothing takes time before it is timed
        key = _key(problem, sparse_filter, all_methods[index])
        if recalled := _recall(key, problem, sparse_filter, all_methods[index], share):
            left_s -= recalled[1]
        elif key in first and not _is_outgrown(first[key], share):
            left_s -= max(first[key].compile_s, default=0.0)  # which of them it will be is not known yet
        else:
            spaces[index] = first[key] = _search_space(problem, sparse_filter, all_methods[index], share)
            left_s -= sum(first[key].compile_s)
    return spaces, shares


def _search_space(
    problem: Problem, sparse_filter: SparseFilter, methods: Sequence[Method], compile_budget_s: float
) -> _Space:
    tried: list[tuple[Method, list[Any]]] = []
    refused: list[Candidate] = []
    compile_s: list[float] = []
    is_cut = False
    for method in methods:
        if reason := method.unsupported(problem):
            refused.append(Candidate(method.name, reason=reason))
            continue
        if method.compiles_per_filter and compile_budget_s == 0.0:
            reason = "it is compiled for each filter, which a compile budget of 0 s rules out; raise compile_budget_s"
            refused.append(Candidate(method.name, reason=reason))
            is_cut = True
            continue
        configs = list(method.configs(problem, sparse_filter))
        if len(configs) > _MOST_CONFIGS:
            refused.append(Candidate(method.name, reason=f"{len(configs) - _MOST_CONFIGS} more configs were not tried"))
        fitting = []
        for config in configs[:_MOST_CONFIGS]:
            if method.compiles_per_filter:
                needed_s, left_s = _compile_s(method, problem, sparse_filter, config), compile_budget_s - sum(compile_s)
                if not _fits(needed_s, left_s):
                    reason = (
                        f"compiling it takes about {_seconds(needed_s)} of all {_cores()} cores, more than the "
                        f"{_seconds(left_s)} left of the layer's compile budget; raise compile_budget_s"
                    )
                    refused.append(Candidate(method.name, asdict(config), reason=reason))
                    is_cut = True
                    continue
                compile_s.append(needed_s)
            fitting.append(config)
        tried.append((method, fitting))
    return _Space(tried, refused, compile_s, compile_budget_s, is_cut)


def _compile_s(method: Any, problem: Problem, sparse_filter: SparseFilter, config: Any) -> float:
    """About how long all cores together compile a config of a method that compiles per filter."""
    estimate_s: float = method.compile_s(problem, sparse_filter, config)
    return estimate_s / _cores()


def _fits(needed_s: float, left_s: float) -> bool:
    return left_s > 0.0 and needed_s <= left_s


def _seconds(value: float) -> str:
    return f"{value:.0f} s" if value >= 10.0 else f"{value:.2g} s"


def _measure(
    problem: Problem, sparse_filter: SparseFilter, bias: torch.Tensor | None, space: _Space, budget_s: float
) -> Plan:
    with torch.inference_mode():
        inputs = bench.example_inputs(problem)
        settled, running = _first_runs(problem, sparse_filter, bias, space, *inputs[0])
        if not running:
            reasons = "; ".join(f"{c.method}: {c.reason}" for c in settled)
            raise ValueError(f"no method can run {problem}: {reasons}")
        best_us = min(first_us for _, _, first_us in running)
        limit_us = max(_HOPELESS * best_us, best_us + (_HOST_US if problem.device_type == "cuda" else 0.0))
        contenders = [(candidate, run) for candidate, run, first_us in running if first_us <= limit_us]
        settled += _race(problem, contenders, inputs, budget_s)
    hopeless = [(candidate, first_us) for candidate, _, first_us in running if first_us > limit_us]
    timer: Timer = "calls" if problem.device_type == "cpu" else "events"
    settled += [replace(candidate, time_us=first_us, timer=timer) for candidate, first_us in hopeless]
    timed = [candidate for candidate in settled if candidate.time_us is not None]
    if not timed:  # each ran once, and failed when it was timed
        raise ValueError(f"no method can run {problem}: " + "; ".join(f"{c.method}: {c.reason}" for c in settled))
    best = min(timed, key=lambda candidate: candidate.time_us or 0.0)
    assert best.config is not None
    return Plan(problem, best.method, best.config, tuple(settled), Machine.here(problem.device))


def _first_runs(
    problem: Problem,
    sparse_filter: SparseFilter,
    bias: torch.Tensor | None,
    space: _Space,
    x: torch.Tensor,
    residual: torch.Tensor | None,
) -> tuple[list[Candidate], list[tuple[Candidate, Runner, float]]]:
    """The candidates that cannot run, and those that are right, with their runner and a rough time in microseconds."""
    # Of the whole batch the first and the last image: where a kernel's tables depend on the batch, its end is at risk.
    images = sorted({0, len(x) - 1})
    some = x[images], None if residual is None else residual[images]
    expected = reference.conv2d(problem, some[0], sparse_filter.to_dense(), bias, some[1])
    bound = reference.ERROR_BOUND[problem.precision]
    settled = list(space.refused)
    running: list[tuple[Candidate, Runner, float]] = []
    searched_s = 0.0
    for method, configs in space.tried:
        prepared = _prepared(method, problem, sparse_filter, bias, configs, space.runners)
        for tried, config in enumerate(configs):
            # What was compiled for the filter is tried whatever it took, which is bounded by a budget of its own.
            if tried and searched_s > _SEARCH_S and not method.compiles_per_filter:
                settled.append(Candidate(method.name, reason=f"{len(configs) - tried} more configs were not tried"))
                break
            candidate, begin = Candidate(method.name, asdict(config)), time.perf_counter()
            try:
                ready = next(prepared)()
                run = ready.run
                if method.compiles_per_filter:
                    begin = time.perf_counter()
                if binary := ready.binary:
                    candidate = replace(candidate, compile_s=binary.compile_s, code_bytes=len(binary.cubin))
                candidate = replace(candidate, remainder_share=ready.notes.get("remainder_share"))
                error = reference.compare(run(x, residual)[images], expected)
                candidate = replace(candidate, rel_error=error if math.isfinite(error) else None)
                if error <= bound:
                    running.append((candidate, run, bench.glance_us(partial(run, x, residual), problem.device)))
                else:
                    settled.append(replace(candidate, reason=f"relative error {error:.1e} exceeds {bound:.0e}"))
            except (RuntimeError, ValueError) as failure:
                if problem.device_type == "cpu":
                    raise
                settled.append(replace(candidate, reason=bench.survived(failure)))
            searched_s += time.perf_counter() - begin
    return settled, running


def _prepare_ahead(
    space: _Space, method: Method, problem: Problem, sparse_filter: SparseFilter, bias: torch.Tensor | None, config: Any
) -> None:
    with suppress(RuntimeError, ValueError):  # what fails will say so when it is tried
        space.runners[method.name, config] = method.prepare(problem, sparse_filter, bias, config)


def _prepared(
    method: Method,
    problem: Problem,
    sparse_filter: SparseFilter,
    bias: torch.Tensor | None,
    configs: Sequence[Any],
    ahead: dict[tuple[str, Any], Prepared],
) -> Iterator[Callable[[], Prepared]]:
    """What gives each config its runner, or raises. On a GPU all are prepared at once: each may compile a kernel."""

    def prepare(config: Any) -> Prepared:
        return ahead.pop((method.name, config), None) or method.prepare(problem, sparse_filter, bias, config)

    jobs = [partial(prepare, config) for config in configs]
    if problem.device_type == "cpu":
        yield from jobs
        return
    with _threads() as pool:
        yield from [future.result for future in [pool.submit(job) for job in jobs]]


@contextmanager
def _threads() -> Iterator[ThreadPoolExecutor]:
    """As many as there are cores. At the end, or once an error passes through, what has not begun never will."""
    pool = ThreadPoolExecutor(_cores())
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _race(
    problem: Problem,
    contenders: Sequence[tuple[Candidate, Runner]],
    inputs: Sequence[tuple[torch.Tensor, torch.Tensor | None]],
    budget_s: float,
) -> list[Candidate]:
    """The contenders with their times."""
    candidates = [candidate for candidate, _ in contenders]
    if problem.device_type == "cpu":
        runs = [partial(run, *inputs[0]) for _, run in contenders]
        times = bench.race(runs, warmup=0, rounds=7, budget_s=budget_s)
        return [replace(candidate, time_us=time_us) for candidate, time_us in zip(candidates, times, strict=True)]
    rotations = [[partial(run, *one) for one in inputs] for _, run in contenders]
    timings = bench.race_on_gpu(rotations, problem.device, rounds=7, budget_s=budget_s)
    return [
        replace(c, time_us=t.time_us, timer=t.timer, reason=t.reason if t.time_us is None else None)
        for c, t in zip(candidates, timings, strict=True)
    ]
