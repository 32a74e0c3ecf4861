"""The table of a network's plan says what the plan says, in a terminal and in a notebook."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from torch import nn

import escort
from escort import report
from escort.network.plan import NetworkPlan, plan_table
from escort.network.wording import machine_line
from escort.planner import Candidate, Plan, timing
from escort.planner.machine import Machine
from escort.problem import Problem

MACHINE = Machine("a CPU", "avx2", 2, "2.13.0", "0.1.0")


def network_plan(kept_dense: bool = False) -> NetworkPlan:
    problem = Problem(8, 64, 16, 16, 128, (3, 3), stride=(2, 2), padding=(1, 1, 1, 1))
    candidates = (
        Candidate("direct", {}, 100.0, 1e-7),
        Candidate("dense", {}, 2500.0, 1e-7),
        Candidate("lowered", reason="takes no <dilation>"),
    )
    layers = {"stem[0]": Plan(problem, "direct", {}, candidates, MACHINE)}
    return NetworkPlan(
        layers=layers,
        skipped={"odd": "pads with 'reflect'"},
        input_shapes=((8, 64, 16, 16),),
        dense_time_us=3000.0,
        converted_time_us=1500.0,
        rel_error=1e-7,
        kept_dense=kept_dense,
        machine=MACHINE,
    )


def test_the_plan_table_says_what_the_plan_says():
    section = plan_table(network_plan(), whole=True)
    rows = {row[0]: dict(zip(section.columns, row, strict=True)) for row in section.rows}
    layer = rows["stem[0]"]
    assert layer["Convolution"] == "64->128 3x3, 16x16 /2"
    assert (layer["Method"], layer["µs"], layer["Dense µs"], layer["Speedup"]) == ("direct", "100", "2,500", "25.00x")
    assert "takes no <dilation>" in layer["Others µs"]
    assert rows["odd"]["Method"] == "left alone"
    assert rows["odd"]["Others µs"] == "pads with 'reflect'"
    assert rows["whole network"]["Speedup"] == "2.00x"
    assert "a CPU, avx2, 2 threads" in section.caption


def test_the_plan_table_says_why_the_dense_network_was_kept():
    plan = network_plan(kept_dense=True)
    last = plan_table(plan).rows[-1]
    assert last[3] == "kept dense"
    assert last[-1] == plan.reason


def test_the_terminal_prints_brackets_as_they_are():
    console = Console(width=120, record=True, file=None, quiet=False, force_terminal=False)
    with console.capture() as capture:
        console.print(report.terminal(plan_table(network_plan())))
    assert "stem[0]" in capture.get()
    words = " ".join(capture.get().split())
    assert "25.00x not lowered odd" in words and "or escort plan --candidates." in words


def test_a_gpu_is_named_with_its_driver() -> None:
    gpu = Machine("NVIDIA H200", "sm_90", 0, "2.11.0", "0.2.0", "580.159.04", "13.0", "9.19.0")
    assert machine_line(gpu) == "NVIDIA H200, sm_90, driver 580.159.04, CUDA 13.0, torch 2.11.0"
    assert machine_line(MACHINE) == "a CPU, avx2, 2 threads, torch 2.13.0"


def test_a_plan_prints_its_table() -> None:
    plan = network_plan()
    lines = str(plan).splitlines()
    assert lines[0].strip() == "Plan per layer" and any("stem[0]" in line and "25.00x" in line for line in lines)
    assert "whole network" in str(plan) and "Medians for an input of 8x64x16x16" in re.sub(r"\s+", " ", str(plan))
    html = plan._repr_html_()
    assert '<th scope="row">stem[0]</th>' in html and "takes no &lt;dilation&gt;" in html


def test_the_dense_method_of_a_gpu_has_one_column() -> None:
    problem = Problem(8, 64, 16, 16, 128, (3, 3), precision="fp16", device="cuda:0")
    candidates = Candidate("direct", {}, 100.0), Candidate("cudnn", {}, 250.0), Candidate("cublas", {}, 300.0)
    layer = Plan(problem, "direct", {}, candidates, MACHINE)
    plan = replace(network_plan(), layers={"a": layer}, skipped={})
    table = plan_table(plan)
    row = dict(zip(table.columns, table.rows[0], strict=True))
    assert (row["Dense µs"], row["Speedup"], row["Others µs"]) == ("250", "2.50x", "cublas 300")


def test_what_was_not_tried_is_said() -> None:
    caption = plan_table(replace(network_plan(), not_tried={"graph": "x.sum() > 0", "channels_last": "fp32"})).caption
    assert " Not tried as a graph: x.sum() > 0. Not tried in channels_last: fp32." in caption


def test_a_rival_has_a_line_of_its_own_or_a_reason() -> None:
    rival = plan_table(replace(network_plan(), rivals={"torch.compile": 2000.0})).rows[-1]
    assert rival[3:7] == ("torch.compile", "2,000", "3,000", "1.50x") and "dense model" in rival[7]
    caption = plan_table(replace(network_plan(), not_tried={"torch.compile": "there is no C compiler"})).caption
    assert " Not tried by torch.compile: there is no C compiler." in caption


def test_it_says_which_steps_run_natively() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.LogSoftmax(1), nn.Conv2d(8, 4, 3), nn.LogSoftmax(1)).eval()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "race", lambda runs, **_: [2.0] + [1.0] * (len(runs) - 1))
        fast, by_torch = (escort.convert(model, torch.randn(1, 3, 8, 8), methods=[m]) for m in ("direct", "dense"))
    assert fast.plan.native_steps == 2 and fast.plan.not_native == {"2": "is a LogSoftmax", "4": "is a LogSoftmax"}
    assert "2 of 4 steps run natively; not 2, 4 (is a LogSoftmax)." in " ".join(str(fast.plan).split())
    assert by_torch.plan.native_steps == 0 and by_torch.plan.not_native["0"] == "is run by method dense"
    assert "0 of 4 steps run natively; not 0, 3 (is run by method dense);" in " ".join(str(by_torch.plan).split())
    assert NetworkPlan.from_json(fast.plan.to_json()) == fast.plan


def test_it_says_why_steps_of_these_sizes_do_not_run_natively() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(x).mean(1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "race", lambda runs, **_: [2.0] + [1.0] * (len(runs) - 1))
        fast = escort.convert(Net().eval(), torch.randn(1, 3, 8, 8), methods=["direct"])
    assert list(fast.plan.not_native.values()) == ["averages other axes than the last ones"]


def test_it_says_where_torch_was_faster_and_not_chosen() -> None:
    layer = next(iter(network_plan().layers.values()))
    faster = Candidate("dense", {}, time_us=0.9 * (layer.time_us or 0.0))
    layer = replace(layer, candidates=(*layer.candidates, faster))
    plan = replace(network_plan(), layers={"a": layer})
    assert "In 1 of 1 layers torch is faster by less than the step between costs." in plan_table(plan).caption
    assert "torch is faster" not in plan_table(network_plan()).caption
