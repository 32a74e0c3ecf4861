"""Which layers of a network get kernels compiled for their filters: those that save most in a second of compiling."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from escort.cuda.gpu import Gpu
from escort.filter import SparseFilter
from escort.methods import Config
from escort.planner import Candidate, Plan, cores, measure, plan_layer, planner, store
from escort.planner.compile_budget import Grant, Offer, share_out
from escort.planner.store import Hint
from escort.problem import Problem
from tests.fakes import PROBLEM, Compiled, Fake, FakeConfig, a_filter, plans_of, put_gpu_in_place

METHOD = Compiled()


@pytest.fixture(autouse=True)
def one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "count", lambda: 1)


def offer(*seconds: float, saved_us: float | None, compiled_us: float | None = 100.0, layers: int = 1) -> Offer:
    configs = tuple((METHOD, FakeConfig(knob)) for knob in range(len(seconds)))
    return Offer(configs, seconds, layers, compiled_us, saved_us)


def counts(grants: list[Grant]) -> list[int]:
    return [len(grant.configs) for grant in grants]


def test_what_saves_most_in_a_second_comes_first() -> None:
    offers = [offer(4.0, saved_us=20.0), offer(2.0, saved_us=20.0), offer(2.0, saved_us=11.0)]
    assert counts(share_out(offers, 2.0)) == [0, 1, 0]
    assert counts(share_out(offers, 4.0)) == [0, 1, 1]
    assert counts(share_out(offers, 6.0)) == [0, 1, 1]  # the third's turn is before the first's, for which 2 s are left
    assert counts(share_out(offers, 8.0)) == [1, 1, 1]
    late = share_out(offers, 6.0)[0]
    assert [candidate.reason for candidate in late.refused] == [
        "compiling it takes about 4 s of all 1 cores, more than the 2 s left; pass effort='best' or more seconds"
    ]
    assert (late.seconds, late.is_cut, late.is_likely) == (0.0, True, False)


def test_what_is_too_much_leaves_the_budget_to_others() -> None:
    assert counts(share_out([offer(8.0, saved_us=90.0), offer(2.0, saved_us=5.0)], 6.0)) == [0, 1]


def test_layers_that_share_a_plan_save_and_take_together() -> None:
    """Each of them needs its own kernel of the choice; what else is tried is compiled for the first alone."""
    three, one = offer(2.0, 2.0, saved_us=10.0, layers=3), offer(2.0, saved_us=12.0)
    assert counts(share_out([three, one], 6.0)) == [0, 1]  # 12 us of 2 s before 30 us of 6 s
    assert counts(share_out([three, one], 8.0)) == [1, 1]
    assert counts(share_out([three, one], 10.0)) == [2, 1]
    grant = share_out([three, one], 10.0)[0]
    assert grant.seconds == pytest.approx(4.0, rel=0.1) and not grant.is_cut and grant.is_likely
    assert counts(share_out([replace(three, saved_us=13.0), one], 6.0)) == [1, 0]


def test_a_layer_where_nothing_is_saved_gets_nothing() -> None:
    grants = share_out([offer(2.0, 2.0, saved_us=-0.1), offer(2.0, saved_us=0.0), offer(2.0, saved_us=3.0)], 900.0)
    assert counts(grants) == [0, 0, 1]
    assert [(c.method, c.config, c.reason) for c in grants[0].refused] == [
        ("compiled", None, "predicted to take 100 us, other methods 99.9 us: not worth about 2 s of all 1 cores")
    ]
    assert (grants[0].seconds, grants[0].is_cut, grants[0].is_likely) == (0.0, True, False)


def test_too_little_is_not_waited_for() -> None:
    """A second saves at least 0.3 % of the time of all layers."""
    worth, not_worth = offer(2.0, saved_us=1.5), offer(2.0, saved_us=0.9)
    assert counts(share_out([worth, not_worth], 900.0)) == [1, 0]


def test_further_configs_are_tried_while_they_are_expected_to_save_enough() -> None:
    """The second is expected to save 4.4 % of 100 us."""
    quick, slow = offer(*[0.1] * 8, saved_us=50.0), offer(*[10.0] * 8, saved_us=50.0)
    assert counts(share_out([quick], 900.0)) == [6] and counts(share_out([slow], 900.0)) == [2]
    assert counts(share_out([quick, offer(1.0, saved_us=8.0)], 1.45)) == [4, 1]
    (candidate,) = share_out([slow], 900.0)[0].refused
    assert candidate.reason is not None and candidate.reason.startswith("6 more configs were not tried: the next is")
    (candidate,) = share_out([slow], 12.0)[0].refused
    assert candidate.reason is not None and "7 more configs were not tried: compiling it takes" in candidate.reason


def test_no_kernel_is_waited_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many cores there are, one of them compiles it."""
    monkeypatch.setattr(cores, "count", lambda: 16)
    grants = share_out([offer(3.0, saved_us=90.0), offer(2.0, saved_us=5.0)], 300.0)
    assert counts(grants) == [0, 1] and counts(share_out([offer(3.0, saved_us=90.0)], 400.0)) == [1]
    assert [candidate.reason for candidate in grants[0].refused] == [
        "compiling it takes one core about 48 s, and all would wait for it; pass effort=384 or more seconds"
    ]


def test_what_no_model_tells_is_tried_one_config_each_first() -> None:
    unknown = offer(2.0, 2.0, saved_us=None, compiled_us=None)
    assert counts(share_out([unknown, unknown], 6.0)) == [2, 1]
    stem = offer(2.0, 2.0, saved_us=None)  # nothing tells how long the others take
    assert counts(share_out([offer(2.0, saved_us=90.0), stem], 2.0)) == [0, 1]
    assert not share_out([stem], 2.0)[0].is_likely


def test_without_configs_nothing_is_cut() -> None:
    assert share_out([offer(saved_us=None)], 5.0) == [Grant(0.0)]


# Whole networks, on a GPU that is made of fakes


class Modelled(Fake):
    """A method that is predicted to take so many microseconds, by the problem's batch."""

    device_type = "cuda"

    def __init__(self, name: str, times_us: dict[int, float]) -> None:
        super().__init__(name, lambda y: y, configs=8)
        self.times_us = times_us

    def predict_us(
        self, problem: Problem, sparse_filter: SparseFilter, gpu: Gpu, config: Config | None = None
    ) -> float:
        return self.times_us[problem.batch]


class Generated(Compiled):
    """The same of a method that takes a second to compile each of its two configs."""

    device_type = "cuda"

    def __init__(self, times_us: dict[int, float]) -> None:
        super().__init__(1.0, 1.0)
        self.times_us = times_us

    def predict_us(
        self, problem: Problem, sparse_filter: SparseFilter, gpu: Gpu, config: Config | None = None
    ) -> float:
        return self.times_us[problem.batch]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """A GPU without one: the times that are measured, by the method's name."""
    measured = dict[str, float]()
    put_gpu_in_place(monkeypatch)
    planner._remembered.clear()
    monkeypatch.setattr(measure, "_HOPELESS", float("inf"))
    monkeypatch.setattr(measure.Allowance, "__init__", lambda self, device: setattr(self, "_end", float("inf")))

    def race(problem: Problem, contenders: Any, *_: Any) -> list[Candidate]:
        return [replace(one.candidate, time_us=measured[one.candidate.method]) for one in contenders]

    monkeypatch.setattr(measure, "_race", race)
    return measured


def layers(*batches: int) -> list[tuple[Problem, SparseFilter, None]]:
    return [(replace(PROBLEM, device="cuda:0", batch=batch), a_filter(), None) for batch in batches]


def of(plan: Plan, method: str) -> list[tuple[bool, str | None]]:
    """Whether each candidate of a method was timed, and why not."""
    return [(c.time_us is not None, c.reason) for c in plan.candidates if c.method == method]


def test_a_network_compiles_where_models_say_that_it_pays(gpu: dict[str, float]) -> None:
    generated, other = Generated({1: 50.0, 2: 50.0}), Modelled("other", {1: 90.0, 2: 40.0})
    gpu |= {"compiled": 50.0, "other": 60.0}
    plans = list(plans_of(layers(1, 1, 2), 300.0, methods=[generated, other]))
    assert [plan.method for plan in plans] == ["compiled", "compiled", "other"]
    assert of(plans[0], "compiled") == [(True, None)] * 2  # both configs, of which one more for the layer like it
    assert generated.prepared == 3
    assert of(plans[0], "other")[:1] == [(False, "5 more configs were not tried")]  # which is likely to lose
    says = "predicted to take 50 us, other methods 40 us: not worth about 1 s of all 1 cores"
    assert of(plans[2], "compiled") == [(False, says)]
    assert of(plans[2], "other") == [(True, None)] * 8


def test_the_same_network_is_taken_over_and_a_layer_alone_outgrows_it(gpu: dict[str, float]) -> None:
    methods = Generated({1: 50.0, 2: 50.0}), Modelled("other", {1: 90.0, 2: 40.0})
    gpu |= {"compiled": 30.0, "other": 35.0}
    list(plans_of(layers(1, 2), 300.0, methods=methods))
    again = list(plans_of(layers(1, 2), 300.0, methods=methods))
    assert [(plan.method, plan.times_from) for plan in again] == [("compiled", "equal layer"), ("other", "equal layer")]
    alone = plan_layer(*layers(2)[0], methods=methods, compile_budget_s=60.0)
    assert (alone.method, alone.times_from) == ("compiled", "measured")
    # It is known to be faster now, so that the network may compile it too.
    known = list(plans_of(layers(1, 2), 300.0, methods=methods))
    assert [(plan.method, plan.times_from) for plan in known] == [("compiled", "equal layer")] * 2


def test_what_takes_long_to_compile_comes_first_and_for_all_layers_that_will_need_it(gpu: dict[str, float]) -> None:
    order: list[tuple[int, int]] = []

    class Noting(Generated):
        def compile_s(self, problem: Problem, sparse_filter: SparseFilter, config: FakeConfig) -> float:
            return {1: 2.0, 2: 6.0}[problem.batch]

        def prepare(self, problem: Problem, sparse_filter: SparseFilter, *args: Any) -> Any:
            order.append((problem.batch, args[1].knob))
            return super().prepare(problem, sparse_filter, *args)

    methods = Noting({1: 50.0, 2: 50.0}), Modelled("other", {1: 90.0, 2: 90.0})
    gpu |= {"compiled": 50.0, "other": 60.0}
    plans = plans_of(layers(1, 2, 2, 1), 300.0, methods=methods)
    assert next(plans).method == "compiled"
    # The third layer's, before it is known to be the choice; what the last one needs compiles as soon as it is known.
    assert order == [(2, 0), (2, 1), (2, 0), (1, 0), (1, 1)]
    assert [plan.method for plan in plans] == ["compiled"] * 3 and len(order) == 6


def test_a_known_time_without_such_kernels_counts_more_than_a_prediction(gpu: dict[str, float]) -> None:
    generated, other = Generated({1: 50.0}), Modelled("other", {1: 90.0})
    gpu |= {"compiled": 50.0, "other": 45.0}
    (fast,) = plans_of(layers(1), 0.0, methods=[generated, other])
    assert (fast.method, fast.time_us) == ("other", 45.0)
    (best,) = plans_of(layers(1), 300.0, methods=[generated, other])
    assert (best.method, best.times_from, generated.prepared) == ("other", "measured", 0)
    planner._remembered.clear()
    (best,) = plans_of(layers(1), 300.0, methods=[generated, other])
    assert generated.prepared == 2


def test_a_plan_that_was_made_with_less_is_outgrown(gpu: dict[str, float]) -> None:
    generated, other = Generated({1: 50.0, 2: 50.0}), Modelled("other", {1: 90.0, 2: 99.0})
    gpu |= {"compiled": 50.0, "other": 60.0}
    less = list(plans_of(layers(1, 2), 1.0, methods=[generated, other]))  # the second layer saves more
    assert [plan.method for plan in less] == ["other", "compiled"]
    more = list(plans_of(layers(1, 2), 300.0, methods=[generated, other]))
    assert [(plan.method, plan.times_from) for plan in more][:1] == [("compiled", "measured")]


def test_what_has_nothing_to_compile_is_searched_as_a_whole(gpu: dict[str, float]) -> None:
    other = Modelled("other", {1: 90.0})
    gpu |= {"other": 60.0}
    (fast,) = plans_of(layers(1), 0.0, methods=[other])
    (best,) = plans_of(layers(1), 300.0, methods=[other])
    assert [len(of(plan, "other")) for plan in (fast, best)] == [4, 8] and best.times_from == "measured"
    assert next(plans_of(layers(1), 300.0, methods=[other])).times_from == "equal layer"


def test_hints_keep_what_a_search_was_cut_at(gpu: dict[str, float]) -> None:
    generated, other = Generated({1: 50.0}), Modelled("other", {1: 40.0})
    gpu |= {"other": 60.0}
    list(plans_of(layers(1), 300.0, methods=[generated, other]))
    ((key, hint),) = planner._remembered.items()
    assert isinstance(key, store.Key) and isinstance(hint, Hint) and key.compiles
    assert hint.cut_at_s == 0.0 and not hint.is_outgrown(0.0) and hint.is_outgrown(1.0)
