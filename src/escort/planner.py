"""From a problem to a plan: refuse with reasons, rank by heuristic, validate against the reference, time, remember."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch

from escort import bench, reference
from escort.bench import Machine, Timer
from escort.methods import Method, Runner, by_name, for_device
from escort.problem import Problem
from escort.sparse import StretchedCSR

#: The method that stands for the dense model on each type of device.
DENSE = {"cpu": "dense", "cuda": "cudnn"}

#: A candidate whose first runs take this much longer than the fastest one's is not timed further.
_HOPELESS = 1.6
#: On a GPU first runs hold up to so many microseconds of waiting for the host, which a graph does not.
_HOST_US = 60.0
#: Most configs of a method that are tried, and the seconds after which only the first of each method still is.
_MOST_CONFIGS = 24
_SEARCH_S = 20.0


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
    """

    method: str
    config: dict[str, Any] | None = None
    time_us: float | None = None
    rel_error: float | None = None
    reason: str | None = None
    timer: Timer = "calls"


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
        return self.best_us(DENSE[self.problem.device_type])

    def best_us(self, method: str) -> float | None:
        """Median time of that method's fastest candidate, None where none was timed."""
        times = [c.time_us for c in self.candidates if c.method == method and c.time_us is not None]
        return min(times, default=None)

    def runner(self, problem: Problem, filter: StretchedCSR, bias: torch.Tensor | None) -> Runner:
        """The choice, prepared for this filter and for a problem that may have another batch or input size."""
        method = by_name(self.method, problem.device)
        return method.prepare(problem, filter, bias, method.config_type(**self.config))

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
    filter: StretchedCSR,
    bias: torch.Tensor | None = None,
    *,
    methods: Sequence[Method] | None = None,
    budget_s: float = 0.3,
) -> Plan:
    """Measure the ways to run a convolution on this machine and choose the fastest that is right.

    A layer of the same problem and nearly the same number of nonzeros as one planned before takes over its plan.

    Args:
        methods: the candidates, by default all methods of the problem's device.
        budget_s: seconds after which timing stops at three rounds per candidate.

    Raises:
        ValueError: where no method can run the problem; the message holds each one's reason.
        torch.OutOfMemoryError: where the device cannot even hold the problem's input.
    """
    methods = for_device(problem.device) if methods is None else methods
    machine = Machine.here(problem.device)
    key = (problem, round(math.log(filter.nnz + 1) / 0.05), tuple(method.name for method in methods), machine)
    if key not in _remembered:
        _remembered[key] = _measure(problem, filter, bias, methods, budget_s)
    return _remembered[key]


_remembered: dict[Any, Plan] = {}


def _measure(
    problem: Problem, filter: StretchedCSR, bias: torch.Tensor | None, methods: Sequence[Method], budget_s: float
) -> Plan:
    with torch.inference_mode():
        inputs = bench.example_inputs(problem)
        settled, running = _first_runs(problem, filter, bias, methods, *inputs[0])
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
    filter: StretchedCSR,
    bias: torch.Tensor | None,
    methods: Sequence[Method],
    x: torch.Tensor,
    residual: torch.Tensor | None,
) -> tuple[list[Candidate], list[tuple[Candidate, Runner, float]]]:
    """The candidates that cannot run, and those that are right, with their runner and a rough time in microseconds."""
    # Of the whole batch the first and the last image: where a kernel's tables depend on the batch, its end is at risk.
    images = sorted({0, len(x) - 1})
    some = x[images], None if residual is None else residual[images]
    expected = reference.conv2d(problem, some[0], filter.to_dense(), bias, some[1])
    bound = reference.ERROR_BOUND[problem.dtype]
    settled: list[Candidate] = []
    running: list[tuple[Candidate, Runner, float]] = []
    begin = time.perf_counter()
    for method in methods:
        if reason := method.unsupported(problem):
            settled.append(Candidate(method.name, reason=reason))
            continue
        configs = method.configs(problem, filter)
        prepared = _prepared(method, problem, filter, bias, configs[:_MOST_CONFIGS])
        for tried, config in enumerate(configs):
            if tried == _MOST_CONFIGS or (tried and time.perf_counter() - begin > _SEARCH_S):
                settled.append(Candidate(method.name, reason=f"{len(configs) - tried} more configs were not tried"))
                break
            candidate = Candidate(method.name, asdict(config))
            try:
                run = next(prepared)()
                error = reference.compare(run(x, residual)[images], expected)
                candidate = replace(candidate, rel_error=error if math.isfinite(error) else None)
                if not error <= bound:
                    settled.append(replace(candidate, reason=f"relative error {error:.1e} exceeds {bound:.0e}"))
                    continue
                running.append((candidate, run, bench.glance_us(partial(run, x, residual), problem.device)))
            except (RuntimeError, ValueError) as failure:
                if problem.device_type == "cpu":
                    raise
                settled.append(replace(candidate, reason=bench.survived(failure)))
    return settled, running


def _prepared(
    method: Method, problem: Problem, filter: StretchedCSR, bias: torch.Tensor | None, configs: Sequence[Any]
) -> Iterator[Callable[[], Runner]]:
    """What gives each config its runner, or raises. On a GPU all are prepared at once: each may compile a kernel."""
    jobs = [partial(method.prepare, problem, filter, bias, config) for config in configs]
    if problem.device_type == "cpu":
        yield from jobs
        return
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        yield from [future.result for future in [pool.submit(job) for job in jobs]]


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
