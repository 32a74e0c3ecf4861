"""The commands as a user types them: what they print, write and return, and how they refuse bad input."""

from __future__ import annotations

import csv
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from typer.testing import CliRunner, Result

import escort
from benchmarks.__main__ import app as benchmarks_app
from escort import artifact
from escort.cli import app, doctor, models
from escort.cuda import cache
from escort.planner import planner

TINY = "tests.test_cli:tiny"
COMMANDS = ("demo", "prune", "convert", "run", "plan", "cache", "doctor")


def tiny() -> nn.Module:
    """What most commands are tried on; in training mode, as factories leave it."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 5),
    )


class Branching(nn.Module):
    """Cannot be traced: control flow depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x) if x.sum() > 0 else -self.conv(x)


def chatty() -> nn.Module:
    print("a model that prints")
    return tiny()


def linear() -> nn.Module:
    return nn.Linear(8, 8)


def needs_width(width: int) -> nn.Module:
    return nn.Conv2d(3, width, 3)


def broken() -> nn.Module:
    raise KeyError("no such layer")


def not_a_model() -> str:
    return "weights"


number = 3


@pytest.fixture(autouse=True)
def restore_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Naming a model puts the working directory on the import path, for good."""
    monkeypatch.setattr(sys, "path", list(sys.path))


def invoke(*args: object) -> Result:
    return CliRunner().invoke(benchmarks_app if args[:1] == ("bench",) else app, [str(arg) for arg in args])


def succeed(*args: object) -> Result:
    result = invoke(*args)
    assert result.exit_code == 0, result.output
    return result


def succeed_json(*args: object) -> dict[str, Any]:
    return json.loads(succeed(*args, "--json").stdout)


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pruned") / "pruned.safetensors"
    succeed("prune", TINY, "--sparsity", 0.9, "--skip", "0", "--output", path)
    return path


@pytest.fixture(scope="module")
def saved(pruned: Path) -> Path:
    path = pruned.with_name("model.escort")
    succeed("convert", TINY, "--checkpoint", pruned, "--input", "2,3,16,16", "--output", path)
    return path


@pytest.fixture
def images(tmp_path: Path) -> Path:
    image = pytest.importorskip("PIL.Image")
    folder = tmp_path / "images"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (3, 20, 24, 3), dtype=np.uint8)
    for name, values in zip(("b.png", "a.jpg", "c.PNG"), pixels, strict=True):
        image.fromarray(values).save(folder / name)
    (folder / "notes.txt").write_text("not an image")
    return folder


@pytest.fixture
def batch(tmp_path: Path) -> Path:
    path = tmp_path / "batch.npy"
    np.save(path, np.random.default_rng(0).standard_normal((5, 3, 16, 16), dtype=np.float32))
    return path


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


def test_json_stays_clean_when_the_model_prints(tmp_path: Path) -> None:
    result = succeed("plan", "tests.test_cli:chatty", "--input", "1,3,8,8", "--json")
    assert "layers" in json.loads(result.stdout)
    assert "a model that prints" in result.stderr


def test_plan_of_a_saved_file_is_the_stored_one(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "plan_layers", lambda *args, **kwargs: pytest.fail("measured again"))
    report = succeed_json("plan", saved)
    assert report["input_shapes"] == [[2, 3, 16, 16]]
    methods = {candidate["method"] for candidate in report["layers"]["3"]["candidates"]}
    assert methods == {"direct", "dense", "lowered"}
    text = succeed("plan", saved, "--candidates").stdout
    assert "chosen" in text and "memory_format channels_last" in text


def test_the_compile_budget_is_for_the_whole_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[float] = []
    plan_layers = planner.plan_layers

    def record(layers: Any, compile_budget_s: float, *rest: Any) -> Any:
        given.append(compile_budget_s)
        return plan_layers(layers, compile_budget_s, *rest)

    monkeypatch.setattr(planner, "plan_layers", record)
    for command in (["plan"], ["convert", "--output", tmp_path / "model.escort"]):
        succeed(*command, TINY, "--input", "1,3,8,8")
        succeed(*command, TINY, "--input", "1,3,8,8", "--compile-budget", "12.5")
    assert given == [300.0, 12.5] * 2


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


def test_run_on_images(saved: Path, images: Path, tmp_path: Path) -> None:
    report = succeed_json("run", saved, images, "--output", tmp_path / "out.csv", "--batch", 2)
    assert report["inputs"] == 3 and report["inputs_per_second"] > 0
    rows = list(csv.reader((tmp_path / "out.csv").open()))
    assert rows[0] == ["input", "top1", "score"] and [row[0] for row in rows[1:]] == ["a.jpg", "b.png", "c.PNG"]
    assert [int(row[1]) for row in rows[1:]] == [entry["top1"] for entry in report["predictions"]]


def test_run_prepares_images_as_asked(saved: Path, images: Path, tmp_path: Path) -> None:
    from PIL import Image

    options = ["--size", "12,10", "--mean", "0.1,0.2,0.3", "--std", "0.4,0.5,0.6", "--output", tmp_path / "out.npz"]
    succeed("run", saved, images, *options)
    pixels = (
        np.asarray(Image.open(images / "b.png").resize((10, 12), Image.Resampling.BILINEAR), dtype=np.float32) / 255
    )
    x = (pixels - np.float32([0.1, 0.2, 0.3])) / np.float32([0.4, 0.5, 0.6])
    with torch.inference_mode():
        expected = artifact.load(saved)(torch.from_numpy(x.transpose(2, 0, 1)[None].copy()))
    with np.load(tmp_path / "out.npz", allow_pickle=False) as out:
        assert out["names"][1] == "b.png"
        np.testing.assert_allclose(out["outputs"][1], expected[0], rtol=1e-3, atol=1e-4)


def test_run_on_a_batch(saved: Path, batch: Path, tmp_path: Path) -> None:
    result = succeed("run", saved, batch, "--output", tmp_path / "out.npz", "--batch", 2, "--device", "cpu")
    assert "5 inputs at batch 2" in result.stdout
    with torch.inference_mode():
        expected = artifact.load(saved)(torch.from_numpy(np.load(batch))).numpy()
    with np.load(tmp_path / "out.npz", allow_pickle=False) as out:
        np.testing.assert_allclose(out["outputs"], expected, rtol=1e-4, atol=1e-5)
        assert out["top1"].tolist() == expected.argmax(axis=1).tolist()


def test_run_of_a_model_without_classes_and_without_graph(tmp_path: Path, batch: Path) -> None:
    name, path = "tests.test_cli:Branching", tmp_path / "model.escort"
    succeed("convert", name, "--input", "1,3,16,16", "--output", path)
    succeed("run", path, batch, "--model", name, "--output", tmp_path / "out.npz")
    assert np.load(tmp_path / "out.npz")["outputs"].shape == (5, 4, 16, 16)
    result = invoke("run", path, batch, "--model", name, "--output", tmp_path / "out.csv")
    assert result.exit_code == 2 and "write an .npz" in result.stderr


def test_bench_of_patterns(tmp_path: Path) -> None:
    arrays = {"shape": [4, 4, 2, 3, 3, 1, 1, 1], "indptr": [0, 2, 2, 3], "indices": [0, 17, 4]}
    np.savez(tmp_path / "net_l1.npz", **{f"conv{i}.{k}": np.array(v) for i in (1, 2) for k, v in arrays.items()})
    path = tmp_path / "result.json"
    report = succeed_json("bench", "--patterns", tmp_path / "net_l1.npz", "--batch", "1,2", "--output", path)
    assert json.loads(path.read_text())["rows"] == report["rows"]
    assert {(row["layer"], row["batch"]) for row in report["rows"]} == {(f"conv{i}", n) for i in (1, 2) for n in (1, 2)}
    assert set(report["geometric_means"]) == {"net", "all"}


def test_bench_writes_results_where_they_belong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = succeed("bench", "--network", TINY, "--input", "3,8,8", "--sparsity", 0.5, "--batch", "1,2").stdout
    path = Path("benchmarks/results/cpu/tiny-random-0.50.json")
    rows = json.loads(path.read_text())["rows"]
    assert [(row["batch"], row["method"]) for row in rows] == [
        (n, m) for n in (1, 2) for m in ("escort", "eager", "eager")
    ]
    assert str(path) in text and "vs eager" in text


def test_a_short_search_tries_the_best_guesses() -> None:
    report = succeed_json("bench", "--set", "paper", "--batch", 1, "--layers", "res5a_*", "--search", 1)
    methods = [row["method"] for row in report["rows"]]
    assert methods.count("direct") == 1 and "dense" in methods


def test_bench_of_one_paper_layer_writes_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    report = succeed_json("bench", "--set", "paper", "--batch", 1, "--layers", "res5a_*")
    assert {row["layer"] for row in report["rows"]} == {"res5a_branch2b"}
    assert report["output"] is None and not list(tmp_path.iterdir())


def test_bench_warns_of_a_busy_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez(tmp_path / "net.npz", **{"c.shape": [4, 4, 1, 1, 1, 0, 1, 1], "c.indptr": [0, 1], "c.indices": [0]})
    for load, warned in ((0.0, False), (1000.0, True)):
        monkeypatch.setattr("os.getloadavg", lambda load=load: (load, 0.0, 0.0))
        result = succeed("bench", "--patterns", tmp_path / "net.npz", "--output", tmp_path / "r.json")
        assert ("idle machine" in result.stderr) == warned
        assert json.loads((tmp_path / "r.json").read_text())["header"]["load_average"] == load


def test_bench_of_a_named_network() -> None:
    result = invoke("bench", "--network", "nonet")
    assert result.exit_code == 2 and "resnet50" in result.stderr


def test_doctor() -> None:
    report = succeed_json("doctor")
    findings = {finding["name"]: finding for finding in report["findings"]}
    assert report["ok"] and findings["torch"]["value"] == torch.__version__
    assert "NVRTC" in findings["kernel compiler"]["value"]
    assert any(name.startswith("kernel ") and "fastest" in finding["value"] for name, finding in findings.items())
    assert "remedy" in succeed("doctor").stdout


def test_doctor_finds_a_kernel_that_computes_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.reference, "compare", lambda out, ref: 0.5)
    result = invoke("doctor", "--json")
    assert result.exit_code == 1 and not json.loads(result.stdout)["ok"]


def test_doctor_names_the_remedy_for_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version", lambda package: None)
    findings = {finding["name"]: finding for finding in succeed_json("doctor")["findings"]}
    assert findings["onnxruntime"]["remedy"] == "pip install escort-sparse[bench]"


def test_doctor_without_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setenv("ESCORT_CACHE_DIR", str(tmp_path / "cache"))

    def missing() -> str:
        raise ImportError("no NVRTC")

    monkeypatch.setattr(doctor.compiler, "compiler_version", missing)
    findings = {finding["name"]: finding for finding in succeed_json("doctor")["findings"]}
    assert findings["gpu"]["ok"] is None and "without CUDA" in findings["gpu"]["value"]
    assert findings["kernel compiler"]["ok"] is None
    assert findings["kernel compiler"]["remedy"] == "pip install escort-sparse[cuda13]"
    assert findings["kernel cache"]["ok"] and not (tmp_path / "cache").exists()


def test_doctor_says_why_the_cache_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("ESCORT_CACHE_DIR", str(tmp_path / "file" / "cache"))
    finding = next(finding for finding in succeed_json("doctor")["findings"] if finding["name"] == "kernel cache")
    assert finding["ok"] is None and "ESCORT_CACHE_DIR" in finding["remedy"]


@pytest.mark.gpu
def test_doctor_runs_the_kernel_of_every_gpu() -> None:
    findings = {finding["name"]: finding for finding in succeed_json("doctor")["findings"]}
    for index in range(torch.cuda.device_count()):
        assert torch.cuda.get_device_name(index) in findings[f"cuda:{index}"]["value"]
        assert findings[f"kernel on cuda:{index}"]["value"] == "works"


def test_cache_lists_and_clears(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ESCORT_CACHE_DIR", str(tmp_path))
    empty = succeed_json("cache")
    assert empty["entries"] == [] and empty["total_bytes"] == 0 and empty["folder"] == str(tmp_path)
    described = {"source": "direct.cu", "arch": "sm_90", "defines": {"ROWS": "4"}, "registers": 40}
    cache.store("a" * 64, described, b"cubin")
    (tmp_path / ("b" * 64 + ".kernel")).write_bytes(b"damaged")
    found = succeed_json("cache")
    assert {entry.get("source") for entry in found["entries"]} == {"direct.cu", None}
    assert found["total_bytes"] == sum(path.stat().st_size for path in tmp_path.iterdir())
    table = succeed("cache").stdout
    assert "ROWS=4" in table and "damaged" in table and "of at most 256.0 MB" in table
    assert succeed_json("cache", "--clear")["removed"] == 2
    assert not any(tmp_path.iterdir())


def test_cache_refuses_a_bad_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESCORT_CACHE_MB", "much")
    result = invoke("cache")
    assert result.exit_code == 2 and "ESCORT_CACHE_MB" in result.stderr


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("resnet50", "package.module:factory"),
        ("nowhere.nets:net", "no module 'nowhere'"),
        ("tests.nowhere:net", "no module 'tests.nowhere'"),
        ("tests.test_cli:nothing", "has no 'nothing'"),
        ("tests.test_cli:number", "is a int"),
        ("tests.test_cli:not_a_model", "returned a str, not an nn.Module"),
        ("tests.test_cli:needs_width", "without arguments failed: TypeError"),
        ("tests.test_cli:broken", "KeyError: 'no such layer'"),
        ("tests.test_cli:linear", "nothing to convert"),
        ("weights.safetensors", "is a checkpoint"),
        ("nowhere.pt2", "there is no such file"),
    ],
)
def test_bad_models(spec: str, message: str, tmp_path: Path) -> None:
    result = invoke("convert", spec, "--input", "1,3,8,8", "--output", tmp_path / "model.escort")
    assert result.exit_code == 2 and result.stdout == ""
    assert message in result.stderr and result.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["convert", TINY, "--output", "{tmp}/m.escort"], "--input 1,3,224,224"),
        (["convert", TINY, "--input", "1,3,x,8", "--output", "{tmp}/m.escort"], "--input takes integers"),
        (["convert", TINY, "--input", "1,4,8,8", "--output", "{tmp}/m.escort"], "4 channels"),
        (["convert", TINY, "--input", "1,3,8,8", "--output", "{tmp}/nowhere/m.escort"], "there is no folder"),
        (["convert", TINY, "--input", "1,3,8,8", "--output", "{tmp}"], "is a folder"),
        (["prune", TINY, "--sparsity", "90", "--output", "{tmp}/p.safetensors"], "write 0.9"),
        (["prune", TINY, "--sparsity", "0.9", "--skip", "7", "--output", "{tmp}/p.safetensors"], "not a convolution"),
        (["prune", TINY, "--sparsity", "0.9", "--output", "{tmp}/p.pt"], "name it so"),
        (["prune", "net.pt2", "--sparsity", "0.9", "--output", "{tmp}/p.safetensors"], "before torch.export"),
        (["plan", "{tmp}/nowhere.escort"], "nowhere.escort"),
        (["convert", TINY, "--input", "1,3,8,8", "--dtype", "fp16", "--output", "{tmp}/m.escort"], "add --device cuda"),
        (
            ["convert", TINY, "--input", "1,3,8,8", "--device", "tpu", "--output", "{tmp}/m.escort"],
            "'tpu' is no device",
        ),
        (["plan", TINY, "--input", "1,3,8,8", "--device", "mps"], "not on mps"),
        (["plan", "{saved}", "--input", "1,3,8,8"], "leave out --input"),
        (["plan", "{saved}", "--device", "cuda"], "leave out --input, --checkpoint, --device, --dtype"),
        (["plan", "{saved}", "--compile-budget", "5"], "--dtype and --compile-budget"),
        (["plan", TINY, "--input", "1,3,8,8", "--compile-budget", "nan"], "compile_budget_s is a number of seconds"),
        (["run", "{saved}", "{tmp}", "--device", "cuda:x"], "'cuda:x' is no device"),
        (["run", "{tmp}/nowhere.escort", "{tmp}"], "nowhere.escort"),
        (["run", "{saved}", "{tmp}/nowhere"], "no such folder"),
        (["run", "{saved}", "{tmp}"], "holds no image"),
        (["run", "{saved}", "{tmp}", "--mean", "0.5"], "1 values of the mean"),
        (["run", "{saved}", "{tmp}", "--std", "0,1,1"], "deviations are positive"),
        (["run", "{saved}", "{tmp}", "--size", "8"], "height,width"),
        (["run", "{saved}", "{tmp}", "--output", "{tmp}/out.txt"], ".npz or .csv"),
        (["bench"], "choose one of"),
        (["bench", "--set", "paper", "--network", "resnet50"], "choose one of"),
        (["bench", "--set", "paper", "--sparsity", "0.9"], "go with --network"),
        (["bench", "--set", "paper", "--layers", "nothing*"], "no layer is named so"),
        (["bench", "--set", "paper", "--batch", "0"], "--batch takes integers"),
        (["bench", "--set", "paper", "--dtype", "fp16"], "--dtype fp16 is for GPUs"),
        (["bench", "--set", "paper", "--device", "tpu"], "'tpu' is no device"),
        (["bench", "--network", TINY, "--input", "3,8,8", "--batch", "paper"], "--batch paper goes with --set"),
        (["bench", "--network", TINY], "--input 3,224,224"),
        (["bench", "--network", TINY, "--input", "3,8,8", "--search", "2"], "--search go with --set"),
        (["bench", "--patterns", "{tmp}/nowhere.npz"], "there is no such file"),
        (
            ["bench", "--network", TINY, "--input", "3,8,8", "--against", "fastnet", "--output", "{tmp}/r.json"],
            "no rival",
        ),
    ],
)
def test_bad_input(args: list[str], message: str, tmp_path: Path, saved: Path) -> None:
    result = invoke(*(arg.format(tmp=tmp_path, saved=saved) for arg in args))
    assert result.exit_code == 2, result.output
    error = result.stderr.splitlines()[-1]
    assert error.startswith("error: ") and message in error and result.stdout == ""
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["convert", "plan", "run"])
def test_a_gpu_that_is_not_there(
    command: str, saved: Path, batch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model = ["--input", "1,3,8,8", "--dtype", "fp16"]
    options = {
        "convert": [TINY, *model, "--output", tmp_path / "m.escort"],
        "plan": [TINY, *model],
        "run": [saved, batch],
    }
    result = invoke(command, *options[command], "--device", "cuda")
    assert result.exit_code == 2 and "cuda needs an NVIDIA GPU and a torch for it" in result.stderr


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 4, 16, 16), np.float32), "the model takes (N, 3, H, W)"),
        (np.zeros((3, 16, 16), np.float32), "the model takes (N, 3, H, W)"),
        (np.zeros((0, 3, 16, 16), np.float32), "the model takes (N, 3, H, W)"),
        (np.zeros((2, 3, 16, 16), np.uint8), "holds uint8"),
        (np.array([{}], dtype=object), "no readable .npy"),
    ],
)
def test_bad_batches(array: np.ndarray, message: str, saved: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "batch.npy", array)
    result = invoke("run", saved, tmp_path / "batch.npy")
    assert result.exit_code == 2 and message in result.stderr


def test_npz_batches_hold_one_array(saved: Path, batch: Path, tmp_path: Path) -> None:
    array = np.load(batch)
    np.savez(tmp_path / "one.npz", x=array)
    assert succeed_json("run", saved, tmp_path / "one.npz")["inputs"] == 5
    np.savez(tmp_path / "two.npz", x=array, y=array)
    result = invoke("run", saved, tmp_path / "two.npz")
    assert result.exit_code == 2 and "2 arrays (x, y)" in result.stderr


def test_unreadable_images(saved: Path, images: Path) -> None:
    (images / "b.png").write_bytes(b"no png")
    result = invoke("run", saved, images)
    assert result.exit_code == 2 and "b.png is no readable image" in result.stderr


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
