"""What compiles ahead: processes that run beside rows, stop while something is raced, and end with the run."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import ahead, result_files
from benchmarks.ahead import Ahead, Compilation
from benchmarks.networks import NETWORKS, Network
from benchmarks.result_files import Item
from benchmarks.suite import NetworkRace
from benchmarks.suite import networks as suite_networks
from benchmarks.suite.networks import Way
from tests.benchmarks.small import a_row, tiny

FIRST = Compilation("resnet50", 32, "fp16", "cuda:0", ("channels_last",))
SECOND = replace(FIRST, network="googlenet")
#: Stands in for a process that compiles: it ticks until a file says that it may end.
TICKING = """
import json, pathlib, sys, time
name = json.loads(sys.argv[2])["network"]
folder = pathlib.Path(sys.argv[1])
while not (folder / f"{name}.end").exists():
    with open(folder / name, "a") as file:
        file.write(".")
    time.sleep(0.002)
if name == "googlenet":
    sys.exit("no compiler")
"""


@pytest.fixture
def ticks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], int]:
    """How often the process of a network has ticked."""
    monkeypatch.setattr(ahead, "PROGRAM", (sys.executable, "-S", "-c", TICKING, str(tmp_path)))
    return lambda name: len((tmp_path / name).read_text()) if (tmp_path / name).exists() else 0


def until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_processes_take_turns_stop_and_end(ticks: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "escort.benchmarks")
    compiling = Ahead(1)
    third = replace(FIRST, network="caffenet")
    with compiling.of([FIRST, None, SECOND, FIRST, third]):
        until(lambda: ticks("resnet50") > 0)
        with compiling.paused():
            with compiling.of([SECOND]), compiling.paused():
                pass
            time.sleep(0.05)  # a signal may take a moment
            before = ticks("resnet50")
            time.sleep(0.05)
            assert ticks("resnet50") == before, "none runs while something is raced"
        until(lambda: ticks("resnet50") > before)
        assert not ticks("googlenet"), "one at a time"
        (tmp_path / "resnet50.end").touch()
        compiling.turn_to(FIRST)
        compiling.wait()
        until(lambda: ticks("googlenet") > 0)
        compiling.turn_to(None)
        compiling.wait()
        (tmp_path / "googlenet.end").touch()
        compiling.turn_to(SECOND)
        compiling.wait()
        until(lambda: ticks("caffenet") > 0)
    last = ticks("caffenet")
    time.sleep(0.05)
    assert ticks("caffenet") == last, "what still runs at the end is ended"
    assert "googlenet: compiled ahead in" in caplog.text and "which failed: no compiler" in caplog.text


def test_without_processes_nothing_happens(ticks: Any) -> None:
    compiling = Ahead()
    with compiling.of([FIRST]):
        compiling.turn_to(FIRST)
        compiling.wait()
        with compiling.paused():
            pass
    assert not ticks("resnet50")


def test_only_what_is_missing_is_compiled(tmp_path: Path, ticks: Any) -> None:
    compiling, turns = Ahead(2), []

    def measure(network: str) -> list[Any]:
        until(lambda: ticks(network) > 0)
        turns.append(compiling._current)
        return [a_row(network)]

    done = Item("a", lambda: [a_row("a")], FIRST)
    assert result_files.measure({"speed-fp16": [done]}, tmp_path, {}) == {}
    work = {"speed-fp16": [done, Item("b", lambda: measure("googlenet"), SECOND)]}
    assert result_files.measure(work, tmp_path, {}, ahead=compiling) == {}
    assert turns == [SECOND] and not ticks("resnet50")


def test_namesakes_follow_one_another(tmp_path: Path) -> None:
    order = []

    def item(stem: str, label: str) -> Item:
        def measure() -> list[Any]:
            order.append((stem, label))
            return [a_row(label)]

        return Item(label, measure)

    labels = {"speed-fp16": ("b", "a", "2:4"), "speed-tf32": ("b", "c", "a")}
    work = {stem: [item(stem, label) for label in names] for stem, names in labels.items()}
    assert result_files.measure(work, tmp_path, {}, interleaved=True) == {}
    assert [label for _, label in order] == ["b", "b", "a", "a", "2:4", "c"]
    assert all(json.loads((tmp_path / f"{stem}.json").read_text())["header"]["complete"] for stem in work)


def test_a_row_waits_for_what_it_compiles() -> None:
    class Noting(Ahead):
        waited = 0

        def wait(self) -> None:
            self.waited += 1

    compiling = Noting()
    for is_compiled in (False, True):
        way = Way("compile", {}, lambda: torch.zeros(2), is_compiled=is_compiled)
        assert suite_networks._starts(way, "tiny", NetworkRace(ahead=compiling))
    assert compiling.waited == 1


@pytest.mark.parametrize("of_the_paper", [False, True])
def test_what_a_process_compiles(of_the_paper: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []

    def dense_ways(model: Any, x: Any, formats: Any, *, compiled: bool) -> list[Way]:
        assert compiled and not model.training and torch.is_inference_mode_enabled()
        assert not torch.backends.cudnn.benchmark, "it would try algorithms for nothing"
        return [Way("compile", {}, lambda name=name: note(name, x)) for name in formats]

    def note(name: str, x: torch.Tensor) -> torch.Tensor:
        compiled.append((name, tuple(x.shape), x.dtype))
        return x

    monkeypatch.setattr(suite_networks, "dense_ways", dense_ways)
    monkeypatch.setitem(NETWORKS, "resnet50", Network(tiny, (3, 8, 8)))
    compilation = Compilation("resnet50", 2, "fp16", "cpu", ("channels_last", "contiguous"), of_the_paper)
    words = json.dumps({**compilation.__dict__, "formats": list(compilation.formats)})
    ahead.main(words)
    assert compiled == [(name, (2, 3, 8, 8), torch.float16) for name in compilation.formats]
