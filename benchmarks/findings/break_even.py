"""From which share of zeros on a method is the faster one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from benchmarks.suite import Row

#: A share of zeros, and what we and the others take at it.
Point = tuple[float, float, float]
#: What rows call random weights of which two of each four are zero.
SEMI_STRUCTURED = "random-2:4"


def break_even(points: Sequence[Point]) -> float:
    """The share of zeros from which we stay faster. Points may come in any order.

    Between two of them the logarithm of the ratio is taken as linear. Returns -inf where we are faster at all of them,
    and inf where we are not at the sparsest.
    """
    if not points:
        raise ValueError("no times, no break-even")
    gains = [(sparsity, math.log(theirs / ours)) for sparsity, ours, theirs in sorted(points)]
    slower = [index for index, (_, gain) in enumerate(gains) if gain <= 0.0]
    if not slower:
        return -math.inf
    if slower[-1] == len(gains) - 1:
        return math.inf
    (left, loss), (right, gain) = gains[slower[-1] : slower[-1] + 2]
    return left + (right - left) * loss / (loss - gain)


def by_sparsity(rows: Iterable[Row]) -> dict[tuple[str, str, int], dict[float, dict[str, float]]]:
    """(network, layer, batch) to sparsity, rising, to each method's best time in microseconds.

    Rows whose weights do not say their share of zeros, as those of pattern files, do not count.
    """
    curves: dict[tuple[str, str, int], dict[float, dict[str, float]]] = {}
    for row in (row for row in rows if _has_share(row.weights)):
        times = curves.setdefault((row.network, row.layer, row.batch), {}).setdefault(sparsity_of(row.weights), {})
        times[row.method] = min(row.time_us, times.get(row.method, math.inf))
    return {key: dict(sorted(curve.items())) for key, curve in curves.items()}


def points_of(curve: Mapping[float, Mapping[str, float]], ours: str) -> list[Point]:
    """A curve of :func:`by_sparsity` as :func:`break_even` takes it: one method against the fastest of all others."""
    return [
        (sparsity, times[ours], min(time for method, time in times.items() if method != ours))
        for sparsity, times in curve.items()
        if ours in times and len(times) > 1
    ]


def _has_share(weights: str) -> bool:
    return weights.startswith("random-") and weights != SEMI_STRUCTURED


def random_weights(sparsity: float) -> str:
    """What rows call weights at random positions with this share of zeros."""
    return f"random-{sparsity:.2f}"


def sparsity_of(weights: str) -> float:
    """The share of zeros in :func:`random_weights`, whatever else they are: ``random-0.90-dense-depthwise``."""
    return float(weights.removeprefix("random-").partition("-")[0])
