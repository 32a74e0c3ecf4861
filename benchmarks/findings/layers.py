"""Sums and ratios over layers: of the paper's, and of those that were really pruned."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks import suite
from benchmarks.findings.aims import PatternAim
from benchmarks.findings.methods import OURS, SPARSE, methods_in
from benchmarks.paper_layers import LAYERS, PAPER_BATCH, PAPER_LAYERS
from benchmarks.suite import Row


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
    measured: dict[tuple[str, int], list[dict[str, float]]] = {}
    for (network, layer, batch), times in suite.best_times(rows).items():
        if (network, layer) in LAYERS and LAYERS[network, layer].sparsity >= least_sparsity:
            measured.setdefault((network, batch), []).append(times)
    sums = []
    for (network, batch), layers in measured.items():
        everywhere = [method for method in methods_in(layers) if all(method in times for times in layers)]
        published = sum(e.network == network and e.sparsity >= least_sparsity for e in PAPER_LAYERS)
        times = {method: math.fsum(times[method] for times in layers) for method in everywhere}
        sums.append(Total(network, batch, len(layers), published, times))
    return sums


def complete(sums: Iterable[Total]) -> dict[str, Total]:
    """By network those of all its layers at the paper's batch."""
    return {
        total.network: total
        for total in sums
        if total.layers == total.published and total.batch == PAPER_BATCH[total.network]
    }


def flop(network: str, layer: str, batch: int) -> int:
    """The real work of one of the paper's layers: a multiplication and an addition per nonzero and output position."""
    entry = LAYERS[network, layer]
    problem = entry.problem(batch)
    nnz = round((1.0 - entry.sparsity) * math.prod(problem.weight_shape))
    return 2 * nnz * batch * problem.out_height * problem.out_width


@dataclass(frozen=True)
class Fastest:
    """A layer with the faster of our sparse methods; times in microseconds.

    Attributes:
        cudnn_us: None where cuDNN was not timed.
    """

    network: str
    layer: str
    batch: int
    method: str
    time_us: float
    cudnn_us: float | None

    @property
    def speedup(self) -> float | None:
        """How many times faster than cuDNN."""
        return None if self.cudnn_us is None else self.cudnn_us / self.time_us

    def share(self, peak_tflops: float) -> float:
        """The real work per time, of that peak; for the paper's layers."""
        return flop(self.network, self.layer, self.batch) / (self.time_us * 1e6 * peak_tflops)


def fastest_sparse(rows: Iterable[Row], methods: Sequence[str] = SPARSE) -> list[Fastest]:
    """The layers that one of these methods ran, of rows of one precision and with the same weights."""
    fastest = []
    for (network, layer, batch), times in suite.best_times(rows).items():
        ours = [method for method in methods if method in times]
        if ours:
            method = min(ours, key=times.__getitem__)
            fastest.append(Fastest(network, layer, batch, method, times[method], times.get("cudnn")))
    return fastest


def against_cudnn(
    rows: Iterable[Row], network: str, sparsities: tuple[float, float] = (0.0, 1.0)
) -> list[tuple[float, float]]:
    """The times of cuDNN and of the fastest sparse method, in microseconds, on layers at the paper's batch.

    Nothing where one of the two did not run all of them.

    Args:
        network: whose layers; "all" for those of all networks.
        sparsities: shares of zeros, from the first to the second.
    """
    published = {
        (entry.network, entry.layer, entry.batch)
        for entry in PAPER_LAYERS
        if network in (entry.network, "all") and sparsities[0] <= entry.sparsity <= sparsities[1]
    }
    times = [
        (f.cudnn_us, f.time_us)
        for f in fastest_sparse(rows)
        if (f.network, f.layer, f.batch) in published and f.cudnn_us is not None
    ]
    return times if len(times) == len(published) else []


def against_cudnn_on_patterns(rows: Iterable[Row], aim: PatternAim) -> list[tuple[float, float]]:
    """As :func:`against_cudnn`, on the layers of an aim."""
    fastest = fastest_sparse(row for row in rows if aim.counts(row))
    times = [(f.cudnn_us, f.time_us) for f in fastest if f.cudnn_us is not None]
    return times if len(times) == aim.count else []
