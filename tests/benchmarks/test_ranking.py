"""How the planner's ranking is compared with loops of their own."""

from __future__ import annotations

import pytest
import torch

from benchmarks.suite.ranking import Ranked, alone_us
from escort.filter import SparseFilter
from escort.methods import by_name
from escort.planner.plan import Layer
from escort.planner.planner import plan_layers
from escort.problem import Problem


def test_a_wrong_choice_costs_what_the_best_would_save() -> None:
    ranked = Ranked("conv", in_turn_us=(10.0, 11.0, 12.0), alone_us=(12.0, 10.0, 15.0))
    assert ranked.loss == pytest.approx(0.2)
    assert ranked.pairs == (2, 3), "the first two are in the wrong order"


def test_times_that_are_alike_are_in_no_order() -> None:
    assert Ranked("conv", in_turn_us=(10.0, 11.0), alone_us=(10.2, 10.0)).pairs == (0, 0)


def test_a_candidate_is_timed_alone() -> None:
    weight = torch.randn(16, 16, 3, 3) * (torch.rand(16, 16, 3, 3) < 0.1)
    problem = Problem(1, 16, 28, 28, 16, (3, 3), padding=(1, 1, 1, 1))
    layer = Layer(problem, SparseFilter.from_dense(weight), None)
    (planned,) = plan_layers([layer], 0.0, methods=[by_name("direct", "cpu")])
    assert 0.0 < alone_us(layer, planned.plan.candidates[0], threads=1) < 1e6
