"""What holds a converted network back: which layers gain less than the others, and how many more zeros they need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import numpy as np

from escort.methods import by_name
from escort.network.forecast.curve import SHARES, Curve
from escort.network.wording import convolution, microseconds, percent, ratio
from escort.planner import Plan
from escort.problem import Problem
from escort.report import Table

#: How many layers are named.
_MOST = 6
#: Layers are to gain as much as all of them together, and at least so much.
_LEAST_GAIN = 1.5


@dataclass(frozen=True)
class Holding:
    """A layer that gains less than the network, and what would change that.

    Attributes:
        zeros: the share there is, None where the plan does not say it.
        time_us, dense_us: microseconds by its method, and by the fastest dense one.
        needed: the share of zeros at which it would gain as much as the network; None where it would not at 98 %.
        saved_us: what that, or else 98 % of zeros, would save.
    """

    name: str
    problem: Problem
    zeros: float | None
    time_us: float
    dense_us: float
    needed: float | None
    saved_us: float


class _Timed(NamedTuple):
    """A layer by its fastest sparse method: density and time, its nonzeros' products, and what is read and written."""

    density: float
    time_us: float
    products: float
    values: float


def wanted_gain(layers: Mapping[str, Plan]) -> float:
    """What layers are held to: the gain of all of them together."""
    known = [(p.dense_time_us, p.time_us) for p in layers.values() if p.dense_time_us is not None and p.time_us]
    dense_us, time_us = sum(dense for dense, _ in known), sum(us for _, us in known if us)
    return max(dense_us / time_us if time_us else 1.0, _LEAST_GAIN)


def holding_back(layers: Mapping[str, Plan], sparsities: Mapping[str, float]) -> list[Holding]:
    """The layers that gain less than the network, those first where more zeros would save most.

    Args:
        sparsities: the share of zeros in each layer's filter, as far as it is known.
    """
    gain = wanted_gain(layers)
    sparse = {name: timed for name, plan in layers.items() if (timed := _timed(plan, sparsities.get(name)))}
    fixed = dict(zip(sparse, _fixed_shares(list(sparse.values())), strict=True))
    found = []
    for name, plan in layers.items():
        time_us, dense_us = plan.time_us, plan.dense_time_us
        if time_us is None or dense_us is None or dense_us >= gain * time_us:
            continue
        needed, least_us = None, time_us
        if (timed := sparse.get(name)) is not None:
            curve = Curve(((0.0, fixed[name] * timed.time_us), (timed.density, timed.time_us)))
            shares = [share for share in SHARES if share > 1.0 - timed.density]
            needed = next((share for share in shares if curve(1.0 - share) <= dense_us / gain), None)
            last = needed or SHARES[-1]
            least_us = min(time_us, curve(1.0 - last)) if last > 1.0 - timed.density else time_us
        zeros = sparsities.get(name)
        found.append(Holding(name, plan.problem, zeros, time_us, dense_us, needed, time_us - least_us))
    return sorted(found, key=lambda holding: (-holding.saved_us, -holding.time_us))[:_MOST]


def _timed(plan: Plan, sparsity: float | None) -> _Timed | None:
    """A layer by the fastest method that skips zeros; None where none was timed, or all weights are there."""
    problem = plan.problem
    names = {c.method for c in plan.candidates if c.time_us is not None}
    times_us = [plan.best_us(name) for name in names if not by_name(name, problem.device).is_dense]
    time_us = min((us for us in times_us if us is not None), default=None)
    is_depthwise = problem.groups == problem.in_channels > 1
    if time_us is None or not sparsity or is_depthwise:
        return None
    outputs = problem.batch * problem.out_height * problem.out_width
    products = (1.0 - sparsity) * prod(problem.weight_shape) * outputs
    return _Timed(1.0 - sparsity, time_us, products, prod(problem.input_shape) + problem.out_channels * outputs)


def _fixed_shares(layers: Sequence[_Timed]) -> list[float]:
    """Of each layer the share of its time that is there whatever its zeros.

    A time is what is read and written plus what the nonzeros are multiplied by, each at a rate that is the network's:
    the rates that explain the times of all layers best, relative to each.
    """
    if not layers:
        return []
    terms = np.array([(layer.values, layer.products) for layer in layers]) / [[layer.time_us] for layer in layers]
    rates = np.linalg.lstsq(terms, np.ones(len(layers)), rcond=None)[0]
    if rates.min() < 0.0:  # one of the two explains all that can be
        rates = np.where(rates > 0.0, 1.0, 0.0)
    parts = terms * rates
    return [float(share) for share in parts[:, 0] / parts.sum(axis=1)]


def advice_table(layers: Mapping[str, Plan], sparsities: Mapping[str, float]) -> Table | None:
    """What to prune further; None where no layer gains less than the network."""
    found = holding_back(layers, sparsities)
    if not found:
        return None
    gain = wanted_gain(layers)
    rows = tuple(_row(holding) for holding in found)
    caption = (
        f"The layers that gain less than {gain:.2f}x, those first where more zeros save most. An estimate, from the "
        "times in this plan: what a layer reads and writes stays, what its nonzeros are multiplied by shrinks. It says "
        "nothing of accuracy; escort forecast measures several shares of zeros."
    )
    columns = ("Layer", "Convolution", "Zeros", "µs", "Speedup", f"Zeros for {gain:.2f}x", "Would save, µs")
    return Table("What to do next", columns, rows, caption)


def _row(holding: Holding) -> tuple[str, ...]:
    needed = "not by zeros" if holding.needed is None else f"{holding.needed:.0%}"
    return (
        holding.name,
        convolution(holding.problem),
        percent(holding.zeros),
        microseconds(holding.time_us),
        ratio(holding.dense_us, holding.time_us),
        needed,
        microseconds(holding.saved_us),
    )
