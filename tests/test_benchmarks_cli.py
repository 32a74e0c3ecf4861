"""The commands of benchmarks/ as one types them: what they print, write and return."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from benchmarks.__main__ import app
from tests.cli.named import TINY


def invoke(*args: object) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args])


def succeed(*args: object) -> Result:
    result = invoke(*args)
    assert result.exit_code == 0, result.output
    return result


def succeed_json(*args: object) -> dict[str, Any]:
    return json.loads(succeed(*args, "--json").stdout)


@pytest.fixture(autouse=True)
def restore_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Naming a model puts the working directory on the import path, for good."""
    monkeypatch.setattr(sys, "path", list(sys.path))


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


@pytest.mark.parametrize(
    ("args", "message"),
    [
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
def test_bad_input(args: list[str], message: str, tmp_path: Path) -> None:
    result = invoke(*(arg.format(tmp=tmp_path) for arg in args))
    assert result.exit_code == 2, result.output
    error = result.stderr.splitlines()[-1]
    assert error.startswith("error: ") and message in error and result.stdout == ""
    assert not list(tmp_path.iterdir())
