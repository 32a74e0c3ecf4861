"""Where the time goes, and what the hardware counts."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import breakdown, counters, study
from escort import reference
from tests.benchmarks.small import QUICK, TINY, measured


def test_a_breakdown_has_every_part_of_layers_and_networks() -> None:
    rows = measured(study.break_down(replace(QUICK, factories=TINY), "fp32"))
    runs: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows:
        runs.setdefault((row.layer, row.method), {})[row.config["part"]] = row.time_us
    assert all(tuple(parts) == breakdown.PARTS for parts in runs.values())
    assert {method for layer, method in runs if layer == "all"} == {"escort", "eager"}
    lowered, direct = runs["inception_5a/5x5", "lowered"], runs["inception_5a/5x5", "direct"]
    assert lowered["im2col"] > 0 and lowered["product"] > 0 and lowered["direct"] == 0
    assert direct["direct"] > 0 and direct["im2col"] == direct["product"] == direct["padding"] == 0
    assert runs["all", "eager"]["product"] > 0 and runs["all", "eager"]["direct"] == 0


def test_what_the_device_did_is_told_apart_by_name() -> None:
    def event(name: str, time_us: float, device: str = "CUDA", annotation: bool = False) -> SimpleNamespace:
        elapsed = SimpleNamespace(elapsed_us=lambda: time_us)
        kind = SimpleNamespace(name=device)
        return SimpleNamespace(name=name, device_type=kind, time_range=elapsed, is_user_annotation=annotation)

    events = [
        event("direct", 1.0),
        event("void at::native::im2col_kernel<float>(long, float const*)", 2.0),
        event("sm90_xmma_gemm_f32f32_tf32f32_f32_tn_n_tilesize128x128x32", 4.0),
        event("void cusparse::csrmm_v2_kernel<float>", 8.0),
        event("void cudnn::winograd_nonfused::winogradForwardData4x4<float>", 16.0),
        event("void cudnn::ops::nchwToNhwcKernel<float>", 32.0),
        event("void at::native::vectorized_elementwise_kernel<4>", 64.0),
        event("aten::conv2d", 1000.0, device="CPU"),
        event("escort::direct", 1000.0),
        event("ProfilerStep#1", 1000.0, annotation=True),
    ]
    times = dict.fromkeys(breakdown.PARTS, 0.0)
    for part, time_us in breakdown.kernel_times(events):
        times[part] += time_us
    assert times == {"padding": 0.0, "im2col": 2.0, "product": 28.0, "direct": 1.0, "other": 96.0}


def test_operators_belong_to_the_part_that_calls_them() -> None:
    pad = SimpleNamespace(name="aten::constant_pad_nd", cpu_parent=None, self_cpu_time_total=1.0)
    copy = SimpleNamespace(name="aten::copy_", cpu_parent=pad, self_cpu_time_total=2.0)
    relu = SimpleNamespace(name="aten::relu", cpu_parent=None, self_cpu_time_total=4.0)
    assert list(breakdown.operator_times([pad, copy, relu])) == [("padding", 1.0), ("padding", 2.0), ("other", 4.0)]


def test_the_parts_of_a_run_sum_to_its_time() -> None:
    x = torch.randn(300, 300)
    times = breakdown.part_times(lambda: torch.relu(nn.functional.pad(x @ x, (1, 1))), "cpu")
    assert times["product"] > 0 and times["padding"] > 0 and times["other"] > 0
    assert times["im2col"] == times["direct"] == 0


NCU = """==PROF== Connected to process 7
escort says something
"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size","Grid Size","Device","CC",\
"Section Name","Metric Name","Metric Unit","Metric Value"
"0","7","python","h","zero","1","7","(256, 1, 1)","(1, 1, 1)","0","9.0","c","gpu__time_duration.sum","ns","900"
"1","7","python","h","direct","1","7","(256, 1, 1)","(9, 1, 1)","0","9.0","c","gpu__time_duration.sum","ns","21,500"
"1","7","python","h","direct","1","7","(256, 1, 1)","(9, 1, 1)","0","9.0","c","smsp__inst_executed.sum","inst","1,234"
"1","7","python","h","direct","1","7","(256, 1, 1)","(9, 1, 1)","0","9.0","c","not__there.sum","","n/a"
"""


def test_counters_are_those_of_the_longest_launch() -> None:
    expected = {"gpu__time_duration.sum": 21500.0, "smsp__inst_executed.sum": 1234.0}
    assert counters.longest_launch(NCU) == expected
    with pytest.raises(RuntimeError, match="no launch; it said: ==WARNING== No kernels"):
        counters.longest_launch("==WARNING== No kernels were profiled.")


def test_counter_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []

    def run(words: list[str], **_: Any) -> SimpleNamespace:
        seen.append(words)
        return SimpleNamespace(stdout=NCU, stderr="", returncode=0)

    monkeypatch.setattr(counters.subprocess, "run", run)
    (row,) = measured(study.count(QUICK, "fp32"))
    assert row.time_us == 21.5 and row.config["counters"] == {"smsp__inst_executed.sum": 1234.0}
    assert 0 <= row.rel_error <= reference.ERROR_BOUND["fp32"]
    what = json.loads(seen[0][-1])
    assert (what["network"], what["layer"], what["precision"]) == ("googlenet", "inception_5a/5x5", "fp32")
    assert {**what["config"], "counters": row.config["counters"]} == row.config
    assert seen[0][:3] == ["ncu", "--clock-control", "none"]


@pytest.mark.parametrize(
    ("said", "code", "message"),
    [
        ("==ERROR== ERR_NVGPUCTRPERM - The user does not have permission", 1, "for administrators"),
        ("==ERROR== Failed to find metric x", 1, "ncu failed on .*Failed to find metric x"),
    ],
)
def test_counters_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch, said: str, code: int, message: str) -> None:
    done = SimpleNamespace(stdout="", stderr=said, returncode=code)
    monkeypatch.setattr(counters.subprocess, "run", lambda *_, **__: done)
    with pytest.raises(RuntimeError, match=message):
        measured(study.count(QUICK, "fp32"))
