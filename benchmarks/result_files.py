"""Result files of a study: written item by item, so that a run that was cut off goes on where it stopped."""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

from benchmarks import suite
from benchmarks.ahead import Ahead, Compilation
from benchmarks.suite import Row
from escort.artifact.files import replace_file
from escort.problem import Precision

#: The stems of a study's result files, each followed by a precision: ``layers-fp32.json``.
STEMS = tuple("layers ablation counters break-even networks inference speed breakdown patterns conversions".split())
PRECISIONS: tuple[str, ...] = get_args(Precision)


@dataclass(frozen=True)
class Result:
    """A result file: what it was measured on, and its rows."""

    header: dict[str, Any]
    rows: list[Row]

    @classmethod
    def read(cls, path: Path) -> Result:
        """Raises ValueError, naming the file, where it is not one of ours."""
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            return cls(dict(data["header"]), [Row(**row) for row in data["rows"]])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a result file: {error}") from error


def seed_of(result: Result) -> int:
    """The seed of a study's weights and inputs."""
    return int(result.header.get("study", {}).get("seed", 0))


def read_results(folder: Path) -> dict[str, Result]:
    """The study's files in a folder, by name without ending. Raises ValueError where there are none."""
    results = find_results(folder)
    if not results:
        raise ValueError(f"{folder} holds no results of a study; run: python -m benchmarks paper --out {folder}")
    return results


def find_results(folder: Path) -> dict[str, Result]:
    """As :func:`read_results`, of a folder that may hold none, or not be there."""
    paths = {f"{stem}-{precision}": folder / f"{stem}-{precision}.json" for stem in STEMS for precision in PRECISIONS}
    return {stem: Result.read(path) for stem, path in paths.items() if path.is_file()}


@dataclass(frozen=True)
class Item:
    """A few rows that are measured in one go.

    Attributes:
        label: tells it from the others of its file.
        compilation: what is compiled for them that may be compiled ahead. Without one nothing is, meanwhile.
        seconds: that they are expected to take.
    """

    label: str
    measure: Callable[[], list[Row]]
    compilation: Compilation | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """What became of an item: its rows and what was left out of it, or why it failed, and how many seconds it took."""

    rows: Sequence[Row]
    left_out: Sequence[str]
    failure: str | None
    seconds: float

    def __str__(self) -> str:
        """In a line: the least times in microseconds of each method by each timer, or the failure."""
        if self.failure is not None:
            return f"failed after {self.seconds:.0f} s: {self.failure.partition(chr(10))[0]}"
        by_timer: dict[str, dict[str, float]] = {}
        for row in self.rows:
            times_us = by_timer.setdefault(row.timer or "", {})
            times_us[row.method] = min(row.time_us, times_us.get(row.method, math.inf))
        told = (
            f"{timer} ".lstrip() + " ".join(f"{method} {time_us:.5g}" for method, time_us in times_us.items())
            for timer, times_us in by_timer.items()
        )
        left_out = f" ({len(self.left_out)} left out)" if self.left_out else ""
        return f"{self.seconds:.0f} s: {'; '.join(told)}{left_out}"


def measure(
    work: Mapping[str, Sequence[Item]],
    folder: Path,
    head: Mapping[str, Any],
    *,
    again: bool = False,
    seconds: float | None = None,
    ahead: Ahead | None = None,
    interleaved: bool = False,
    begin: Callable[[str, str], object] = lambda stem, label: None,
    end: Callable[[str, str, Outcome], object] = lambda stem, label, outcome: None,
) -> dict[str, str]:
    """Measures the items that a folder's files do not hold yet, and returns what failed: why, by file and label.

    An item that fails does not end the study: it is named in its file's header, and tried again by the next run. The
    header names what was left out of an item, too, how many seconds each took, and every run that the rows come from.

    Args:
        work: items by the stem of their file.
        head: of every file; rows are only added to a file of the same study, machine and commit.
        again: measure all anew.
        seconds: after which no further item begins, nor one that is expected to end later; None for no end.
        ahead: compiles meanwhile for the items that are to be measured, where it was made for any processes.
        interleaved: an item's namesakes of all files follow one another; else the files do.
        begin: called with stem and label as each item begins, also those that are skipped.
        end: called with what became of each that was measured, once the file holds it.

    Raises:
        ValueError: where a file is of another study, machine or commit; nothing is measured then.
    """
    paths = {stem: folder / f"{stem}.json" for stem in work}
    earlier = {stem: known(path, head) for stem, path in paths.items() if path.is_file() and not again}
    files = {stem: _File(paths[stem], head, items, earlier.get(stem, Result({}, []))) for stem, items in work.items()}
    turns = [(stem, item) for stem, items in work.items() for item in items]
    if interleaved:
        labels = list(dict.fromkeys(item.label for _, item in turns))
        turns.sort(key=lambda turn: labels.index(turn[1].label))
    last = math.inf if seconds is None else time.perf_counter() + seconds
    ahead = ahead or Ahead()
    with ahead.of(item.compilation for stem, item in turns if item.label not in files[stem].finished):
        for stem, item in turns:
            begin(stem, item.label)
            if item.label in files[stem].finished or time.perf_counter() + item.seconds > last:
                continue
            ahead.turn_to(item.compilation)
            with nullcontext() if item.compilation else ahead.paused():  # networks pause it where they are timed
                outcome = _outcome(item)
            files[stem].add(item, outcome)
            end(stem, item.label, outcome)
    return {f"{stem}, {label}": why for stem, file in files.items() for label, why in file.failed.items()}


class _File:
    """A result file that grows item by item, on what an earlier run left in it."""

    def __init__(self, path: Path, head: Mapping[str, Any], items: Sequence[Item], before: Result) -> None:
        self._path, self._head, self._items = path, head, items
        self._runs, self._seconds = [*runs_of(before.header), _run(head)], before.header.get("seconds", {})
        self._rows, self._left_out = before.rows, before.header.get("left_out", [])
        self.finished: list[str] = before.header.get("finished", [])
        self.failed: dict[str, str] = {}
        self._failed_before: dict[str, str] = before.header.get("failed", {})

    def add(self, item: Item, outcome: Outcome) -> None:
        """Writes it with what became of an item."""
        self._left_out += outcome.left_out
        self._failed_before.pop(item.label, None)
        if outcome.failure is None:
            self._rows += outcome.rows
            self.finished.append(item.label)
            self._seconds[item.label] = round(outcome.seconds, 1)
        else:
            self.failed[item.label] = outcome.failure
        complete = all(other.label in self.finished for other in self._items)
        failed = {**self._failed_before, **self.failed}
        names = {"complete": complete, "finished": self.finished, "failed": failed, "left_out": self._left_out}
        names |= {"seconds": self._seconds, "runs": self._runs}
        replace_file(self._path, partial(suite.write_results, head={**self._head, **names}, rows=self._rows))


def runs_of(header: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Date, commit and command of every run that a file's rows come from, the last one last."""
    if not header:
        return []
    continued = [header["continues"]] if "continues" in header else []  # files of before all runs were kept
    return list(header.get("runs", [*continued, _run(header)]))


def _run(header: Mapping[str, Any]) -> dict[str, Any]:
    return {name: header.get(name) for name in ("date", "commit", "command")}


def _outcome(item: Item) -> Outcome:
    begin = time.perf_counter()
    rows, left_out, failure = list[Row](), list[str](), None
    try:
        with _noting(left_out):
            rows = item.measure()
    except Exception as error:  # whatever it is: the next item may do well, and the header names the failure
        failure = f"{type(error).__name__}: {error}"
    return Outcome(rows, left_out, failure, time.perf_counter() - begin)


def known(path: Path, head: Mapping[str, Any]) -> Result:
    """What a file holds of the same study, machine and commit. Raises ValueError where it is of another."""
    result = Result.read(path)
    for name in ("study", "cpu", "gpu", "driver", "threads", "versions", "commit"):
        if result.header.get(name) != head.get(name):
            raise ValueError(
                f"{path} was measured with another {name} ({result.header.get(name)}, now {head.get(name)}); measure "
                "it anew with --again, or write elsewhere with --out"
            )
    return result


@contextmanager
def _noting(left_out: list[str]) -> Iterator[None]:
    """Adds what warnings say was left out; other warnings go their way."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for warning in caught:
        if " is left out: " in str(warning.message):
            left_out.append(str(warning.message))
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
