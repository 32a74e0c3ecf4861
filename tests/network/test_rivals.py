"""A converted network is compared with plain calls of the original, and with torch.compile of it."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import escort
from escort.network.check import Request
from escort.network.example import Example
from escort.network.model import ConvertedModel
from escort.network.original import run_original
from escort.network.plan import NetworkPlan
from escort.network.rivals import _log as compared
from escort.network.rivals import compare_with_compiled, compare_with_eager, compiled
from escort.planner import timing
from tests.network.models import Small, pruned

X = torch.randn(2, 3, 8, 8)


@pytest.fixture(autouse=True)
def no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU has to have survived."""
    monkeypatch.setattr(timing, "survived", lambda error: str(error).splitlines()[0])


@pytest.fixture
def as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands in for torch.compile, which takes long on CPUs."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)


def compare(chosen: ConvertedModel, model: nn.Module) -> NetworkPlan:
    with torch.no_grad():
        original = run_original(model, Example((X,)))
        return compare_with_compiled(chosen, original, Request(torch.device("cpu"), "fp32", 1.0))


@pytest.mark.usefixtures("as_it_is")
@pytest.mark.parametrize(("times_us", "warnings"), [([5.0, 3.0], 1), ([3.0, 5.0], 0)])
def test_its_time_is_kept_and_a_faster_one_is_warned_of(
    times_us: list[float], warnings: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = pruned(Small())
    fast = escort.convert(model, X)
    monkeypatch.setattr(timing, "race", lambda runs, **_: times_us[: len(runs)])
    with caplog.at_level(logging.WARNING):
        plan = compare(fast, model)
    assert plan == replace(fast.plan, rivals={"torch.compile": times_us[1]})
    assert [r.getMessage() for r in caplog.records if r.name == compared.name and r.levelno == logging.WARNING] == [
        "torch.compile of the dense model is faster than what was chosen: 3 us, instead of 5 us"
    ] * warnings


def failing(error: Exception) -> Callable[..., Any]:
    def fail(*args: Any, **options: Any) -> Any:
        raise error

    return fail


class WrappedError(RuntimeError):
    """An error as torch.compile raises it: the cause is an attribute, and its own first line says little."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(f"backend='inductor' raised:\n{cause}")
        self.inner_exception = cause


@pytest.mark.parametrize(
    ("makes", "says"),
    [
        (failing(RuntimeError("Failed to find C compiler.\nand more")), "Failed to find C compiler"),
        (lambda *_, **__: failing(WrappedError(ImportError("no Triton"))), "no Triton"),
        (lambda *_, **__: lambda x: torch.zeros(2, 8, 8, 8), "its outputs differ by"),
        (lambda *_, **__: failing(torch.OutOfMemoryError("CUDA out of memory")), "CUDA out of memory"),
    ],
)
def test_why_there_is_none_is_said(makes: Any, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = pruned(Small())
    fast = escort.convert(model, X)
    monkeypatch.setattr(torch, "compile", makes)
    plan = compare(fast, model)
    assert plan == replace(fast.plan, not_tried={"torch.compile": plan.not_tried["torch.compile"]})
    assert plan.not_tried["torch.compile"].startswith(says) and "Not tried by torch.compile" in " ".join(
        str(plan).split()
    )


@pytest.mark.usefixtures("as_it_is")
def test_one_that_was_timed_in_another_way_does_not_count() -> None:
    model = pruned(Small())
    fast = escort.convert(model, X)
    fast.plan = replace(fast.plan, timer="graph")
    assert "captured in a CUDA graph" in compare(fast, model).not_tried["torch.compile"]


class Counting(nn.Module):
    """Adds how often it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.conv(x) + self.calls


@pytest.mark.usefixtures("as_it_is")
def test_what_a_model_keeps_between_calls_stays() -> None:
    model = pruned(Counting())
    fast = escort.convert(model, X)
    assert compare(fast, model).rivals
    with torch.no_grad():
        assert torch.allclose(fast(X), model(X), atol=1e-5)


@pytest.mark.usefixtures("as_it_is")
def test_a_copy_is_compiled_in_channels_last() -> None:
    model, strides = nn.Sequential(nn.Conv2d(3, 8, 3)), list[bool]()
    model[0].register_forward_hook(
        lambda module, args, out: strides.append(module.weight.is_contiguous(memory_format=torch.channels_last))
    )
    compiled(model, Example((X,)))()
    assert strides == [True] and model[0].weight.is_contiguous()


def test_on_a_cpu_it_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", failing(AssertionError("it was compiled")))
    plan = escort.convert(pruned(Small()), X, effort="best").plan
    assert not plan.rivals and not plan.not_tried


def call_by_call(
    chosen: ConvertedModel, model: nn.Module, times_us: list[float], monkeypatch: pytest.MonkeyPatch
) -> ConvertedModel:
    """What stays where plain calls of the chosen network and of the original take so long."""

    def timed(runs: Any, *_: Any, **__: Any) -> list[float]:
        assert len(runs) == 2
        for run in runs:
            run()
        return times_us

    monkeypatch.setattr(timing, "race_on_host", timed)
    with torch.no_grad():
        original = run_original(model, Example((X,)))
        return compare_with_eager(chosen, original.model, original, Request(torch.device("cpu"), "fp32"))


@pytest.mark.parametrize("times_us", [[50.0, 40.0], [40.0, 50.0]])
def test_plans_have_the_times_of_plain_calls(times_us: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    model = pruned(Small())
    fast = escort.convert(model, X)
    before = fast.plan
    after = call_by_call(fast, model, times_us, monkeypatch)
    assert after is fast, "in a graph it was the faster, and calls replay graphs"
    assert after.plan == replace(before, call_time_us=times_us[0], rivals={"eager": times_us[1]})
    words = f"Plain calls take {times_us[0]:.0f} us, those of the original {times_us[1]:.0f} us."
    assert words in " ".join(str(after.plan).split()) and " eager " not in str(after.plan)
    assert NetworkPlan.from_json(after.plan.to_json()) == after.plan
    assert escort.replan(after).plan.call_time_us is None


@pytest.mark.parametrize(("times_us", "is_kept"), [([50.0, 40.0], True), ([40.0, 50.0], False)])
def test_calls_without_graphs_count_as_they_are(
    times_us: list[float], is_kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = pruned(Small())
    fast = escort.convert(model, X)
    fast.plan = replace(fast.plan, not_captured="the network has hooks", kept_dense=False)
    after = call_by_call(fast, model, times_us, monkeypatch)
    assert after.plan.kept_dense is is_kept and after.plan.call_time_us == 40.0
    if is_kept:
        assert "calls replay no CUDA graph, and take 50 us without, those of the original 40 us" in str(
            after.plan.reason
        )
        with torch.no_grad():
            assert torch.allclose(after(X), model(X), atol=1e-5)


def test_plain_calls_change_no_state(monkeypatch: pytest.MonkeyPatch) -> None:
    model = pruned(Counting())
    fast = escort.convert(model, X)
    for not_captured in (None, "it counts"):
        fast.plan = replace(fast.plan, not_captured=not_captured, kept_dense=False)
        after = call_by_call(fast, model, [50.0, 40.0], monkeypatch)
        with torch.no_grad():
            assert torch.allclose(after(X), copy.deepcopy(model)(X), atol=1e-5)
        after.network.get_buffer("calls").zero_()


@pytest.mark.gpu
def test_plain_calls_on_a_gpu_are_timed() -> None:
    model, x = pruned(Small()).cuda(), X.cuda()
    plan = escort.convert(model, x, precision="fp32").plan
    assert plan.rivals["eager"] > 0.0 and plan.call_time_us is not None and plan.call_time_us > 0.0
    assert plan.call_time_us < plan.rivals["eager"], "a replay takes the host less than a dozen launches"


@pytest.mark.gpu
@pytest.mark.parametrize("effort", ["fast", 1.0])
def test_a_conversion_on_a_gpu_is_compared_where_time_is_given(effort: Any) -> None:
    model, x = pruned(Small()).cuda(), X.cuda()
    plan = escort.convert(model, x, precision="fp32", effort=effort).plan
    if effort == "fast":
        assert plan.rivals.keys() == {"eager"} and "torch.compile" not in plan.not_tried
    elif "torch.compile" in plan.not_tried:  # there may be no compiler
        assert plan.rivals.keys() == {"eager"} and "torch.compile" in str(plan)
    else:
        assert plan.timer == "graph" and 0.0 < plan.rivals["torch.compile"] < 1e5
