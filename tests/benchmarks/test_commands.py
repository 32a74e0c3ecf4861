"""python -m benchmarks layers and networks: what they print, write and return, and how they refuse bad input."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.benchmarks.invoking import invoke, succeed, succeed_json

TINY = "tests.benchmarks.small:tiny"


@pytest.fixture(autouse=True)
def restore_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Naming a model puts the working directory on the import path, for good."""
    monkeypatch.setattr(sys, "path", list(sys.path))


def test_layers_of_a_pattern_file(tmp_path: Path) -> None:
    arrays = {"shape": [4, 4, 2, 3, 3, 1, 1, 1], "indptr": [0, 2, 2, 3], "indices": [0, 17, 4]}
    np.savez(tmp_path / "net_l1.npz", **{f"conv{i}.{k}": np.array(v) for i in (1, 2) for k, v in arrays.items()})
    path = tmp_path / "result.json"
    printed = succeed_json("layers", "--patterns", tmp_path / "net_l1.npz", "--batch", "1,2", "--output", path)
    assert json.loads(path.read_text())["rows"] == printed["rows"]
    assert {(row["layer"], row["batch"]) for row in printed["rows"]} == {
        (f"conv{i}", n) for i in (1, 2) for n in (1, 2)
    }
    assert set(printed["geometric_means"]) == {"net", "all"}


def test_networks_write_results_where_they_belong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    of = "networks", TINY, "--input", "3,8,8", "--sparsity", 0.5
    text = succeed(*of, "--batch", "1,2", "--rounds", 1, "--no-eager").stdout
    path = Path("benchmarks/results/cpu/tiny-random-0.50.json")
    rows = json.loads(path.read_text())["rows"]
    assert [(row["batch"], row["method"]) for row in rows] == [(1, "escort"), (2, "escort")]
    assert str(path) in text and "escort, µs" in text


def test_a_short_search_tries_the_best_guesses() -> None:
    printed = succeed_json("layers", "--batch", 1, "--layers", "res5a_*", "--search", 1)
    methods = [row["method"] for row in printed["rows"]]
    assert methods.count("direct") == 1 and "dense" in methods


def test_one_paper_layer_writes_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    printed = succeed_json("layers", "--batch", 1, "--layers", "res5a_*")
    assert {row["layer"] for row in printed["rows"]} == {"res5a_branch2b"}
    assert printed["output"] is None and not list(tmp_path.iterdir())


def test_a_busy_machine_is_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez(tmp_path / "net.npz", **{"c.shape": [4, 4, 1, 1, 1, 0, 1, 1], "c.indptr": [0, 1], "c.indices": [0]})
    for load, warned in ((0.0, False), (1000.0, True)):
        monkeypatch.setattr("os.getloadavg", lambda load=load: (load, 0.0, 0.0))
        result = succeed("layers", "--patterns", tmp_path / "net.npz", "--output", tmp_path / "r.json")
        assert ("idle machine" in result.stderr) == warned
        assert json.loads((tmp_path / "r.json").read_text())["header"]["load_average"] == load


def test_a_network_that_there_is_not() -> None:
    result = invoke("networks", "nonet")
    assert result.exit_code == 2 and "resnet50" in result.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["layers", "--layers", "nothing*"], "no layer is named so"),
        (["layers", "--batch", "0"], "--batch takes integers"),
        (["layers", "--precision", "fp16"], "--precision fp16 is for GPUs"),
        (["layers", "--device", "tpu"], "'tpu' is no device"),
        (["networks", TINY, "--input", "3,8,8", "--batch", "paper"], "--batch takes integers"),
        (["networks", TINY], "--input 3,224,224"),
        (["networks", TINY, "--input", "3,8,8", "--patterns", "{tmp}/none.npz"], "none.npz"),
        (["networks", TINY, "--input", "3,8,8", "--effort", "-1"], "--effort takes fast, best or a number of seconds"),
        (["layers", "--patterns", "{tmp}/nowhere.npz"], "there is no such file"),
        (["networks", TINY, "--input", "3,8,8", "--against", "fastnet", "--output", "{tmp}/r.json"], "no rival"),
    ],
)
def test_bad_input(args: list[str], message: str, tmp_path: Path) -> None:
    result = invoke(*(arg.format(tmp=tmp_path) for arg in args))
    assert result.exit_code == 2, result.output
    error = result.stderr.splitlines()[-1]
    assert error.startswith("error: ") and message in error and result.stdout == ""
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["networks"], "Missing argument"),
        (["layers", "resnet50"], "unexpected extra argument"),
        (["layers", "--sparsity", "0.9"], "No such option"),
        (["networks", TINY, "--input", "3,8,8", "--search", "2"], "No such option"),
    ],
)
def test_commands_take_no_options_of_each_other(args: list[str], message: str) -> None:
    result = invoke(*args)
    assert result.exit_code == 2 and message in result.stderr and result.stdout == ""
