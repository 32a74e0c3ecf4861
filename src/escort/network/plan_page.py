"""The report of a conversion: a page with the times before and after, layer by layer, and what to prune further."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from pathlib import Path

from escort.network.forecast.advice import advice_table
from escort.network.plan import NetworkPlan, plan_table
from escort.network.wording import microseconds, percent, ratio
from escort.report import Facts, Section, Text, horizontal_bars, write_html

#: How many layers are drawn: those that take longest.
_DRAWN = 16


def write(plan: NetworkPlan, path: Path) -> None:
    """Writes the report, one page that stands alone. Raises ImportError without matplotlib, and OSError."""
    write_html(path, "Report of a conversion", sections(plan))


def sections(plan: NetworkPlan) -> list[Section]:
    """What the page shows."""
    by_time = dict(sorted(plan.layers.items(), key=lambda item: -(item[1].time_us or 0.0)))
    facts = {
        "before": f"{microseconds(plan.dense_time_us)} µs",
        "after": f"{microseconds(plan.dense_time_us if plan.kept_dense else plan.converted_time_us)} µs",
        "gain": ratio(plan.dense_time_us, plan.dense_time_us if plan.kept_dense else plan.converted_time_us),
        "zeros": percent(zeros(plan)),
    }
    shown: list[Section] = [Facts("In short", facts)]
    if plan.reason is not None:
        shown.append(Text("Why the original was kept", (plan.reason,)))
    if (advice := advice_table(plan.layers, plan.sparsities)) is not None:
        shown.append(advice)
    drawn = list(by_time.items())[:_DRAWN]
    if drawn:
        times = {
            "dense": [layer.dense_time_us for _, layer in drawn],
            "converted": [layer.time_us for _, layer in drawn],
        }
        shown.append(horizontal_bars("The layers that take longest", [name for name, _ in drawn], times, "µs"))
    return [*shown, plan_table(replace(plan, layers=by_time), "Layers by time", whole=True)]


def zeros(plan: NetworkPlan) -> float | None:
    """The share of zeros in all filters together, None where the plan does not say it."""
    weights = {name: prod(layer.problem.weight_shape) for name, layer in plan.layers.items() if name in plan.sparsities}
    total = sum(weights.values())
    return sum(count * plan.sparsities[name] for name, count in weights.items()) / total if total else None
