"""Planner: refuses with reasons, trusts no wrong answer, chooses the fastest, remembers."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from escort import methods, reference
from escort.cuda.capture import runs
from escort.cuda.compiler import Variant
from escort.filter import SparseFilter
from escort.kernels import _cpu
from escort.methods import Prepared, by_name, for_device
from escort.planner import Candidate, Plan, cores, measure, plan_layer, plan_layers, planner, search, timing
from escort.planner.machine import Machine
from escort.planner.store import Hint
from escort.planner.timing import Timing
from escort.problem import Problem
from tests.fakes import PROBLEM, Compiled, Fake, FakeConfig, Trying, a_filter, plans_of, put_gpu_in_place


@pytest.fixture(autouse=True)
def forget() -> None:
    planner._remembered.clear()


def took_over(plan: Plan, earlier: Plan) -> bool:
    """Whether a plan has the choice and the times of an earlier one."""
    alike = [(c.method, c.config, c.time_us, c.reason) for c in plan.candidates]
    return (plan.times_from, plan.method, plan.config, alike) == (
        "equal layer",
        earlier.method,
        earlier.config,
        [(c.method, c.config, c.time_us, c.reason) for c in earlier.candidates],
    )


def test_inputs_are_written_anew_where_threads_share_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    for threads, most, is_written in ((1, 100, False), (2, 100, True), (2, 10, False)):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        monkeypatch.setattr(measure, "_MOST_REWRITTEN", most)
        x = torch.zeros(4)
        rewrite = measure.rewriting([x])
        x.fill_(1.0)
        rewrite()
        assert bool((x == 0.0).all()) is is_written


def test_every_candidate_is_timed_or_has_a_reason() -> None:
    plan = plan_layer(PROBLEM, a_filter())
    assert {c.method for c in plan.candidates} == {method.name for method in for_device("cpu")}
    for candidate in plan.candidates:
        assert (candidate.time_us is None) is (candidate.reason is not None)
        if candidate.config is not None:
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
    monkeypatch.setattr(measure, "_HOPELESS", float("inf"))
    monkeypatch.setattr(timing, "race", lambda runs, **_: [float(len(runs) - i) for i in range(len(runs))])
    plan = plan_layer(
        PROBLEM, a_filter(), methods=(Fake("a", lambda y: y), Fake("b", lambda y: y), Fake("c", lambda y: y))
    )
    assert (plan.method, plan.time_us) == ("c", 1.0)


def test_a_like_layer_takes_over_the_plan_and_another_does_not() -> None:
    fake = Fake("fake", lambda y: y)
    first = plan_layer(PROBLEM, a_filter(), methods=(fake,))
    assert took_over(plan_layer(PROBLEM, a_filter(), methods=(fake,)), first)
    for others in (
        plan_layer(PROBLEM, a_filter(density=0.9), methods=(fake,)),
        plan_layer(replace(PROBLEM, batch=3), a_filter(), methods=(fake,)),
    ):
        assert others.times_from == "measured"
    assert fake.prepared == 4


def test_what_a_layer_takes_over_is_validated_on_its_own_filter() -> None:
    """The method computes the first filter right, and another one of as many nonzeros wrong."""
    right = a_filter(seed=1)
    like = SparseFilter.from_dense(right.to_dense().flip(0))
    wrong = Fake("fake", lambda y: y)
    first = plan_layer(PROBLEM, right, methods=(wrong, by_name("dense")))
    planner._remembered[next(iter(planner._remembered))] = Hint(replace(first, method="fake", config={"knob": 0}))
    assert plan_layer(PROBLEM, like, methods=(wrong, by_name("dense"))).method == "fake"
    wrong.change = lambda y: y * 1.01
    own = plan_layer(PROBLEM, like, methods=(wrong, by_name("dense")))
    assert (own.method, own.times_from) == ("dense", "measured")
    reason = next(c.reason for c in own.candidates if c.method == "fake")
    assert reason is not None and "exceeds" in reason
    assert took_over(plan_layer(PROBLEM, right, methods=(wrong, by_name("dense"))), own)


def test_a_choice_that_is_taken_over_has_the_error_on_this_filter() -> None:
    fake = Fake("fake", lambda y: y)
    first = plan_layer(PROBLEM, a_filter(), methods=(fake,))
    fake.change = lambda y: y * (1 + 2e-6)
    second = plan_layer(PROBLEM, a_filter(), methods=(fake,))
    errors = [plan.candidates[0].rel_error for plan in (first, second)]
    assert took_over(second, first) and errors[0] is not None and errors[1] is not None
    assert errors[0] < 1e-6 < errors[1] < 1e-5


def test_a_plan_survives_json_and_runs_at_other_sizes() -> None:
    sparse_filter = a_filter()
    plan = Plan.from_json(json.loads(json.dumps(plan_layer(PROBLEM, sparse_filter).to_json())))
    assert took_over(plan_layer(PROBLEM, sparse_filter), plan)
    like = plan_layer(PROBLEM, sparse_filter)
    assert Plan.from_json(json.loads(json.dumps(like.to_json()))) == like and like.times_from == "equal layer"
    other = replace(PROBLEM, batch=5, height=12, width=7)
    x = torch.randn(other.input_shape)
    expected = reference.conv2d(other, x, sparse_filter.to_dense())
    method = by_name(plan.method)
    run = method.prepare(other, sparse_filter, None, method.config_type(**plan.config))
    assert reference.compare(run(x), expected) < 1e-5


@pytest.mark.parametrize(
    "change",
    [
        {"method": "magic"},
        {"config": {"knob": 1}},
        {"config": 3},
        {"machine": {}},
        {"problem": {}},
        {"candidates": [1]},
        {"times_from": "hearsay"},
        {"times_from": []},
    ],
)
def test_nonsense_is_no_plan(change: dict[str, Any]) -> None:
    data = plan_layer(PROBLEM, a_filter()).to_json()
    with pytest.raises(ValueError, match="no"):
        Plan.from_json({**data, **change})


def test_a_search_is_bounded_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    large = Fake("large", lambda y: y, configs=search._MOST_CONFIGS + 5)
    plan = plan_layer(PROBLEM, a_filter(), methods=(large,))
    assert large.prepared == search._MOST_CONFIGS
    assert [c.reason for c in plan.candidates if c.config is None] == ["5 more configs were not tried"]
    planner._remembered.clear()
    monkeypatch.setattr(measure, "_SEARCH_S", 0.0)
    others = Fake("large", lambda y: y, configs=3), Fake("small", lambda y: y)
    plan_layer(PROBLEM, a_filter(), methods=others)
    assert [method.prepared for method in others] == [1, 1]  # each method's best guess is always tried


def test_the_last_sample_of_the_batch_is_checked() -> None:
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
    put_gpu_in_place(monkeypatch)

    def race(runs: Sequence[Sequence[Any]], device: str, **options: Any) -> list[Timing]:
        assert device == "cuda:0" and all(len(run) == 3 for run in runs)  # every input takes part
        return [Timing(10.0 * (index + 1)) for index in range(len(runs))]

    monkeypatch.setattr(timing, "race_on_gpu", race)


def out_of_memory(y: torch.Tensor) -> torch.Tensor:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 TiB. GPU 0 has less.")


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("races", "chosen", "prepared"),
    [
        ([[10.0, 14.0]], ("other", 0), 1),  # far from the fastest: not tried
        ([[10.0, 12.0], [10.0, 9.0]], ("cudnn", 0), 2),
        ([[10.0, 12.0], [10.0, 11.0]], ("other", 0), 2),
        ([[12.0, 10.0], [10.0, 9.9]], ("cudnn", 1), 2),  # a hundredth is not worth trying wherever it is loaded
        ([[12.0, 10.0], [10.0, 9.0]], ("cudnn", 0), 2),
    ],
)
def test_what_takes_long_to_try_is_tried_where_it_may_win(
    races: list[list[float]], chosen: tuple[str, int], prepared: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = iter(races)
    monkeypatch.setattr(timing, "race_on_gpu", lambda *_, **__: [Timing(time_us) for time_us in next(left)])
    trying = Trying()
    (plan,) = plans_of([(ON_GPU, a_filter(), None)], 0.0, methods=(Fake("other", lambda y: y), trying))
    assert (plan.method, plan.config["knob"]) == chosen and next(left, None) is None
    assert len(trying.knobs) == prepared
    # Where there is time for all, it is tried with the others.
    monkeypatch.setattr(timing, "race_on_gpu", lambda *_, **__: [Timing(t) for t in (10.0, 9.9, 10.0)])
    (plan,) = plans_of([(ON_GPU, a_filter(), None)], 9.0, methods=(Fake("other", lambda y: y), Trying()))
    assert (plan.method, plan.config["knob"]) == ("other", 0) and plan.dense_time_us == 9.9


@pytest.mark.usefixtures("gpu")
def test_each_kernel_is_compiled_once_and_before_what_needs_it_is_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[Any] = []

    class OfKernels(Fake):
        def kernels(self, problem: Problem, config: FakeConfig) -> tuple[Variant, ...]:
            if config.knob == 2:
                raise ValueError("it does not fit")
            return Variant("first.cu", {"KNOB": config.knob}), Variant("second.cu", {})

        def prepare(self, *args: Any) -> Any:
            done.append("prepared")
            return super().prepare(*args)

    def compile_kernel(source: str, defines: dict[str, int], device: torch.device, *, native: bool) -> None:
        done.append((source, defines.get("KNOB")))
        raise RuntimeError("it does not compile")  # which shows where it is prepared

    monkeypatch.setattr(measure, "kernel", compile_kernel)
    monkeypatch.setattr(cores, "count", lambda: 1)
    layers = [(replace(ON_GPU, batch=batch), a_filter(), None) for batch in (1, 2)]
    plans = plans_of(layers, 0.0, methods=(OfKernels("cudnn", lambda y: y, configs=3),))
    next(plans)
    assert done == [("first.cu", 0), ("second.cu", None), ("first.cu", 1), *["prepared"] * 6]


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
    first_us = iter([20.0, 160.0, 200.0])
    monkeypatch.setattr(timing, "glance_us", lambda run, device: next(first_us))
    plan = plan_layer(ON_GPU, a_filter(), methods=[Fake(name, lambda y: y) for name in ("a", "b", "c")])
    timed = {c.method: (c.time_us, c.timer) for c in plan.candidates}
    assert timed == {"a": (10.0, "graph"), "b": (20.0, "graph"), "c": (200.0, "events")}


@pytest.mark.usefixtures("gpu")
def test_on_a_gpu_a_race_may_be_lost_to_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    timings = [Timing(None, reason="out of device memory"), Timing(9.0, "events", "not captured: it synchronizes")]
    monkeypatch.setattr(timing, "race_on_gpu", lambda runs, device, **_: timings[: len(runs)])
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
        for key in ("timer", "compile_s", "code_bytes", "remainder_share"):
            del candidate[key]
    assert {candidate.timer for candidate in Plan.from_json(data).candidates} == {"calls"}


# Methods that compile a kernel for each filter


@pytest.fixture
def first_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    """The candidate that was tried first takes the least time."""
    monkeypatch.setattr(measure, "_HOPELESS", float("inf"))
    monkeypatch.setattr(timing, "race", lambda runs, **_: [float(i + 1) for i in range(len(runs))])


@pytest.fixture
def one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "count", lambda: 1)


def test_configs_are_compiled_as_long_as_the_budget_lasts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "count", lambda: 4)
    method = Compiled(20.0, 8.0, 160.0)
    plan = plan_layer(PROBLEM, a_filter(), methods=(method, by_name("dense")), compile_budget_s=12.0)
    assert method.prepared == 2
    compiled = {(c.config or {}).get("knob"): c for c in plan.candidates if c.method == "compiled"}
    assert compiled[0].time_us is not None and compiled[1].time_us is not None
    assert (compiled[None].time_us, compiled[None].reason) == (
        None,
        "1 more configs were not tried: compiling it takes about 40 s of all 4 cores, more than the 5 s left; "
        "pass effort='best' or more seconds",
    )


def test_a_budget_of_nothing_rules_a_method_out() -> None:
    method = Compiled(0.0)
    plan = plan_layer(PROBLEM, a_filter(), methods=(method, by_name("dense")), compile_budget_s=0)
    assert (plan.method, method.prepared) == ("dense", 0)
    (refused,) = (c for c in plan.candidates if c.method == "compiled")
    assert refused.config is None and "for which no time is given; pass effort='best'" in str(refused.reason)


@pytest.mark.parametrize("budget", [-1.0, float("nan")])
def test_a_budget_is_a_number_of_seconds(budget: float) -> None:
    with pytest.raises(ValueError, match=f"compile_budget_s is a number of seconds.* got {budget}"):
        plan_layer(PROBLEM, a_filter(), compile_budget_s=budget)
    with pytest.raises(ValueError, match="compile_budget_s is a number of seconds"):
        next(plans_of([(PROBLEM, a_filter(), None)], budget))


def test_a_plan_says_what_was_compiled() -> None:
    plan = plan_layer(PROBLEM, a_filter(), methods=(Compiled(1.0, 1.0), by_name("dense")))
    compiled = {(c.method, (c.config or {}).get("knob")): (c.compile_s, c.code_bytes) for c in plan.candidates}
    assert compiled.pop(("compiled", 0)) == (1.5, 7) and compiled.pop(("compiled", 1)) == (1.5, 8)
    assert set(compiled.values()) == {(None, None)}
    data = json.loads(json.dumps(plan.to_json()))["candidates"]
    assert {(c["compile_s"], c["code_bytes"]) for c in data} == {(1.5, 7), (1.5, 8), (None, None)}


@pytest.mark.usefixtures("first_wins", "one_core")
def test_a_plan_is_taken_over_within_the_budget() -> None:
    method, dense = Compiled(1.0, 4.0), by_name("dense")

    def plan(budget: float, sparse_filter: SparseFilter) -> Plan:
        return plan_layer(PROBLEM, sparse_filter, methods=(method, dense), compile_budget_s=budget)

    cut = plan(4.0, a_filter(seed=1))  # the second config needs one second more
    assert (cut.method, method.prepared) == ("compiled", 1)
    like = a_filter(seed=1)
    assert took_over(plan(1.0, like), cut) and took_over(plan(8.0, like), cut) and method.prepared == 3
    without = plan(0.9, like)  # the choice does not fit any more
    assert (without.method, method.prepared) == ("dense", 3)
    assert took_over(plan(1.8, like), without)
    whole = plan(9.0, like)
    assert (whole.method, whole.times_from, method.prepared) == ("compiled", "measured", 5)
    assert took_over(plan(900.0, like), whole) and method.prepared == 6  # nothing was left out
    assert took_over(plan(0.0, like), without) is False  # which is another question


@pytest.mark.usefixtures("first_wins", "one_core")
def test_a_plan_without_a_compile_budget_stays_beside_one_with() -> None:
    method, dense = Compiled(1.0), by_name("dense")
    plans = [plan_layer(PROBLEM, a_filter(), methods=(method, dense), compile_budget_s=s) for s in (9.0, 0.0, 9.0, 0.0)]
    assert [plan.method for plan in plans] == ["compiled", "dense"] * 2
    assert took_over(plans[2], plans[0]) and took_over(plans[3], plans[1])


@pytest.mark.usefixtures("first_wins")
def test_compiling_takes_nothing_from_the_time_to_search(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_SEARCH_S", 0.5)
    slow, other = Compiled(1.0, 1.0, 1.0), Fake("other", lambda y: y, configs=3)
    prepare = slow.prepare
    monkeypatch.setattr(slow, "prepare", lambda *args: (time.sleep(0.3), prepare(*args))[1])
    plan_layer(PROBLEM, a_filter(), methods=(slow, other))
    assert (slow.prepared, other.prepared) == (3, 3)
    planner._remembered.clear()
    monkeypatch.setattr(measure, "_SEARCH_S", 0.0)
    plan_layer(PROBLEM, a_filter(), methods=(slow, other))
    assert (slow.prepared, other.prepared) == (6, 4)  # what was compiled is tried


@pytest.mark.usefixtures("one_core", "first_wins")
def test_what_is_not_begun_in_time_is_not_compiled_and_no_plan_is_kept_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    slow, other = Compiled(0.01), Fake("other", lambda y: y)
    prepare = slow.prepare
    monkeypatch.setattr(slow, "prepare", lambda *args: (time.sleep(0.15), prepare(*args))[1])
    layers = [(replace(PROBLEM, batch=batch), a_filter(), None) for batch in (1, 2, 3)]
    first, *late = plans_of(layers, 0.1, methods=(slow, other))
    assert (first.method, slow.prepared) == ("compiled", 1)
    assert [plan.method for plan in late] == ["other", "other"]
    assert all("the time for compiling was over" in str(plan.candidates) for plan in late)
    assert [problem.batch for problem in (hint.plan.problem for hint in planner._remembered.values())] == [1]


@pytest.mark.usefixtures("one_core", "first_wins")
def test_what_other_methods_compile_takes_no_time_from_filters(monkeypatch: pytest.MonkeyPatch) -> None:
    """And equal layers take over a plan for which time was over, in this call alone."""
    kernel = SimpleNamespace(key="a kernel of any filter")
    monkeypatch.setattr(planner, "kernels_of", lambda layer, method, config: [kernel])
    monkeypatch.setattr(planner, "compile_kernel", lambda layer, variant: time.sleep(0.2))
    slow, other = Compiled(0.01), Fake("other", lambda y: y)
    (plan,) = plans_of([(PROBLEM, a_filter(), None)], 0.1, methods=(slow, other))
    assert (plan.method, slow.prepared) == ("compiled", 1)
    prepare = slow.prepare
    monkeypatch.setattr(slow, "prepare", lambda *args: (time.sleep(0.15), prepare(*args))[1])
    first, last = (replace(PROBLEM, batch=batch) for batch in (2, 3))
    layers = [(problem, a_filter(), None) for problem in (first, last, last)]
    _, late, same = plans_of(layers, 0.1, methods=(slow, other))
    assert late.method == "other" and took_over(same, late)
    assert [hint.plan.problem.batch for hint in planner._remembered.values()] == [2]


LAYERS = [replace(PROBLEM, batch=batch) for batch in (1, 2, 3)]


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Compiled:
    """The planner's methods are dense and one that compiles: one config, 0.1 seconds per nonzero."""
    method = Compiled(0.0, per_nnz=0.1)
    monkeypatch.setattr(methods, "METHODS", (method, by_name("dense")))
    return method


def layer(problem: Problem, nnz: int) -> tuple[Problem, SparseFilter, None]:
    weight = torch.zeros(PROBLEM.weight_shape)
    weight.view(-1)[:nnz] = 1.0
    return problem, SparseFilter.from_dense(weight), None


@pytest.mark.usefixtures("first_wins", "one_core")
def test_layers_share_a_budget_and_leave_the_rest_to_others(compiled: Compiled) -> None:
    refuses = replace(PROBLEM, batch=4)
    compiled.unsupported = lambda problem: "no" if problem is refuses else None  # type: ignore[method-assign]
    layers = [layer(LAYERS[0], 40), layer(refuses, 40), layer(LAYERS[1], 120), layer(LAYERS[2], 150)]
    plans = list(plans_of(layers, 30.0))
    # 4 of 30 s, then 12 of 26 s, then 15 of 14 s: it is not compiled.
    assert [plan.method for plan in plans] == ["compiled", "dense", "compiled", "dense"]
    assert [plan.problem for plan in plans] == [problem for problem, _, _ in layers]
    (reason,) = (c.reason for c in plans[3].candidates if c.method == "compiled")
    assert reason is not None and "takes about 15 s of all 1 cores, more than the 14 s left" in reason
    assert compiled.prepared == 2


@pytest.mark.usefixtures("first_wins", "one_core")
def test_a_layer_that_takes_over_a_plan_needs_its_choice(compiled: Compiled) -> None:
    layers = [layer(LAYERS[0], 60), layer(LAYERS[0], 60), layer(LAYERS[1], 120)]
    plans = list(plans_of(layers, 24.0))  # 12 s for the two that are alike, and 12 s
    assert took_over(plans[1], plans[0]) and [plan.method for plan in plans] == ["compiled"] * 3
    assert compiled.prepared == 3
    again = list(plans_of(layers, 24.0))
    assert all(map(took_over, again, plans)) and compiled.prepared == 6
    # The remembered choice counts too.
    assert [plan.method for plan in plans_of(layers, 23.0)] == ["compiled", "compiled", "dense"]


@pytest.mark.usefixtures("first_wins")
def test_all_is_compiled_before_the_first_layer_is_timed(compiled: Compiled) -> None:
    progress: list[tuple[int, int]] = []
    plans = plans_of([layer(problem, 40) for problem in LAYERS], 60.0, lambda *counts: progress.append(counts))
    assert next(plans).method == "compiled"
    assert compiled.prepared == 3 and progress == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert [plan.method for plan in plans] == ["compiled", "compiled"]
    assert compiled.prepared == 3 and len(progress) == 4  # none is prepared again


@pytest.mark.usefixtures("gpu")
def test_on_a_gpu_all_is_prepared_before_the_first_layer_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = Fake("cudnn", lambda y: y, configs=2)
    monkeypatch.setattr(methods, "METHODS", (dense,))
    monkeypatch.setattr(Fake, "device_type", "cuda")
    progress: list[tuple[int, int]] = []
    layers = [(replace(ON_GPU, batch=batch), a_filter(), None) for batch in (1, 2, 1)]
    plans = plans_of(layers, 60.0, lambda *counts: progress.append(counts))
    first = next(plans)
    assert dense.prepared == 4 and progress[-1] == (4, 4)
    second, third = plans
    assert (second.method, third.method) == ("cudnn", "cudnn") and took_over(third, first)
    assert dense.prepared == 5  # the choice alone, for the layer that takes it over
    assert {c.time_us for c in first.candidates} == {10.0, 20.0}


@pytest.mark.usefixtures("gpu")
def test_layers_that_wait_for_a_plan_are_prepared_together(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fake("cudnn", lambda y: y)
    monkeypatch.setattr(methods, "METHODS", (fake,))
    monkeypatch.setattr(Fake, "device_type", "cuda")
    plans = plans_of([(replace(ON_GPU, batch=batch), a_filter(), None) for batch in (1, 1, 2, 1, 2)], 60.0)
    prepared = []
    for _ in plans:
        prepared.append(fake.prepared)
    # Both first ones, then the two that follow the first of them; the last one follows the second.
    assert prepared == [2, 4, 4, 4, 5]


@pytest.mark.usefixtures("gpu")
def test_a_known_choice_is_prepared_before_anything_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fake("cudnn", lambda y: y, configs=3)
    monkeypatch.setattr(methods, "METHODS", (fake,))
    monkeypatch.setattr(Fake, "device_type", "cuda")
    layers = [(replace(ON_GPU, batch=batch), a_filter(), None) for batch in (1, 2)]
    first = list(plans_of(layers, 60.0))
    progress: list[tuple[int, int]] = []
    again = plans_of(layers, 60.0, lambda *counts: progress.append(counts))
    assert took_over(next(again), first[0]) and fake.prepared == 6 + 2 and progress == [(0, 2), (1, 2), (2, 2)]
    assert took_over(next(again), first[1]) and fake.prepared == 6 + 2
    anew = list(plans_of(layers, 60.0, remeasure=True))
    assert [plan.times_from for plan in anew] == ["measured"] * 2 and fake.prepared == 6 + 2 + 6


@pytest.mark.usefixtures("gpu")
def test_a_choice_that_fails_on_a_gpu_is_measured_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    fails, other = Fake("a", lambda y: y), Fake("b", lambda y: y)
    assert plan_layer(ON_GPU, a_filter(), methods=(fails, other)).method == "a"
    fails.change = out_of_memory
    plan = plan_layer(ON_GPU, a_filter(), methods=(fails, other))
    assert (plan.method, plan.times_from) == ("b", "measured")
    assert "out of device memory" in str(next(c.reason for c in plan.candidates if c.method == "a"))


@pytest.mark.usefixtures("gpu")
def test_a_candidate_runs_for_the_first_time_while_nothing_is_captured() -> None:
    """A capture elsewhere would make it fail, and a plan without it be stored."""
    entered: list[int] = []

    def change(y: torch.Tensor) -> torch.Tensor:
        entered.append(runs._count)
        return y

    for _ in range(2):  # measured, and taken over
        plan_layer(ON_GPU, a_filter(), methods=(Fake("a", change),))
    assert entered == [1, 1] and runs._count == 0


@pytest.mark.usefixtures("gpu")
def test_what_fails_to_compile_ahead_becomes_a_reason(monkeypatch: pytest.MonkeyPatch, compiled: Compiled) -> None:
    def fail(*args: Any) -> Any:
        raise RuntimeError("generated.cu does not compile")

    monkeypatch.setattr(compiled, "prepare", fail)
    monkeypatch.setattr(methods, "METHODS", (compiled, Fake("cudnn", lambda y: y)))
    monkeypatch.setattr(Fake, "device_type", "cuda")
    (plan,) = plans_of([(ON_GPU, a_filter(), None)], 60.0)
    assert plan.method == "cudnn"
    assert [c.reason for c in plan.candidates if c.method == "compiled"] == ["generated.cu does not compile"]


@pytest.mark.usefixtures("one_core")
def test_the_first_job_that_fails_ends_the_rest() -> None:
    began: list[int] = []

    def job(number: int) -> None:
        began.append(number)
        time.sleep(0.05)  # so that the error arrives while jobs are left
        if number == 1:
            raise RuntimeError("job 1 failed")

    with pytest.raises(RuntimeError, match="job 1 failed"):
        cores.on_all_cores([lambda number=number: job(number) for number in range(30)])  # type: ignore[misc]
    assert began[:2] == [0, 1] and len(began) < 30


@pytest.mark.parametrize(
    ("sparse_filter", "bias", "says"),
    [
        (SparseFilter.from_dense(torch.ones(2, 2, 1, 1)), None, r"a filter of shape .*, got \(2, 2, 1, 1\)"),
        (None, torch.zeros(3), r"a bias of shape None, got \(3,\)"),
    ],
)
def test_a_filter_or_bias_of_another_problem_is_refused(
    sparse_filter: SparseFilter | None, bias: torch.Tensor | None, says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        plan_layer(PROBLEM, sparse_filter or a_filter(), bias)


def test_methods_may_be_named() -> None:
    assert plan_layer(PROBLEM, a_filter(), methods=["lowered"]).method == "lowered"
    with pytest.raises(ValueError, match="no method 'direkt' on cpu; there are direct"):
        plan_layer(PROBLEM, a_filter(), methods=["direkt"])


def test_what_a_plan_was_measured_with_comes_with_it() -> None:
    """It was not made in inference mode, whose tensors a converted layer could not hold."""
    planner._remembered.clear()
    modes = list[bool]()

    class Watched(Fake):
        def prepare(self, *args: Any) -> Any:
            modes.append(torch.is_inference_mode_enabled())
            return super().prepare(*args)

    method = Watched("watched", lambda y: y)
    turned = SparseFilter.from_dense(a_filter().to_dense().flip(0))
    layers = [(PROBLEM, sparse_filter, None) for sparse_filter in (a_filter(), turned)]
    planned = list(plan_layers(layers, 0.0, methods=[method]))
    assert [each.plan.times_from for each in planned] == ["measured", "equal layer"]
    assert modes == [False, False]
    x = torch.randn(PROBLEM.input_shape)
    for (_, sparse_filter, _), each in zip(layers, planned, strict=True):
        assert reference.compare(each.prepared(x), reference.conv2d(PROBLEM, x, sparse_filter.to_dense())) < 1e-5


@pytest.mark.parametrize(("native_us", "method"), [(100.0, "direct"), (108.0, "direct"), (112.0, "dense")])
def test_a_method_that_native_programs_call_may_be_slower_by_a_hand_over(native_us: float, method: str) -> None:
    def run(x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        return x

    times_us = {"dense": 100.0, "direct": native_us}
    candidates = [Candidate(name, {}, time_us=time_us) for name, time_us in times_us.items()]
    prepared = [Prepared(run), Prepared(run, op=_cpu.Copy((1,), (1,)))]
    runnable = [measure._FirstRun(*each, 1.0) for each in zip(candidates, prepared, strict=True)]
    assert measure._best(candidates, runnable).method == method
