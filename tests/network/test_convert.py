"""Whole models: converted equals original, for every network, and wherever it goes."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import escort
from benchmarks.networks import NETWORKS
from escort import reference
from escort.layers import MaxPool2d, SparseConv2d
from escort.network import choose
from escort.network.choose import NETWORK_ERROR_BOUND
from escort.network.model import ConvertedModel
from escort.network.plan import NetworkPlan, plan_table
from escort.planner import cores, measure, planner
from escort.runtime import Program
from tests.network.models import Branching, Masked, Small, pruned, three_convolutions

#: The smallest input that each network takes, so that the tests stay fast.
SIZES = {"googlenet": 64, "caffenet": 227, "alexnet": 127}


def converted(model: nn.Module, *example: torch.Tensor) -> ConvertedModel:
    return escort.convert(model, example)


@pytest.mark.usefixtures("always_faster")
@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_is_the_same_network(name: str) -> None:
    torch.manual_seed(0)
    model = pruned(NETWORKS[name].factory(num_classes=10), 0.9)
    size = SIZES.get(name, 32)
    fast = converted(model, torch.randn(1, 3, size, size))
    assert fast.traced and not fast.plan.kept_dense
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert len(fast.plan.layers) == len(convolutions) and not fast.plan.skipped
    kinds = (nn.Conv2d,) if name == "densenet121" else (nn.Conv2d, nn.BatchNorm2d)  # its norms stand before a ReLU
    assert not any(isinstance(m, kinds) for m in fast.modules())
    for batch, other in ((1, size), (3, size), (2, size + 32)):
        x = torch.randn(batch, 3, other, other)
        try:
            with torch.no_grad():
                expected, out = model(x), fast(x)
        except RuntimeError:  # its classifier takes one input size only
            continue
        assert reference.compare(out, expected) < NETWORK_ERROR_BOUND["fp32"]


@pytest.mark.usefixtures("always_faster")
def test_what_is_fused_and_swapped() -> None:
    model = pruned(Small())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x = torch.randn(2, 3, 17, 18)
    fast = converted(model, x)
    first, second = fast.network.get_submodule("first"), fast.network.get_submodule("second")
    assert isinstance(first, SparseConv2d) and isinstance(second, SparseConv2d)
    assert (first.activation, first.residual) == ("relu6", False)
    assert (second.activation, second.residual) == ("relu", True)
    assert first.name == "first" and first.plan is fast.plan.layers["first"]
    assert sum(isinstance(m, MaxPool2d) for m in fast.modules()) == 2
    with torch.no_grad():
        assert torch.allclose(fast(x), model(x), atol=1e-5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.usefixtures("always_faster")
def test_an_untraceable_model_is_converted_layer_by_layer() -> None:
    model = pruned(Branching())
    fast = converted(model, torch.rand(1, 3, 8, 8))
    assert not fast.traced and set(fast.plan.layers) == {"conv"}
    assert "other" not in fast.plan.layers
    for x in (torch.rand(2, 3, 8, 8), -torch.rand(2, 3, 8, 8)):
        with torch.no_grad():
            assert torch.allclose(fast(x), model(x), atol=1e-5)
    assert fast.plan.skipped == {"other": "is not called on the example"}
    fast = converted(model, -torch.rand(1, 3, 8, 8))
    assert set(fast.plan.layers) == {"other.conv", "conv"}
    for x in (torch.rand(2, 3, 8, 8), -torch.rand(2, 3, 8, 8)):
        with torch.no_grad():
            assert torch.allclose(fast(x), model(x), atol=1e-5)


@pytest.mark.usefixtures("always_faster")
def test_a_converted_model_compiles_and_exports() -> None:
    fast = converted(pruned(Small()), torch.randn(2, 3, 16, 16))
    x = torch.randn(2, 3, 16, 16)
    torch._dynamo.reset()
    with torch.no_grad():
        assert torch.allclose(torch.compile(fast, fullgraph=True, backend="aot_eager")(x), fast(x), atol=1e-6)
    program = torch.export.export(fast, (x,))
    assert torch.allclose(program.module()(x), fast(x), atol=1e-6)


@pytest.mark.usefixtures("always_faster")
def test_an_exported_program_can_be_converted() -> None:
    model = pruned(Small())
    x = torch.randn(2, 3, 16, 16)
    fast = converted(torch.export.export(model, (x,)).module(), x)
    assert len(fast.plan.layers) == 2
    with torch.no_grad():
        assert torch.allclose(fast(x), model(x), atol=1e-5)


@pytest.mark.usefixtures("always_faster")
def test_the_plan_survives_json() -> None:
    plan = converted(pruned(Small()), torch.randn(1, 3, 8, 8)).plan
    assert NetworkPlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    assert (plan.precision, plan.device, plan.timer, plan.input_dtypes) == ("fp32", "cpu", "calls", ("float32",))
    with pytest.raises(ValueError, match="not a network plan"):
        NetworkPlan.from_json({"layers": 1})


@pytest.mark.usefixtures("always_faster")
def test_replanning_measures_again_and_computes_the_same() -> None:
    x = torch.randn(1, 3, 8, 8)
    fast = converted(pruned(Small()), x)
    planner._remembered.clear()
    again = escort.replan(fast)
    assert set(again.plan.layers) == set(fast.plan.layers)
    assert again.plan.layers["first"] is not fast.plan.layers["first"]
    assert (again.plan.dense_time_us, again.plan.speedup) == (None, None)  # the original is not there to be timed
    assert NetworkPlan.from_json(json.loads(json.dumps(again.plan.to_json()))) == again.plan
    assert torch.allclose(again(x), fast(x), atol=1e-5)


@pytest.mark.usefixtures("always_faster", "plan_store")
def test_a_converted_network_says_where_its_times_are_from() -> None:
    x = torch.randn(1, 3, 8, 8)
    model = pruned(Small())
    planner._remembered.clear()
    first = escort.convert(model, x)
    assert {plan.times_from for plan in first.plan.layers.values()} == {"measured"}
    planner._remembered.clear()
    again = escort.convert(model, x)
    assert {plan.times_from for plan in again.plan.layers.values()} == {"plan store"}
    assert " The times of 2 of 2 layers are from the plan store." in plan_table(again.plan).caption
    assert json.loads(json.dumps(again.plan.to_json()))["layers"]["first"]["times_from"] == "plan store"
    assert torch.allclose(again(x), model(x), atol=1e-4)
    anew = escort.replan(again)
    assert {plan.times_from for plan in anew.plan.layers.values()} == {"measured"}


def slow_down(monkeypatch: pytest.MonkeyPatch, network_us: list[float]) -> list[str]:
    """Lets whole networks take these times, the original first; returns what will be measured."""
    measured: list[str] = []
    measure_one = planner.measure
    monkeypatch.setattr(choose, "race", lambda runs, device: (network_us[: len(runs)], "calls"))
    monkeypatch.setattr(planner, "measure", lambda *args: measured.append("a layer") or measure_one(*args))
    return measured


@pytest.mark.usefixtures("plan_store")
def test_stored_plans_that_do_not_pay_are_measured_anew_before_the_original_is_kept(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    planner._remembered.clear()
    model, x = pruned(Small()), torch.randn(1, 3, 8, 8)
    measured = slow_down(monkeypatch, [1.0, 2.0])
    assert escort.convert(model, x).plan.kept_dense and len(measured) == 2  # nothing was stored
    planner._remembered.clear()
    with caplog.at_level(logging.INFO, "escort"):
        fast = escort.convert(model, x)
    assert fast.plan.kept_dense and len(measured) == 4
    assert {plan.times_from for plan in fast.plan.layers.values()} == {"measured"}
    assert "found no gain with the stored plans" in caplog.text
    with torch.no_grad():
        assert torch.allclose(fast(x), model(x), atol=1e-5)
    planner._remembered.clear()
    times_us = iter([[1.0, 2.0], [2.0, 1.0]])  # once measured anew, it is faster
    monkeypatch.setattr(choose, "race", lambda runs, device: (next(times_us), "calls"))
    fast = escort.convert(model, x)
    assert not fast.plan.kept_dense and len(measured) == 6
    with torch.no_grad():
        assert torch.allclose(fast(x), model(x), atol=1e-4)


@pytest.mark.usefixtures("plan_store")
def test_a_conversion_may_measure_all_layers_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    planner._remembered.clear()
    measured = slow_down(monkeypatch, [2.0, 1.0])
    model, x = pruned(Small()), torch.randn(1, 3, 8, 8)
    for remeasure, count in ((False, 2), (False, 2), (True, 4), (False, 4)):
        fast = escort.convert(model, x, remeasure=remeasure)
        assert len(measured) == count and not fast.plan.kept_dense


@pytest.mark.usefixtures("always_faster")
def test_replanning_keeps_to_the_methods_of_the_conversion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fast = escort.convert(pruned(Small()), torch.randn(1, 3, 8, 8), methods=["lowered"])
    assert fast.plan.methods == ("dense", "lowered")
    assert NetworkPlan.from_json(json.loads(json.dumps(fast.plan.to_json()))) == fast.plan
    escort.save(fast, tmp_path / "fast.escort")
    for again in (escort.replan(fast), escort.load(tmp_path / "fast.escort", remeasure=True)):
        assert again.plan.methods == fast.plan.methods
        weighed = {candidate.method for plan in again.plan.layers.values() for candidate in plan.candidates}
        assert weighed == {"dense", "lowered"}
    fast.plan = replace(fast.plan, methods=("dense", "lowered", "gone"))
    assert escort.replan(fast).plan.layers.keys() == fast.plan.layers.keys()
    assert "of which there is no gone on cpu any more" in caplog.text
    assert escort.convert(pruned(Small()), torch.randn(1, 3, 8, 8)).plan.methods == ()


def test_where_the_original_was_kept_there_is_nothing_to_replan(monkeypatch: pytest.MonkeyPatch) -> None:
    slow_down(monkeypatch, [1.0, 2.0])
    fast = escort.convert(pruned(Small()), torch.randn(1, 3, 8, 8))
    with pytest.warns(UserWarning, match=r"no layer to plan anew; pass the original to escort.convert\(\.\.\., rem"):
        again = escort.replan(fast)
    assert again.plan.kept_dense


@pytest.mark.usefixtures("always_faster")
@pytest.mark.parametrize(("share", "scatter", "is_said"), [(0.2, 99.0, False), (0.3, 99.0, True), (0.2, -1.0, True)])
def test_a_busy_machine_is_said_in_the_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, share: float, scatter: float, is_said: bool
) -> None:
    planner._remembered.clear()
    monkeypatch.setattr(cores.Watch, "others_share", lambda self: share)
    monkeypatch.setattr(measure, "_SCATTER", scatter)
    fast = escort.convert(pruned(Small()), torch.randn(1, 3, 8, 8))
    count = 2 if scatter < 0 else 0
    said = (
        f"took {100 * share:.0f}% of the time of this machine's cores, and disturbed the times of {count} of 2 layers"
    )
    assert (said in caplog.text) is is_said
    assert ("layers were disturbed by other processes" in plan_table(fast.plan).caption) is bool(count)


@pytest.mark.usefixtures("always_faster")
def test_a_converted_model_does_not_train() -> None:
    fast = converted(pruned(Small()), torch.randn(1, 3, 8, 8))
    assert fast.train() is fast.eval() is fast
    assert not any(module.training for module in nn.Sequential(fast, nn.Linear(5, 5)).train()[0].modules())
    with pytest.raises(RuntimeError, match="frozen: fine-tune the original"):
        fast.requires_grad_()
    with pytest.raises(RuntimeError, match="no gradient, and its input needs one: detach"):
        fast(torch.randn(1, 3, 8, 8, requires_grad=True))


@pytest.mark.usefixtures("always_faster")
def test_what_a_converted_model_refuses_has_changed_nothing() -> None:
    x = torch.randn(1, 3, 8, 8)
    fast = converted(pruned(Small()), x)
    before = fast(x)
    for move, error in ((fast.half, TypeError), (fast.double, TypeError), (lambda: fast.to("meta"), ValueError)):
        with pytest.raises(error, match="first .*(convert the model again|convert it there)"):
            move()
        assert torch.equal(fast(x), before)
    assert fast.to("cpu", torch.float32) is fast


@pytest.mark.usefixtures("always_faster")
def test_arguments_by_name() -> None:
    model, x = pruned(Masked()), torch.randn(2, 3, 8, 8)
    named = {"bias": torch.randn(4, 8, 8), "mask": torch.rand(2, 1, 8, 8)}
    fast = escort.convert(model, x, named)
    assert fast.traced and list(fast.plan.layers) == ["conv", "other"]
    assert (fast.plan.input_names, len(fast.plan.input_shapes)) == (("bias", "mask"), 3)
    assert NetworkPlan.from_json(json.loads(json.dumps(fast.plan.to_json()))) == fast.plan
    with torch.no_grad():
        for batch in (2, 3):
            x = torch.randn(batch, 3, 8, 8)
            named = {"mask": torch.rand(batch, 1, 8, 8), "bias": torch.randn(4, 8, 8)}
            assert torch.allclose(fast(x, **named), model(x, **named), atol=1e-5)
        again = escort.replan(fast)
        assert torch.allclose(again(x, **named), fast(x, **named), atol=1e-5)
        nothing = escort.convert(model, (), {"x": x})
        assert torch.allclose(nothing(x=x), model(x), atol=1e-5)


@pytest.mark.usefixtures("always_faster")
def test_an_exported_program_takes_its_arguments_by_name() -> None:
    model, x, named = pruned(Masked()), torch.randn(2, 3, 8, 8), {"mask": torch.rand(2, 1, 8, 8)}
    program = torch.export.export(model, (x,), named).module()
    fast = escort.convert(program, x, named)
    assert type(fast.network) is Program and list(fast.plan.layers) == ["conv", "other"]
    with torch.no_grad():
        assert torch.allclose(fast(x, **named), model(x, **named), atol=1e-5)


@pytest.mark.usefixtures("always_faster")
def test_layers_that_are_skipped_stay_as_they_are() -> None:
    model, x = pruned(Small()), torch.randn(1, 3, 8, 8)
    fast = escort.convert(model, x, skip=lambda name, module: name == "first" and isinstance(module, nn.Conv2d))
    assert list(fast.plan.layers) == ["second"] and fast.plan.skipped == {"first": "you asked to skip it"}
    assert type(fast.network.get_submodule("first")) is nn.Conv2d
    with torch.no_grad():
        assert torch.allclose(fast(x), model(x), atol=1e-5)
    layer_by_layer = escort.convert(pruned(Branching()), torch.rand(1, 3, 8, 8), skip=lambda name, module: True)
    assert not layer_by_layer.traced
    with pytest.raises(ValueError, match="nothing to convert; layer first: you asked to skip it; layer second:"):
        escort.convert(model, torch.randn(1, 3, 8, 8), skip=lambda name, module: True)


@pytest.mark.usefixtures("always_faster")
def test_methods_to_choose_from() -> None:
    fast = escort.convert(three_convolutions(), torch.randn(1, 4, 8, 8), methods=["lowered"])
    weighed = {candidate.method for plan in fast.plan.layers.values() for candidate in plan.candidates}
    assert weighed == {"dense", "lowered"}


@pytest.mark.usefixtures("always_faster")
def test_a_plan_says_why_there_is_no_graph() -> None:
    plan = converted(pruned(Branching()), torch.rand(1, 3, 8, 8)).plan
    assert plan.not_tried.keys() == {"graph"} and "control flow" in plan.not_tried["graph"]
    assert "Not tried as a graph: Branching: " in " ".join(str(plan).split())
    assert not converted(pruned(Small()), torch.rand(1, 3, 8, 8)).plan.not_tried


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
        y = self.conv(x)
        return y if scale is None else y * scale


def test_an_input_beyond_the_example_is_refused() -> None:
    x, scale = torch.randn(1, 3, 8, 8), torch.tensor(2.0)
    fast = escort.convert(pruned(Scaled()), x)
    for call in (lambda: fast(x, scale), lambda: fast(x, scale=scale)):
        with pytest.raises(ValueError, match="scale was None when .* is a tensor now; pass it as it was, or convert"):
            call()
    model = pruned(Scaled())
    with_scale = escort.convert(model, x, {"scale": scale})
    with torch.no_grad():
        assert torch.allclose(with_scale(x, scale=torch.tensor(3.0)), model(x, torch.tensor(3.0)), atol=1e-5)


def test_what_is_converted_already_is_said() -> None:
    model, x = pruned(Scaled()), torch.randn(1, 3, 8, 8)
    with pytest.raises(TypeError, match="replan takes what escort.convert returned, got Scaled; convert it first"):
        escort.replan(model)  # type: ignore[arg-type]
    layer = escort.convert(model, x)
    if not layer.plan.kept_dense:
        with pytest.raises(ValueError, match="converted already; use escort.replan"):
            escort.convert(layer, x)


@pytest.mark.parametrize("skip", ["conv", ["conv"]])
def test_skip_is_a_function(skip: Any) -> None:
    with pytest.raises(TypeError, match=r"skip is a function of \(name, module\), got .*write lambda name, module"):
        escort.convert(pruned(Scaled()), torch.randn(1, 3, 8, 8), skip=skip)


@pytest.mark.usefixtures("always_faster")
def test_replan_measures_again() -> None:
    fast = escort.convert(pruned(Scaled()), torch.randn(1, 3, 8, 8))
    again = escort.replan(fast)
    for name, plan in fast.plan.layers.items():
        assert [c.time_us for c in again.plan.layers[name].candidates] != [c.time_us for c in plan.candidates]


def test_skip_takes_a_name_and_a_module() -> None:
    with pytest.raises(TypeError, match="got one of other arguments; write lambda name, module:"):
        escort.convert(pruned(Small()), torch.randn(1, 3, 8, 8), skip=lambda name: name == "first")  # type: ignore[arg-type, misc]
