"""A plan that was made before is followed: nothing is measured, and what comes out is the same bit for bit."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import escort
from escort.network.plan import NetworkPlan
from escort.planner import timing
from tests.network.models import Small, pruned

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return pruned(Small())


@pytest.fixture(scope="module")
def plan(model: nn.Module) -> NetworkPlan:
    """A plan by which the layers run by different methods, as JSON brings it from another process."""
    first, second = (escort.convert(model, X, methods=[name]).plan for name in ("direct", "lowered"))
    layers = {"first": by(first, "first", "direct"), "second": by(second, "second", "lowered")}
    made = replace(first, layers=layers, kept_dense=False, methods=(), samples=1)
    return NetworkPlan.from_json(json.loads(json.dumps(made.to_json())))


def by(plan: NetworkPlan, name: str, method: str) -> Any:
    """A layer's plan with the choice of a method."""
    layer = plan.layers[name]
    chosen = next(c for c in layer.candidates if c.method == method and c.time_us is not None)
    return replace(layer, method=method, config=chosen.config)


@pytest.fixture
def no_timer(monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(*args: Any, **options: Any) -> None:
        raise AssertionError("something was timed")

    for name in ("race", "race_on_gpu"):
        monkeypatch.setattr(timing, name, measured)


@pytest.mark.usefixtures("no_timer")
def test_what_runs_is_what_the_plan_says(model: nn.Module, plan: NetworkPlan) -> None:
    one, other = (escort.convert(model, X, plan=plan) for _ in range(2))
    assert {name: layer.method for name, layer in one.plan.layers.items()} == {"first": "direct", "second": "lowered"}
    assert [layer.config for layer in one.plan.layers.values()] == [layer.config for layer in plan.layers.values()]
    assert not one.plan.kept_dense and one.plan.converted_time_us == plan.converted_time_us
    assert one.plan.batching == plan.batching and one.plan.layers["first"].times_from == "measured"
    assert torch.equal(one(X), other(X)), "bit for bit"
    torch.testing.assert_close(one(X), model(X))


@pytest.mark.usefixtures("no_timer")
def test_the_original_is_kept_where_the_plan_kept_it(model: nn.Module, plan: NetworkPlan) -> None:
    kept = escort.convert(model, X, plan=replace(plan, kept_dense=True))
    assert kept.plan.kept_dense and kept.plan.layers.keys() == plan.layers.keys()
    torch.testing.assert_close(kept(X), model(X))


@pytest.mark.usefixtures("no_timer")
def test_other_weights_of_the_model_follow_it_too(model: nn.Module, plan: NetworkPlan) -> None:
    torch.manual_seed(7)
    other = pruned(Small(), 0.82)
    fast = escort.convert(other, X, plan=plan)
    torch.testing.assert_close(fast(X), other(X))
    assert all(0.81 < share < 0.83 for share in fast.plan.sparsities.values()), "the zeros of the weights at hand"


@pytest.mark.usefixtures("no_timer")
def test_weights_of_far_other_zeros_do_not_follow_it(plan: NetworkPlan) -> None:
    for zeros in (0.6, 0.9):
        with pytest.raises(ValueError, match=f"layer first: the plan is for 80% zeros, the model has {zeros:.0%}, .* "):
            escort.convert(pruned(Small(), zeros), X, plan=plan)
    silent = replace(plan, sparsities={"first": plan.sparsities["first"]})
    with pytest.raises(ValueError, match="layer second: the plan does not say how many zeros it is for; convert it"):
        escort.convert(pruned(Small(), 0.8), X, plan=silent)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("kept_dense", value) for value in (None, [], "false", 1)),
        *(("skipped", value) for value in (None, [], {"a": 1}, {"a": "x" * 20000})),
        *(("refused", value) for value in (1, ["x"], "x" * 20000)),
        *((name, {"a": ["x"]}) for name in ("not_tried", "not_native")),
        *((name, 5) for name in ("device", "precision", "favor", "timer", "widened", "not_saved", "not_captured")),
        ("layers", [1]),
        ("machine", "here"),
        *(("packed_inputs", value) for value in (None, 0)),
        ("is_favor_asked", "true"),
        *(("converted_time_us", value) for value in (-1, math.nan, math.inf, None, "1", True)),
        *(("dense_time_us", value) for value in (-1, math.nan)),
        *(("rel_error", value) for value in (-1, math.nan, math.inf)),
        ("call_time_us", -1.0),
        *(("samples", value) for value in (-1, 0, 1.5, "1")),
        *(("native_steps", value) for value in (-1, 2.5, None)),
        *(("input_dtypes", value) for value in ("float32", None)),
        *(("methods", value) for value in ("direct", [1])),
        *(("sparsities", {"first": value}) for value in (-0.1, 1.5, math.nan, "0.8")),
        *(("rivals", {"eager": value}) for value in (-1, "1")),
        *(("input_shapes", [[value, 3, 16, 16]]) for value in (-1, 2.5, "2")),
    ],
)
def test_fields_that_are_no_plans_are_refused(plan: NetworkPlan, name: str, value: Any) -> None:
    with pytest.raises(ValueError, match="not a network plan: "):
        NetworkPlan.from_json({**plan.to_json(), name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("candidates.0.time_us", value) for value in (-1.0, math.nan, math.inf, "1", True, [1])),
        *(("candidates.0.method", value) for value in ("eval", 5, None, "x" * 20000)),
        *(("candidates.0.config", value) for value in ([1], "x", {"a": {}}, {"a": math.nan}, {"a": "x" * 20000})),
        *(("candidates.0.reason", value) for value in (5, "x" * 20000)),
        *(("candidates.0.rel_error", value) for value in (-1.0, "0")),
        *(("candidates.0.compile_s", value) for value in (-1.0, "0")),
        *(("candidates.0.code_bytes", value) for value in (-1, 1.5)),
        *(("candidates.0.timer", value) for value in ("sundial", 5)),
        ("candidates.0", 5),
        *(("candidates", value) for value in (5, {"a": 1}, "direct")),
        *(("config", value) for value in ([1], "x", 5)),
        *(("method", value) for value in ("", "eval", 5, ["direct"])),
        *(("is_steady", value) for value in (1, "yes", None)),
        *(("times_from", value) for value in ("hearsay", 5)),
        *(("problem", value) for value in (5, {})),
        *(("problem.batch", value) for value in (True, -1, 1.5, 1 << 40)),
        ("machine.threads", -2),
    ],
)
def test_plans_of_layers_that_are_none_are_refused(plan: NetworkPlan, name: str, value: Any) -> None:
    data = json.loads(json.dumps(plan.to_json()))
    place: Any = data["layers"]["first"]
    *way, last = [int(part) if part.isdecimal() else part for part in name.split(".")]
    for part in way:
        place = place[part]
    place[last] = value
    with pytest.raises(ValueError, match="^not a network plan: layer first: ") as caught:
        NetworkPlan.from_json(data)
    assert len(str(caught.value)) < 500


def test_what_is_no_plan_says_what_is_missing() -> None:
    with pytest.raises(ValueError, match="it has no layers, skipped, .*, machine; make it by fast.plan.to_json"):
        NetworkPlan.from_json({})


def test_an_infinite_error_is_plain_json(plan: NetworkPlan) -> None:
    wrong = replace(plan, rel_error=math.inf, kept_dense=True)
    assert NetworkPlan.from_json(json.loads(json.dumps(wrong.to_json(), allow_nan=False))) == wrong


def test_a_choice_that_is_wrong_here_is_refused(
    model: nn.Module, plan: NetworkPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("escort.planner.follow.check", lambda *args: None)
    with pytest.raises(ValueError, match="layer first: its plan has direct with .*does not compute it here"):
        escort.convert(model, X, plan=plan)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"effort": "best"}, "leave out effort"),
        ({"methods": ["direct"], "remeasure": True}, "leave out methods, remeasure"),
        ({"plan": "model.escort"}, "plan is the plan of a converted model"),
        ({"precision": "tf32"}, "TF32|tf32"),
    ],
)
def test_what_does_not_go_with_a_plan(
    model: nn.Module, plan: NetworkPlan, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        escort.convert(model, X, **{"plan": plan, **arguments})


def test_plans_of_something_else(model: nn.Module, plan: NetworkPlan) -> None:
    with pytest.raises(ValueError, match="the plan is for inputs of"):
        escort.convert(model, X[:1], plan=plan)
    for other in (replace(plan, input_dtypes=("float16",)), replace(plan, input_names=("x",))):
        with pytest.raises(ValueError, match="the plan is for inputs of .* with the names"):
            escort.convert(model, X, plan=other)
    with pytest.raises(ValueError, match="the plan is for a model of float16"):
        escort.convert(model, X, plan=replace(plan, widened="float16"))
    with pytest.raises(ValueError, match=r"as json.loads gives it, got str"):
        NetworkPlan.from_json(json.dumps(plan.to_json()))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the plan is for cuda, the model on cpu"):
        escort.convert(model, X, plan=replace(plan, device="cuda:0"))
    with pytest.raises(ValueError, match="only one of the two has the layer second"):
        escort.convert(model, X, plan=replace(plan, layers={"first": plan.layers["first"]}))
    wider = replace(plan.layers["first"], problem=replace(plan.layers["first"].problem, stride=(2, 2)))
    with pytest.raises(ValueError, match="layer first: the plan is for"):
        escort.convert(model, X, plan=replace(plan, layers={**plan.layers, "first": wider}))
    strange = replace(plan.layers["first"], config={**plan.layers["first"].config, "channel_block": 10**6})
    with pytest.raises(ValueError, match="layer first: its plan has direct, and .* is none of its configs"):
        escort.convert(model, X, plan=replace(plan, layers={**plan.layers, "first": strange}))
