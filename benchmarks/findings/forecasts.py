"""How far off forecasts were, of networks that were then pruned."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median

from benchmarks.suite import Row

#: The gain from which on a forecast's error counts: below that nobody prunes for speed.
LEAST_GAIN = 1.3


@dataclass(frozen=True)
class Check:
    """A network that was pruned, and what the forecast had said of it.

    Attributes:
        weights: how its zeros are spread, and `zeros` the share of them over all convolutions.
        forecast, measured: how many times as fast as the original it is.
    """

    network: str
    weights: str
    zeros: float
    forecast: float
    measured: float

    @property
    def error(self) -> float:
        """How far off the forecast is, as a share of what was measured; above zero where it is too bright."""
        return self.forecast / self.measured - 1.0

    @property
    def counts(self) -> bool:
        return self.measured >= LEAST_GAIN


def checks(rows: Iterable[Row]) -> list[Check]:
    """Those networks of which there is both."""
    by_key: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        by_key.setdefault((row.network, row.weights), {})[row.method] = row
    return [
        Check(
            network,
            weights,
            float(found["escort"].config["zeros"]),
            max(float(found["forecast"].config["dense_us"]) / found["forecast"].time_us, 1.0),
            max(found["eager"].time_us / found["escort"].time_us, 1.0),
        )
        for (network, weights), found in by_key.items()
        if {"eager", "escort", "forecast"} <= found.keys()
    ]


def errors(found: Sequence[Check]) -> tuple[float, float]:
    """The median and the largest error of the speed-ups that count, whatever their sign. Raises ValueError for none."""
    sizes = [abs(check.error) for check in found if check.counts]
    if not sizes:
        raise ValueError(f"no network gained {LEAST_GAIN} times")
    return median(sizes), max(sizes)
