"""A study's results for readers: tables and plots by name, and documents that hold the tables.

No number is written by hand: documents name a table, and :func:`render` puts it there.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from statistics import median

import numpy as np

from benchmarks import findings, suite
from benchmarks.breakdown import PARTS
from benchmarks.counters import METRICS
from benchmarks.findings import (
    AIMS,
    GPUS,
    LAYERS,
    ON_FMA,
    OURS,
    PATTERN_AIMS,
    PEAK_TFLOPS,
    SPARSE,
    SPARSE_AIMS,
    Change,
    Total,
    by_sparsity,
    methods_in,
    rivals_in,
)
from benchmarks.result_files import PRECISIONS, STEMS, Result
from benchmarks.suite import WHOLE, Row
from escort.network.plan_table import convolution
from escort.problem import Precision
from escort.report import Figure, Table, horizontal_bars, line_chart, markdown

#: The precisions that there is a forecast of.
FORECAST: tuple[Precision, ...] = ("fp16", "fp32")
#: A plot that is drawn when it is called.
Plot = Callable[[], Figure]


def tables(results: Mapping[str, Result]) -> dict[str, Table]:
    """Every table that the results can fill, by the name that documents call it."""
    return {name: shown for name, shown in _exhibits(results) if isinstance(shown, Table)}


def plots(results: Mapping[str, Result]) -> dict[str, Figure]:
    """Every plot, by the name of its file. Raises ImportError without matplotlib."""
    return {name: shown() for name, shown in _exhibits(results) if not isinstance(shown, Table)}


def _exhibits(results: Mapping[str, Result]) -> Iterator[tuple[str, Table | Plot]]:
    yield "conditions", _conditions(results)
    for stem, show in _SHOWN.items():
        by_dtype = {dtype: results[f"{stem}-{dtype}"] for dtype in PRECISIONS if f"{stem}-{dtype}" in results}
        if by_dtype:
            yield from show(by_dtype).items()
    for dtype in FORECAST:
        yield from _forecast(results, dtype).items()


_BEGIN, _END = re.compile(r"<!-- table: (\S+) -->"), "<!-- end -->"
_IMAGE = re.compile(r"!\[[^]]*\]\(([\w-]+)\.svg\)")


def render(text: str, results: Mapping[str, Result]) -> str:
    """A Markdown document with its tables replaced by those of the results.

    A table's place is between a line ``<!-- table: NAME -->`` and a line ``<!-- end -->``; the rest stays as it is.

    Raises:
        ValueError: where there is no such place, one does not end, or the results have no table of that name.
    """
    there = tables(results)
    lines: list[str] = []
    name = None
    names = 0
    for number, line in enumerate(text.splitlines(), 1):
        begin = _BEGIN.fullmatch(line.strip())
        if begin and name is not None:
            raise ValueError(f"line {number}: table {begin[1]} begins before the place of table {name} ended: {_END}")
        if begin:
            name = begin[1]
            names += 1
            if name not in there:
                raise ValueError(f"line {number}: the results hold no table {name}; there are {', '.join(there)}")
            lines += [line, "", markdown(there[name]), ""]
        elif name is None and line.strip() == _END:
            raise ValueError(f"line {number}: {_END} ends nothing")
        elif name is None:
            lines.append(line)
        elif line.strip() == _END:
            lines.append(line)
            name = None
    if name is not None:
        raise ValueError(f"the place of table {name} does not end; put {_END} on a line behind it")
    if not names:
        raise ValueError(
            "there is no place for a table; put <!-- table: totals --> and <!-- end --> on lines of their own"
        )
    return "\n".join(lines) + "\n"


def illustrations(text: str, results: Mapping[str, Result]) -> dict[str, Figure]:
    """The plots that a document shows as images of their names beside it. Raises ImportError without matplotlib."""
    named = set(_IMAGE.findall(text))
    return {name: shown() for name, shown in _exhibits(results) if name in named and not isinstance(shown, Table)}


def _conditions(results: Mapping[str, Result]) -> Table:
    lines = []
    for stem, result in results.items():
        head = result.header
        versions = head.get("versions", {})
        device = head.get("gpu") or head.get("cpu")
        device = f"{device}, driver {head['driver']}" if head.get("driver") else device
        cells = (stem, device, versions.get("torch"), head.get("date"), head.get("commit"))
        lines.append((*("-" if cell is None else str(cell) for cell in cells), f"`{head.get('command', '-')}`"))
    return Table("Measured on", ("File", "Device", "torch", "Date", "Commit", "Command"), tuple(lines))


def _layers(results: Mapping[str, Result]) -> dict[str, Table | Plot]:
    """RQ1 and RQ3."""
    sums = {dtype: findings.totals(result.rows) for dtype, result in results.items()}
    found: dict[str, Table | Plot] = {"totals": _totals(sums), "wins": _wins(results)}
    if any(result.header.get("device") == "cuda" for result in results.values()):
        found["aims"] = _aims(results)
        found["sparse-aims"] = _sparse_aims(results)
        found |= _sparse_layers(results)
    known = {dtype: result for dtype, result in results.items() if result.header.get("gpu") in GPUS}
    if known:
        found |= {"floor": _floor(known), "prediction": _prediction(known)}
    for dtype, result in results.items():
        found[f"layers-{dtype}"] = _layer_table(dtype, result.rows)
        best = suite.best_times(result.rows)
        for network in dict.fromkeys(network for network, _, _ in best):
            times = {layer: found for (name, layer, _), found in best.items() if name == network and OURS in found}
            rivals = rivals_in(times.values())
            series = {f"over {r}": [t[r] / t[OURS] if r in t else None for t in times.values()] for r in rivals}
            if times and rivals:
                heading = f"Speedup of direct, {network}, {dtype}"
                chart = partial(horizontal_bars, heading, list(times), series, "Times faster", mark=1.0)
                found[f"speedup-{network}-{dtype}"] = chart
    return found


def _totals(sums: Mapping[str, Sequence[Total]]) -> Table:
    rivals = rivals_in(total.times for of_dtype in sums.values() for total in of_dtype)
    lines = []
    for dtype, of_dtype in sums.items():
        for total in of_dtype:
            count = str(total.layers) if total.layers == total.published else f"{total.layers} of {total.published}"
            times = [_us(total.times.get(method)) for method in (OURS, *rivals)]
            ratios = [_times(total.ratio(rival)) for rival in rivals]
            lines.append((total.network, dtype, str(total.batch), count, *times, *ratios))
    columns = ("Network", "Precision", "Batch", "Layers", *(f"{method} µs" for method in (OURS, *rivals)))
    columns += tuple(f"vs {rival}" for rival in rivals)
    return Table("Sums over the pruned layers", columns, tuple(lines), "A method without a sum did not run all layers.")


def _wins(results: Mapping[str, Result]) -> Table:
    lines = []
    for dtype, result in results.items():
        best = [times for times in suite.best_times(result.rows).values() if OURS in times]
        for rival in rivals_in(best):
            ratios = [times[rival] / times[OURS] for times in best if rival in times]
            faster = f"{sum(ratio > 1.0 for ratio in ratios)} of {len(ratios)}"
            middle = _times(_geometric_mean(ratios))
            lines.append((dtype, rival, faster, _times(min(ratios)), middle, _times(max(ratios))))
    columns = ("Precision", "Against", "Layers won", "Least", "Geometric mean", "Most")
    return Table("Speedup of direct over all layers", columns, tuple(lines))


def _aims(results: Mapping[str, Result]) -> Table:
    lines = []
    for aim in AIMS:
        rows = results[aim.dtype].rows if aim.dtype in results else []
        meant = findings.complete(findings.totals(filter(aim.meant, rows), aim.least_sparsity))
        fastest = findings.complete(findings.totals(rows, aim.least_sparsity))
        for network, least in aim.least.items():
            ratio = meant[network].ratio(aim.rival) if network in meant else None
            best = fastest[network].ratio(aim.rival) if network in fastest else None
            reached = "not measured" if ratio is None else "yes" if ratio >= least else "no"
            line = (aim.against, aim.dtype, network, _times(aim.paper), f"{least:g}x", _times(ratio), reached)
            lines.append((*line, _times(best)))
    columns = ("Against", "Precision", "Network", "Paper", "Aim", "Measured", "Reached", "Fastest variant")
    caption = (
        "Ratios of sums over a network's pruned layers at the paper's batch. The lowerings of the aims unfold a batch "
        "image by image, as torch does; the last column is against the fastest variant of the rival."
    )
    return Table("Aims", columns, tuple(lines), caption)


def _layer_table(dtype: str, rows: Sequence[Row]) -> Table:
    best = suite.best_times(rows)
    rivals = rivals_in(best.values())
    lines = []
    for (network, layer, batch), times in best.items():
        ours = times.get(OURS)
        ratios = (_times(times[rival] / ours if ours and rival in times else None) for rival in rivals)
        lines.append((network, layer, _zeros(network, layer), str(batch), _us(ours), *ratios))
    columns = ("Network", "Layer", "Zeros", "Batch", "direct µs", *(f"vs {rival}" for rival in rivals))
    return Table(f"Speedup of direct per layer, {dtype}", columns, tuple(lines))


def _sparse_aims(results: Mapping[str, Result]) -> Table:
    lines = []
    for aim in SPARSE_AIMS:
        rows = results[aim.dtype].rows if aim.dtype in results else []
        for network, (floor, goal) in aim.wanted.items():
            times = findings.against_cudnn(rows, network, aim.sparsities)
            lines.append((aim.against, network, *_reached(times, floor, goal)))
    caption = (
        "Measured: the geometric mean, over a network's pruned layers at the paper's batch, of cuDNN's time by that of "
        f"the fastest of {', '.join(SPARSE)}. The ratio of sums is of the same times: large layers count more in it."
    )
    return Table("Aims of the sparse methods", ("Against", "Network", *_REACHED), tuple(lines), caption)


_REACHED = ("Layers", "Floor", "Goal", "Measured", "Reached", "Layers won", "Ratio of sums")


def _reached(times: Sequence[tuple[float, float]], floor: float, goal: float) -> tuple[str, ...]:
    """An aim's cells, from the times of cuDNN and of ours per layer; none where they were not measured."""
    asked = f"{floor:g}x", f"{goal:g}x"
    if not times:
        return ("-", *asked, "-", "not measured", "-", "-")
    ratios = [cudnn / ours for cudnn, ours in times]
    mean = _geometric_mean(ratios)
    reached = "goal" if mean >= goal else "floor" if mean >= floor else "no"
    won = f"{sum(ratio > 1.0 for ratio in ratios)} of {len(ratios)}"
    cudnn, ours = (math.fsum(column) for column in zip(*times, strict=True))
    return (str(len(times)), *asked, _times(mean), reached, won, _times(cudnn / ours))


def _patterns(results: Mapping[str, Result]) -> dict[str, Table | Plot]:
    """Layers that were really pruned."""
    lines = []
    for aim in PATTERN_AIMS:
        for dtype, (floor, goal) in aim.wanted.items():
            rows = results[dtype].rows if dtype in results else []
            reached = _reached(findings.against_cudnn_on_patterns(rows, aim), floor, goal)
            lines.append((aim.weights, aim.kind, str(aim.batch), dtype, *reached))
    caption = "As in the aims of the sparse methods; fp32 is strict."
    columns = ("Patterns", "Layers of", "Batch", "cuDNN in", *_REACHED)
    found: dict[str, Table | Plot] = {"pattern-aims": Table("Aims on real patterns", columns, tuple(lines), caption)}
    return found | {f"patterns-{dtype}": _pattern_layers(dtype, result.rows) for dtype, result in results.items()}


def _pattern_layers(dtype: str, rows: Sequence[Row]) -> Table:
    lines = []
    for weights in dict.fromkeys(row.weights for row in rows):
        for f in findings.fastest_sparse(row for row in rows if row.weights == weights):
            lines.append((weights, f.layer, str(f.batch), f.method, _us(f.time_us), _times(f.speedup)))
    columns = ("Patterns", "Layer", "Batch", "Fastest", "µs", "vs cudnn")
    return Table(f"Fastest sparse method on real patterns, {dtype}", columns, tuple(lines))


def _sparse_layers(results: Mapping[str, Result]) -> dict[str, Table | Plot]:
    """Per precision the fastest of our sparse methods on each layer, and plots of all against cuDNN."""
    found: dict[str, Table | Plot] = {}
    for dtype, result in results.items():
        peak = _peak(dtype, result)
        layers = [f for f in findings.fastest_sparse(result.rows) if (f.network, f.layer) in LAYERS]
        lines = []
        for f in layers:
            share = (f"{f.share(peak):.0%}" if f.method in ON_FMA else "-",) if peak else ()
            line = (f.network, f.layer, _zeros(f.network, f.layer), str(f.batch), f.method, _us(f.time_us))
            lines.append((*line, _times(f.speedup), *share))
        columns = ("Network", "Layer", "Zeros", "Batch", "Fastest", "µs", "vs cudnn", *(("FMA peak",) if peak else ()))
        caption = ""
        on_fma = [f for f in findings.fastest_sparse(result.rows, ON_FMA) if (f.network, f.layer) in LAYERS]
        if peak and on_fma:
            most = max(on_fma, key=lambda f: f.share(peak))
            large = [f.share(peak) for f in on_fma if f.batch >= 128 and LAYERS[f.network, f.layer].sparsity <= 0.92]
            middle = f" The median over layers of 128 images or more and 92 % zeros or less: {median(large):.1%}."
            caption = (
                f"FMA peak: the real work's share of {peak:g} TFLOP/s, outside of the tensor cores; at most "
                f"{most.share(peak):.1%}, {most.network} {most.layer}.{middle if large else ''}"
            )
        found[f"sparse-layers-{dtype}"] = Table(f"Fastest sparse method, {dtype}", columns, tuple(lines), caption)
        best = suite.best_times(result.rows)
        for network in dict.fromkeys(f.network for f in layers):
            times = {layer: t for (name, layer, _), t in best.items() if name == network and "cudnn" in t}
            ours = [method for method in SPARSE if any(method in t for t in times.values())]
            series = {m: [t["cudnn"] / t[m] if m in t else None for t in times.values()] for m in ours}
            if series:
                heading = f"Sparse methods against cudnn, {network}, {dtype}"
                chart = partial(horizontal_bars, heading, list(times), series, "Times faster", mark=1.0)
                found[f"sparse-{network}-{dtype}"] = chart
    return found


def _floor(results: Mapping[str, Result]) -> Table:
    """Direct beside the time in which shared memory delivers a word of the input for each of its multiply-adds."""
    peaks = {dtype: peak for dtype, result in results.items() if (peak := _peak(dtype, result))}
    best = {dtype: suite.best_times(results[dtype].rows) for dtype in peaks}
    lines = []
    for network, layer, batch in dict.fromkeys(key for times in best.values() for key in times if key[:2] in LAYERS):
        cells: list[str] = []
        for dtype, times in best.items():
            time_us = times.get((network, layer, batch), {}).get(OURS)
            # The arithmetic could take four words in the time that shared memory takes for one.
            floor_us = findings.flop(network, layer, batch) / (peaks[dtype] / 4 * 1e6)
            cells += [_us(time_us), f"{floor_us / time_us:.0%}" if time_us else "-"]
        lines.append((network, layer, _zeros(network, layer), *cells))
    columns = ("Network", "Layer", "Zeros", *(f"{dtype} {what}" for dtype in best for what in ("µs", "of the floor")))
    return Table("How near direct comes to its floor", columns, tuple(lines))


def _prediction(results: Mapping[str, Result]) -> Table:
    """Not of TF32, whose problems run the kernels of fp32."""
    lines = []
    for dtype, result in results.items():
        layers = findings.predictions(result) if dtype != "tf32" else []
        if layers:
            errors = [error for layer in layers for error in layer.errors]
            spread = (f"{np.median(errors):.1%}", f"{np.quantile(errors, 0.9):.1%}")
            costs = [layer.first_cost for layer in layers], [layer.tried_cost for layer in layers]
            first, tried = (f"{_geometric_mean(cost):.2f}x, at worst {max(cost):.2f}x" for cost in costs)
            lines.append((dtype, str(len(errors)), *spread, first, tried))
    columns = ("Precision", "Timings", "Median error", "90th percentile", "Ranked first", "Tried first")
    caption = (
        "Error: predicted by measured time of a generated kernel, less one, by the model as it is now. Ranked first: "
        "the time of a layer's config of least prediction by that of the fastest one timed, geometric mean over the "
        "layers. Tried first: the same for the config that the model of then put first, before anything was timed."
    )
    return Table("The model of generated kernels", columns, tuple(lines), caption)


def _forecast(results: Mapping[str, Result], dtype: Precision) -> dict[str, Table | Plot]:
    found = findings.forecasts(results, dtype)
    if not found:
        return {}
    methods = methods_in(forecast.least for forecast in found)
    lines = []
    for f in found:
        shares = (_least(f.least[method]) for method in methods)
        lines.append((convolution(f.problem), str(f.problem.batch), f.layout, _us(f.cudnn_us), *shares))
    lowest, highest = 100 * findings.SHARES[0], 100 * findings.SHARES[-1]
    caption = (
        "Share of zeros, at random positions, from which a method's model predicts less than the time measured of "
        f"cuDNN; never: not at {highest:g} % either."
    )
    if any(f.layout == "any" for f in found):
        caption += (
            " Tensors in any layout: each method takes them as suits it best and nothing is converted, which for cuDNN "
            "and sparse_tc means channels_last, as a network that is channels_last throughout has them."
        )
    if OURS in methods:
        rates = findings.direct_mhz(results[f"layers-{dtype}"], dtype)
        low, middle, high = np.quantile(rates, (0.1, 0.5, 0.9)) / 1e3
        caption += (
            f" The model of direct counts clocks: {middle:.2f} GHz are taken, the median over the paper's layers of "
            f"its clocks by the time measured (10th percentile {low:.2f}, 90th {high:.2f})."
        )
    columns = ("Convolution", "Images", "Tensors", "cudnn µs", *methods)
    heading = f"Forecast of break-even sparsity, {dtype}"
    names = [f"{convolution(f.problem)}, {f.problem.batch} images, {f.layout}" for f in found]
    bars = {method: [_length(f.least[method], findings.SHARES[0]) for f in found] for method in methods}
    plot = partial(horizontal_bars, heading, names, bars, f"Percent zeros, no less than {lowest:g}")
    return {f"forecast-{dtype}": Table(heading, columns, tuple(lines), caption), f"forecast-{dtype}-plot": plot}


def _least(share: float) -> str:
    if share == math.inf:
        return "never"
    return f"below {findings.SHARES[0]:.0%}" if share == -math.inf else f"{share:.0%}"


def _peak(dtype: str, result: Result) -> float | None:
    """TFLOP/s, where the GPU is known."""
    return PEAK_TFLOPS.get(result.header.get("gpu", ""), {}).get(dtype)


def _ablation(results: Mapping[str, Result]) -> dict[str, Table | Plot]:
    """RQ2."""
    found: dict[str, Table | Plot] = {}
    for dtype, result in results.items():
        changes = findings.changes_of(result.rows)
        lines = [
            (c.network, c.layer, c.field, c.chosen, c.value, _us(c.time_us), f"{c.cost:.2f}x")
            for c in sorted(changes, key=lambda c: (c.network, c.layer, c.field, c.cost))
        ]
        columns = ("Network", "Layer", "Field", "Chosen", "Instead", "µs", "Time")
        caption = "Time: against the chosen configuration, of which one field is changed at a time."
        found[f"ablation-{dtype}-all"] = Table(f"Every change, {dtype}", columns, tuple(lines), caption)
        found[f"ablation-{dtype}"] = _ablation_summary(dtype, changes)
    return found


def _ablation_summary(dtype: str, changes: Sequence[Change]) -> Table:
    """Per field: over the layers, the cost of its worst and of its best other value."""
    lines = []
    for name in dict.fromkeys(change.field for change in changes):
        costs: dict[tuple[str, str], list[float]] = {}
        for change in changes:
            if change.field == name:
                costs.setdefault((change.network, change.layer), []).append(change.cost)
        most = max(costs, key=lambda key: max(costs[key]))
        worst, best = (_geometric_mean([pick(values) for values in costs.values()]) for pick in (max, min))
        where = f"{max(costs[most]):.2f}x, {most[0]} {most[1]}"
        lines.append((name, str(len(costs)), f"{worst:.2f}x", f"{best:.2f}x", where))
    columns = ("Field", "Layers", "Worst other value", "Best other value", "Most")
    caption = "Time against the chosen configuration with this field alone changed; geometric means over the layers."
    return Table(f"What each field of the configuration is worth, {dtype}", columns, tuple(lines), caption)


def _counters(results: Mapping[str, Result]) -> dict[str, Table | Plot]:
    """RQ2's evidence."""
    found: dict[str, Table | Plot] = {}
    for dtype, result in results.items():
        lines = [
            (row.network, row.layer, _us(row.time_us), *(_count(row.config["counters"].get(m)) for m in METRICS))
            for row in result.rows
        ]
        columns = ("Network", "Layer", "µs", *METRICS.values())
        found[f"counters-{dtype}"] = Table(f"Hardware counters of direct, {dtype}", columns, tuple(lines))
    return found


def _networks(results: Mapping[str, Result]) -> dict[str, Table | Plot]:
    """RQ4: whole networks."""
    found: dict[str, Table | Plot] = {}
    for dtype, result in results.items():
        best = by_sparsity(result.rows)
        engines = methods_in(times for curve in best.values() for times in curve.values())
        rivals = [engine for engine in engines if engine != "escort"]
        lines = []
        for (network, _, batch), curve in best.items():
            for sparsity, times in curve.items():
                milliseconds = [_ms(times.get(engine)) for engine in engines]
                ours = times.get("escort")
                ratios = [_times(times[rival] / ours if ours and rival in times else None) for rival in rivals]
                lines.append((network, str(batch), f"{sparsity:.0%}", *milliseconds, *ratios))
            there = methods_in(curve.values())
            lengths = {engine: [times.get(engine, math.nan) / 1e3 for times in curve.values()] for engine in there}
            heading, axis = f"{network}, batch {batch}, {dtype}", "Zeros in all convolutions but the first, percent"
            percent = [100 * sparsity for sparsity in curve]
            found[f"network-{network}-{dtype}"] = partial(line_chart, heading, percent, lengths, axis, "ms")
        columns = ("Network", "Batch", "Zeros", *(f"{engine} ms" for engine in engines))
        columns += tuple(f"vs {rival}" for rival in rivals)
        found[f"networks-{dtype}"] = Table(f"Whole networks, {dtype}", columns, tuple(lines), _network_crossings(best))
    return found


def _network_crossings(best: Mapping[tuple[str, str, int], Mapping[float, Mapping[str, float]]]) -> str:
    found = {network: findings.points(curve, "escort") for (network, _, _), curve in best.items()}
    texts = [f"{network} {_crossing(points)}" for network, points in found.items() if points]
    return f"Faster than the fastest dense engine from this share of zeros on: {', '.join(texts)}." if texts else ""


def _break_evens(results: Mapping[str, Result]) -> dict[str, Table | Plot]:
    """RQ4: layers."""
    found: dict[tuple[str, str], dict[str, list[tuple[float, float, float]]]] = {}
    for dtype, result in results.items():
        for (network, layer, _), curve in by_sparsity(result.rows).items():
            if points := findings.points(curve, OURS):
                found.setdefault((network, layer), {})[dtype] = points
    lines = []
    for (network, layer), points_of in found.items():
        entry = LAYERS[network, layer]
        cells = (_crossing(points_of[dtype]) if dtype in points_of else "-" for dtype in results)
        lines.append((network, layer, convolution(entry.problem(entry.batch)), _zeros(network, layer), *cells))
    columns = ("Network", "Layer", "Convolution", "Zeros in the paper", *results)
    caption = "Share of zeros from which direct is faster than the dense library at the same precision."
    table = Table("Break-even sparsity per layer shape", columns, tuple(lines), caption)
    names = [f"{network} {layer}" for network, layer in found]
    bars = {dtype: [_bar(points_of.get(dtype)) for points_of in found.values()] for dtype in results}
    plot = partial(horizontal_bars, "Break-even sparsity per layer shape", names, bars, "Percent zeros")
    return {"break-even": table, "break-even-plot": plot} if found else {}


def _bar(points: Sequence[tuple[float, float, float]] | None) -> float | None:
    """A break-even sparsity in percent, not below what was measured; None where there is none."""
    return _length(findings.break_even(points), min(points)[0]) if points else None


def _length(share: float, lowest: float) -> float | None:
    return None if share == math.inf else 100 * max(share, lowest)


def _crossing(points: Sequence[tuple[float, float, float]]) -> str:
    at, sparsities = findings.break_even(points), [sparsity for sparsity, _, _ in points]
    if at == math.inf:
        return f"above {max(sparsities):.0%}"
    return f"below {min(sparsities):.0%}" if at == -math.inf else f"{at:.0%}"


def _breakdown(results: Mapping[str, Result]) -> dict[str, Table | Plot]:
    found: dict[str, Table | Plot] = {}
    for dtype, result in results.items():
        sums: dict[tuple[str, str, str], dict[str, float]] = {}
        for row in result.rows:
            what = f"all, {findings.sparsity_of(row.weights):.0%} zeros" if row.layer == WHOLE else "pruned layers"
            parts = sums.setdefault((row.network, what, row.method), dict.fromkeys(PARTS, 0.0))
            parts[row.config["part"]] += row.time_us
        lines = []
        for key, parts in sums.items():
            total = math.fsum(parts.values())
            shares = (f"{_us(time)} ({time / total:.0%})" if time else "-" for time in parts.values())
            lines.append((*key, *shares, _us(total)))
        columns = ("Network", "Convolutions", "Method", *(f"{part} µs" for part in PARTS), "Sum µs")
        found[f"breakdown-{dtype}"] = Table(f"Where the time goes, {dtype}", columns, tuple(lines))
        groups = [" ".join((network, method, what.partition(",")[0])) for network, what, method in sums]
        series = {part: [parts[part] / 1e3 for parts in sums.values()] for part in PARTS}
        chart = partial(horizontal_bars, f"Where the time goes, {dtype}", groups, series, "ms", stacked=True)
        found[f"breakdown-{dtype}-plot"] = chart
    return found


#: What is shown of the result files of each stem, given by precision.
_SHOWN: dict[str, Callable[[Mapping[str, Result]], dict[str, Table | Plot]]] = dict(
    zip(STEMS, (_layers, _ablation, _counters, _break_evens, _networks, _breakdown, _patterns), strict=True)
)


def _geometric_mean(values: Sequence[float]) -> float:
    return math.exp(math.fsum(map(math.log, values)) / len(values))


def _zeros(network: str, layer: str) -> str:
    return f"{LAYERS[network, layer].sparsity:.1%}" if (network, layer) in LAYERS else "-"


def _us(time_us: float | None) -> str:
    return "-" if time_us is None else f"{time_us:,.0f}" if time_us >= 100 else f"{time_us:.1f}"


def _ms(time_us: float | None) -> str:
    return "-" if time_us is None else f"{time_us / 1e3:.2f}"


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}x"


def _count(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
