"""Without a compiler: a plan that was made before is taken over where its kernels are had, and nothing fails by it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from escort import methods
from escort.cuda.compiler import Variant
from escort.planner import Plan, measure, plan_layer, planner, store, timing
from escort.planner.follow import follow
from escort.planner.plan import Layer
from escort.planner.search import runs
from escort.planner.timing import Timing
from escort.problem import Problem
from tests.fakes import PROBLEM, Compiled, Fake, FakeConfig, a_filter, put_gpu_in_place

LAYER = Layer(replace(PROBLEM, device="cuda:0"), a_filter())
MISSING = "CUDA kernels need NVRTC, which is missing: pip install escort-sparse[cuda13]"


class OfKernels(Fake):
    """A method with a kernel for each config."""

    device_type = "cuda"

    def kernels(self, problem: Problem, config: FakeConfig) -> Sequence[Variant]:
        return (Variant("fake.cu", {"KNOB": config.knob}), Variant("arrange.cu", {}))


class Dense(Fake):
    device_type, is_dense = "cuda", True


@pytest.fixture
def method(monkeypatch: pytest.MonkeyPatch) -> OfKernels:
    """The fastest method of a GPU that is the CPU; the first of its two configs is the faster one."""
    put_gpu_in_place(monkeypatch)
    monkeypatch.setattr(planner, "_remembered", {})
    monkeypatch.setattr(measure, "_HOPELESS", float("inf"))
    monkeypatch.setattr(
        timing, "race_on_gpu", lambda runs, *_, **options: [Timing(10.0 * (i + 1)) for i in range(len(runs))]
    )
    method = OfKernels("fake", lambda y: y, configs=2)
    monkeypatch.setattr(methods, "METHODS", (method, Dense("cudnn", lambda y: y)))
    return method


def lose_compiler(monkeypatch: pytest.MonkeyPatch, had: int) -> None:
    """From now on only the kernels of one config are had."""
    monkeypatch.setattr("escort.planner.search.no_compiler", lambda: MISSING)
    monkeypatch.setattr("escort.planner.search.is_had", lambda variant, device: variant.defines.get("KNOB", had) == had)


def plan() -> Plan:
    """The layer's plan as in another process."""
    planner._remembered.clear()
    return plan_layer(LAYER.problem, LAYER.sparse_filter, compile_budget_s=0.0)


def test_all_kernels_of_a_config_must_be_had(method: OfKernels, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = method.space
    assert runs(method, LAYER, one), "the compiler makes them"
    lose_compiler(monkeypatch, 1)
    assert not runs(method, LAYER, one) and runs(method, LAYER, other)
    assert runs(method, Layer(PROBLEM, LAYER.sparse_filter), one), "on a CPU nothing is compiled"
    assert runs(Compiled(1.0), LAYER, one), "of what is made for a filter nothing is known"
    monkeypatch.setattr("escort.planner.search.is_had", lambda variant, device: variant.source == "fake.cu")
    assert not runs(method, LAYER, one) and not runs(method, LAYER, other)


@pytest.mark.usefixtures("plan_store")
@pytest.mark.parametrize("imported", [False, True])
def test_a_stored_plan_is_taken_over_where_its_kernels_are_had(
    method: OfKernels, imported: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = plan()
    assert (first.method, first.config) == ("fake", {"knob": 0})
    for key, hint in filter(None, [found for _, found in store.entries()]):
        store.save(key, replace(hint, imported=imported))
    lose_compiler(monkeypatch, 0)
    assert plan().times_from == "plan store"
    method.knobs.clear()
    lose_compiler(monkeypatch, 1)
    second = plan()
    assert (second.method, second.config, second.times_from) == ("fake", {"knob": 1}, "measured")
    assert method.knobs == [1], "nothing else was prepared"


def test_a_plan_is_followed_where_its_kernels_are_had(method: OfKernels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(store.KEEP_VARIABLE, "0")
    chosen = plan()
    lose_compiler(monkeypatch, 0)
    (followed,) = follow([LAYER], [chosen])
    assert followed.plan.config == {"knob": 0}
    method.knobs.clear()
    lose_compiler(monkeypatch, 1)
    with pytest.raises(ValueError, match="its plan has fake, and no kernel for it came .*cuda13.*by kernels=True;"):
        next(follow([LAYER], [chosen]))
    assert not method.knobs


def test_a_library_that_is_gone_ends_no_conversion(method: OfKernels, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a method imports too late: its candidate says so, and so does one of a plan."""
    monkeypatch.setenv(store.KEEP_VARIABLE, "0")
    chosen = plan()

    def gone(*args: Any) -> Any:
        raise ImportError("no libnvrtc.so")

    monkeypatch.setattr(method, "prepare", gone)
    measured = plan()
    assert measured.method == "cudnn"
    assert {c.reason for c in measured.candidates if c.method == "fake"} == {"no libnvrtc.so"}
    with pytest.raises(ValueError, match="its plan has fake .* does not compute it here"):
        next(follow([LAYER], [chosen]))
