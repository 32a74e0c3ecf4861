"""What is planned, and what comes out: a layer, the candidates that were weighed for it, and the plan."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import torch

from escort.filter import SparseFilter
from escort.methods import Config, Method, Prepared, by_name, dense_for
from escort.planner.checked import check_fields
from escort.planner.machine import Machine
from escort.planner.timing import Timer
from escort.problem import Problem

#: Where a plan's times come from: from this layer, from an equal one of this process, or from the store on disk.
TimesFrom = Literal["measured", "equal layer", "plan store"]


class Layer(NamedTuple):
    """A convolution to plan."""

    problem: Problem
    sparse_filter: SparseFilter
    bias: torch.Tensor | None = None
    slope: torch.Tensor | None = None

    def prepare(self, method: Method, config: Config) -> Prepared:
        """The layer run by a config of a method. Raises what :meth:`Method.prepare` raises."""
        return method.prepare(self.problem, self.sparse_filter, self.bias, config, self.slope)

    def check(self) -> None:
        """Raises ValueError where filter, bias or slopes are not those of the problem."""
        problem, found = self.problem, (self.sparse_filter.shape, self.sparse_filter.groups)
        if found != (problem.weight_shape, problem.groups):
            raise ValueError(f"the plan is for a filter of shape {problem.weight_shape}, got {found[0]}")
        has_slope = problem.epilogue.activation == "prelu"
        for name, tensor, needed in (("a bias", self.bias, problem.epilogue.bias), ("slopes", self.slope, has_slope)):
            expected = (problem.out_channels,) if needed else None
            shape = None if tensor is None else tuple(tensor.shape)
            if shape != expected:
                raise ValueError(f"the plan is for {name} of shape {expected}, got {shape}")


@dataclass(frozen=True)
class Candidate:
    """One way to run a problem and what became of it: timed, or refused for a reason.

    Attributes:
        config: the method's Config as JSON values; None where the method refused the problem, or for configs that
            were not tried.
        time_us: median time of a call in microseconds.
        rel_error: ``||out - ref|| / ||ref||`` against the float64 reference, None where it is not finite.
        reason: why it was refused or not timed, None where it was timed.
        timer: how it was timed; on a GPU "events" where its first run was too slow to go on, or it cannot be captured.
        compile_s: seconds of one core that compiling its kernel took, whenever that was; None where nothing says so.
        code_bytes: size of that kernel's binary; None likewise.
        remainder_share: share of the filter's nonzeros that a method for structured filters adds separately, else None.
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
    """What was chosen for a problem, and every candidate that was weighed for it.

    Attributes:
        method: name of the method that was chosen.
        config: its Config as JSON values.
        machine: where the candidates were measured.
        times_from: whose times the candidates have. The choice was validated on the layer's own filter in any case, and
            has the error of that.
        is_steady: whether those times are good for other layers too. They are not where others kept the machine's cores
            busy, or calls of the choice, or of the dense method, took very different times.
    """

    problem: Problem
    method: str
    config: dict[str, Any]
    candidates: tuple[Candidate, ...]
    machine: Machine
    times_from: TimesFrom = "measured"
    is_steady: bool = True

    @property
    def time_us(self) -> float | None:
        """Median time of the choice in microseconds; None if it was never timed here."""
        chosen = (c.time_us for c in self.candidates if (c.method, c.config) == (self.method, self.config))
        return next(chosen, None)

    @property
    def dense_time_us(self) -> float | None:
        """Median time of the fastest dense candidate in microseconds."""
        return self.best_us(dense_for(self.problem.device).name)

    def best_us(self, method: str) -> float | None:
        """Median time of that method's fastest candidate in microseconds, None where none was timed."""
        times = [c.time_us for c in self.candidates if c.method == method and c.time_us is not None]
        return min(times, default=None)

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values, the last two where they say anything; :meth:`from_json` reads them back."""
        data = {
            "problem": self.problem.to_json(),
            "method": self.method,
            "config": self.config,
            "candidates": [asdict(candidate) for candidate in self.candidates],
            "machine": self.machine.to_json(),
        }
        data |= {} if self.times_from == "measured" else {"times_from": self.times_from}
        return data if self.is_steady else data | {"is_steady": False}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Plan:
        """The plan behind :meth:`to_json`. Raises ValueError where the data is not one that this version can run."""
        try:
            plan = cls(
                problem=Problem.from_json(data["problem"]),
                method=data["method"],
                config=data["config"],
                candidates=tuple(Candidate(**candidate) for candidate in data["candidates"]),
                machine=Machine.from_json(data["machine"]),
                times_from=data.get("times_from", "measured"),
                is_steady=data.get("is_steady", True),
            )
            check_fields(plan)
            for candidate in plan.candidates:
                by_name(candidate.method, plan.problem.device)
            check_fields(by_name(plan.method, plan.problem.device).config_type(**plan.config))
        except (KeyError, TypeError, AttributeError, ArithmeticError) as error:
            raise ValueError(f"not a plan: {error}") from error
        return plan


class Planned(NamedTuple):
    """A layer's plan, and the choice as it was prepared for the layer's own filter and bias."""

    plan: Plan
    prepared: Prepared
