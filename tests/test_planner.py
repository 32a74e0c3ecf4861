"""Planner: refuses with reasons, trusts no wrong answer, chooses the fastest, remembers."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from escort import bench, planner, reference
from escort.bench import Machine
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

    def __init__(self, name: str, change: Callable[[torch.Tensor], torch.Tensor], refuses: str | None = None) -> None:
        self.name, self.change, self.refuses, self.prepared = name, change, refuses, 0

    def unsupported(self, problem: Problem) -> str | None:
        return self.refuses

    def configs(self, problem: Problem, filter: StretchedCSR) -> Sequence[FakeConfig]:
        return (FakeConfig(),)

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


def test_race_takes_turns_and_reports_medians() -> None:
    order: list[str] = []
    times = bench.race([lambda: order.append("a"), lambda: order.append("b")], warmup=1, rounds=4)
    assert order == ["a", "b"] + ["a", "b"] * 4
    assert len(times) == 2 and min(times) > 0.0
