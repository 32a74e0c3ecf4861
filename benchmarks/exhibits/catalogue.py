"""Every table and plot that results can fill, by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from benchmarks.exhibits.aims import show_patterns
from benchmarks.exhibits.cells import Exhibit, Shown
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
    return {name: shown for name, shown, _ in exhibits(results) if isinstance(shown, Table)}


def plots(results: Mapping[str, Result]) -> dict[str, Figure]:
    """Every plot, by the name of its file. Raises ImportError without matplotlib."""
    return {name: shown() for name, shown, _ in exhibits(results) if not isinstance(shown, Table)}


def exhibits(results: Mapping[str, Result], text: str | None = None) -> Iterator[Exhibit]:
    """All tables, and all plots as the functions that draw them, with the files that they are made of.

    Args:
        text: a document. What takes seconds is left out where it does not name it.
    """
    yield "conditions", conditions_table(results), ()
    for stem, show in _SHOWN.items():
        by_precision = {
            precision: results[f"{stem}-{precision}"] for precision in PRECISIONS if f"{stem}-{precision}" in results
        }
        if by_precision:
            for name, shown in show(by_precision).items():
                of = [precision for precision in by_precision if precision in name.split("-")] or by_precision
                yield name, shown, tuple(f"{stem}-{precision}" for precision in of)
    for precision in (each for each in CROSSING if text is None or f"crossing-{each}" in text):
        for name, shown in show_crossing(results, precision).items():
            of_stems = (f"{stem}-{precision}" for stem in ("layers", "patterns"))
            yield name, shown, tuple(stem for stem in of_stems if stem in results)


#: Tables of which each precision that was measured has one, by the result file that they are made of.
_BY_PRECISION = {
    name: name for name in "layers ablation counters networks inference speed breakdown conversions".split()
}
_BY_PRECISION |= {"sparse-layers": "layers", "calls": "networks", "choices": "conversions", "callers": "conversions"}


def file_of(name: str) -> str | None:
    """The result file that a table of one precision is made of, which not every folder has; None for other tables."""
    stem, _, precision = name.rpartition("-")
    return f"{_BY_PRECISION[stem]}-{precision}" if precision in PRECISIONS and stem in _BY_PRECISION else None


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
