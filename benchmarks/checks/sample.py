"""What result files say, as documents quote it, and a random sample of that."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from benchmarks.findings.methods import OURS
from benchmarks.result_files import Result
from benchmarks.suite import Row

#: What tells a time from the others of its subject: the method, the timer, and what a conversion began with.
Key = tuple[str, ...]
#: How a time compares between runs: as it is ("gpu"), by that of ours in the same run ("ratio"), or not ("wall").
Clock = Literal["gpu", "ratio", "wall"]


@dataclass(frozen=True)
class Subject:
    """Rows of a file that are measured in one go.

    Attributes:
        file: relative to the folder, without ending.
        kind: of conversions, what was measured of them.
    """

    file: str
    header: Mapping[str, Any]
    rows: tuple[Row, ...]
    kind: str = ""

    @property
    def stem(self) -> str:
        """The kind of its file: "layers" of ``h200/layers-fp16``."""
        return self.file.rpartition("/")[2].rpartition("-")[0]

    @property
    def label(self) -> str:
        row = self.rows[0]
        kind = f", {self.kind}" if self.kind else ""
        return f"{self.file}: {row.network} {row.weights} {row.layer} N={row.batch}{kind}"

    @property
    def ours(self) -> str:
        """The method of ours that rivals are compared with."""
        return "escort" if any(row.method == "escort" for row in self.rows) else OURS

    @property
    def times(self) -> dict[Key, float]:
        return quoted(self.rows)

    def clock(self, key: Key) -> Clock:
        """How a time of this subject compares between runs: the host's clock depends on what else the host does."""
        if key[0] in ("convert", "load"):
            return "wall"
        if self.header.get("device") == "cuda" and key[1] in ("", "graph"):
            return "gpu"
        return "ratio" if self.reference(key) in self.times else "wall"

    def reference(self, key: Key) -> Key:
        """What a ratio is to: ours by the same timer."""
        return self.ours, *key[1:]

    @property
    def keys(self) -> list[Key]:
        """What can be compared: a ratio of ours to itself says nothing."""
        return [key for key in self.times if self.clock(key) != "ratio" or key != self.reference(key)]


@dataclass(frozen=True)
class Drawn:
    """A subject, and which of its times are in the sample."""

    subject: Subject
    keys: tuple[Key, ...]


def quoted(rows: Iterable[Row]) -> dict[Key, float]:
    """The times that documents quote of a subject's rows, in microseconds: the least of each, or the sum of parts."""
    times: dict[Key, float] = {}
    for row in rows:
        key = (
            row.method,
            row.timer or "",
            *(str(row.config[name]) for name in ("caches", "effort") if name in row.config),
        )
        if "part" in row.config:
            times[key] = times.get(key, 0.0) + row.time_us
        else:
            times[key] = min(row.time_us, times.get(key, row.time_us))
    return times


def subjects_of(results: Mapping[str, Result]) -> list[Subject]:
    """All subjects of result files, by their names relative to a folder, in order."""
    grouped: dict[tuple[Any, ...], list[Row]] = {}
    for file, result in results.items():
        for row in result.rows:
            about = row.network, row.weights, row.layer, row.batch, row.dtype
            grouped.setdefault((file, _kind(row), *about), []).append(row)
    return [Subject(file, results[file].header, tuple(rows), kind) for (file, kind, *_), rows in grouped.items()]


def _kind(row: Row) -> str:
    if row.method in ("convert", "load"):
        return f"effort {row.config['effort']}"
    if row.method == "escort" and "effort" in row.config:
        return "choices"
    return "calls" if row.method == "escort" and "layers" in row.config else ""


def draw(subjects: Sequence[Subject], count: int, seed: int) -> list[Drawn]:
    """A random sample of times, each as likely as any other, in random order but for those of one subject."""
    pairs = [(index, key) for index, subject in enumerate(subjects) for key in subject.keys]
    drawn: dict[int, list[Key]] = {}
    for index, key in random.Random(seed).sample(pairs, min(count, len(pairs))):
        drawn.setdefault(index, []).append(key)
    return [Drawn(subjects[index], tuple(keys)) for index, keys in drawn.items()]
