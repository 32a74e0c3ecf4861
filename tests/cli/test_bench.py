"""escort bench: a model of the user's beside its rivals, each alone on the CPU, and why one of them is missing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from statistics import median

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from escort.cli.engines import ENGINES, Bench, Engine, Turns, engine, placed_on, take_turns, turns, worker
from escort.cli.rivals import Race, measure
from tests.cli.invoking import invoke, succeed, succeed_json
from tests.cli.named import TINY, tiny

X = (torch.randn(2, 3, 8, 8),)
ONE_ROUND = "--rounds", "1"


def test_bench_of_a_model(pruned: Path) -> None:
    args = "--checkpoint", pruned, "--input", "2,3,8,8", "--against", "eager", "--rounds", "2", "--threads", "1"
    report = succeed_json("bench", TINY, *args)
    ways = [(result["method"], result["config"]["memory_format"]) for result in report["results"]]
    assert ways == [("escort", "contiguous"), ("eager", "contiguous"), ("eager", "channels_last")]
    assert all(result["time_us"] > 0 and result["rel_error"] <= 1e-4 for result in report["results"])
    ours = report["results"][0]["time_us"]
    assert [result["speedup"] for result in report["results"]] == [r["time_us"] / ours for r in report["results"]]
    assert report["input_shapes"] == [[2, 3, 8, 8]] and report["precision"] == "fp32"
    assert report["machine"]["threads"] == 1
    for result in report["results"]:
        assert len(result["rounds_us"]) == 2 and result["time_us"] == median(result["rounds_us"])
        assert result["version"] == version("torch") and 0.0 <= result["others"] <= 1.0


def test_bench_of_a_model_of_bytes() -> None:
    args = "--input", "1,8,8,3", "--against", "eager", *ONE_ROUND
    report = succeed_json("bench", "tests.cli.named:of_bytes", *args)
    assert len(report["results"]) == 3 and all(result["rel_error"] <= 1e-4 for result in report["results"])


@pytest.mark.parametrize("rival", ["onnxruntime", "openvino"])
def test_bench_against_engines_that_take_onnx(rival: str) -> None:
    for package in (rival, "onnxscript"):
        pytest.importorskip(package)
    text = succeed("bench", TINY, "--input", "1,3,8,8", "--against", rival, *ONE_ROUND).stdout
    assert rival in text and "1.00x" in text and "each engine alone" in text and "differs" not in text


def test_what_is_missing_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    results = measure(tiny().eval(), X, Race(["litert", "onnxruntime"], rounds=1))
    assert [result.method for result in results] == ["escort", "litert", "onnxruntime"]
    assert results[0].time_us is not None and results[0].reason is None
    assert results[1].time_us is None and "--tflite FILE" in str(results[1].reason)
    assert results[2].time_us is None and "pip install escort-sparse[bench]" in str(results[2].reason)


class Wrong(nn.Module):
    """Computes something else than :func:`tiny`."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros(2, 5)


class Less(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return ()


class Failing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise OSError("no C++ compiler\nand more")


class Ending(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        os._exit(3)


def test_a_rival_that_is_wrong_or_fails_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def others(bench: Bench) -> list[Engine]:
        modules = {"wrong": Wrong(), "less": Less(), "failing": Failing(), "ending": Ending()}
        return [Engine(name, {}, "torch_module", bench.module(name, m, X)) for name, m in modules.items()]

    monkeypatch.setitem(ENGINES, "eager", others)
    began: list[tuple[str, int]] = []
    race = Race(["eager"], rounds=2, begin=lambda method, number: began.append((method, number)))
    ours, *results = measure(tiny().eval(), X, race)
    assert ours.time_us is not None and all(other.time_us is None for other in results)
    reasons = [str(other.reason) for other in results]
    assert "differs from the model in float64 by 1.0e+00" in reasons[0]
    assert reasons[1:] == [
        "it returns 0 outputs instead of 1",
        "OSError: no C++ compiler",
        "its process ended with 3: without a word",
    ]
    assert began == [(name, 0) for name in ("escort", "wrong", "less", "failing", "ending")] + [("escort", 1)]


def test_a_model_that_cannot_be_pickled_says_so(tmp_path: Path) -> None:
    class Local(nn.Module):
        pass

    with pytest.raises(ValueError, match="handed to a process of its own.*top of an importable module"):
        Bench(Local(), X, tmp_path, 1).module("local", Local(), X)


def test_a_turn_that_others_disturb_is_tried_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(turns, "_TRIES", 3)
    shares = iter([0.5, 0.2, 0.01, 0.0, 0.9, 0.8, 0.7])
    expected = [torch.ones(2)]
    wanted: list[bool] = []

    def in_a_process(engine: Engine, outputs: Path | None, _: Turns) -> dict[str, object]:
        wanted.append(outputs is not None)
        if outputs is not None:
            np.savez(outputs, np.ones(2))
        share = next(shares)
        return {"time_us": 1000.0 * share, "others": share, "version": "1"}

    monkeypatch.setattr(turns, "_in_a_process", in_a_process)
    some = Engine("some", {}, "torch_module", tmp_path)
    (result,) = take_turns([some], expected, 1e-4, tmp_path, Turns(1, rounds=3))
    assert result.rounds_us == (10.0, 0.0, 700.0) and result.time_us == 10.0
    assert result.others == 0.7 and result.rel_error == 0.0
    assert wanted == [True] + [False] * 6


def test_outputs_of_the_users_files_are_found_by_shape_and_content(tmp_path: Path) -> None:
    maps, a, b = torch.randn(1, 3, 4, 5), torch.randn(1, 7), torch.randn(1, 7)
    np.savez(tmp_path / "outputs.npz", b.numpy(), maps.permute(0, 2, 3, 1).numpy(), a.reshape(1, 7, 1).numpy())
    some = Engine("litert", {}, "litert", tmp_path, is_ordered=False)
    error, reason = turns._compare(some, tmp_path / "outputs.npz", [maps, a, b], 1e-4)
    assert (error, reason) == (0.0, None)
    ordered = Engine("eager", {}, "torch_module", tmp_path)
    assert turns._compare(ordered, tmp_path / "outputs.npz", [maps, a, b], 1e-4)[1] is not None


def test_the_process_of_another_engine_does_not_load_torch(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    bench = Bench(tiny().eval(), X, tmp_path, 1)
    code = (
        "import runpy, sys; del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__'); "
        "print(sorted({'torch', 'escort', 'openvino', 'onnxruntime'} & set(sys.modules)))"
    )
    (some,) = engine.onnxruntime(bench)
    job = turns.job(some, None, Turns(1, seconds=0.01))
    words = [sys.executable, "-c", code, worker.__file__, json.dumps(job)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "['onnxruntime']"


def test_threads_and_cores_are_set_and_put_back() -> None:
    cores, threads = os.sched_getaffinity(0), torch.get_num_threads()
    with placed_on(1) as count:
        assert count == torch.get_num_threads() == len(os.sched_getaffinity(0)) == 1
    assert (os.sched_getaffinity(0), torch.get_num_threads()) == (cores, threads)
    with placed_on(None) as count:
        assert count == threads and os.sched_getaffinity(0) == cores
    with pytest.raises(ValueError, match="--threads 9999: this process may use"), placed_on(9999):
        pass


def test_options_that_do_not_go_with_a_gpu_or_name_no_file() -> None:
    args = "bench", TINY, "--input", "1,3,8,8"
    assert "are for the CPU" in invoke(*args, "--device", "cuda", "--threads", "1").stderr
    assert "nothing.tflite: there is no such file" in invoke(*args, "--tflite", "nothing.tflite").stderr


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_bench_on_a_gpu(precision: str) -> None:
    args = "--input", "2,3,32,32", "--device", "cuda", "--precision", precision, "--against", "eager,onnxruntime"
    report = succeed_json("bench", TINY, *args)
    assert {result["timer"] for result in report["results"] if result["time_us"]} <= {"graph", "events"}
    assert [result["method"] for result in report["results"]] == ["escort", "eager", "eager", "onnxruntime"]
    assert report["results"][-1]["reason"] == "onnxruntime is timed on the CPU only"
