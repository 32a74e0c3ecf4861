"""From a problem to a plan: refuse with reasons, rank by heuristic, validate against the reference, time, remember."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from escort import bench, reference
from escort.bench import Machine
from escort.methods import Method, Runner, by_name, for_device
from escort.problem import Problem
from escort.sparse import StretchedCSR

#: A candidate whose first runs take this much longer than the fastest one's is not timed further.
_HOPELESS = 1.6


@dataclass(frozen=True)
class Candidate:
    """One way to run a problem and what became of it: timed, or refused for a reason.

    Attributes:
        config: the method's Config as JSON values; None where the method refused the problem.
        time_us: median time of a call.
        rel_error: ``||out - ref|| / ||ref||`` against the float64 reference, None where it is not finite.
        reason: why it was refused or not timed, None where it was timed.
    """

    method: str
    config: dict[str, Any] | None = None
    time_us: float | None = None
    rel_error: float | None = None
    reason: str | None = None


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
        return self.best_us("dense")

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
    """
    methods = for_device(problem.device) if methods is None else methods
    key = (problem, round(math.log(filter.nnz + 1) / 0.05), tuple(method.name for method in methods), Machine.here())
    if key not in _remembered:
        _remembered[key] = _measure(problem, filter, bias, methods, budget_s)
    return _remembered[key]


_remembered: dict[Any, Plan] = {}


def _measure(
    problem: Problem, filter: StretchedCSR, bias: torch.Tensor | None, methods: Sequence[Method], budget_s: float
) -> Plan:
    generator = torch.Generator().manual_seed(0)
    shape = (max(problem.batch, 1), *problem.input_shape[1:])
    x = torch.randn(shape, generator=generator)
    residual = None
    if problem.epilogue.residual:
        residual = torch.randn((len(x), *problem.output_shape[1:]), generator=generator)
    one = x[:1], None if residual is None else residual[:1]
    expected = reference.conv2d(problem, one[0], filter.to_dense(), bias, one[1])
    bound = reference.ERROR_BOUND[problem.dtype]

    settled: list[Candidate] = []
    running: list[tuple[Candidate, Runner]] = []
    first_times: list[float] = []
    with torch.inference_mode():
        for method in methods:
            if reason := method.unsupported(problem):
                settled.append(Candidate(method.name, reason=reason))
                continue
            for config in method.configs(problem, filter):
                run = method.prepare(problem, filter, bias, config)
                candidate = Candidate(method.name, asdict(config))
                error = reference.compare(run(*one), expected)
                candidate = replace(candidate, rel_error=error if math.isfinite(error) else None)
                if not error <= bound:
                    settled.append(replace(candidate, reason=f"relative error {error:.1e} exceeds {bound:.0e}"))
                    continue
                run(x, residual)
                first_times.append(min(_seconds(run, x, residual) for _ in range(2)))
                running.append((candidate, run))
        if not running:
            reasons = "; ".join(f"{c.method}: {c.reason}" for c in settled)
            raise ValueError(f"no method can run {problem}: {reasons}")
        limit = _HOPELESS * min(first_times)
        contenders = [pair for pair, first in zip(running, first_times, strict=True) if first <= limit]
        runs = [lambda run=run: run(x, residual) for _, run in contenders]
        times = iter(bench.race(runs, warmup=0, rounds=7, budget_s=budget_s))
    for (candidate, _), first in zip(running, first_times, strict=True):
        settled.append(replace(candidate, time_us=next(times) if first <= limit else first * 1e6))
    best = min((c for c in settled if c.time_us is not None), key=lambda c: c.time_us or 0.0)
    assert best.config is not None
    return Plan(problem, best.method, best.config, tuple(settled), Machine.here())


def _seconds(run: Runner, x: torch.Tensor, residual: torch.Tensor | None) -> float:
    start = time.perf_counter()
    run(x, residual)
    return time.perf_counter() - start
