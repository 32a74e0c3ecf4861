"""Planner: refuses with reasons, trusts no wrong answer, chooses the fastest, remembers."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from escort import bench, planner, reference
from escort.bench import Machine, Timing
from escort.methods import by_name, for_device
from escort.planner import Plan, plan_layer
from escort.problem import Problem
from escort.sparse import StretchedCSR

PROBLEM = Problem(2, 6, 9, 9, 8, (3, 3), padding=(1, 1, 1, 1))


@pytest.fixture(autouse=True)
def forget() -> None:
    planner._remembered.clear()


def a_filter(density: float = 0.3, seed: int = 0) -> StretchedCSR:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(PROBLEM.weight_shape, generator=generator)
    return StretchedCSR.from_dense(weight * (torch.rand(weight.shape, generator=generator) < density))


@dataclass(frozen=True)
class FakeConfig:
    knob: int = 0


class Fake:
    """A method made of the reference, changed by what a test wants to see."""

    config_type = FakeConfig

    def __init__(
        self, name: str, change: Callable[[torch.Tensor], torch.Tensor], refuses: str | None = None, configs: int = 1
    ) -> None:
        self.name, self.change, self.refuses, self.prepared = name, change, refuses, 0
        self.space = [FakeConfig(knob) for knob in range(configs)]

    def unsupported(self, problem: Problem) -> str | None:
        return self.refuses

    def configs(self, problem: Problem, filter: StretchedCSR) -> Sequence[FakeConfig]:
        return self.space

    def prepare(self, problem: Problem, filter: StretchedCSR, bias: torch.Tensor | None, config: Any) -> Any:
        self.prepared += 1
        weight = filter.to_dense()
        return lambda x, residual=None: self.change(reference.conv2d(problem, x, weight, bias, residual).float())


def test_every_candidate_is_timed_or_has_a_reason() -> None:
    plan = plan_layer(PROBLEM, a_filter())
    assert {c.method for c in plan.candidates} == {method.name for method in for_device("cpu")}
    for candidate in plan.candidates:
        assert (candidate.time_us is None) is (candidate.reason is not None)
        assert candidate.rel_error is not None and candidate.rel_error < 1e-5
    assert plan.time_us == min(c.time_us for c in plan.candidates if c.time_us is not None)
    assert plan.dense_time_us is not None and plan.dense_time_us >= (plan.time_us or 0.0)
    assert plan.machine == Machine.here()


def test_a_wrong_answer_is_never_chosen_however_fast() -> None:
    wrong = Fake("wrong", lambda y: y * 1.01)
    nan = Fake("nan", lambda y: y.fill_(float("nan")))
    plan = plan_layer(PROBLEM, a_filter(), methods=(wrong, nan, by_name("dense")))
    assert plan.method == "dense"
    reasons = {c.method: c.reason for c in plan.candidates if c.reason}
    assert "exceeds" in reasons["wrong"] and "exceeds" in reasons["nan"]
    assert all(c.time_us is None for c in plan.candidates if c.method != "dense")


def test_no_method_left_names_every_reason() -> None:
    picky = Fake("picky", lambda y: y, refuses="wants even channels")
    wrong = Fake("wrong", lambda y: -y)
    with pytest.raises(ValueError, match=r"no method can run .*picky: wants even channels.*|.*wrong: relative error"):
        plan_layer(PROBLEM, a_filter(), methods=(picky, wrong))


def test_the_fastest_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "_HOPELESS", float("inf"))
    monkeypatch.setattr(bench, "race", lambda runs, **_: [float(len(runs) - i) for i in range(len(runs))])
    plan = plan_layer(
        PROBLEM, a_filter(), methods=(Fake("a", lambda y: y), Fake("b", lambda y: y), Fake("c", lambda y: y))
    )
    assert (plan.method, plan.time_us) == ("c", 1.0)


def test_a_like_layer_takes_over_the_plan_and_another_does_not() -> None:
    fake = Fake("fake", lambda y: y)
    first = plan_layer(PROBLEM, a_filter(), methods=(fake,))
    assert plan_layer(PROBLEM, a_filter(), methods=(fake,)) is first
    plan_layer(PROBLEM, a_filter(density=0.9), methods=(fake,))
    plan_layer(replace(PROBLEM, batch=3), a_filter(), methods=(fake,))
    assert fake.prepared == 3


def test_a_plan_survives_json_and_runs_at_other_sizes() -> None:
    filter = a_filter()
    plan = Plan.from_json(json.loads(json.dumps(plan_layer(PROBLEM, filter).to_json())))
    assert plan == plan_layer(PROBLEM, filter)
    other = replace(PROBLEM, batch=5, height=12, width=7)
    x = torch.randn(other.input_shape)
    expected = reference.conv2d(other, x, filter.to_dense())
    assert reference.compare(plan.runner(other, filter, None)(x), expected) < 1e-5


@pytest.mark.parametrize(
    "change",
    [
        {"method": "magic"},
        {"config": {"knob": 1}},
        {"config": 3},
        {"machine": {}},
        {"problem": {}},
        {"candidates": [1]},
    ],
)
def test_nonsense_is_no_plan(change: dict[str, Any]) -> None:
    data = plan_layer(PROBLEM, a_filter()).to_json()
    with pytest.raises(ValueError, match="no"):
        Plan.from_json({**data, **change})


def test_a_search_is_bounded_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    large = Fake("large", lambda y: y, configs=planner._MOST_CONFIGS + 5)
    plan = plan_layer(PROBLEM, a_filter(), methods=(large,))
    assert large.prepared == planner._MOST_CONFIGS
    assert [c.reason for c in plan.candidates if c.config is None] == ["5 more configs were not tried"]
    planner._remembered.clear()
    monkeypatch.setattr(planner, "_SEARCH_S", 0.0)
    others = Fake("large", lambda y: y, configs=3), Fake("small", lambda y: y)
    plan_layer(PROBLEM, a_filter(), methods=others)
    assert [method.prepared for method in others] == [1, 1]  # each method's best guess is always tried


def test_the_last_image_of_the_batch_is_checked() -> None:
    def spoil(y: torch.Tensor) -> torch.Tensor:
        y[-1] *= 1.5
        return y

    batch = replace(PROBLEM, batch=4)
    plan = plan_layer(batch, a_filter(), methods=(Fake("spoilt", spoil), by_name("dense")))
    assert "exceeds" in next(c.reason or "" for c in plan.candidates if c.method == "spoilt")


ON_GPU = replace(PROBLEM, device="cuda:0")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that is the CPU, on which contestants take as long as their name says."""
    machine = Machine("NVIDIA H200", "sm_90", 0, "2.11.0", "0.2.0", "580.159", "13.0", "9.19.0")
    monkeypatch.setattr(Machine, "here", classmethod(lambda cls, device="cpu": machine))
    inputs = bench.example_inputs
    monkeypatch.setattr(bench, "example_inputs", lambda problem: 3 * inputs(replace(problem, device="cpu")))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(bench, "glance_us", lambda run, device: 100.0)

    def race(runs: Sequence[Sequence[Any]], device: str, **options: Any) -> list[Timing]:
        assert device == "cuda:0" and all(len(run) == 3 for run in runs)  # every input takes part
        return [Timing(10.0 * (index + 1)) for index in range(len(runs))]

    monkeypatch.setattr(bench, "race_on_gpu", race)


def out_of_memory(y: torch.Tensor) -> torch.Tensor:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 TiB. GPU 0 has less.")


@pytest.mark.usefixtures("gpu")
def test_on_a_gpu_whatever_fails_becomes_a_reason() -> None:
    class Refused(Fake):
        def prepare(self, *args: Any) -> Any:
            raise ValueError("a block of 2048 threads")

    methods = Fake("full", out_of_memory), Refused("refused", lambda y: y), Fake("cudnn", lambda y: y)
    plan = plan_layer(ON_GPU, a_filter(), methods=methods)
    assert (plan.method, plan.time_us, plan.dense_time_us) == ("cudnn", 10.0, 10.0)
    reasons = {c.method: c.reason for c in plan.candidates if c.reason}
    assert reasons == {
        "full": "out of device memory: Tried to allocate 9 TiB",
        "refused": "a block of 2048 threads",
    }
    assert {c.timer for c in plan.candidates if c.time_us} == {"graph"}
    with pytest.raises(ValueError, match="no method can run .* on cuda:0.*: full: out of device memory"):
        plan_layer(ON_GPU, a_filter(), methods=methods[:1])


@pytest.mark.usefixtures("gpu")
def test_on_a_gpu_first_runs_may_wait_for_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    first_us = iter([20.0, 70.0, 200.0])
    monkeypatch.setattr(bench, "glance_us", lambda run, device: next(first_us))
    plan = plan_layer(ON_GPU, a_filter(), methods=[Fake(name, lambda y: y) for name in ("a", "b", "c")])
    timed = {c.method: (c.time_us, c.timer) for c in plan.candidates}
    assert timed == {"a": (10.0, "graph"), "b": (20.0, "graph"), "c": (200.0, "events")}


@pytest.mark.usefixtures("gpu")
def test_on_a_gpu_a_race_may_be_lost_to_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    timings = [Timing(None, reason="out of device memory"), Timing(9.0, "events", "not captured: it synchronizes")]
    monkeypatch.setattr(bench, "race_on_gpu", lambda runs, device, **_: timings[: len(runs)])
    methods = Fake("full", lambda y: y), Fake("synchronizes", lambda y: y)
    plan = plan_layer(ON_GPU, a_filter(), methods=methods)
    assert (plan.method, plan.time_us) == ("synchronizes", 9.0)
    full, synchronizes = plan.candidates
    assert (full.time_us, full.reason) == (None, "out of device memory")
    assert (synchronizes.timer, synchronizes.reason) == ("events", None)
    with pytest.raises(ValueError, match="no method can run"):
        plan_layer(ON_GPU, a_filter(), methods=methods[:1])


def test_plans_of_older_versions_are_read() -> None:
    data = plan_layer(PROBLEM, a_filter()).to_json()
    for candidate in data["candidates"]:
        del candidate["timer"]
    assert {candidate.timer for candidate in Plan.from_json(data).candidates} == {"calls"}
