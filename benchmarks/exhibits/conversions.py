"""Tables of conversions: how long they take, how fast what little search chooses is, and what callers see of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import geometric_mean

from benchmarks.exhibits.cells import Shown, microseconds
from benchmarks.findings.aims import ConversionAim, read_aims
from benchmarks.result_files import Result
from benchmarks.suite import Row
from escort.report import Table


def show_conversions(results: Mapping[str, Result]) -> Shown:
    """The times of conversions and loads with their aims, what they choose and what callers see, per precision."""
    shown: Shown = {}
    ratios = [fast / exhaustive for result in results.values() for fast, exhaustive, _ in _raced(result.rows).values()]
    of_all = geometric_mean(ratios) if ratios else 1.0
    for precision, result in results.items():
        aims = read_aims().conversions if result.header.get("device") == "cuda" else ()
        if times := _times(precision, result.rows, aims):
            shown[f"conversions-{precision}"] = times
        if choices := _choices(precision, result.rows, of_all):
            shown[f"choices-{precision}"] = choices
        if calls := _calls(precision, result.rows):
            shown[f"callers-{precision}"] = calls
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
        "Aims are for empty caches, for filled ones and for loading."
    )
    return Table(f"Conversions, {precision}", columns, tuple(lines), caption) if lines else None


def _judged(aim: ConversionAim | None, taken: Mapping[str, float]) -> tuple[str, str]:
    """The cells of an aim, and of whether what was measured reaches it."""
    if aim is None:
        return "-", "-"
    known = [(taken[caches], most) for caches, most in aim.seconds.items() if caches in taken]
    reached = _yes(bool(known) and all(time <= most for time, most in known))
    return ", ".join(f"{most:g}" for most in aim.seconds.values()), reached


def _raced(rows: Iterable[Row]) -> dict[tuple[str, str, int], tuple[float, float, str]]:
    """What the choices of the effort "fast" and of an exhaustive search take in us, and how many layers were searched.

    By network, weights and samples.
    """
    found: dict[tuple[str, str, int], dict[str, Row]] = {}
    for row in rows:
        if row.method == "escort" and "effort" in row.config:
            found.setdefault((row.network, row.weights, row.batch), {})[row.config["effort"]] = row
    raced = {}
    for subject, by_effort in found.items():
        fast, exhaustive = by_effort["fast"], by_effort["exhaustive"]
        about = exhaustive.config
        searched = f"{about['searched_layers']} of {about['all_layers']}"
        raced[subject] = fast.time_us, exhaustive.time_us, searched
    return raced


def _choices(precision: str, rows: Sequence[Row], of_all: float) -> Table | None:
    """The table of a precision; `of_all` is the geometric mean over those of all."""
    lines, ratios = [], []
    for (network, weights, batch), (fast, exhaustive, searched) in _raced(rows).items():
        ratios.append(fast / exhaustive)
        cells = microseconds(fast), microseconds(exhaustive), f"{ratios[-1]:.3f}", searched
        lines.append((network, weights, str(batch), *cells))
    if not lines:
        return None
    columns = ("Network", "Weights", "Samples", "Fast, µs", "Exhaustive, µs", "Ratio", "Layers searched")
    caption = (
        f"What the effort fast chooses by what an exhaustive search does, raced in turn: {geometric_mean(ratios):.3f} "
        f"in the geometric mean, {of_all:.3f} over all precisions; at most {read_aims().choices:g} is the aim. Neither "
        "compiles anything for the weights. An exhaustive search times all configs, 24 of a method at most, of all "
        "methods that do not write their input out, for as many layers as it has time for, the longest first."
    )
    return Table(f"What little search chooses, {precision}", columns, tuple(lines), caption)


def _calls(precision: str, rows: Iterable[Row]) -> Table | None:
    """What a caller sees of a converted network beside its graph, and the host's time of a call without one."""
    calls: dict[tuple[str, str, int, int], dict[str, float]] = {}
    for row in rows:
        if row.method == "escort" and "layers" in row.config and row.timer is not None:
            calls.setdefault((row.network, row.weights, row.batch, row.config["layers"]), {})[row.timer] = row.time_us
    aim, lines = read_aims().calls, []
    for (network, weights, batch, layers), times in calls.items():
        if "graph" in times:  # of a GPU
            per_layer, most_us = times["host"] / layers, aim.most_us(times["graph"])
            cells = microseconds(times["graph"]), microseconds(times["call"]), microseconds(most_us)
            reached = _yes(times["call"] <= most_us), microseconds(times["pipelined"])
            host = f"{per_layer:.1f}", f"{aim.host_us_per_layer:g}", _yes(per_layer <= aim.host_us_per_layer)
            lines.append((network, weights, str(batch), *cells, *reached, *host))
    columns = (
        *("Network", "Weights", "Samples", "Graph, µs", "Call, µs", "Aim, µs", "Reached", "Pipelined, µs"),
        *("Host per layer, µs", "Its aim, µs", "It is reached"),
    )
    caption = (
        f"Calls of converted networks, each waited for; the aim is {aim.times:g} times the time of the CUDA graph and "
        f"{aim.plus_us:g} µs. The host's time per convolution is that of calls that replay no graph."
    )
    return Table(f"What callers see, {precision}", columns, tuple(lines), caption) if lines else None


def _yes(is_reached: bool) -> str:
    return "yes" if is_reached else "no"
