"""Plans on disk: what another process measured is taken over where it is right here, and nothing else is."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import shutil
import threading
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any, get_args

import pytest
import torch

import escort
from escort import cache, methods
from escort.artifact import export_plans, import_plans
from escort.methods import by_name
from escort.planner import Plan, cores, measure, plan_layer, planner, store, timing
from escort.planner.follow import follow
from escort.planner.machine import Machine
from escort.planner.plan import Candidate, Layer
from escort.problem import Activation, Epilogue
from tests.fakes import PROBLEM, Compiled, Fake, a_filter, plans_of
from tests.fuzz.problems import draw

pytestmark = pytest.mark.usefixtures("plan_store")


@pytest.fixture(autouse=True)
def new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "_warned", set())
    forget()


def forget() -> None:
    """What follows is as in another process: only the files are left."""
    planner._remembered.clear()


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> tuple[Fake, Fake]:
    """The methods of the CPU: the first takes 1 us, the second 2 us."""
    both = Fake("first", lambda y: y, configs=2), Fake("second", lambda y: y)
    monkeypatch.setattr(methods, "METHODS", (*both, by_name("dense")))
    monkeypatch.setattr(measure, "_HOPELESS", float("inf"))
    monkeypatch.setattr(timing, "race", lambda runs, **_: [float(i + 1) for i in range(len(runs))])
    return both


def files() -> list[Path]:
    return sorted(cache.folder().glob("*.plan"))


def key() -> store.Key:
    return store.Key.of(Layer(PROBLEM, a_filter()), methods.for_device("cpu"), compiles=False)


def same(plan: Plan, earlier: Plan) -> bool:
    """Whether they are alike but for where the times are from, and for the error of the choice."""
    candidates = [replace(candidate, rel_error=None) for candidate in plan.candidates]
    others = [replace(candidate, rel_error=None) for candidate in earlier.candidates]
    return replace(plan, candidates=tuple(candidates), times_from="measured") == replace(
        earlier, candidates=tuple(others), times_from="measured"
    )


def test_a_later_process_takes_over_what_was_measured(fakes: tuple[Fake, Fake]) -> None:
    earlier = plan_layer(PROBLEM, a_filter())
    assert (earlier.method, earlier.times_from, [fake.prepared for fake in fakes]) == ("first", "measured", [2, 1])
    forget()
    plan = plan_layer(PROBLEM, a_filter())
    assert plan.times_from == "plan store" and same(plan, earlier)
    assert [fake.prepared for fake in fakes] == [3, 1]  # the choice alone
    assert plan.dense_time_us == earlier.dense_time_us is not None
    assert plan_layer(PROBLEM, a_filter()).times_from == "plan store"  # wherever it is remembered by now


EPILOGUES = (
    *(Epilogue(True, True, activation) for activation in get_args(Activation) if activation != "prelu"),
    *(Epilogue(False, False, "leaky_relu", slope) for slope in (-0.2, -1e30, 1e30, 5, -5, 1e-40, -0.0)),
)


@pytest.mark.parametrize("epilogue", EPILOGUES, ids=str)
def test_plans_of_every_epilogue_are_stored_exported_and_followed(
    fakes: tuple[Fake, Fake], epilogue: Epilogue, tmp_path: Path
) -> None:
    problem = replace(PROBLEM, epilogue=epilogue)
    layer = Layer(problem, a_filter(), torch.ones(problem.out_channels) if epilogue.bias else None)
    earlier = plan_layer(*layer)
    assert export_plans(tmp_path / "plans.json") == 1
    cache.clear("plan")
    forget()
    assert import_plans(tmp_path / "plans.json") == (1, 0, 0)
    assert same(plan := plan_layer(*layer), earlier) and plan.times_from == "plan store"
    assert Plan.from_json(json.loads(json.dumps(plan.to_json(), allow_nan=False))) == plan
    assert next(follow([layer], [plan])).plan == plan


def test_plans_of_any_problem_and_of_any_config_are_read_again() -> None:
    for seed in range(60):
        drawn = draw(seed)
        for method in methods.for_device("cpu"):
            if method.unsupported(drawn.problem) is None:
                for config in map(asdict, method.configs(drawn.problem, drawn.filter)):
                    odd = Candidate(method.name, None, reason="odd: \0\ud800\n\u2028é\x1b[1m" * 10, rel_error=None)
                    timed = Candidate(method.name, config, 0.0, 0.0, compile_s=0.0, code_bytes=0, remainder_share=0.0)
                    plan = Plan(drawn.problem, method.name, config, (odd, timed), Machine.here())
                    assert Plan.from_json(json.loads(json.dumps(plan.to_json(), allow_nan=False))) == plan


def _plan_in_a_process(barrier: Any, results: Any) -> None:
    measure._SCATTER, measure._BUSY = math.inf, 1.0
    barrier.wait(timeout=120)
    plan = plan_layer(PROBLEM, a_filter())
    results.put((plan.times_from, plan.to_json()))


def test_processes_share_plans() -> None:
    """Two at once that may both measure, then one that finds what the last of them stored."""
    context = multiprocessing.get_context("spawn")

    def plans(count: int) -> list[tuple[str, Plan]]:
        barrier, results = context.Barrier(count), context.Queue()
        processes = [context.Process(target=_plan_in_a_process, args=(barrier, results)) for _ in range(count)]
        for process in processes:
            process.start()
        found = [results.get(timeout=120) for _ in processes]
        for process in processes:
            process.join(timeout=60)
            assert process.exitcode == 0
        return [(times_from, Plan.from_json(plan)) for times_from, plan in found]

    first = plans(2)
    assert "measured" in {times_from for times_from, _ in first}
    ((times_from, plan),) = plans(1)
    assert times_from == "plan store" and any(same(plan, earlier) for _, earlier in first)
    (stored,) = store.entries()
    assert [path.name for path in cache.folder().iterdir()] == [f"{stored[0].key}.plan"]


@pytest.mark.parametrize(("calls_s", "is_steady"), [([1.0, 2.0, 1.9], True), ([1.0, 2.1, 9.0], False)])
@pytest.mark.parametrize("hit", ["dense", "the choice", "another"])
def test_times_that_scatter_are_for_one_layer_alone(
    fakes: tuple[Fake, Fake], monkeypatch: pytest.MonkeyPatch, hit: str, calls_s: list[float], is_steady: bool
) -> None:
    """Contestants are both configs of the first method, the second, and the configs of the dense one."""

    def race(runs: Any, *, seen: Any, **_: Any) -> list[float]:
        hits = {"the choice": 0, "another": 2, "dense": len(runs) - 1}
        seen([calls_s if number == hits[hit] else [1.0] for number in range(len(runs))])
        return [float(i + 1) for i in range(len(runs))]

    monkeypatch.setattr(timing, "race", race)
    monkeypatch.setattr(measure, "_SCATTER", 2.0)
    is_steady |= hit == "another"
    plan = plan_layer(PROBLEM, a_filter())
    assert (plan.method, plan.is_steady) == ("first", is_steady) and len(files()) == is_steady
    assert Plan.from_json(plan.to_json()) == plan
    again = plan_layer(PROBLEM, a_filter()).times_from
    assert again == ("equal layer" if is_steady else "measured")


@pytest.mark.parametrize(("share", "is_steady"), [(0.2, True), (0.3, False)])
def test_times_of_a_busy_machine_are_for_one_layer_alone(
    fakes: tuple[Fake, Fake], monkeypatch: pytest.MonkeyPatch, share: float, is_steady: bool
) -> None:
    """Threads that wait for cores take the same time in each call, and yet the wrong one."""
    monkeypatch.setattr(measure, "_BUSY", cores.BUSY)
    monkeypatch.setattr(cores.Watch, "others_share", lambda self: share)
    plan = plan_layer(PROBLEM, a_filter())
    assert plan.is_steady == is_steady and len(files()) == is_steady


def test_the_timer_tells_what_it_saw() -> None:
    seen: list[Any] = []
    times_us = timing.race([lambda: None, lambda: None], rounds=4, seen=seen.extend)
    assert [median(calls_s) * 1e6 for calls_s in seen] == times_us and min(map(len, seen)) >= 12


def test_what_is_remembered_is_stored_again_where_it_is_gone(
    fakes: tuple[Fake, Fake], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    earlier = plan_layer(PROBLEM, a_filter())
    cache.clear("plan")
    assert plan_layer(PROBLEM, a_filter()).times_from == "equal layer" and len(files()) == 1
    monkeypatch.setenv("ESCORT_CACHE_DIR", str(tmp_path / "another"))
    assert not files() and plan_layer(PROBLEM, a_filter()).times_from == "equal layer"
    forget()
    plan = plan_layer(PROBLEM, a_filter())
    assert plan.times_from == "plan store" and same(plan, earlier)


def test_threads_share_plans(fakes: tuple[Fake, Fake]) -> None:
    plan_layer(PROBLEM, a_filter())
    forget()
    plans: list[Plan] = []
    threads = [threading.Thread(target=lambda: plans.append(plan_layer(PROBLEM, a_filter()))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {plan.times_from for plan in plans} == {"plan store"} and len(plans) == 8


def test_a_hint_that_computes_wrong_is_measured_anew_and_replaced(fakes: tuple[Fake, Fake]) -> None:
    first, _ = fakes
    plan_layer(PROBLEM, a_filter())
    forget()
    first.change = lambda y: y * 1.01
    plan = plan_layer(PROBLEM, a_filter())
    assert (plan.method, plan.times_from) == ("second", "measured")
    assert {c.reason is not None and "exceeds" in c.reason for c in plan.candidates if c.method == "first"} == {True}
    forget()
    first.change = lambda y: y
    again = plan_layer(PROBLEM, a_filter())
    assert (again.method, again.times_from) == ("second", "plan store")


@pytest.mark.parametrize("error", [ImportError, ValueError, RuntimeError, torch.OutOfMemoryError])
def test_a_hint_that_cannot_be_prepared_is_measured_anew(
    fakes: tuple[Fake, Fake], error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _ = fakes
    plan_layer(PROBLEM, a_filter())
    forget()
    prepare, refused = first.prepare, []

    def refuse_once(*args: Any) -> Any:
        if not refused:
            refused.append(True)
            raise error("not today")
        return prepare(*args)

    monkeypatch.setattr(first, "prepare", refuse_once)
    plan = plan_layer(PROBLEM, a_filter())
    assert (plan.method, plan.times_from) == ("first", "measured") and refused


@pytest.mark.parametrize(
    "change",
    [
        {"device": "another CPU"},
        {"isa": "avx1024"},
        {"threads": 77},
        {"torch": "3.0"},
        {"escort": "9.9"},
    ],
)
def test_plans_of_another_machine_or_version_are_not_seen(
    fakes: tuple[Fake, Fake], change: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan_layer(PROBLEM, a_filter())
    forget()
    other = replace(Machine.here(), **change)
    monkeypatch.setattr(Machine, "here", classmethod(lambda cls, device="cpu": other))
    assert plan_layer(PROBLEM, a_filter()).times_from == "measured" and len(files()) == 2


def test_a_change_of_the_sources_takes_over_no_times(fakes: tuple[Fake, Fake], monkeypatch: pytest.MonkeyPatch) -> None:
    plan_layer(PROBLEM, a_filter())
    forget()
    monkeypatch.setattr(store, "digest_sources", lambda device: "0" * 64)
    assert plan_layer(PROBLEM, a_filter()).times_from == "measured"


def test_a_change_of_a_library_that_a_method_needs_takes_over_no_times(
    fakes: tuple[Fake, Fake], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = key()
    monkeypatch.setattr(Fake, "version", lambda self: "1.2" if self is fakes[1] else "")
    plan_layer(PROBLEM, a_filter())
    assert key().sources != before.sources and key() == store.entries()[0][1][0]
    forget()
    monkeypatch.setattr(Fake, "version", lambda self: "1.3" if self is fakes[1] else "")
    assert plan_layer(PROBLEM, a_filter()).times_from == "measured" and len(files()) == 2


def test_the_digest_is_of_kernels_and_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "escort"
    shutil.copytree(Path(escort.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(store, "__file__", str(package / "planner" / "store.py"))
    digest = store.digest_sources.__wrapped__
    before = digest("cuda"), digest("cpu")
    assert before == (store.digest_sources("cuda"), store.digest_sources("cpu")) and before[0] != before[1]
    for changed in ("kernels/cuda/direct.cu", "methods/cuda/cudnn.py", "cuda/launch.py", "planner/timing.py"):
        with open(package / changed, "a") as file:
            file.write("\n")
        assert digest("cuda") != before[0], changed
        before = digest("cuda"), digest("cpu")
    (package / "cli" / "run.py").write_text("")
    assert before == (digest("cuda"), digest("cpu"))


def test_another_question_is_another_plan(fakes: tuple[Fake, Fake]) -> None:
    _, second = fakes
    plan_layer(PROBLEM, a_filter())
    forget()
    for problem, density, names in (
        (replace(PROBLEM, batch=3), 0.3, None),
        (PROBLEM, 0.6, None),
        (PROBLEM, 0.3, (second, by_name("dense"))),
    ):
        assert plan_layer(problem, a_filter(density), methods=names).times_from == "measured"
    assert len(files()) == 4


def test_the_number_of_a_gpu_is_none_of_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine("NVIDIA H200", "sm_90", 0, "2.11.0", "0.2.0", "580.159", "13.0", "9.19.0")
    monkeypatch.setattr(Machine, "here", classmethod(lambda cls, device="cpu": machine))
    keys = {
        store.Key.of(Layer(replace(PROBLEM, device=device), a_filter()), methods.for_device("cuda"), compiles=True)
        for device in ("cuda:0", "cuda:1")
    }
    assert len(keys) == 1 and keys.pop().problem.device == "cuda"


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "cut":
        path.write_bytes(content[:-20])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "changed":
        path.write_bytes(content.replace(b'"first"', b'"secnd"'))
    elif how == "a link":
        path.rename(path.with_suffix(".elsewhere"))
        path.symlink_to(path.with_suffix(".elsewhere"))
    else:
        path.unlink()
        path.mkdir()


@pytest.mark.parametrize("how", ["cut", "empty", "changed", "a link", "a folder"])
@pytest.mark.filterwarnings("ignore:the cache .* cannot be written")
def test_a_damaged_entry_counts_as_absent(fakes: tuple[Fake, Fake], how: str) -> None:
    plan_layer(PROBLEM, a_filter())
    forget()
    damage(files()[0], how)
    assert plan_layer(PROBLEM, a_filter()).times_from == "measured"
    forget()
    assert plan_layer(PROBLEM, a_filter()).times_from == ("measured" if how == "a folder" else "plan store")


def forge(**changes: Any) -> None:
    """Changes the entry of the layer, with a checksum that holds."""
    stored = cache.load("plan", key().digest)
    assert stored is not None
    cache.store("plan", key().digest, {**stored[0], **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {"plan": None},
        {"plan": {}},
        {"nonzeros": 3},
        {"methods": ["first"]},
        {"methods": "first"},
        {"compiles": True},
        {"cut_at_s": -1.0},
        {"cut_at_s": 10**400},
        {"nonzeros": (1 << 31) - 1},
        {"imported": 1},
        {"more": 1},
    ],
)
def test_an_entry_of_something_else_counts_as_absent(fakes: tuple[Fake, Fake], changes: dict[str, Any]) -> None:
    plan_layer(PROBLEM, a_filter())
    forget()
    forge(**changes)
    assert store.load(key()) is None and [stored for _, stored in store.entries()] == [None]
    assert plan_layer(PROBLEM, a_filter()).times_from == "measured"
    assert store.load(key()) is not None


def test_a_read_only_folder_is_read(fakes: tuple[Fake, Fake], monkeypatch: pytest.MonkeyPatch) -> None:
    plan_layer(PROBLEM, a_filter())
    forget()

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(cache, "_write", refuse)
    monkeypatch.setattr(os, "utime", refuse)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert plan_layer(PROBLEM, a_filter()).times_from == "plan store"
    with pytest.warns(RuntimeWarning, match="cannot be written .*: every process compiles kernels and measures layers"):
        assert plan_layer(replace(PROBLEM, batch=3), a_filter()).times_from == "measured"


def test_a_folder_that_others_can_write_is_not_used(fakes: tuple[Fake, Fake]) -> None:
    plan_layer(PROBLEM, a_filter())
    forget()
    cache.folder().chmod(0o777)
    with pytest.warns(RuntimeWarning, match="can be written by others"):
        assert plan_layer(PROBLEM, a_filter()).times_from == "measured"


@pytest.mark.parametrize(("variable", "value"), [("ESCORT_KEEP_PLANS", "0"), ("ESCORT_CACHE_MB", "0")])
def test_plans_may_be_switched_off(
    fakes: tuple[Fake, Fake], monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    plan_layer(PROBLEM, a_filter())
    (path,) = files()
    forget()
    monkeypatch.setenv(variable, value)
    assert plan_layer(PROBLEM, a_filter()).times_from == "measured" and files() == [path]


def test_remeasuring_reads_nothing_and_overwrites(fakes: tuple[Fake, Fake], monkeypatch: pytest.MonkeyPatch) -> None:
    plan_layer(PROBLEM, a_filter())
    monkeypatch.setattr(timing, "race", lambda runs, **_: [float(9 - i) for i in range(len(runs))])
    layers = [(PROBLEM, a_filter(), None)] * 2
    plans = list(plans_of(layers, 0.0, remeasure=True))
    assert [plan.times_from for plan in plans] == ["measured", "equal layer"]
    assert {plan.method for plan in plans} == {"dense"}
    forget()
    again = plan_layer(PROBLEM, a_filter())
    assert (again.method, again.times_from) == ("dense", "plan store")


@pytest.mark.usefixtures("fakes")
def test_compile_budgets_mean_the_same_across_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    method = Compiled(1.0, 4.0)
    monkeypatch.setattr(cores, "count", lambda: 1)
    monkeypatch.setattr(methods, "METHODS", (method, by_name("dense")))

    def plan(budget: float) -> Plan:
        forget()
        return plan_layer(PROBLEM, a_filter(), compile_budget_s=budget)

    cut = plan(4.0)  # the second config needs one second more
    assert (cut.method, cut.times_from, method.prepared) == ("compiled", "measured", 1)
    assert same(plan(1.0), cut) and plan(8.0).times_from == "plan store" and method.prepared == 3
    without = plan(0.0)  # another question
    assert (without.method, without.times_from) == ("dense", "measured")
    assert plan(0.0).times_from == plan(8.0).times_from == "plan store"
    whole = plan(9.0)  # outgrows the search with 4 s
    assert (whole.times_from, method.prepared) == ("measured", 6)
    assert same(plan(900.0), whole) and same(plan(9.0), whole)  # nothing was left out
    small = plan(0.9)  # the choice does not fit any more
    assert (small.method, small.times_from) == ("dense", "measured")


@pytest.mark.gpu
def test_on_a_gpu_a_stored_plan_is_checked_and_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = replace(PROBLEM, device="cuda:0")
    earlier = plan_layer(problem, a_filter(), compile_budget_s=0.0)
    forget()

    def race(*args: Any, **options: Any) -> Any:
        raise AssertionError("nothing is timed")

    monkeypatch.setattr(timing, "race_on_gpu", race)
    plan = plan_layer(problem, a_filter(), compile_budget_s=0.0)
    assert plan.times_from == "plan store" and same(plan, earlier) and plan.machine == Machine.here("cuda:0")
    plans = list(plans_of([(problem, a_filter(), None)] * 3, 0.0))
    assert all(plan.times_from == "plan store" and same(plan, earlier) for plan in plans)
