"""A plan on a GPU that is followed: nothing is timed, and what comes out is the same bit for bit."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

import escort
from escort.methods import by_name
from escort.network.plan import NetworkPlan
from escort.planner import timing
from escort.problem import TORCH_DTYPE, Precision
from tests.network.gpu.networks import PRECISIONS, Mixed, assert_close, each, pruned, samples

pytestmark = pytest.mark.gpu


@each(*PRECISIONS)
def test_a_plan_is_followed(precision: Precision, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = pruned(Mixed()).cuda().to(TORCH_DTYPE[precision]), samples(precision)
    chosen = escort.convert(model, x, precision=precision).plan
    plan = NetworkPlan.from_json(json.loads(json.dumps(replace(chosen, kept_dense=False).to_json())))

    def measured(*args: Any, **options: Any) -> None:
        raise AssertionError("something was timed")

    monkeypatch.setattr(timing, "race_on_gpu", measured)
    one, other = (escort.convert(model, x, plan=plan) for _ in range(2))
    for name, layer in one.plan.layers.items():
        method = by_name(plan.layers[name].method, layer.problem.device)
        config = method.config_type(**plan.layers[name].config)
        assert layer.method == method.name
        assert method.config_type(**layer.config) == method.without_trying(config), "cuDNN's search is left out"
    with torch.inference_mode():
        assert torch.equal(one(x), other(x))
    assert_close(one, model, x, precision)
