"""Methods made of the reference, for tests of what chooses among methods and runs them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from escort import reference
from escort.cuda.gpu import H200, Gpu
from escort.filter import SparseFilter
from escort.methods import Method, Prepared
from escort.planner import Plan, plan_layers, timing
from escort.planner.machine import Machine
from escort.problem import Problem

PROBLEM = Problem(2, 6, 9, 9, 8, (3, 3), padding=(1, 1, 1, 1))


def a_filter(density: float = 0.3, seed: int = 0) -> SparseFilter:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(PROBLEM.weight_shape, generator=generator)
    return SparseFilter.from_dense(weight * (torch.rand(weight.shape, generator=generator) < density))


@dataclass(frozen=True)
class FakeConfig:
    knob: int = 0


class Fake(Method):
    """A method made of the reference, changed by what a test wants to see."""

    config_type = FakeConfig
    device_type = "cpu"

    def __init__(
        self, name: str, change: Callable[[torch.Tensor], torch.Tensor], refuses: str | None = None, configs: int = 1
    ) -> None:
        self.name, self.change, self.refuses, self.knobs = name, change, refuses, list[int]()
        self.space = [FakeConfig(knob) for knob in range(configs)]

    @property
    def prepared(self) -> int:
        """How often it was prepared; `knobs` has the config of each time."""
        return len(self.knobs)

    def unsupported(self, problem: Problem) -> str | None:
        return self.refuses

    def binary(self, config: FakeConfig) -> Any:
        """What it compiles."""
        return None

    def configs(self, problem: Problem, sparse_filter: SparseFilter) -> Sequence[FakeConfig]:
        return self.space

    def prepare(
        self,
        problem: Problem,
        sparse_filter: SparseFilter,
        bias: torch.Tensor | None,
        config: Any,
        slope: torch.Tensor | None = None,
    ) -> Any:
        self.knobs.append(config.knob)
        weight = sparse_filter.to_dense()
        return Prepared(
            lambda x, residual=None: self.change(reference.conv2d(problem, x, weight, bias, residual).float()),
            self.binary(config),
        )


class Compiled(Fake):
    """A method whose configs take so many seconds of one core to compile, at the filter's seconds per nonzero."""

    compiles_per_filter = True

    def __init__(self, *seconds: float, per_nnz: float = 0.0) -> None:
        super().__init__("compiled", lambda y: y, configs=len(seconds))
        self.seconds, self.per_nnz = seconds, per_nnz

    def compile_s(self, problem: Problem, sparse_filter: SparseFilter, config: FakeConfig) -> float:
        return self.seconds[config.knob] + self.per_nnz * sparse_filter.nnz

    def binary(self, config: FakeConfig) -> Any:
        return SimpleNamespace(compile_s=1.5, cubin=bytes(7 + config.knob))


class Trying(Fake):
    """A dense method whose config 0 tries something in its first call, and 1 does without."""

    is_dense = True

    def __init__(self) -> None:
        super().__init__("cudnn", lambda y: y, configs=2)

    def without_trying(self, config: FakeConfig) -> FakeConfig:
        return FakeConfig(1)


@dataclass(frozen=True)
class NoSettings:
    """A method's config that leaves no choice."""


class Rounded(Method):
    """The reference, rounded to the problem's type: a method of any precision that needs no GPU."""

    name, device_type, config_type = "rounded", "cpu", NoSettings

    def unsupported(self, problem: Problem) -> str | None:
        return None

    def configs(self, problem: Problem, sparse_filter: SparseFilter) -> tuple[NoSettings, ...]:
        return (NoSettings(),)

    def prepare(
        self,
        problem: Problem,
        sparse_filter: SparseFilter,
        bias: torch.Tensor | None,
        config: NoSettings,
        slope: torch.Tensor | None = None,
    ) -> Prepared:
        def run(x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
            return reference.conv2d(problem, x, sparse_filter.to_dense(), bias, residual).to(problem.storage)

        return Prepared(run)


def plans_of(*args: Any, **named: Any) -> Iterator[Plan]:
    """What :func:`plan_layers` plans, without what it prepared."""
    return (planned.plan for planned in plan_layers(*args, **named))


def put_gpu_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the CPU stand for a GPU: what is planned for "cuda:0" has its inputs here, three where all are asked for."""
    machine = Machine("NVIDIA H200", "sm_90", 0, "2.11.0", "0.2.0", "580.159", "13.0", "9.19.0")
    inputs = timing.example_inputs
    monkeypatch.setattr(Machine, "here", classmethod(lambda cls, device="cpu": machine))
    monkeypatch.setattr(Gpu, "of", classmethod(lambda cls, device: H200))
    monkeypatch.setattr(timing, "example_inputs", lambda p, most: min(most, 3) * inputs(replace(p, device="cpu")))
    monkeypatch.setattr(timing, "glance_us", lambda run, device: 100.0)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
