"""python -m benchmarks paper and render."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import counters, suite
from benchmarks.result_files import read_results
from benchmarks.suite import Row
from tests.benchmarks.invoking import invoke
from tests.benchmarks.small import write_patterns

SMALL_RUN = (
    "--device",
    "cpu",
    "--networks",
    "googlenet",
    "--layers",
    "inception_5a/5x5",
    "--batch",
    1,
    "--budget-s",
    0,
)


def test_the_command_measures_tells_and_renders(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run = ("paper", *SMALL_RUN, "--questions", "rq1,rq2", "--search", 2, "--out", out)
    result = invoke(*run)
    assert result.exit_code == 0, result.output
    assert "Sums over the pruned layers" in result.output
    written = {path.name for path in out.iterdir()}
    assert {"layers-fp32.json", "ablation-fp32.json", "report.html", "speedup-googlenet-fp32.svg"} <= written
    before = (out / "layers-fp32.json").read_text()

    printed = json.loads(invoke(*run, "--json").stdout)
    assert json.loads(before)["rows"] == printed["rows"]["layers-fp32"] and printed["failures"] == {}
    assert printed["tables"]["totals"][0]["Layers"] == "1 of 19"

    document = tmp_path / "results.md"
    image = "![bars](speedup-googlenet-fp32.svg)"
    document.write_text(f"# Report\n\n<!-- table: totals -->\nold\n<!-- end -->\n\n{image}\n")
    plots = tmp_path / "plots"
    result = invoke("render", out, "--into", document, "--out", plots)
    assert result.exit_code == 0, result.output
    assert "| googlenet |" in document.read_text() and "old" not in document.read_text()
    assert (plots / "report.html").is_file()
    drawn = {path.read_text() for path in tmp_path.rglob("speedup-googlenet-fp32.svg")}
    assert len(drawn) == 1 and (tmp_path / "speedup-googlenet-fp32.svg").is_file()


def test_the_command_takes_files_of_patterns(tmp_path: Path) -> None:
    path = write_patterns(tmp_path)
    options = ("--device", "cpu", "--budget-s", 0, "--search", 1, "--batch", 1, "--out", tmp_path / "out")
    result = invoke("paper", "--questions", "patterns", "--patterns", path, "--layers", "conv1", *options)
    assert result.exit_code == 0, result.output
    assert read_results(tmp_path / "out")["patterns-fp32"].header["finished"] == ["net_l1 conv1 N=1"]
    result = invoke("paper", "--questions", "patterns", *options)
    assert result.exit_code == 2 and "name them with --patterns FILE.npz" in result.stderr


def test_without_ncu_the_command_says_so_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counters.shutil, "which", lambda _: None)
    result = invoke("paper", *SMALL_RUN, "--questions", "rq1", "--ncu", "--search", 1, "--out", tmp_path)
    assert result.exit_code == 0 and "ncu is not on the PATH" in result.stderr


def test_a_failure_is_told_and_ends_in_an_exit_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> list[Row]:
        raise RuntimeError("wrong result")

    monkeypatch.setattr(suite, "measure_layer", fail)
    result = invoke("paper", *SMALL_RUN, "--questions", "rq1", "--out", tmp_path)
    assert result.exit_code == 1
    assert "failed: layers-fp32, googlenet inception_5a/5x5 N=1: RuntimeError: wrong result" in result.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("paper", "--questions", "rq9"), "--questions: there is no 'rq9'; there are rq1"),
        (("paper", "--device", "cpu", "--networks", "alexnet"), "--networks: there is no 'alexnet'"),
        (("paper", "--device", "tpu"), "'tpu' is no device"),
        (("paper", "--device", "cpu", "--precision", "fp16"), "compute in fp32, not in fp16"),
        (("paper", "--device", "cpu", "--sparsity", "most"), "shares of zeros such as 0.9"),
        (("paper", "--device", "cpu", "--effort", "much"), "--effort takes fast, best or a number of seconds"),
        (("paper", "--into", "results.md"), "No such option"),
        (("render", "nowhere"), "nowhere holds no results of a study"),
    ],
)
def test_bad_input(args: tuple[str, ...], message: str, tmp_path: Path) -> None:
    result = invoke(*args, "--out", tmp_path / "out")
    assert result.exit_code == 2 and message in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_default_device_is_a_gpu(tmp_path: Path) -> None:
    result = invoke("paper", "--out", tmp_path)
    assert result.exit_code == 2 and "use cpu" in result.stderr
