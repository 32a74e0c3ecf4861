"""Tables of aims, and of whether they were reached."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import geometric_mean

from benchmarks.exhibits.cells import Shown, times_faster
from benchmarks.exhibits.sparse import pattern_layers_table
from benchmarks.findings.aims import Wanted, read_aims
from benchmarks.findings.layers import against_cudnn, against_cudnn_on_patterns, complete, totals
from benchmarks.findings.methods import SPARSE
from benchmarks.result_files import Result
from escort.report import Table

_REACHED = ("Layers", "Floor", "Goal", "Measured", "Reached", "Layers won", "Ratio of sums")


def aims_table(results: Mapping[str, Result]) -> Table:
    lines = []
    for aim in read_aims().direct:
        rows = results[aim.precision].rows if aim.precision in results else []
        aimed = complete(totals(filter(aim.counts, rows), aim.least_sparsity))
        fastest = complete(totals(rows, aim.least_sparsity))
        for network, least in aim.least.items():
            ratio = aimed[network].ratio(aim.rival) if network in aimed else None
            best = fastest[network].ratio(aim.rival) if network in fastest else None
            if ratio is None:
                continue
            reached = "yes" if ratio >= least else "no"
            ratios = times_faster(aim.paper), f"{least:g}x", times_faster(ratio)
            lines.append((aim.against, aim.precision, network, *ratios, reached, times_faster(best)))
    columns = ("Against", "Precision", "Network", "Paper", "Aim", "Measured", "Reached", "Fastest variant")
    caption = (
        "Ratios of sums over a network's pruned layers at the paper's batch. The lowerings of the aims unfold a batch "
        "sample by sample, as torch does; the last column is against the fastest variant of the rival."
    )
    return Table("Aims", columns, tuple(lines), caption)


def sparse_aims_table(results: Mapping[str, Result]) -> Table:
    lines = []
    for aim in read_aims().sparse:
        rows = results[aim.precision].rows if aim.precision in results else []
        for network, wanted in aim.wanted.items():
            if times := against_cudnn(rows, network, aim.sparsities):
                lines.append((aim.against, network, *_reached(times, wanted)))
    caption = (
        "Measured: the geometric mean, over a network's pruned layers at the paper's batch, of cuDNN's time by that of "
        f"the fastest of {', '.join(SPARSE)}. The ratio of sums is of the same times: large layers count more in it."
    )
    return Table("Aims of the sparse methods", ("Against", "Network", *_REACHED), tuple(lines), caption)


def _reached(times: Sequence[tuple[float, float]], wanted: Wanted) -> tuple[str, ...]:
    """An aim's cells, from the times of cuDNN and of ours per layer."""
    least = f"{wanted.floor:g}x", f"{wanted.goal:g}x"
    ratios = [cudnn / ours for cudnn, ours in times]
    mean = geometric_mean(ratios)
    reached = "goal" if mean >= wanted.goal else "floor" if mean >= wanted.floor else "no"
    won = f"{sum(ratio > 1.0 for ratio in ratios)} of {len(ratios)}"
    cudnn, ours = (math.fsum(column) for column in zip(*times, strict=True))
    return (str(len(times)), *least, times_faster(mean), reached, won, times_faster(cudnn / ours))


def show_patterns(results: Mapping[str, Result]) -> Shown:
    """Layers that were really pruned."""
    lines = []
    for aim in read_aims().patterns:
        for precision, wanted in aim.wanted.items():
            rows = results[precision].rows if precision in results else []
            if times := against_cudnn_on_patterns(rows, aim):
                lines.append((aim.weights, aim.kind, str(aim.batch), precision, *_reached(times, wanted)))
    caption = "As in the aims of the sparse methods; fp32 is strict."
    columns = ("Patterns", "Layers of", "Batch", "cuDNN in", *_REACHED)
    shown: Shown = {"pattern-aims": Table("Aims on real patterns", columns, tuple(lines), caption)}
    return shown | {
        f"patterns-{precision}": pattern_layers_table(precision, result.rows) for precision, result in results.items()
    }
