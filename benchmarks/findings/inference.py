"""Whole networks of the paper: what ours gains over each rival, and what it could gain at most."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from benchmarks import suite
from benchmarks.findings.aims import InferenceAim
from benchmarks.study import CAP
from benchmarks.suite import Row


@dataclass(frozen=True)
class Gain:
    """A network's times in microseconds: of ours, of a rival, and of ours with its pruned layers at no time."""

    network: str
    batch: int
    rival: str
    ours_us: float
    rival_us: float
    cap_us: float

    @property
    def ratio(self) -> float:
        """How many times as fast ours is."""
        return self.rival_us / self.ours_us

    @property
    def cap(self) -> float:
        """How many times as fast ours would be if the pruned layers took no time; infinite where nothing is left."""
        return self.rival_us / self.cap_us if self.cap_us else math.inf

    @property
    def share_of_cap(self) -> float:
        return self.cap_us / self.ours_us

    def reaches(self, aim: InferenceAim) -> bool | None:
        """Whether it reaches what the paper reports, and enough of the cap; None for rivals without an aim."""
        if self.rival not in aim.least:
            return None
        return self.ratio >= aim.least[self.rival] and self.share_of_cap >= aim.share_of_cap


def gains(rows: Iterable[Row]) -> list[Gain]:
    """Ours against every rival at its best, of rows of one precision. Networks without a cap are not measured yet."""
    found = []
    for (network, _, batch), times in suite.best_times(rows).items():
        if "escort" in times and CAP in times:
            ours, cap = times["escort"], times[CAP]
            rivals = (method for method in times if method not in ("escort", CAP))
            found += [Gain(network, batch, rival, ours, times[rival], cap) for rival in rivals]
    return found
