"""The zoo: what its rows say, how they are shown, and one network of it that needs no other library."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.commands import zoo
from benchmarks.exhibits.zoo import zoo_tables
from benchmarks.zoo import ENTRIES, LIBRARIES, ZooRow, read_zoo, write_zoo
from tests.benchmarks.invoking import invoke, succeed_json
from tests.benchmarks.made_up import cells

HEADER = {
    "cpu": "a CPU",
    "commit": "0123456789-dirty",
    "date": "2026-01-02T03:04:05",
    "versions": {"torch": "2", "timm": None},
    "command": "python -m benchmarks zoo",
}


def row(name: str = "timm/a", **fields: Any) -> ZooRow:
    usual = {
        "input": [[1, 3, 8, 8]],
        "convolutions": 5,
        "swapped": 3,
        "fused": 2,
        "left": {"it is transposed": 2},
        "traced": "whole",
        "errors": {"1x3x8x8": [2e-7, 1e-7], "2x3x8x8": [3e-7, 1e-7], "1x3x9x9": [1e-6, 1e-7]},
        "saved": "loaded",
        "commit": "0123456789-dirty",
    }
    return ZooRow(name, **{**usual, **fields})


def test_there_are_networks_of_every_library_and_each_once() -> None:
    names = [entry.name for entry in ENTRIES]
    assert len(names) == len(set(names)) >= 60
    assert {entry.library for entry in ENTRIES} == {*LIBRARIES, "own"}
    for entry in ENTRIES:
        example, more, other = entry.shapes
        assert len({example, more, other}) == 3 and more[0] > example[0]


@pytest.mark.parametrize(
    ("errors", "is_right"),
    [
        ([1e-7, 1e-7], True),
        ([0.9e-4, 1e-7], True),
        ([2e-4, 1e-7], False),
        ([2e-4, 1e-4], True),  # the original is no better
        ([4e-4, 1e-4], False),
        ([1e-5], True),  # against the original alone
        ([2e-4], False),
        ("ValueError: it does not run", False),
    ],
)
def test_a_network_is_right_at_every_size_or_not_at_all(errors: Any, is_right: bool) -> None:
    usual = row().errors
    assert row(errors={**usual, "1x3x9x9": errors}).is_right == is_right
    assert not row(errors={**usual, "1x3x9x9": errors}, failed="it was kept").is_right
    assert not row(errors={}).is_right


def test_rows_are_read_back_as_written_and_damaged_files_are_named(tmp_path: Path) -> None:
    write_zoo(tmp_path / "zoo.json", HEADER, [row(), row("timm/b", errors={"1x3x8x8": "it fails"})])
    assert read_zoo(tmp_path / "zoo.json") == (HEADER, [row(), row("timm/b", errors={"1x3x8x8": "it fails"})])
    (tmp_path / "zoo.json").write_text('{"header": {}, "rows": [{"speed": 1}]}')
    with pytest.raises(ValueError, match=r"zoo\.json is not a result file of the zoo"):
        read_zoo(tmp_path / "zoo.json")


def test_tables_count_per_library_and_say_why() -> None:
    rows = [
        row(),
        row("timm/b", commit="89abcdef", traced="in 2 parts", why_not_whole="it counts", saved="not loaded: no graph"),
        ZooRow("smp/c", failed="ValueError: " + "no " * 100),
        row("smp/d", errors={"1x3x8x8": [1e-7], "2x3x8x8": "it fails", "1x3x9x9": [1e-7, 1e-7]}),
    ]
    tables = zoo_tables(HEADER, rows)
    timm, smp, every = cells(tables["zoo-totals"])
    assert (timm["Networks"], timm["Converted"], timm["Whole graphs"], timm["Saved and loaded"]) == ("2", "2", "1", "1")
    assert (smp["Networks"], smp["Converted"], smp["Right at all sizes"], smp["Left alone"]) == ("2", "1", "0", "2")
    assert (every["Library"], every["Convolutions"], every["Swapped"], every["Fused"]) == ("all", "15", "9", "6")
    lines = cells(tables["zoo"])
    assert (lines[0]["Error"], lines[0]["Right"], lines[1]["File"]) == ("2e-07 (1e-07)", "yes", "not loaded")
    assert (lines[3]["Error"], lines[3]["More samples"], lines[3]["Right"]) == ("1e-07 (no float64)", "fails", "no")
    assert cells(tables["zoo-left"]) == [
        {"Reason": "it is transposed", "Convolutions": "6", "In": "timm/a, timm/b, smp/d"}
    ]
    assert [line["Network"] for line in cells(tables["zoo-graphs"])] == ["timm/b"]
    assert cells(tables["zoo-files"]) == [{"Network": "timm/b", "Why": "not loaded: no graph"}]
    (failed,) = cells(tables["zoo-failed"])
    assert failed["Network"] == "smp/c" and len(failed["Why"]) == 100
    (conditions,) = cells(tables["zoo-conditions"])
    assert (conditions["Commits"], conditions["Versions"]) == ("0123456, 89abcde", "torch 2")


def test_a_network_is_examined_and_takes_its_place_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "zoo.json"
    header = {**zoo._header("*"), "commit": "0123456"}
    other = row(ENTRIES[0].name)
    write_zoo(path, header, [other, row("own/generator", swapped=0)])
    printed = succeed_json("zoo", "--only", "own/*", "--output", path)
    after, (first, examined) = read_zoo(path)
    assert printed["rows"] == json.loads(path.read_text())["rows"] and first == other
    assert after["continues"] == {name: header[name] for name in ("date", "commit", "command")}
    assert examined.network == "own/generator" and examined.is_right and examined.traced == "whole"
    assert examined.convolutions == examined.swapped + sum(examined.left.values())
    assert list(examined.errors) == ["1x64x1x1", "2x64x1x1", "3x64x1x1"] and examined.saved == "loaded"


def test_bad_input(tmp_path: Path) -> None:
    path = tmp_path / "zoo.json"
    result = invoke("zoo", "--only", "nothing*", "--output", path)
    assert result.exit_code == 2 and "no network is named so" in result.stderr
    write_zoo(path, HEADER, [row()])
    result = invoke("zoo", "--only", "own/*", "--output", path)
    assert result.exit_code == 2 and "is of other versions" in result.stderr and "without --only" in result.stderr
    result = invoke("zoo", "--only", "own/*", "--limit-s", "1", "--output", tmp_path / "b.json")
    assert result.exit_code == 1 and "it took more than 1 s" in result.stderr
