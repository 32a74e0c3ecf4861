"""Tables and plots of our sparse methods: the fastest per layer, what bounds them, what their models predict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from statistics import geometric_mean, median

import numpy as np

from benchmarks import suite
from benchmarks.exhibits.cells import Shown, microseconds, times_faster, zeros_in_paper
from benchmarks.findings import prediction
from benchmarks.findings.gpus import peak_tflops
from benchmarks.findings.layers import fastest_sparse, flop
from benchmarks.findings.methods import ON_FMA, OURS, SPARSE
from benchmarks.paper_layers import LAYERS
from benchmarks.result_files import Result
from benchmarks.suite import Row
from escort.report import Table, horizontal_bars


def show_sparse_layers(results: Mapping[str, Result]) -> Shown:
    """Per precision the fastest of our sparse methods on each layer, and plots of all against cuDNN."""
    shown: Shown = {}
    for precision, result in results.items():
        peak = peak_tflops(result, precision)
        layers = [f for f in fastest_sparse(result.rows) if (f.network, f.layer) in LAYERS]
        lines = []
        for f in layers:
            share = (f"{f.share(peak):.0%}" if f.method in ON_FMA else "-",) if peak else ()
            cells = zeros_in_paper(f.network, f.layer), str(f.batch), f.method, microseconds(f.time_us)
            lines.append((f.network, f.layer, *cells, times_faster(f.speedup), *share))
        columns = ("Network", "Layer", "Zeros", "Batch", "Fastest", "µs", "vs cudnn", *(("FMA peak",) if peak else ()))
        caption = ""
        on_fma = [f for f in fastest_sparse(result.rows, ON_FMA) if (f.network, f.layer) in LAYERS]
        if peak and on_fma:
            most = max(on_fma, key=lambda f: f.share(peak))
            large = [f.share(peak) for f in on_fma if f.batch >= 128 and LAYERS[f.network, f.layer].sparsity <= 0.92]
            middle = f" The median over layers of 128 samples or more and 92 % zeros or less: {median(large):.1%}."
            caption = (
                f"FMA peak: the real work's share of {peak:g} TFLOP/s, outside of the tensor cores; at most "
                f"{most.share(peak):.1%}, {most.network} {most.layer}.{middle if large else ''}"
            )
        shown[f"sparse-layers-{precision}"] = Table(
            f"Fastest sparse method, {precision}", columns, tuple(lines), caption
        )
        best = suite.best_times(result.rows)
        for network in dict.fromkeys(f.network for f in layers):
            times = {layer: t for (name, layer, _), t in best.items() if name == network and "cudnn" in t}
            ours = [method for method in SPARSE if any(method in t for t in times.values())]
            series = {m: [t["cudnn"] / t[m] if m in t else None for t in times.values()] for m in ours}
            if series:
                heading = f"Sparse methods against cudnn, {network}, {precision}"
                chart = partial(horizontal_bars, heading, list(times), series, "Times faster", mark=1.0)
                shown[f"sparse-{network}-{precision}"] = chart
    return shown


def pattern_layers_table(precision: str, rows: Sequence[Row]) -> Table:
    lines = []
    for weights in dict.fromkeys(row.weights for row in rows):
        for f in fastest_sparse(row for row in rows if row.weights == weights):
            lines.append((weights, f.layer, str(f.batch), f.method, microseconds(f.time_us), times_faster(f.speedup)))
    columns = ("Patterns", "Layer", "Batch", "Fastest", "µs", "vs cudnn")
    return Table(f"Fastest sparse method on real patterns, {precision}", columns, tuple(lines))


def floor_table(results: Mapping[str, Result]) -> Table:
    """Direct beside the time in which shared memory delivers a word of the input for each of its multiply-adds."""
    peaks = {precision: peak for precision, result in results.items() if (peak := peak_tflops(result, precision))}
    best = {precision: suite.best_times(results[precision].rows) for precision in peaks}
    lines = []
    for network, layer, batch in dict.fromkeys(key for times in best.values() for key in times if key[:2] in LAYERS):
        cells: list[str] = []
        for precision, times in best.items():
            time_us = times.get((network, layer, batch), {}).get(OURS)
            # The arithmetic could take four words in the time that shared memory takes for one.
            floor_us = flop(network, layer, batch) / (peaks[precision] / 4 * 1e6)
            cells += [microseconds(time_us), f"{floor_us / time_us:.0%}" if time_us else "-"]
        lines.append((network, layer, zeros_in_paper(network, layer), *cells))
    columns = (
        "Network",
        "Layer",
        "Zeros",
        *(f"{precision} {what}" for precision in best for what in ("µs", "of the floor")),
    )
    return Table("How near direct comes to its floor", columns, tuple(lines))


def prediction_table(results: Mapping[str, Result]) -> Table:
    """Not of TF32, whose problems run the kernels of fp32."""
    lines = []
    for precision, result in results.items():
        layers = prediction.predictions(result) if precision != "tf32" else []
        if layers:
            errors = [error for layer in layers for error in layer.errors]
            spread = (f"{np.median(errors):.1%}", f"{np.quantile(errors, 0.9):.1%}")
            costs = [layer.first_cost for layer in layers], [layer.tried_cost for layer in layers]
            first, tried = (f"{geometric_mean(cost):.2f}x, at worst {max(cost):.2f}x" for cost in costs)
            lines.append((precision, str(len(errors)), *spread, first, tried))
    columns = ("Precision", "Timings", "Median error", "90th percentile", "Ranked first", "Tried first")
    caption = (
        "Error: predicted by measured time of a generated kernel, less one, by the model as it is now. Ranked first: "
        "the time of a layer's config of least prediction by that of the fastest one timed, geometric mean over the "
        "layers. Tried first: the same for the config that the model of then put first, before anything was timed."
    )
    return Table("The model of generated kernels", columns, tuple(lines), caption)
