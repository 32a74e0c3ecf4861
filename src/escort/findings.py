"""What the rows of a study say, in numbers: sums and aims, where two methods break even, what a change costs.

Everything is computed from result files, which :mod:`escort.study` writes; nothing is measured here. A method always
counts with its fastest configuration. :mod:`escort.exhibits` shows it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from escort import suite
from escort.paper_layers import PAPER_LAYERS
from escort.suite import Row

#: The paper's layers by network and name.
LAYERS = {(entry.network, entry.layer): entry for entry in PAPER_LAYERS}
#: The method that all others are compared with.
OURS = "direct"


@dataclass(frozen=True)
class Aim:
    """A least ratio of total times, ``rival / direct``, over the layers of a network at the paper's batch.

    Attributes:
        least: by network.
        config: what tells the rival's configurations that are meant from its other ones; by default its fastest counts.
        least_sparsity: only layers with at least this share of zeros count.
        paper: the speedup that the paper reports over all networks, None where it does not compare.
    """

    against: str
    rival: str
    dtype: str
    least: Mapping[str, float]
    config: Mapping[str, Any] = field(default_factory=dict)
    least_sparsity: float = 0.0
    paper: float | None = None

    def meant(self, row: Row) -> bool:
        """Whether the row counts."""
        return row.method != self.rival or self.config.items() <= row.config.items()


#: Lowering as torch alone does it: im2col image by image, then one product per group of the filter.
_PLAIN_CUBLAS = {"unfold": "by_image", "product": "by_group"}
_PLAIN_CUSPARSE = {"unfold": "by_image"}
AIMS = (
    Aim("cuBLAS lowering", "cublas", "fp32", {"caffenet": 5, "googlenet": 7, "resnet50": 8}, _PLAIN_CUBLAS, paper=2.63),
    Aim(
        "cuSPARSE lowering",
        "cusparse",
        "fp32",
        {"caffenet": 5, "googlenet": 8, "resnet50": 8},
        _PLAIN_CUSPARSE,
        paper=3.07,
    ),
    Aim("cuDNN strict fp32", "cudnn", "fp32", {"caffenet": 1.2, "googlenet": 1.5, "resnet50": 4}),
    Aim("cuDNN, layers of at least 96 %", "cudnn", "fp16", {"googlenet": 1.4, "resnet50": 1.4}, least_sparsity=0.96),
)


@dataclass(frozen=True)
class Total:
    """Times in microseconds summed over a network's layers, of the methods that ran all of them.

    Attributes:
        layers: how many were measured.
        published: how many the paper has of this kind.
    """

    network: str
    batch: int
    layers: int
    published: int
    times: Mapping[str, float]

    def ratio(self, rival: str) -> float | None:
        """How many times faster direct is; None where one of the two did not run all layers."""
        ours, theirs = self.times.get(OURS), self.times.get(rival)
        return theirs / ours if ours and theirs else None


def totals(rows: Iterable[Row], least_sparsity: float = 0.0) -> list[Total]:
    """Sums over the paper's layers per network and batch, of rows of one precision.

    Args:
        least_sparsity: only layers with at least this published share of zeros.
    """
    found: dict[tuple[str, int], list[dict[str, float]]] = {}
    for (network, layer, batch), times in suite.best_times(rows).items():
        if (network, layer) in LAYERS and LAYERS[network, layer].sparsity >= least_sparsity:
            found.setdefault((network, batch), []).append(times)
    sums = []
    for (network, batch), layers in found.items():
        everywhere = [method for method in methods_in(layers) if all(method in times for times in layers)]
        published = sum(e.network == network and e.sparsity >= least_sparsity for e in PAPER_LAYERS)
        times = {method: math.fsum(times[method] for times in layers) for method in everywhere}
        sums.append(Total(network, batch, len(layers), published, times))
    return sums


def complete(sums: Iterable[Total]) -> dict[str, Total]:
    """By network those of all its layers at the paper's batch."""
    batches = {entry.network: entry.batch for entry in PAPER_LAYERS}
    return {
        total.network: total
        for total in sums
        if total.layers == total.published and total.batch == batches[total.network]
    }


def break_even(points: Sequence[tuple[float, float, float]]) -> float:
    """The share of zeros from which we stay faster, as (sparsity, our time, their time) say, in any order.

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


@dataclass(frozen=True)
class Change:
    """One field of a layer's chosen configuration set to another value, and what that costs."""

    network: str
    layer: str
    field: str
    chosen: str
    value: str
    time_us: float
    cost: float


def changes_of(rows: Iterable[Row]) -> list[Change]:
    """A layer's first row is the chosen configuration, the others are changes of it."""
    chosen: dict[tuple[str, str], Row] = {}
    changes = []
    for row in rows:
        base = chosen.setdefault((row.network, row.layer), row)
        fields = [name for name, value in row.config.items() if value != base.config.get(name)]
        if fields:
            before, after = (
                ", ".join(str(config.get(name)) for name in fields) for config in (base.config, row.config)
            )
            cost = row.time_us / base.time_us
            changes.append(Change(row.network, row.layer, " and ".join(fields), before, after, row.time_us, cost))
    return changes


def by_sparsity(rows: Iterable[Row]) -> dict[tuple[str, str, int], dict[float, dict[str, float]]]:
    """(network, layer, batch) to sparsity, rising, to each method's best time in microseconds."""
    found: dict[tuple[str, str, int], dict[float, dict[str, float]]] = {}
    for row in rows:
        times = found.setdefault((row.network, row.layer, row.batch), {}).setdefault(sparsity_of(row.weights), {})
        times[row.method] = min(row.time_us, times.get(row.method, math.inf))
    return {key: dict(sorted(curve.items())) for key, curve in found.items()}


def points(curve: Mapping[float, Mapping[str, float]], ours: str) -> list[tuple[float, float, float]]:
    """A curve of :func:`by_sparsity` as :func:`break_even` takes it: one method against the fastest of all others."""
    return [
        (sparsity, times[ours], min(time for method, time in times.items() if method != ours))
        for sparsity, times in curve.items()
        if ours in times and len(times) > 1
    ]


def random_weights(sparsity: float) -> str:
    """What rows call weights at random positions with this share of zeros."""
    return f"random-{sparsity:.2f}"


def sparsity_of(weights: str) -> float:
    """The share of zeros in :func:`random_weights`."""
    return float(weights.removeprefix("random-"))


def methods_in(times: Iterable[Mapping[str, float]]) -> list[str]:
    return list(dict.fromkeys(method for found in times for method in found))
