"""The plan of a network as a value, and the devices there are."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from escort.network.plan import NetworkPlan
from escort.planner.machine import Machine, find_device

PLAN = NetworkPlan(
    layers={},
    skipped={},
    input_shapes=((2, 3), (4,), (5, 1)),
    dense_time_us=3.0,
    converted_time_us=2.0,
    rel_error=0.0,
    kept_dense=False,
    machine=Machine("A GPU", "sm_90", 0, "2.11", "0"),
)


def test_an_example_is_like_the_one_that_was_planned_for() -> None:
    plan = replace(PLAN, input_dtypes=("float16", "int64", "bfloat16"))
    inputs = plan.example("cpu").args
    assert [(tuple(x.shape), x.dtype) for x in inputs] == [
        ((2, 3), torch.float16),
        ((4,), torch.int64),
        ((5, 1), torch.bfloat16),
    ]
    assert inputs[0].any() and not inputs[1].any()
    assert {x.dtype for x in PLAN.example("cpu").args} == {torch.float32}
    named = replace(plan, input_names=("mask", "scale")).example("cpu")
    assert [tuple(x.shape) for x in named.args] == [(2, 3)]
    assert {name: (tuple(x.shape), x.dtype) for name, x in named.kwargs.items()} == {
        "mask": ((4,), torch.int64),
        "scale": ((5, 1), torch.bfloat16),
    }


@pytest.mark.parametrize("device", ["cpu", "cuda:0", "cuda:12"])
@pytest.mark.parametrize("precision", ["fp32", "tf32", "fp16", "bf16"])
def test_a_plan_for_any_device_survives_json(device: str, precision: str) -> None:
    plan = replace(PLAN, device=device, precision=precision, timer="graph", input_dtypes=("float16",) * 3)
    plan = replace(plan, input_names=("mask",), not_tried={"channels_last": "for a reason"}, samples=2)
    plan = replace(plan, rivals={"torch.compile": 2.5})
    assert NetworkPlan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("gpu", "'gpu' is no device; name cpu, cuda or cuda:0"),
        ("cuda:-1", "no device"),
        ("mps", "not on mps; use cpu or cuda"),
        ("cuda:7", "there is no cuda:7; torch sees 2 GPUs"),
    ],
)
def test_devices_that_are_not_here(monkeypatch: pytest.MonkeyPatch, name: str, says: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    with pytest.raises(ValueError, match=says):
        find_device(name)
    assert find_device("cuda") == torch.device("cuda:1") and find_device("cuda:0") == torch.device("cuda:0")
    assert str(find_device("cpu:0")) == "cpu"
