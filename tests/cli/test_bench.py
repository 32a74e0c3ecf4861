"""escort bench: a model of the user's beside its rivals, each alone on the CPU, and why one of them is missing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from escort.cli.engines import ENGINES, Bench, Engine, Turns, engine, placed_on, take_turns, turns, worker
from escort.cli.rivals import Race, measure
from tests.cli.invoking import fail, succeed, succeed_json
from tests.cli.named import TINY, tiny

X = (torch.randn(2, 3, 8, 8),)
ONE_ROUND = "--rounds", "1"


def test_bench_of_a_model(pruned: Path) -> None:
    report = succeed_json("bench", TINY, "--checkpoint", pruned, "--input", "2,3,8,8", "--against", "eager")
    ways = [(result["method"], result["config"]["memory_format"]) for result in report["results"]]
    assert ways == [("escort", "contiguous"), ("eager", "contiguous"), ("eager", "channels_last")]
    assert all(result["time_us"] > 0 and result["rel_error"] <= 1e-4 for result in report["results"])
    ours = report["results"][0]["time_us"]
    assert [result["speedup"] for result in report["results"]] == [r["time_us"] / ours for r in report["results"]]
    assert report["input_shapes"] == [[2, 3, 8, 8]] and report["precision"] == "fp32"


def test_bench_against_onnxruntime() -> None:
    pytest.importorskip("onnxscript")
    text = succeed("bench", TINY, "--input", "1,3,8,8", "--against", "onnxruntime").stdout
    assert "onnxruntime" in text and "1.00x" in text and "take turns" in text


def test_what_is_missing_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(model: nn.Module, **options: Any) -> Any:
        def run(*inputs: torch.Tensor) -> None:
            raise OSError("no C++ compiler\nand more")

        return run

    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setattr(torch, "compile", failing)
    results = measure(tiny().eval(), X, ["compile", "onnxruntime"])
    assert [result.method for result in results] == ["escort", "compile", "onnxruntime"]
    assert results[0].time_us is not None and results[0].reason is None
    assert (results[1].time_us, results[1].reason) == (None, "OSError: no C++ compiler")
    assert results[2].time_us is None and "pip install escort-sparse[bench]" in str(results[2].reason)


def test_a_rival_that_computes_something_else_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = [Way("wrong", {}, lambda: torch.zeros(2, 5)), Way("less", {}, lambda: ())]
    monkeypatch.setitem(rivals.RIVALS, "wrong", lambda model, inputs: wrong)
    ours, *others = measure(tiny().eval(), X, ["wrong"])
    assert ours.time_us is not None
    assert all(other.time_us is None for other in others)
    assert "differs from the model in float64 by 1.0e+00" in str(others[0].reason) and others[1].reason


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_bench_on_a_gpu(precision: str) -> None:
    args = "--input", "2,3,32,32", "--device", "cuda", "--precision", precision, "--against", "eager,onnxruntime"
    report = succeed_json("bench", TINY, *args)
    assert {result["timer"] for result in report["results"] if result["time_us"]} <= {"graph", "events"}
    assert [result["method"] for result in report["results"]] == ["escort", "eager", "eager", "onnxruntime"]
    assert report["results"][-1]["reason"] == "ONNX Runtime is timed on the CPU only"
