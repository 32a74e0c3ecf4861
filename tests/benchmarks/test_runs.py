"""Runs of a study: what they write, how they go on, and what becomes of failures."""

from __future__ import annotations

import time
import warnings
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import study
from benchmarks.result_files import Item, Outcome, Result
from benchmarks.suite import Row
from tests.benchmarks.small import QUICK, a_row


def work_of(*items: Item, stem: str = "layers-fp32") -> dict[str, list[Item]]:
    return {stem: list(items)}


def test_rows_are_kept_item_by_item(tmp_path: Path) -> None:
    path = tmp_path / "layers-fp32.json"

    def second() -> list[Row]:
        now = Result.read(path)
        assert [row.layer for row in now.rows] == ["a"] and now.header["finished"] == ["a"]
        assert not now.header["complete"]
        return [a_row("b")]

    assert study.run(QUICK, work_of(Item("a", lambda: [a_row("a")]), Item("b", second)), tmp_path, "paper") == {}
    result = Result.read(path)
    assert result.header["complete"] and [row.layer for row in result.rows] == ["a", "b"]
    assert result.header["command"] == "paper" and result.header["study"] == QUICK.conditions()
    assert list(tmp_path.iterdir()) == [path]


def test_a_run_goes_on_where_the_last_one_stopped(tmp_path: Path) -> None:
    def cut_off() -> list[Row]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        study.run(QUICK, work_of(Item("a", lambda: [a_row("a")]), Item("b", cut_off)), tmp_path, "paper")
    never = Item("a", lambda: pytest.fail("measured again"))
    study.run(QUICK, work_of(never, Item("b", lambda: [a_row("b")])), tmp_path, "paper")
    assert [row.layer for row in Result.read(tmp_path / "layers-fp32.json").rows] == ["a", "b"]
    anew = work_of(Item("a", lambda: [a_row("a", 7.0)]))
    study.run(QUICK, anew, tmp_path, "paper", again=True)
    assert [row.time_us for row in Result.read(tmp_path / "layers-fp32.json").rows] == [7.0]


def test_what_was_raced_before_is_not_raced_again(tmp_path: Path) -> None:
    (item, _) = study.compare(QUICK, "fp32")
    study.run(QUICK, work_of(item), tmp_path, "paper")
    later = replace(QUICK, raced={})
    study.run(later, work_of(Item("a", lambda: []), stem="ablation-fp32"), tmp_path, "paper")
    assert later.raced["googlenet", "inception_5a/5x5", 1, "fp32"] == Result.read(tmp_path / "layers-fp32.json").rows
    other = replace(QUICK, search=QUICK.search + 1, raced={})
    with pytest.raises(ValueError, match="another study"):
        study.run(other, work_of(Item("a", lambda: []), stem="ablation-fp32"), tmp_path, "paper")
    study.run(other, work_of(Item("a", lambda: []), stem="break-even-fp32"), tmp_path, "paper")
    assert not other.raced, "what does not start from it takes another study's folder"


def test_nothing_begins_once_the_time_is_over(tmp_path: Path) -> None:
    told: list[str] = []

    def end(stem: str, label: str, outcome: Outcome) -> None:
        told.append(f"{stem} {label} {outcome}")

    def slow() -> list[Row]:
        time.sleep(0.3)
        warnings.warn("direct {} is left out: out of device memory", stacklevel=1)
        return [a_row("a", 12.0), replace(a_row("a", 10.0), method="cudnn"), a_row("a", 11.0)]

    work = work_of(Item("a", slow), Item("b", lambda: [a_row("b")]))
    assert study.run(QUICK, work, tmp_path, "paper", seconds=0.2, end=end) == {}
    assert told == ["layers-fp32 a 0 s: direct 11 cudnn 10 (1 left out)"]
    assert not Result.read(tmp_path / "layers-fp32.json").header["complete"]
    assert study.run(QUICK, work, tmp_path, "paper", end=end) == {}
    assert told[1:] == ["layers-fp32 b 0 s: direct 1"]


def test_an_item_that_fails_is_named_and_tried_again(tmp_path: Path) -> None:
    def fail() -> list[Row]:
        raise RuntimeError("wrong result")

    work = work_of(Item("a", fail), Item("b", lambda: [a_row("b")]))
    assert study.run(QUICK, work, tmp_path, "paper") == {"layers-fp32, a": "RuntimeError: wrong result"}
    result = Result.read(tmp_path / "layers-fp32.json")
    assert result.header["failed"] == {"a": "RuntimeError: wrong result"} and not result.header["complete"]
    assert study.run(QUICK, work_of(Item("a", lambda: [a_row("a")])), tmp_path, "paper") == {}
    assert [row.layer for row in Result.read(tmp_path / "layers-fp32.json").rows] == ["b", "a"]


def test_what_is_left_out_is_named_in_the_header(tmp_path: Path) -> None:
    def measure() -> list[Row]:
        warnings.warn("direct {} is left out: out of device memory", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
        return [a_row("a")]

    with pytest.warns(UserWarning, match="something else"):
        study.run(QUICK, work_of(Item("a", measure)), tmp_path, "paper")
    header = Result.read(tmp_path / "layers-fp32.json").header
    assert header["left_out"] == ["direct {} is left out: out of device memory"]


def test_results_of_another_study_are_not_mixed(tmp_path: Path) -> None:
    study.run(QUICK, work_of(Item("a", lambda: [a_row("a")])), tmp_path, "paper")
    with pytest.raises(ValueError, match="another study .*--again"):
        study.run(replace(QUICK, seed=1), work_of(Item("b", lambda: pytest.fail("measured"))), tmp_path, "paper")
    (tmp_path / "layers-fp32.json").write_text("{}")
    with pytest.raises(ValueError, match=r"layers-fp32\.json is not a result file"):
        study.run(QUICK, work_of(), tmp_path, "paper")
