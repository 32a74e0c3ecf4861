"""Tables of conversions: how long they take, and how fast what little search chooses is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import geometric_mean

from benchmarks.exhibits.cells import Shown, microseconds
from benchmarks.findings.aims import ConversionAim, read_aims
from benchmarks.result_files import Result
from benchmarks.suite import Row
from escort.report import Table


def show_conversions(results: Mapping[str, Result]) -> Shown:
    """The times of conversions and loads with their aims, and what they choose, per precision."""
    shown: Shown = {}
    for precision, result in results.items():
        aims = read_aims().conversions if result.header.get("device") == "cuda" else ()
        if times := _times(precision, result.rows, aims):
            shown[f"conversions-{precision}"] = times
        if choices := _choices(precision, result.rows):
            shown[f"choices-{precision}"] = choices
    return shown


def _times(precision: str, rows: Iterable[Row], aims: Sequence[ConversionAim]) -> Table | None:
    seconds: dict[tuple[str, str, int, str], dict[str, float]] = {}
    for row in rows:
        if row.method in ("convert", "load"):
            key = row.network, row.weights, row.batch, str(row.config["effort"])
            seconds.setdefault(key, {})[row.config.get("caches", "load")] = row.time_us / 1e6
    lines = []
    for (network, weights, batch, effort), taken in seconds.items():
        aim = next((a for a in aims if a.is_about(network, precision, effort, batch)), None)
        cells = [f"{taken[name]:.1f}" if name in taken else "-" for name in ("empty", "filled", "load")]
        lines.append((network, weights, str(batch), effort, *cells, *_judged(aim, taken)))
    columns = (
        "Network",
        "Weights",
        "Samples",
        "Effort",
        "Empty caches, s",
        "Filled, s",
        "Load, s",
        "Aims, s",
        "Reached",
    )
    caption = (
        "Wall time of a conversion in a fresh process, and of loading with the first call in one without a compiler. "
        "Aims are for empty and for filled caches."
    )
    return Table(f"Conversions, {precision}", columns, tuple(lines), caption) if lines else None


def _judged(aim: ConversionAim | None, taken: Mapping[str, float]) -> tuple[str, str]:
    """The cells of an aim, and of whether what was measured reaches it."""
    if aim is None:
        return "-", "-"
    known = [(taken[caches], most) for caches, most in aim.seconds.items() if caches in taken]
    reached = "yes" if known and all(time <= most for time, most in known) else "no"
    return ", ".join(f"{most:g}" for most in aim.seconds.values()), reached


def _choices(precision: str, rows: Iterable[Row]) -> Table | None:
    times: dict[tuple[str, str, int], dict[str, Row]] = {}
    for row in rows:
        if row.method == "escort":
            times.setdefault((row.network, row.weights, row.batch), {})[row.config["effort"]] = row
    lines, ratios = [], []
    for (network, weights, batch), by_effort in times.items():
        fast, exhaustive = by_effort["fast"], by_effort["exhaustive"]
        ratios.append(fast.time_us / exhaustive.time_us)
        cells = microseconds(fast.time_us), microseconds(exhaustive.time_us), f"{ratios[-1]:.3f}"
        lines.append((network, weights, str(batch), str(fast.timer), *cells))
    if not lines:
        return None
    columns = ("Network", "Weights", "Samples", "Timer", "Fast, µs", "Exhaustive, µs", "Ratio")
    caption = (
        f"What the effort fast chooses by what an exhaustive search does, raced in turn: {geometric_mean(ratios):.3f} "
        f"in the geometric mean, at most {read_aims().choices:g} is the aim. Neither compiles anything for the weights."
    )
    return Table(f"What little search chooses, {precision}", columns, tuple(lines), caption)
