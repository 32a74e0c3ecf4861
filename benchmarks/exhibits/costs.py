"""Tables and plots of what a run costs: the fields of its configuration, what hardware counts, its parts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from statistics import geometric_mean

from benchmarks.breakdown import PARTS
from benchmarks.counters import METRICS
from benchmarks.exhibits.cells import Shown, count, microseconds
from benchmarks.findings.break_even import sparsity_of
from benchmarks.findings.changes import Change, changes_of
from benchmarks.result_files import Result
from benchmarks.suite import WHOLE
from escort.report import Table, horizontal_bars


def show_ablation(results: Mapping[str, Result]) -> Shown:
    """RQ2."""
    shown: Shown = {}
    for precision, result in results.items():
        changes = changes_of(result.rows)
        lines = [
            (c.network, c.layer, c.field, c.chosen, c.value, microseconds(c.time_us), f"{c.cost:.2f}x")
            for c in sorted(changes, key=lambda c: (c.network, c.layer, c.field, c.cost))
        ]
        columns = ("Network", "Layer", "Field", "Chosen", "Instead", "µs", "Time")
        caption = "Time: against the chosen configuration, of which one field is changed at a time."
        shown[f"ablation-{precision}-all"] = Table(f"Every change, {precision}", columns, tuple(lines), caption)
        shown[f"ablation-{precision}"] = _ablation_table(precision, changes)
    return shown


def _ablation_table(precision: str, changes: Sequence[Change]) -> Table:
    """Per field: over the layers, the cost of its worst and of its best other value."""
    lines = []
    for name in dict.fromkeys(change.field for change in changes):
        costs: dict[tuple[str, str], list[float]] = {}
        for change in changes:
            if change.field == name:
                costs.setdefault((change.network, change.layer), []).append(change.cost)
        most = max(costs, key=lambda key: max(costs[key]))
        worst, best = (geometric_mean([pick(values) for values in costs.values()]) for pick in (max, min))
        where = f"{max(costs[most]):.2f}x, {most[0]} {most[1]}"
        lines.append((name, str(len(costs)), f"{worst:.2f}x", f"{best:.2f}x", where))
    columns = ("Field", "Layers", "Worst other value", "Best other value", "Most")
    caption = "Time against the chosen configuration with this field alone changed; geometric means over the layers."
    return Table(f"What each field of the configuration is worth, {precision}", columns, tuple(lines), caption)


def show_counters(results: Mapping[str, Result]) -> Shown:
    """RQ2's evidence."""
    shown: Shown = {}
    for precision, result in results.items():
        lines = [
            (row.network, row.layer, microseconds(row.time_us), *_counts(row.config["counters"])) for row in result.rows
        ]
        columns = ("Network", "Layer", "µs", *METRICS.values())
        shown[f"counters-{precision}"] = Table(f"Hardware counters of direct, {precision}", columns, tuple(lines))
    return shown


def _counts(counters: Mapping[str, float]) -> list[str]:
    return [count(counters.get(metric)) for metric in METRICS]


def show_breakdown(results: Mapping[str, Result]) -> Shown:
    shown: Shown = {}
    for precision, result in results.items():
        sums: dict[tuple[str, str, str], dict[str, float]] = {}
        for row in result.rows:
            what = f"all, {sparsity_of(row.weights):.0%} zeros" if row.layer == WHOLE else "pruned layers"
            parts = sums.setdefault((row.network, what, row.method), dict.fromkeys(PARTS, 0.0))
            parts[row.config["part"]] += row.time_us
        lines = []
        for key, parts in sums.items():
            total = math.fsum(parts.values())
            shares = (f"{microseconds(time)} ({time / total:.0%})" if time else "-" for time in parts.values())
            lines.append((*key, *shares, microseconds(total)))
        columns = ("Network", "Convolutions", "Method", *(f"{part} µs" for part in PARTS), "Sum µs")
        shown[f"breakdown-{precision}"] = Table(f"Where the time goes, {precision}", columns, tuple(lines))
        groups = [" ".join((network, method, what.partition(",")[0])) for network, what, method in sums]
        series = {part: [parts[part] / 1e3 for parts in sums.values()] for part in PARTS}
        chart = partial(horizontal_bars, f"Where the time goes, {precision}", groups, series, "ms", stacked=True)
        shown[f"breakdown-{precision}-plot"] = chart
    return shown
