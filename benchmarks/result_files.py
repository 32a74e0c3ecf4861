"""Result files of a study: written item by item, so that a run that was cut off goes on where it stopped."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

from benchmarks import suite
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
    paths = {f"{stem}-{precision}": folder / f"{stem}-{precision}.json" for stem in STEMS for precision in PRECISIONS}
    results = {stem: Result.read(path) for stem, path in paths.items() if path.is_file()}
    if not results:
        raise ValueError(f"{folder} holds no results of a study; run: python -m benchmarks paper --out {folder}")
    return results


@dataclass(frozen=True)
class Item:
    """A few rows that are measured in one go; `label` tells it from the others of its file."""

    label: str
    measure: Callable[[], list[Row]]


def measure(
    work: Mapping[str, Sequence[Item]],
    folder: Path,
    head: Mapping[str, Any],
    *,
    again: bool = False,
    begin: Callable[[str, str], object] = lambda stem, label: None,
) -> dict[str, str]:
    """Measures the items that a folder's files do not hold yet, and returns what failed: why, by file and label.

    An item that fails does not end the study: it is named in its file's header, and tried again by the next run. The
    header names what was left out of an item, too.

    Args:
        work: items by the stem of their file.
        head: of every file; rows are only added to a file of the same study and machine.
        again: measure all anew.
        begin: called with stem and label as each item begins, also those that are skipped.

    Raises:
        ValueError: where a file is of another study or machine; nothing is measured then.
    """
    paths = {stem: folder / f"{stem}.json" for stem in work}
    earlier = {stem: known(path, head) for stem, path in paths.items() if path.is_file() and not again}
    failures: dict[str, str] = {}
    for stem, items in work.items():
        before = earlier.get(stem, Result({}, []))
        rows, finished, left_out = before.rows, before.header.get("finished", []), before.header.get("left_out", [])
        failed: dict[str, str] = {}
        for item in items:
            begin(stem, item.label)
            if item.label in finished:
                continue
            try:
                with _noting(left_out):
                    rows += item.measure()
                finished.append(item.label)
            except Exception as error:  # whatever it is: the next item may do well, and the header names the failure
                failed[item.label] = f"{type(error).__name__}: {error}"
            complete = all(other.label in finished for other in items)
            state = {"complete": complete, "finished": finished, "failed": failed, "left_out": left_out}
            if before.header:
                state["continues"] = {name: before.header.get(name) for name in ("date", "commit", "command")}
            write = partial(suite.write_results, head={**head, **state}, rows=rows)
            replace_file(paths[stem], write)
        failures |= {f"{stem}, {label}": why for label, why in failed.items()}
    return failures


def known(path: Path, head: Mapping[str, Any]) -> Result:
    """What a file holds of the same study on the same machine. Raises ValueError where it is of another."""
    result = Result.read(path)
    for name in ("study", "cpu", "gpu", "driver", "threads", "versions"):
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
