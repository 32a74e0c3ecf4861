"""How long a layer takes by the share of its weights that are left."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

#: Shares of zeros, rising by a hundredth, for which there is a forecast: beyond either end nothing was measured.
SHARES = tuple(percent / 100 for percent in range(50, 99))
#: Halving the nonzeros again is worth it where the network gets so many times as fast by it.
_WORTH = 1.2
#: How far below what there is a share may be, and still stand for it: half of what lies between two.
_SAME = 0.005


@dataclass(frozen=True)
class Curve:
    """The time of a method for one layer: a part that is always there, and one in proportion to the nonzeros.

    What is read and written whatever the weights, and what each nonzero adds, make a line over the density. Where
    several densities were measured there is such a line between each two, and the first and the last go on. No line
    falls as the density rises, or reaches below zero at no density.

    Attributes:
        points: density and microseconds, densities rising. Of one point alone, the time is that at all densities.
    """

    points: tuple[tuple[float, float], ...]

    @classmethod
    def of(cls, points: Sequence[tuple[float, float]]) -> Curve:
        """The curve through measured points, in any order. Of several at one density the mean counts."""
        densities = sorted({density for density, _ in points})
        groups = [[us for at, us in points if at == density] for density in densities]
        return cls(tuple((d, sum(group) / len(group)) for d, group in zip(densities, groups, strict=True)))

    def __call__(self, density: float) -> float:
        """Microseconds."""
        if len(self.points) == 1:
            return self.points[0][1]
        pairs = list(pairwise(self.points))
        (low, low_us), (high, high_us) = next((pair for pair in pairs if density <= pair[1][0]), pairs[-1])
        slope = (high_us - low_us) / (high - low)
        if density < low:
            return low_us - (low - density) * min(max(slope, 0.0), low_us / low if low else 0.0)
        return low_us + (density - low) * slope if density <= high else high_us + (density - high) * max(slope, 0.0)


def is_ahead(share: float, now: float) -> bool:
    """Whether a share of zeros is about what there is now, or more."""
    return share >= now - _SAME


def shares_from(now: float) -> list[float]:
    """Those of :data:`SHARES` that are ahead of what there is now, the last one in any case."""
    return [share for share in SHARES if is_ahead(share, now)] or [SHARES[-1]]


def wins_from(ours: Callable[[float], float], theirs_us: float, now: float = 0.0) -> float | None:
    """The least share ahead from which a time by sparsity stays below another one; None where not at the last."""
    shares = shares_from(now)
    last_loss = max((share for share in shares if ours(share) >= theirs_us), default=0.0)
    return next((share for share in shares if share > last_loss), None)


def knee(time_us: Callable[[float], float], now: float = 0.0) -> float | None:
    """The least share ahead from which halving the nonzeros again makes a network less than 1.2 times as fast.

    Of a time of a fixed part and one in proportion to the nonzeros that is where these take half as long as the rest:
    the curve of speed bends there, and levels off. None where half the nonzeros are beyond the last share before that.
    """
    for share in shares_from(now):
        halved = 1.0 - (1.0 - share) / 2
        if halved <= SHARES[-1] and time_us(share) < _WORTH * time_us(halved):
            return share
    return None
