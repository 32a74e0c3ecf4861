"""Every table and plot that results can fill, by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from benchmarks.exhibits.aims import show_patterns
from benchmarks.exhibits.cells import Plot, Shown
from benchmarks.exhibits.conditions import conditions_table
from benchmarks.exhibits.conversions import show_conversions
from benchmarks.exhibits.costs import show_ablation, show_breakdown, show_counters
from benchmarks.exhibits.crossing import CROSSING, show_crossing
from benchmarks.exhibits.inference import show_inference
from benchmarks.exhibits.layers import show_layers
from benchmarks.exhibits.networks import show_break_evens, show_networks
from benchmarks.exhibits.speed import show_speed
from benchmarks.result_files import PRECISIONS, Result
from escort.report import Figure, Table


def tables(results: Mapping[str, Result]) -> dict[str, Table]:
    """Every table that the results can fill, by the name that documents call it."""
    return {name: shown for name, shown in exhibits(results) if isinstance(shown, Table)}


def plots(results: Mapping[str, Result]) -> dict[str, Figure]:
    """Every plot, by the name of its file. Raises ImportError without matplotlib."""
    return {name: shown() for name, shown in exhibits(results) if not isinstance(shown, Table)}


def exhibits(results: Mapping[str, Result]) -> Iterator[tuple[str, Table | Plot]]:
    """All tables, and all plots as the functions that draw them."""
    yield "conditions", conditions_table(results)
    for stem, show in _SHOWN.items():
        by_precision = {
            precision: results[f"{stem}-{precision}"] for precision in PRECISIONS if f"{stem}-{precision}" in results
        }
        if by_precision:
            yield from show(by_precision).items()
    for precision in CROSSING:
        yield from show_crossing(results, precision).items()


#: What is shown of the result files of each stem, given by precision.
_SHOWN: dict[str, Callable[[Mapping[str, Result]], Shown]] = {
    "layers": show_layers,
    "ablation": show_ablation,
    "counters": show_counters,
    "break-even": show_break_evens,
    "networks": show_networks,
    "inference": show_inference,
    "speed": show_speed,
    "breakdown": show_breakdown,
    "patterns": show_patterns,
    "conversions": show_conversions,
}
