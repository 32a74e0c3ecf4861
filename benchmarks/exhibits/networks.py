"""Tables and plots of RQ4: from which share of zeros on networks and layers are faster than dense ones."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial

from benchmarks.exhibits.cells import Shown, bar_length, microseconds, milliseconds, times_faster, zeros_in_paper
from benchmarks.findings.aims import read_aims
from benchmarks.findings.break_even import Point, break_even, by_sparsity, points_of, sparsity_of
from benchmarks.findings.methods import OURS, methods_in
from benchmarks.paper_layers import LAYERS
from benchmarks.result_files import Result
from benchmarks.suite import Row
from escort.network.wording import convolution
from escort.report import Table, horizontal_bars, line_chart


def show_networks(results: Mapping[str, Result]) -> Shown:
    """RQ4: whole networks."""
    shown: Shown = {}
    for precision, result in results.items():
        best = by_sparsity(result.rows)
        engines = methods_in(times for curve in best.values() for times in curve.values())
        rivals = [engine for engine in engines if engine != "escort"]
        lines = []
        for (network, _, batch), curve in best.items():
            for sparsity, times in curve.items():
                times_ms = [milliseconds(times.get(engine)) for engine in engines]
                ours = times.get("escort")
                ratios = [times_faster(times[rival] / ours if ours and rival in times else None) for rival in rivals]
                lines.append((network, str(batch), f"{sparsity:.0%}", *times_ms, *ratios))
            timed = methods_in(curve.values())
            lengths = {engine: [times.get(engine, math.nan) / 1e3 for times in curve.values()] for engine in timed}
            heading, axis = f"{network}, batch {batch}, {precision}", "Zeros in all convolutions but the first, percent"
            percent = [100 * sparsity for sparsity in curve]
            shown[f"network-{network}-{precision}"] = partial(line_chart, heading, percent, lengths, axis, "ms")
        columns = ("Network", "Batch", "Zeros", *(f"{engine} ms" for engine in engines))
        columns += tuple(f"vs {rival}" for rival in rivals)
        effort = f"Converted with effort={result.header['effort']}. " if "effort" in result.header else ""
        caption = effort + _network_crossings(best)
        shown[f"networks-{precision}"] = Table(f"Whole networks, {precision}", columns, tuple(lines), caption)
        if calls := _calls_table(precision, result.rows):
            shown[f"calls-{precision}"] = calls
    return shown


def _calls_table(precision: str, rows: Iterable[Row]) -> Table | None:
    """What a caller sees beside what the GPU does; None where rows do not say how they were timed, or of a CPU."""
    best: dict[tuple[str, float, int, str], dict[str, float]] = {}
    for row in rows:
        if row.timer is not None:
            engine = "eager" if row.method == "graph" else row.method  # the name of eager torch in a CUDA graph
            engine += " by torch.compile" if row.config.get("compiled") else ""
            times = best.setdefault((row.network, sparsity_of(row.weights), row.batch, engine), {})
            times[row.timer] = min(row.time_us, times.get(row.timer, math.inf))
    aim = read_aims().calls
    lines = []
    for (network, sparsity, batch, engine), times in best.items():
        if "graph" in times and "call" in times:
            judged = "-", "-"
            if engine == "escort":
                most_us = aim.most_us(times["graph"])
                judged = microseconds(most_us), "yes" if times["call"] <= most_us else "no"
            cells = (microseconds(times.get(timer)) for timer in ("graph", "call", "pipelined"))
            lines.append((network, str(batch), f"{sparsity:.0%}", engine, *cells, *judged))
    columns = ("Network", "Batch", "Zeros", "Engine", "Graph, µs", "Call, µs", "Pipelined, µs", "Aim, µs", "Reached")
    caption = (
        "Replays of a CUDA graph by the GPU's clock; calls that are waited for one by one, and calls back to back, by "
        f"the host's. The aim is a call of {aim.times:g} times the graph's time and {aim.plus_us:g} µs."
    )
    return Table(f"Calls of whole networks, {precision}", columns, tuple(lines), caption) if lines else None


def _network_crossings(best: Mapping[tuple[str, str, int], Mapping[float, Mapping[str, float]]]) -> str:
    curves = {network: points_of(curve, "escort") for (network, _, _), curve in best.items()}
    texts = [f"{network} {_crossing(points)}" for network, points in curves.items() if points]
    return f"Faster than the fastest dense engine from this share of zeros on: {', '.join(texts)}." if texts else ""


def show_break_evens(results: Mapping[str, Result]) -> Shown:
    """RQ4: layers."""
    layers: dict[tuple[str, str], dict[str, list[Point]]] = {}
    for precision, result in results.items():
        for (network, layer, _), curve in by_sparsity(result.rows).items():
            if points := points_of(curve, OURS):
                layers.setdefault((network, layer), {})[precision] = points
    lines = []
    for (network, layer), by_precision in layers.items():
        entry = LAYERS[network, layer]
        cells = (_crossing(by_precision[precision]) if precision in by_precision else "-" for precision in results)
        lines.append((network, layer, convolution(entry.problem(entry.batch)), zeros_in_paper(network, layer), *cells))
    columns = ("Network", "Layer", "Convolution", "Zeros in the paper", *results)
    caption = "Share of zeros from which direct is faster than the dense library at the same precision."
    table = Table("Break-even sparsity per layer shape", columns, tuple(lines), caption)
    names = [f"{network} {layer}" for network, layer in layers]
    bars = {precision: [_bar(by_precision.get(precision)) for by_precision in layers.values()] for precision in results}
    plot = partial(horizontal_bars, "Break-even sparsity per layer shape", names, bars, "Percent zeros")
    return {"break-even": table, "break-even-plot": plot} if layers else {}


def _bar(points: Sequence[Point] | None) -> float | None:
    """A break-even sparsity in percent, not below what was measured; None where there is none."""
    return bar_length(break_even(points), min(points)[0]) if points else None


def _crossing(points: Sequence[Point]) -> str:
    at, sparsities = break_even(points), [sparsity for sparsity, _, _ in points]
    if at == math.inf:
        return f"above {max(sparsities):.0%}"
    return f"below {min(sparsities):.0%}" if at == -math.inf else f"{at:.0%}"
