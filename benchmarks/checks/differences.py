"""How far what was measured again is from what files say."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median

from benchmarks.checks.sample import Clock, Drawn, quoted
from benchmarks.suite import Row


@dataclass(frozen=True)
class Difference:
    """A time of a file beside the same measured again: microseconds, or its ratio to ours of the same run.

    Attributes:
        subject: its label.
        what: the method and how it was timed.
    """

    subject: str
    what: str
    clock: Clock
    committed: float
    again: float

    @property
    def change(self) -> float:
        """By how much more, or less, it is now, as a share."""
        return self.again / self.committed - 1.0


@dataclass(frozen=True)
class Limits:
    """How far differences may go, as shares: in the median, and each."""

    median: float = 0.03
    most: float = 0.10


@dataclass(frozen=True)
class Verdict:
    """What all differences by a clock come to.

    Attributes:
        is_within: the limits; None for what is shown and not judged.
    """

    clock: Clock
    count: int
    median: float
    most: float
    is_within: bool | None


def differences_of(drawn: Drawn, rows: Sequence[Row]) -> list[Difference]:
    """The differences of a drawn subject. Raises RuntimeError where one of its times was not measured again."""
    before, after, found = drawn.subject.times, quoted(rows), []
    for key in drawn.keys:
        clock, reference = drawn.subject.clock(key), drawn.subject.reference(key)
        needed = (key, reference) if clock == "ratio" else (key,)
        if missing := [each for each in needed if each not in after]:
            raise RuntimeError(f"{' '.join(missing[0]).strip()} could not be measured again")
        old, new = before[key], after[key]
        if clock == "ratio":
            old, new = old / before[reference], new / after[reference]
        found.append(Difference(drawn.subject.label, " ".join(filter(None, key)), clock, round(old, 4), round(new, 4)))
    return found


def verdicts(differences: Iterable[Difference], limits: Limits) -> list[Verdict]:
    """One for each clock by which something was timed. Wall times of whole processes are not judged."""
    by_clock: dict[Clock, list[float]] = {}
    for difference in differences:
        by_clock.setdefault(difference.clock, []).append(abs(difference.change))
    found = []
    for clock, changes in by_clock.items():
        middle, most = median(changes), max(changes)
        is_within = None if clock == "wall" else middle <= limits.median and most <= limits.most
        found.append(Verdict(clock, len(changes), middle, most, is_within))
    return found
