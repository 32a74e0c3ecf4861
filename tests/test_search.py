"""What is tried for a layer where predictions choose: on a GPU, without time to compile for the filter."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from escort.cuda.gpu import H200, Gpu
from escort.filter import SparseFilter
from escort.methods import Config, Method
from escort.methods.cuda.sparse_tc import SparseTc
from escort.planner import planner
from escort.planner.compile_budget import Offer, share_out
from escort.planner.machine import Machine
from escort.planner.plan import Layer
from escort.planner.planner import known_us, plan_layer, predicted_us
from escort.planner.search import Search, predict_us
from escort.problem import Precision, Problem
from tests.fakes import PROBLEM, Compiled, Fake, a_filter

LAYER = Layer(replace(PROBLEM, device="cuda:0"), a_filter())


class Modelled(Fake):
    """A method whose model predicts so many microseconds."""

    device_type = "cuda"

    def __init__(self, name: str, time_us: float | None, configs: int = 1, refuses: str | None = None) -> None:
        super().__init__(name, lambda y: y, refuses, configs)
        self.time_us, self.asked = time_us, 0

    def predict_us(
        self, problem: Problem, sparse_filter: SparseFilter, gpu: Gpu, config: Config | None = None
    ) -> float | None:
        self.asked += 1
        return self.time_us


class Lowers(Modelled):
    lowers = True


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Gpu, "of", classmethod(lambda cls, device: H200))


def tried(search: Search) -> dict[str, int]:
    return {method.name: len(configs) for method, configs in search.tried}


def reasons(search: Search) -> dict[str, str]:
    return {candidate.method: str(candidate.reason) for candidate in search.refused}


def test_a_few_configs_of_each_likely_method_are_tried() -> None:
    methods = Modelled("near", 10.0, 8), Modelled("far", 21.0, 8), Modelled("dense", None, 2), Lowers("lowers", None)
    search = Search.of(LAYER, methods, None)
    assert tried(search) == {"near": 3, "dense": 2}
    assert reasons(search) == {
        "near": "5 more configs were not tried",
        "far": "predicted to take 21 us, near 10 us; effort='best' tries it",
        "lowers": "it writes its input out patch by patch, which other methods do without; effort='best' tries it",
    }


def test_what_a_dense_library_is_sure_to_match_is_not_tried() -> None:
    class Outdone(Modelled):
        def outdone(self, problem: Problem, sparse_filter: SparseFilter) -> str | None:
            return "it skips nothing"

    search = Search.of(LAYER, (Outdone("outdone", 1.0), Modelled("near", 1.9)), None)
    assert tried(search) == {"near": 1}
    assert reasons(search) == {"outdone": "it skips nothing; effort='best' tries it"}
    (grant,) = share_out([Offer.of(LAYER, (Outdone("outdone", 1.0), Compiled(1.0)))], 900.0)
    assert tried(Search.of(LAYER, (Outdone("outdone", 1.0),), grant)) == {"outdone": 1}, "with time all are"


@pytest.mark.parametrize(
    ("sparsity", "batch", "precision", "is_outdone"),
    [
        (0.0, 32, "fp16", True),
        (0.3, 32, "tf32", True),
        (0.5, 32, "fp16", False),  # as of 2:4
        (0.0, 1, "fp16", False),  # products take little of its time
        (0.9, 128, "fp16", False),
    ],
)
def test_a_dense_filter_gains_nothing_by_sparse_tensor_cores(
    sparsity: float, batch: int, precision: Precision, is_outdone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = Problem(batch, 256, 256, 14, 14, (3, 3), padding=(1, 1, 1, 1), precision=precision, device="cuda:0")
    weight = torch.ones(256, 256, 3, 3)
    weight[:, : int(256 * sparsity)] = 0.0
    sparse_filter, method = SparseFilter.from_dense(weight), SparseTc()
    assert (method.outdone(problem, sparse_filter) is not None) == is_outdone
    if is_outdone:
        monkeypatch.setattr("escort.methods.cuda.sparse_tc.search", lambda *_: pytest.fail("searched"))
        us = method.predict_us(problem, sparse_filter, H200)
        assert us == pytest.approx(
            2 * 0.5 * batch * 14 * 14 * 256 * 256 * 9 / (330e6 if precision == "fp16" else 165e6)
        )


def test_with_time_to_compile_all_are_tried() -> None:
    methods = Modelled("near", 10.0, 8), Modelled("far", 21.0, 8), Lowers("lowers", None), Compiled(1.0)
    (grant,) = share_out([Offer.of(LAYER, methods)], 900.0)
    search = Search.of(LAYER, methods, grant)
    assert tried(search) == {"near": 8, "far": 8, "lowers": 1, "compiled": 1}
    assert not search.refused and search.cut_at_s is None


def test_where_kernels_for_the_filter_are_likely_to_win_little_else_is_tried() -> None:
    methods = Modelled("near", 10.0, 8), Modelled("far", 21.0, 8), Lowers("lowers", None), Compiled(1.0, 1.0)
    offer = replace(Offer.of(LAYER, methods), compiled_us=4.0, saved_us=6.0)
    (grant,) = share_out([offer], 900.0)
    search = Search.of(LAYER, methods, grant)
    assert tried(search) == {"near": 3, "compiled": 2}
    assert reasons(search) == {
        "near": "5 more configs were not tried",
        "far": "predicted to take 21 us, near 10 us",
        "lowers": "it writes its input out patch by patch, which other methods do without",
    }
    (nothing,) = share_out([replace(offer, saved_us=-1.0)], 900.0)
    search = Search.of(LAYER, methods, nothing)
    assert tried(search) == {"near": 8, "far": 8, "lowers": 1, "compiled": 0} and search.cut_at_s == 0.0


def test_where_predictions_chose_time_to_compile_is_worth_another_search() -> None:
    search = Search.of(LAYER, [Modelled("only", 10.0)], None)
    assert search.cut_at_s == 0.0


def test_more_than_all_time_is_worth_none() -> None:
    """A plan whose search was cut at infinity could not be stored."""
    methods = Modelled("near", 10.0, 8), Compiled(1.0)
    (grant,) = share_out([replace(Offer.of(LAYER, methods), compiled_us=4.0, saved_us=6.0)], math.inf)
    search = Search.of(LAYER, methods, replace(grant, seconds=math.inf))
    assert tried(search) == {"near": 3, "compiled": 1} and search.cut_at_s is None


def test_without_a_model_all_are_tried() -> None:
    methods = Modelled("some", None, 8), Lowers("lowers", None), Modelled("refuses", 5.0, refuses="odd channels")
    search = Search.of(LAYER, methods, None)
    assert tried(search) == {"some": 8, "lowers": 1}
    assert search.cut_at_s is None


def test_a_prediction_is_of_what_could_run() -> None:
    compiled: Method = Compiled(1.0)
    methods = Modelled("a", 7.0), Modelled("b", None), Modelled("c", 3.0, refuses="odd channels"), compiled
    assert predict_us(LAYER, methods) == {"a": 7.0}
    on_cpu = Layer(PROBLEM, a_filter())
    assert predict_us(on_cpu, methods) == {}


def test_known_plans_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Layer(PROBLEM, a_filter())
    monkeypatch.setattr(planner, "_remembered", {})
    assert known_us([layer], [Fake("a", lambda y: y)]) is None
    plan = plan_layer(*layer, methods=[Fake("a", lambda y: y)], compile_budget_s=0.0)
    assert known_us([layer, layer], [Fake("a", lambda y: y)]) == [plan.time_us] * 2
    assert known_us([layer, layer._replace(problem=replace(PROBLEM, batch=9))], [Fake("a", lambda y: y)]) is None


def test_like_layers_are_predicted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine.here()
    monkeypatch.setattr(Machine, "here", classmethod(lambda cls, device="cpu": machine))
    method = Modelled("a", 7.0)
    other = LAYER._replace(problem=replace(LAYER.problem, batch=9))
    assert predicted_us([LAYER, LAYER, other, LAYER], [method]) == [7.0] * 4
    assert method.asked == 2
