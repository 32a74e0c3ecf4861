"""Tables and plots of the paper's layers: direct against its rivals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from statistics import geometric_mean

from benchmarks import suite
from benchmarks.exhibits.aims import aims_table, sparse_aims_table
from benchmarks.exhibits.cells import Shown, microseconds, times_faster, zeros_in_paper
from benchmarks.exhibits.sparse import floor_table, prediction_table, show_sparse_layers
from benchmarks.findings.gpus import GPUS
from benchmarks.findings.layers import Total, totals
from benchmarks.findings.methods import OURS, rivals_in
from benchmarks.result_files import Result
from benchmarks.suite import Row
from escort.report import Table, horizontal_bars


def show_layers(results: Mapping[str, Result]) -> Shown:
    """RQ1 and RQ3."""
    sums = {precision: totals(result.rows) for precision, result in results.items()}
    shown: Shown = {"totals": _totals_table(sums), "wins": _wins_table(results)}
    if any(result.header.get("device") == "cuda" for result in results.values()):
        shown["aims"] = aims_table(results)
        shown["sparse-aims"] = sparse_aims_table(results)
        shown |= show_sparse_layers(results)
    known = {precision: result for precision, result in results.items() if result.header.get("gpu") in GPUS}
    if known:
        shown |= {"floor": floor_table(known), "prediction": prediction_table(known)}
    for precision, result in results.items():
        shown[f"layers-{precision}"] = _layer_table(precision, result.rows)
        best = suite.best_times(result.rows)
        for network in dict.fromkeys(network for network, _, _ in best):
            times = {layer: t for (name, layer, _), t in best.items() if name == network and OURS in t}
            rivals = rivals_in(times.values())
            series = {f"over {r}": [t[r] / t[OURS] if r in t else None for t in times.values()] for r in rivals}
            if times and rivals:
                heading = f"Speedup of direct, {network}, {precision}"
                chart = partial(horizontal_bars, heading, list(times), series, "Times faster", mark=1.0)
                shown[f"speedup-{network}-{precision}"] = chart
    return shown


def _totals_table(sums: Mapping[str, Sequence[Total]]) -> Table:
    rivals = rivals_in(total.times for of_precision in sums.values() for total in of_precision)
    lines = []
    for precision, of_precision in sums.items():
        for total in of_precision:
            count = str(total.layers) if total.layers == total.published else f"{total.layers} of {total.published}"
            times = [microseconds(total.times.get(method)) for method in (OURS, *rivals)]
            ratios = [times_faster(total.ratio(rival)) for rival in rivals]
            lines.append((total.network, precision, str(total.batch), count, *times, *ratios))
    columns = ("Network", "Precision", "Batch", "Layers", *(f"{method} µs" for method in (OURS, *rivals)))
    columns += tuple(f"vs {rival}" for rival in rivals)
    return Table("Sums over the pruned layers", columns, tuple(lines), "A method without a sum did not run all layers.")


def _wins_table(results: Mapping[str, Result]) -> Table:
    lines = []
    for precision, result in results.items():
        best = [times for times in suite.best_times(result.rows).values() if OURS in times]
        for rival in rivals_in(best):
            ratios = [times[rival] / times[OURS] for times in best if rival in times]
            faster = f"{sum(ratio > 1.0 for ratio in ratios)} of {len(ratios)}"
            middle = times_faster(geometric_mean(ratios))
            lines.append((precision, rival, faster, times_faster(min(ratios)), middle, times_faster(max(ratios))))
    columns = ("Precision", "Against", "Layers won", "Least", "Geometric mean", "Most")
    return Table("Speedup of direct over all layers", columns, tuple(lines))


def _layer_table(precision: str, rows: Sequence[Row]) -> Table:
    best = suite.best_times(rows)
    rivals = rivals_in(best.values())
    lines = []
    for (network, layer, batch), times in best.items():
        ours = times.get(OURS)
        ratios = (times_faster(times[rival] / ours if ours and rival in times else None) for rival in rivals)
        lines.append((network, layer, zeros_in_paper(network, layer), str(batch), microseconds(ours), *ratios))
    columns = ("Network", "Layer", "Zeros", "Batch", "direct µs", *(f"vs {rival}" for rival in rivals))
    return Table(f"Speedup of direct per layer, {precision}", columns, tuple(lines))
