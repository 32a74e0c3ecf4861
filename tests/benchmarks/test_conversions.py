"""Conversions and loads in fresh processes: what is measured, what becomes of failures, what tables say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import exhibits, suite
from benchmarks.result_files import Result
from benchmarks.suite import Conversion, Row, Subject, conversions, exhaustive, fresh
from escort import prune
from escort.cuda import compiler
from escort.planner import timing
from escort.planner.timing import Timing
from tests.benchmarks.invoking import invoke, succeed_json
from tests.benchmarks.made_up import HEADER, cells, row
from tests.benchmarks.small import tiny, write_patterns

TINY = "tests.benchmarks.small:tiny"
CONVERSION = Conversion(TINY, 2, sparsity=0.5, input_size=(3, 8, 8))


def test_conversions_loads_choices_and_calls(tmp_path: Path) -> None:
    path = tmp_path / "conversions-fp32.json"
    options = "--batch", 2, "--sparsity", 0.5, "--load", "--calls", "--output", path
    command = "conversions", TINY, "--input", "3,8,8", *options
    printed = succeed_json(*command)
    result = Result.read(path)
    assert [row.to_json() for row in result.rows] == printed["rows"] and result.header["complete"]
    assert [(row.method, row.config.get("effort"), row.config.get("caches"), row.timer) for row in result.rows] == [
        ("convert", "fast", "empty", None),
        ("convert", "fast", "filled", None),
        ("load", "fast", None, None),
        ("escort", "fast", None, "call"),
        ("escort", "exhaustive", None, "call"),
        ("escort", None, None, "call"),
    ]
    assert result.rows[-1].config["layers"] == 2
    assert {(r.network, r.weights, r.layer, r.batch, r.dtype) for r in result.rows} == {
        ("tiny", "random-0.50", "all", 2, "fp32")
    }
    assert all(row.time_us > 0 and row.rel_error <= 1e-4 for row in result.rows)
    assert succeed_json(*command)["rows"] == printed["rows"], "what the file holds is not measured again"


Answers = list[dict[str, Any] | str]


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> tuple[list[tuple[dict[str, Any], dict[str, str]]], Answers]:
    """Processes that were started, by job and environment, and what the next ones answer, or fail with."""
    started: list[tuple[dict[str, Any], dict[str, str]]] = []
    answers: Answers = []

    def run(words: list[str], env: dict[str, str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert words[:3] == [sys.executable, "-m", "benchmarks.suite.fresh"]
        started.append((json.loads(words[3]), env))
        answer = answers.pop(0)
        if isinstance(answer, str):
            return subprocess.CompletedProcess(words, 1, "", f"Traceback\n{answer}\n")
        return subprocess.CompletedProcess(words, 0, f"the model's own words\n{json.dumps(answer)}\n", "")

    monkeypatch.setattr(conversions, "subprocess", SimpleNamespace(run=run, TimeoutExpired=subprocess.TimeoutExpired))
    return started, answers


def found(seconds: float, **more: Any) -> dict[str, Any]:
    about = {"network": "tiny", "weights": "random-0.50", "rel_error": 0.0, "peak_bytes": 3 << 20}
    return {**about, "time_us": seconds * 1e6, **more}


def test_caches_are_empty_once_and_loads_find_none(processes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESCORT_CACHE_MB", "0")
    started, answers = processes
    answers += [found(9.0), found(2.0), found(1.0)]
    said: list[str] = []
    rows = suite.measure_conversion(CONVERSION, with_load=True, limit_s=9.0, say=said.append)
    assert [(row.method, row.time_us) for row in rows] == [("convert", 9e6), ("convert", 2e6), ("load", 1e6)]
    assert "empty caches: 9.00 s, 3 MiB" in said[0] and "load and first call: 1.00 s" in said[2]
    (first, with_empty), (second, with_filled), (third, bare) = started
    assert [job["task"] for job in (first, second, third)] == ["convert", "convert", "load"]
    assert Conversion.from_json(first["conversion"]) == CONVERSION
    assert with_empty == with_filled and not Path(with_empty["ESCORT_CACHE_DIR"]).exists()
    assert "ESCORT_CACHE_MB" not in with_empty
    assert "saved" not in first and second["saved"] == third["saved"]
    assert "ESCORT_CACHE_DIR" not in bare and (bare["HOME"], bare["PATH"]) == (os.devnull, os.devnull)


def test_a_load_that_fails_leaves_the_conversions(processes: Any) -> None:
    processes[1].extend([found(9.0), found(2.0), "RuntimeError: kernels need a compiler"])
    with pytest.warns(UserWarning, match="N=2 fast, load is left out: .* ended with 1: RuntimeError: kernels need"):
        rows = suite.measure_conversion(CONVERSION, with_load=True, limit_s=9.0)
    assert [row.config["caches"] for row in rows] == ["empty", "filled"]


def test_a_network_that_fails_leaves_the_others(processes: Any, tmp_path: Path) -> None:
    processes[1].extend([found(9.0), found(2.0), "ValueError: no such network"])
    path = tmp_path / "made.json"
    options = "--input", "3,8,8", "--batch", 1, "--no-choices", "--output", path
    result = invoke("conversions", TINY, "nowhere:net", *options)
    assert result.exit_code == 1 and "failed: made, nowhere:net" in result.stderr and "no such network" in result.stderr
    assert [row.method for row in Result.read(path).rows] == ["convert", "convert"]


def test_processes_end_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(words: list[str], timeout: float, **_: Any) -> None:
        raise subprocess.TimeoutExpired(words, timeout)

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(RuntimeError, match="it took more than 9 s"):
        suite.measure_choices(CONVERSION, search_s=1.0, limit_s=9.0)


def test_efforts_and_batches_are_conversions_of_their_own(processes: Any, tmp_path: Path) -> None:
    started, answers = processes
    answers += [found(1.0) for _ in range(8)]
    options = (
        "--input",
        "3,8,8",
        "--batch",
        "1,4",
        "--effort",
        "fast,3",
        "--no-choices",
        "--output",
        tmp_path / "a.json",
    )
    printed = succeed_json("conversions", TINY, *options)
    assert [(r["batch"], r["config"]["effort"]) for r in printed["rows"][::2]] == [
        (1, "fast"),
        (1, 3.0),
        (4, "fast"),
        (4, 3.0),
    ]
    assert [job["conversion"]["batch"] for job, _ in started] == [1] * 4 + [4] * 4
    answers.append(found(1.0, config={"layers": 1}, calls=[{"timer": "call", "time_us": 5.0}]))
    made = "--no-conversions", "--no-choices", "--calls", "--batch", 1, "--output", tmp_path / "b.json"
    (called,) = succeed_json("conversions", TINY, "--input", "3,8,8", *made)["rows"]
    assert (called["time_us"], called["timer"], called["config"]) == (5.0, "call", {"layers": 1})


def choices(monkeypatch: pytest.MonkeyPatch, search_s: float, *timings: Timing) -> dict[str, Any]:
    def race(runs: Any, device: Any) -> list[Timing]:
        for run in runs:
            run()
        return [*timings, *[Timing(9.0, "calls")] * (len(runs) - len(timings))]

    monkeypatch.setattr(fresh, "_race", race)
    return fresh.choices(CONVERSION, search_s)


def test_what_there_is_no_time_to_search_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = Timing(3.0, "calls"), Timing(2.0, "calls")
    for search_s, layers in ((60.0, 2), (0.0, 0)):
        fast, exhaustive = choices(monkeypatch, search_s, *taken)["choices"]
        assert (fast["config"]["effort"], fast["time_us"]) == ("fast", 3.0)
        assert (exhaustive["config"]["effort"], exhaustive["time_us"]) == ("exhaustive", 2.0)
        about = exhaustive["config"]
        assert (about["searched_layers"], about["all_layers"], about["candidates"] > 2) == (layers, 2, layers > 0)
        assert max(fast["rel_error"], exhaustive["rel_error"]) < 1e-4
    with pytest.raises(RuntimeError, match="effort exhaustive: out of device memory"):
        choices(monkeypatch, 0.0, Timing(3.0), Timing(None, reason="out of device memory"))


def test_a_search_of_all_candidates_is_checked_and_takes_close_memory_formats(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    model, x = tiny().eval(), torch.randn(2, 3, 8, 8)
    real = exhaustive.convert_keeping

    def several(*args: Any, **options: Any) -> Any:
        """As if there were three networks, of which one is far slower."""
        assert options["only_likely"]
        converted, (network,) = real(*args, **options)
        plans = {name: replace(plan, candidates=()) for name, plan in network.layers.items()}
        times_us = {"far": 3.0, "close": 1.2, "best": 1.0}
        monkeypatch.setattr(exhaustive, "_time_us", lambda each: times_us[next(iter(each.skipped))])
        return converted, [replace(network, layers=plans, skipped={name: ""}) for name in times_us]

    monkeypatch.setattr(exhaustive, "convert_keeping", several)
    _, found = exhaustive.convert_and_search(model, x, precision="fp32", search_s=60.0)
    assert [each.about["searched_layers"] for each in found] == [2, 2]
    monkeypatch.setattr(exhaustive, "largest_error", lambda *_: 0.5)
    with pytest.raises(RuntimeError, match=r"an exhaustive search chose is off by 5.0e-01 \(bound 1e-04\)"):
        exhaustive.convert_and_search(model, x, precision="fp32", search_s=0.0)


def test_a_wrong_conversion_is_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    convert = fresh.escort.convert

    def refusing(*args: Any, **options: Any) -> Any:
        converted = convert(*args, **options)
        converted.plan = replace(converted.plan, refused="its outputs differ")
        return converted

    monkeypatch.setattr(fresh.escort, "convert", refusing)
    with pytest.raises(RuntimeError, match="its outputs differ"):
        fresh.convert(CONVERSION)


def test_a_load_is_held_to_what_was_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fresh, "_hide_compiler", lambda: None)  # from all later tests
    saved = tmp_path / "saved"
    fresh.convert(CONVERSION, str(saved))
    tensors = torch.load(saved / "tensors.pt")
    torch.save({**tensors, "outputs": [out + 1.0 for out in tensors["outputs"]]}, saved / "tensors.pt")
    with pytest.raises(RuntimeError, match="what was loaded: relative error"):
        fresh.load(CONVERSION, str(saved))
    (saved / "reason").write_text("it calls code of its own")
    with pytest.raises(RuntimeError, match="not saved: it calls code of its own"):
        fresh.load(CONVERSION, str(saved))


def test_a_hidden_compiler_is_hidden() -> None:
    pytest.importorskip("cuda.pathfinder")
    hide = "from benchmarks.suite import fresh; fresh._hide_compiler(); fresh._check_compiler_is_hidden()"
    subprocess.run([sys.executable, "-c", hide], check=True)
    compiler.nvrtc_version()
    with pytest.raises(RuntimeError, match="NVRTC .* was there although"):
        fresh._check_compiler_is_hidden()


def test_networks_are_pruned_to_patterns_of_their_shapes(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(4, 8, 3), nn.Conv2d(4, 8, 3), nn.Conv2d(4, 8, 3))
    before = [conv.weight.detach().clone() for conv in model]
    suite.prune_to_patterns(model, write_patterns(tmp_path))
    shares = [conv.weight.count_nonzero().item() for conv in model]
    assert shares == [before[0].numel(), 16, 16, before[3].numel()]
    kept = model[1].weight[0].flatten()[[3, 21]]
    assert torch.allclose(kept, before[1][0].flatten()[[3, 21]] * (288 / 16) ** 0.5)
    with pytest.raises(ValueError, match="no pattern of the shape of a convolution of Sequential"):
        suite.prune_to_patterns(nn.Sequential(nn.Conv2d(1, 1, 1)), tmp_path / "net_l1.npz")


def test_patterns_take_the_place_of_a_sparsity(tmp_path: Path) -> None:
    arrays = {"shape": [8, 8, 3, 8, 3, 1, 1, 1], "indptr": range(9), "indices": [5] * 8}
    np.savez(tmp_path / "net_l1.npz", **{f"conv.{name}": np.array(part) for name, part in arrays.items()})
    subject = Subject.load(TINY, sparsity=0.9, patterns=tmp_path / "net_l1.npz", input_size=(3, 8, 8))
    first, second = (module for module in subject.model if isinstance(module, nn.Conv2d))
    assert (first.weight.count_nonzero(), second.weight.count_nonzero()) == (8, second.weight.numel())
    assert subject.weights == "net_l1"


def test_depthwise_convolutions_stay_dense_where_that_is_asked() -> None:
    subject = Subject.load("mobilenet_v2", sparsity=0.9, dense_depthwise=True)
    shares = {name: (conv.weight == 0).double().mean() for name, conv in prune.convolutions(subject.model).items()}
    depthwise = {name for name, conv in prune.convolutions(subject.model).items() if conv.groups > 1}
    assert len(depthwise) == 17
    dense = {name for name, share in shares.items() if share < 0.89}
    assert dense == {*depthwise, "features.0.0"} and subject.weights == "random-0.90-dense-depthwise"


def test_torchvisions_networks_have_norms_that_know_their_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    def net() -> nn.Module:
        large = nn.Conv2d(3, 8, 3)
        large.weight.data *= 1e6
        return nn.Sequential(large, nn.BatchNorm2d(8, momentum=0.3), nn.ReLU())

    library, models = ModuleType("torchvision"), ModuleType("torchvision.models")
    library.models, models.net = models, net  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchvision", library)
    monkeypatch.setitem(sys.modules, "torchvision.models", models)
    subject = Subject.load("torchvision:net", sparsity=None)
    assert (subject.name, subject.input_size) == ("net", (3, 224, 224))
    norm = subject.model[1]
    assert not subject.model.training and not norm.training and norm.momentum == 0.3
    with torch.no_grad():
        assert subject.model(torch.randn(2, 3, 64, 64)).std() < 10.0


def conversion_rows(*seconds: float, effort: Any = "fast", network: str = "resnet50", dtype: str = "fp16") -> list[Row]:
    about: dict[str, Any] = {"weights": "random-0.90", "dtype": dtype}
    configs = [{"caches": "empty", "effort": effort}, {"caches": "filled", "effort": effort}]
    return [
        row(network, "all", "convert", s * 1e6, config=config, batch=1, **about)
        for s, config in zip(seconds, configs, strict=False)
    ]


def test_tables_of_conversions_tell_aims() -> None:
    load = row(
        "resnet50", "all", "load", 2.5e6, config={"effort": "fast"}, batch=1, weights="random-0.90", dtype="fp16"
    )
    rows = [*conversion_rows(11.0, 3.96), load, *conversion_rows(21.0, 5.0, network="densenet121")]
    rows += conversion_rows(1.0, 1.0, effort=3.0)
    tables = exhibits.tables({"conversions-fp16": Result(HEADER, rows)})
    lines = cells(tables["conversions-fp16"])
    assert [line["Reached"] for line in lines] == ["yes", "no", "-"] and "choices-fp16" not in tables
    first = lines[0]
    assert [first[name] for name in ("Effort", "Empty caches, s", "Filled, s", "Load, s", "Aims, s")] == [
        "fast",
        "11.0",
        "4.0",
        "2.5",
        "12, 4, 3",
    ]
    on_cpu = exhibits.tables({"conversions-fp16": Result({**HEADER, "device": "cpu"}, rows)})
    assert {line["Aims, s"] for line in cells(on_cpu["conversions-fp16"])} == {"-"}, "aims are about GPUs"


def test_tables_of_choices_have_a_geometric_mean() -> None:
    exhaustive = {"effort": "exhaustive", "searched_layers": 5, "all_layers": 7}
    rows = [
        row(network, "all", "escort", time_us, config=config, batch=1, weights="random-0.90", timer="graph")
        for network, fast in (("a", 110.0), ("b", 90.0))
        for config, time_us in (({"effort": "fast"}, fast), (exhaustive, 100.0))
    ]
    table = exhibits.tables({"conversions-fp32": Result(HEADER, rows)})["choices-fp32"]
    assert [line["Ratio"] for line in cells(table)] == [
        "1.100",
        "0.900",
    ] and "0.995 in the geometric mean" in table.caption
    assert {line["Layers searched"] for line in cells(table)} == {"5 of 7"}
    other = [replace(each, time_us=2.0 * each.time_us) if each.config["effort"] == "fast" else each for each in rows]
    results = {"conversions-fp32": Result(HEADER, rows), "conversions-fp16": Result(HEADER, other)}
    captions = [table.caption for name, table in exhibits.tables(results).items() if name.startswith("choices")]
    assert len(captions) == 2 and all("1.407 over all precisions" in caption for caption in captions)


def test_tables_of_calls_of_conversions_tell_aims() -> None:
    def called(network: str, **times: float) -> list[Row]:
        about: dict[str, Any] = {"batch": 1, "config": {"layers": 10}, "weights": "random-0.90"}
        return [row(network, "all", "escort", us, timer=timer, **about) for timer, us in times.items()]

    rows = called("a", graph=100.0, call=134.0, pipelined=99.0, host=90.0)
    rows += called("b", graph=100.0, call=136.0, pipelined=99.0, host=101.0) + called("cpu", call=1.0)
    tables = exhibits.tables({"conversions-fp32": Result(HEADER, rows)})
    names = "Call, µs", "Aim, µs", "Reached", "Host per layer, µs", "It is reached"
    assert [tuple(line[name] for name in names) for line in cells(tables["callers-fp32"])] == [
        ("134", "135", "yes", "9.0", "yes"),
        ("136", "135", "no", "10.1", "no"),
    ]
    assert set(tables) & {"choices-fp32", "conversions-fp32"} == set()


def test_tables_of_calls_tell_what_a_caller_sees() -> None:
    def timed(method: str, **times: float) -> list[Row]:
        about: dict[str, Any] = {"batch": 1, "weights": "random-0.90"}
        return [row("resnet50", "all", method, us, timer=timer, **about) for timer, us in times.items()]

    rows = [*timed("escort", graph=100.0, call=134.0, pipelined=99.0), *timed("eager", call=900.0, pipelined=800.0)]
    rows += timed("graph", graph=500.0)
    lines = cells(exhibits.tables({"networks-fp32": Result(HEADER, rows)})["calls-fp32"])
    assert [
        (line["Engine"], line["Graph, µs"], line["Call, µs"], line["Aim, µs"], line["Reached"]) for line in lines
    ] == [
        ("escort", "100", "134", "135", "yes"),
        ("eager", "500", "900", "-", "-"),
    ]
    rows[1] = replace(rows[1], time_us=136.0)
    (first, _) = cells(exhibits.tables({"networks-fp32": Result(HEADER, rows)})["calls-fp32"])
    assert first["Reached"] == "no"


@pytest.mark.gpu
def test_conversions_on_a_gpu(tmp_path: Path) -> None:
    options = "--input", "3,32,32", "--batch", 4, "--device", "cuda", "--precision", "fp16", "--load", "--calls"
    result = invoke("conversions", "tests.benchmarks.test_conversions:wide", *options, "--output", tmp_path / "a.json")
    rows = Result.read(tmp_path / "a.json").rows
    raced = [row.timer for row in rows if row.method == "escort"]
    assert raced == ["graph", "graph", "graph", "call", "pipelined", "host"], result.stderr
    assert [row.config["caches"] for row in rows if row.method == "convert"] == ["empty", "filled"]
    assert "MiB of the GPU at most" in result.stderr


def wide() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1), nn.ReLU())


@pytest.mark.gpu
def test_the_hosts_time_on_a_gpu() -> None:
    x = torch.randn(4096, 4096, device="cuda")

    def long() -> torch.Tensor:
        return x @ x

    def short() -> torch.Tensor:
        return x[:32, :32] + 1.0

    waited = timing.race_on_host([long, short], "cuda:0", budget_s=0.5)
    pipelined = timing.race_on_host([long, short], "cuda:0", pipelined=True, budget_s=0.5)
    assert pipelined[1] < waited[1] < waited[0] and pipelined[1] < pipelined[0]
