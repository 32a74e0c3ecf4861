"""The commands as a user types them: what they print, write and return."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from safetensors.torch import load_file

import escort
from escort import artifact, cache
from escort.cli import models
from escort.network.check import settle_favor
from escort.planner import plan_layer, planner
from tests.cli.invoking import invoke, succeed, succeed_json
from tests.cli.named import TINY, tiny
from tests.fakes import PROBLEM, a_filter
from tests.onnx_models import small

COMMANDS = ("demo", "forecast", "prune", "convert", "run", "plan", "bench", "cache", "doctor")


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command: str) -> None:
    result = succeed(command, "--help")
    assert "--json" in result.stdout
    assert command in succeed("--help").stdout


def test_version() -> None:
    assert succeed("--version").stdout == f"escort {escort.__version__}\n"


def test_prune_saves_a_state_dict_with_the_sparsity_asked_for(tmp_path: Path, pruned: Path) -> None:
    state = load_file(pruned)
    assert set(state) == set(tiny().state_dict())
    assert (state["3.weight"] == 0).float().mean() == pytest.approx(0.9, abs=0.01)
    assert (state["0.weight"] != 0).all()
    report = succeed_json(
        "prune",
        TINY,
        "--sparsity",
        0.5,
        "--method",
        "global",
        "--checkpoint",
        pruned,
        "--output",
        tmp_path / "g.safetensors",
    )
    # All that was pruned already is more than half.
    assert report["sparsity"]["3"] == pytest.approx(0.9, abs=0.01) and report["method"] == "global"


def test_convert_reports_its_plan_and_computes_the_same(pruned: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.escort"
    result = succeed("convert", TINY, "--checkpoint", pruned, "--input", "2,3,16,16", "--output", path, "--json")
    report = json.loads(result.stdout)
    assert set(report["layers"]) == {"0", "3"} and report["bytes"] == path.stat().st_size
    assert "wrote" in result.stderr
    x = torch.randn(3, 3, 16, 16)
    with torch.inference_mode():
        torch.testing.assert_close(artifact.load(path)(x), models.load(TINY, pruned)(x), rtol=1e-4, atol=1e-5)


def test_convert_says_on_stdout_what_was_chosen(tmp_path: Path) -> None:
    result = succeed("convert", TINY, "--input", "1,3,8,8", "--output", tmp_path / "model.escort")
    assert "Plan per layer" in result.stdout and "whole network" in result.stdout


def test_forecast_and_the_report_of_a_conversion(tmp_path: Path) -> None:
    page = tmp_path / "forecast.html"
    report = succeed_json("forecast", TINY, "--input", "1,3,8,8", "--page", page)
    assert [layer["is_pruned"] for layer in report["layers"]] == [False, True]
    assert json.loads(page.with_suffix(".json").read_text())["network"] == report["network"]
    written = "convert", TINY, "--input", "1,3,8,8", "--output", tmp_path / "m.escort", "--report"
    assert "Layers by time" in (succeed(*written, tmp_path / "r.html"), (tmp_path / "r.html").read_text())[1]
    for command in (("forecast", TINY, "--input", "1,3,8,8", "--page"), written):
        assert "name it so" in invoke(*command, tmp_path / "page.txt").stderr


def test_json_stays_clean_when_the_model_prints(tmp_path: Path) -> None:
    result = succeed("plan", "tests.cli.named:chatty", "--input", "1,3,8,8", "--json")
    assert "layers" in json.loads(result.stdout)
    assert "a model that prints" in result.stderr


def test_plan_of_a_saved_file_is_the_stored_one(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("escort.network.swap.plan_layers", lambda *args, **kwargs: pytest.fail("measured again"))
    report = succeed_json("plan", saved)
    assert report["input_shapes"] == [[2, 3, 16, 16]]
    methods = {candidate["method"] for candidate in report["layers"]["3"]["candidates"]}
    assert methods == {"direct", "depthwise", "linear", "dense", "lowered"}
    text = succeed("plan", saved, "--candidates").stdout
    assert "chosen" in text and "memory_format channels_last" in text


def test_the_effort_is_for_the_whole_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    budgets_s: list[float] = []
    plan_layers = planner.plan_layers

    def record(layers: Any, compile_budget_s: float, *rest: Any, **options: Any) -> Any:
        budgets_s.append(compile_budget_s)
        return plan_layers(layers, compile_budget_s, *rest, **options)

    monkeypatch.setattr("escort.network.swap.plan_layers", record)
    for command in (["plan"], ["convert", "--output", tmp_path / "model.escort"]):
        succeed(*command, TINY, "--input", "1,3,8,8")
        succeed(*command, TINY, "--input", "1,3,8,8", "--effort", "best")
        succeed(*command, TINY, "--input", "1,3,8,8", "--effort", "12.5")
    assert budgets_s == [0.0, 300.0, 12.5] * 2


def test_what_threads_are_to_do_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str | None] = []

    def record(favor: Any, device: torch.device) -> Any:
        asked.append(favor)
        return settle_favor(favor, device)

    monkeypatch.setattr("escort.network.convert.settle_favor", record)
    convert, bench = ["convert", "--output", tmp_path / "model.escort"], ["bench", "--against", "", "--rounds", "1"]
    for command in (["plan", "--favor", "latency"], [*convert, "--favor", "throughput"], ["plan"]):
        succeed(*command, TINY, "--input", "2,3,8,8")
    succeed(*bench, TINY, "--input", "2,3,8,8", "--favor", "throughput")
    assert asked == ["latency", "throughput", None, "throughput"]


def test_plan_says_what_was_compiled_for_a_filter(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = artifact.load_plan(saved)
    layer = plan.layers["3"]
    compiled = replace(layer.candidates[0], compile_s=12.34, code_bytes=2_186_400, remainder_share=0.0123)
    layers = plan.layers | {"3": replace(layer, candidates=(compiled, *layer.candidates[1:]))}
    monkeypatch.setattr(artifact, "load_plan", lambda path: replace(plan, layers=layers))
    assert succeed("plan", saved, "--candidates").stdout.count("2,186 kB in 12.3 s, 1.2% left over") == 1
    assert succeed_json("plan", saved)["layers"]["3"]["candidates"][0]["compile_s"] == 12.34


def test_plan_of_an_exported_archive(tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    torch.export.save(torch.export.export(tiny().eval(), (torch.randn(2, 3, 8, 8),)), path)
    assert set(succeed_json("plan", path, "--input", "4,3,8,8")["layers"]) == {"0", "3"}


def test_plan_of_an_onnx_file(tmp_path: Path) -> None:
    onnx.save(small(), tmp_path / "model.onnx")
    assert set(succeed_json("plan", tmp_path / "model.onnx", "--favor", "latency")["layers"]) == {"body.0.conv"}


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "pruned.safetensors"
    path.write_text("old")

    def write_half(target: Path, data: bytes) -> None:
        target.write_text("half")
        raise OSError(28, "No space left on device", str(target))

    monkeypatch.setattr(Path, "write_bytes", write_half)
    result = invoke("prune", TINY, "--sparsity", 0.9, "--output", path)
    assert result.exit_code == 1 and "No space left" in result.stderr
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_demo_passes_its_options_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Path, int, bool]] = []

    def run_demo(out: Path, *, seed: int, quick: bool, console: Any) -> dict[str, Any]:
        console.print("training")
        calls.append((out, seed, quick))
        return {"sparsity": 0.9}

    monkeypatch.setattr("escort.cli.demo.run_demo", run_demo)
    result = succeed("demo", "--out", tmp_path, "--seed", 3, "--quick", "--json")
    assert calls == [(tmp_path, 3, True)]
    assert json.loads(result.stdout) == {"sparsity": 0.9} and "training" in result.stderr


def test_demo_without_its_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    def run_demo(*args: Any, **kwargs: Any) -> dict[str, Any]:
        raise ImportError("the demo needs scikit-learn: pip install escort-sparse[demo]")

    monkeypatch.setattr("escort.cli.demo.run_demo", run_demo)
    result = invoke("demo")
    assert result.exit_code == 1 and "escort-sparse[demo]" in result.stderr


def test_cache_lists_and_clears(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ESCORT_CACHE_DIR", str(tmp_path))
    empty = succeed_json("cache")
    assert empty["entries"] == [] and empty["total_bytes"] == 0 and empty["folder"] == str(tmp_path)
    described = {"source": "direct.cu", "arch": "sm_90", "defines": {"ROWS": "4"}, "registers": 40}
    cache.store("kernel", "a" * 64, described, b"cubin")
    (tmp_path / ("b" * 64 + ".kernel")).write_bytes(b"damaged")
    report = succeed_json("cache")
    assert {entry.get("source") for entry in report["entries"]} == {"direct.cu", None}
    assert report["total_bytes"] == sum(path.stat().st_size for path in tmp_path.iterdir())
    table = succeed("cache").stdout
    assert "ROWS=4" in table and "damaged" in table and "of at most 256.0 MB" in table
    assert succeed_json("cache", "--clear")["removed"] == 2
    assert not any(tmp_path.iterdir())


def test_convert_measures_anew_where_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    convert = escort.convert
    monkeypatch.setattr(
        escort, "convert", lambda *args, **options: asked.append(options["remeasure"]) or convert(*args, **options)
    )
    words = ("convert", TINY, "--input", "1,3,8,8", "--output", tmp_path / "m.escort")
    succeed(*words)
    succeed(*words, "--remeasure")
    assert asked == [False, True]


def test_convert_follows_a_plan(saved: Path, pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("escort.network.swap.plan_layers", lambda *args, **kwargs: pytest.fail("measured again"))
    plan = succeed_json("plan", saved)
    as_json = tmp_path / "plan.json"
    as_json.write_text(json.dumps(plan))
    given = (TINY, "--checkpoint", pruned, "--input", "2,3,16,16")
    words = ("convert", *given, "--output", tmp_path / "again.escort", "--plan")
    for file in (saved, as_json):
        again = succeed_json(*words, file)
        assert again["converted_time_us"] == plan["converted_time_us"]
        assert {name: layer["method"] for name, layer in again["layers"].items()} == {
            name: layer["method"] for name, layer in plan["layers"].items()
        }
    as_json.write_text("[]")
    assert "write it by escort plan --json" in invoke(*words, as_json).stderr


@pytest.mark.usefixtures("plan_store")
def test_cache_lists_shares_and_clears_plans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planner._remembered.clear()
    plan = plan_layer(PROBLEM, a_filter())
    cache.store("plan", "b" * 64, {"plan": "of another version"})
    report = succeed_json("cache")
    entry, other = sorted(report["plans"], key=len, reverse=True)
    assert (entry["plan"]["method"], entry["plan"]["problem"]["device"]) == (plan.method, "cpu")
    assert other.keys() == {"file", "bytes", "used"} and report["entries"] == []
    assert report["total_bytes"] == sum(path.stat().st_size for path in cache.folder().iterdir())
    table = succeed("cache").stdout
    assert "6->8 3x3, 9x9, fp32" in table and "damaged, or of another version" in table and "just now" in table
    file = tmp_path / "plans.json"
    assert succeed_json("cache", "export", file) == {"file": str(file), "exported": 1}
    assert succeed_json("cache", "import", file) == {"file": str(file), "imported": 0, "known": 1, "without_room": 0}
    assert "removed 0 kernels and 2 plans" in succeed("cache", "clear").stdout
    assert (
        f"took in 1 plan of {file}, and left out 0 that were there already\n" in succeed("cache", "import", file).stdout
    )
    assert " never " in succeed("cache").stdout
    removed = succeed_json("cache", "--clear")
    assert (removed["removed"], removed["kernel"], removed["plan"]) == (1, 0, 1)
    monkeypatch.setattr(cache, "limit_bytes", lambda: 10)
    said = " ".join(succeed("cache", "import", file).stdout.split())
    assert "and 1 for which there is no room: the cache holds 0.0 MB; set ESCORT_CACHE_MB to a larger size" in said


@pytest.mark.parametrize("args", [("export",), ("import",), ("list", "x"), ("clear", "x"), ("export", "x", "--clear")])
def test_cache_takes_a_file_to_export_and_import(args: tuple[str, ...]) -> None:
    result = invoke("cache", *args)
    assert result.exit_code == 2 and "give a FILE to export and import, and to nothing else" in result.stderr


@pytest.mark.usefixtures("plan_store")
def test_cache_says_what_is_wrong_with_a_file(tmp_path: Path) -> None:
    (tmp_path / "plans.json").write_text("[]")
    result = invoke("cache", "import", tmp_path / "plans.json")
    assert result.exit_code == 2 and "it is none that escort cache export wrote" in result.stderr
    assert invoke("cache", "import", tmp_path / "missing.json").exit_code == 2
    assert invoke("cache", "export", tmp_path / "missing" / "plans.json").exit_code == 2


def test_cache_refuses_a_bad_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESCORT_CACHE_MB", "much")
    result = invoke("cache")
    assert result.exit_code == 2 and "ESCORT_CACHE_MB" in result.stderr
