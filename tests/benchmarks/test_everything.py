"""python -m benchmarks all: what it would measure, that it goes on, and that its files are those of other commands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import suite
from benchmarks.commands import everything, parts
from benchmarks.commands.parts import Part
from benchmarks.commands.speed import SpeedOptions
from benchmarks.result_files import STEMS, Item, Result, runs_of
from tests.benchmarks.invoking import invoke, succeed_json
from tests.benchmarks.small import a_row, write_patterns

STUDY = {"study": {"device": "cpu", "seed": 0}}


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was measured of two files of two items; the second item of the second fails."""
    done: list[str] = []

    def item(stem: str, label: str) -> Item:
        def measure() -> list[Any]:
            done.append(f"{stem} {label}")
            if (stem, label) == ("speed-fp32", "b"):
                raise RuntimeError("wrong result")
            return [a_row(label)]

        return Item(label, measure)

    def made(*_: Any, **__: Any) -> list[Part]:
        stems = "networks-fp32", "speed-fp32"
        return [Part({stem: [item(stem, label) for label in "ab"]}, STUDY) for stem in stems]

    monkeypatch.setattr(everything, "parts", made)
    return done


def test_a_folder_is_filled_and_what_failed_is_tried_again(measured: list[str], tmp_path: Path) -> None:
    run = ("all", "--into", tmp_path / "new", "--device", "cpu")
    listed = succeed_json(*run, "--list")
    assert [(each["file"], each["left"]) for each in listed["left"]] == [("networks-fp32", 2), ("speed-fp32", 2)]
    assert listed["left"][0]["seconds"] == 2 * parts.SECONDS["networks-fp32"]
    assert not measured and not (tmp_path / "new").exists()
    assert invoke(*run, "--only", "networks-*:b").exit_code == 0 and measured == ["networks-fp32 b"]
    first = invoke(*run)
    assert first.exit_code == 1 and "failed: speed-fp32, b: RuntimeError: wrong result" in first.stderr
    assert measured[1:] == ["networks-fp32 a", "speed-fp32 a", "speed-fp32 b"]
    invoke(*run)
    assert measured[4:] == ["speed-fp32 b"]
    left = succeed_json(*run, "--list")["left"]
    assert [(each["left"], each["failed"], each["seconds"]) for each in left] == [(0, 0, 0), (1, 1, 0)]
    header = Result.read(tmp_path / "new" / "networks-fp32.json").header
    assert header["complete"] and set(header["seconds"]) == {"a", "b"}
    assert len(runs_of(header)) == 2


def test_nothing_begins_that_would_end_too_late(
    measured: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(parts.SECONDS, "speed-fp32", parts.SECONDS["networks-fp32"] + 10.0)
    run = ("all", "--into", tmp_path, "--device", "cpu", "--seconds", parts.SECONDS["networks-fp32"] + 5.0)
    assert invoke(*run).exit_code == 0
    assert measured == ["networks-fp32 a", "networks-fp32 b"], "they take no time, but others of their kind do"


def test_files_are_measured_in_the_order_in_which_they_are_named(measured: list[str], tmp_path: Path) -> None:
    invoke("all", "--into", tmp_path, "--device", "cpu", "--only", "speed-*,*")
    assert measured == ["speed-fp32 a", "speed-fp32 b", "networks-fp32 a", "networks-fp32 b"]
    measured.clear()
    invoke("all", "--into", tmp_path / "new", "--device", "cpu", "--only", "networks-*:b,*:a,speed-*")
    assert measured == ["networks-fp32 b", "networks-fp32 a", "speed-fp32 a", "speed-fp32 b"]
    assert list(Result.read(tmp_path / "new" / "speed-fp32.json").header["failed"]) == ["b"]


def test_what_failed_is_named_until_it_is_measured(measured: list[str], tmp_path: Path) -> None:
    invoke("all", "--into", tmp_path, "--device", "cpu", "--only", "speed-*:b")
    assert invoke("all", "--into", tmp_path, "--device", "cpu", "--only", "speed-*:a").exit_code == 0
    header = Result.read(tmp_path / "speed-fp32.json").header
    assert header["finished"] == ["a"] and list(header["failed"]) == ["b"]


def test_a_file_is_of_one_commit(measured: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = ("all", "--into", tmp_path, "--device", "cpu", "--only")
    monkeypatch.setattr(suite.rows, "commit", lambda: "0123456")
    assert invoke(*run, "networks-*:a").exit_code == 0
    monkeypatch.setattr(suite.rows, "commit", lambda: "abcdef0")
    refused = invoke(*run, "networks-*:b")
    assert refused.exit_code == 2 and "was measured with another commit (0123456, now abcdef0)" in refused.stderr
    assert measured == ["networks-fp32 a"]


def test_a_list_takes_neither_folder_nor_device(measured: list[str]) -> None:
    listed = succeed_json("all", "--list")
    assert listed["output"] is None and [each["left"] for each in listed["left"]] == [2, 2]
    assert succeed_json("all", "--list", "--device", "cuda")["left"] == listed["left"], "of a GPU that is not here"
    nowhere = invoke("all", "--device", "cpu")
    assert nowhere.exit_code == 2 and "--into benchmarks/results/NAME; or add --list" in nowhere.stderr
    assert not measured


def test_bad_input(measured: list[str], tmp_path: Path) -> None:
    nothing = invoke("all", "--into", tmp_path, "--device", "cpu", "--only", "none")
    assert nothing.exit_code == 2 and "--list says what there is" in nothing.stderr


def test_everything_of_a_gpu_is_what_documents_show(tmp_path: Path) -> None:
    for name in ("resnet50_magnitude_90", "resnet50_magnitude_95"):
        write_patterns(tmp_path, name, "module_conv2d_")
    found = parts.parts("cuda:0", tmp_path, ncu=True)
    stems = [stem for part in found for stem in part.work]
    assert len(stems) == len(set(stems)) and {stem.rpartition("-")[0] for stem in stems} <= set(STEMS)
    wanted = {"patterns-fp16", "inference-fp32", "networks-fp16", "conversions-fp16", "conversions-tf32"}
    assert wanted | {"counters-fp32"} <= set(stems)
    labels = [item.label for part in found for item in part.work.get("speed-fp16", ())]
    assert any("magnitude" in label for label in labels)
    assert SpeedOptions(patterns=tmp_path / "none").has_file("random-0.90")
    assert not SpeedOptions(patterns=tmp_path / "none").has_file("resnet50_magnitude_90")


def test_everything_of_a_cpu(tmp_path: Path) -> None:
    (tmp_path / "networks").mkdir()
    (tmp_path / "networks" / "pose_detection.pt2").touch()
    found = parts.parts("cpu", tmp_path / "patterns")
    labels = {stem: [item.label for item in items] for part in found for stem, items in part.work.items()}
    assert "resnet50 random-0.90 N=8" in labels["networks-fp32"] and len(labels["layers-fp32"]) == 39
    assert labels["networks-fp32"][-1] == "pose_detection as-given N=1"
    assert not [label for label in labels["networks-fp32"] if "magnitude" in label]
    without = [item.label for item in parts.parts("cpu", tmp_path)[0].work["networks-fp32"]]
    assert without == labels["networks-fp32"][:-1]


def test_files_of_before_all_runs_were_kept() -> None:
    last = {"date": "b", "commit": "2", "command": "y"}
    first = {"date": "a", "commit": "1", "command": "x"}
    assert runs_of({**last, "continues": first}) == [first, last] and runs_of({}) == []
