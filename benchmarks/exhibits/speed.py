"""The table of how fast converted networks are against torch.compile."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from benchmarks.exhibits.cells import Shown, milliseconds, times_faster
from benchmarks.findings.aims import Wanted, read_aims
from benchmarks.findings.speed import Key, Speed, speeds
from benchmarks.result_files import Result
from escort.report import Table


def show_speed(results: Mapping[str, Result]) -> Shown:
    """Every network that has an aim and was measured, or why it could not be, per precision."""
    slower, shown = read_aims().slower, Shown()
    times = "Call, ms", "Graph, ms", "compile, ms"
    judged = "Floor", "Goal", "Gain", "Reached", "In graphs", "vs dense", "Never slower"
    columns = "Network", "Weights", "Samples", *times, *judged
    caption = (
        "Gain: plain calls of ours (call) against replays of the dense model by `torch.compile` in a CUDA graph, "
        "interleaved, both waited for by the host's clock; a replay copies nothing in or out. Ours and "
        "`torch.compile` in graphs: both by the GPU's clock, and so against the fastest dense model of all (vs dense), "
        f"eager torch among them. Never slower is at most {slower - 1.0:.0%} slower than that. A tie is a network that "
        "was kept dense. Dense models were tried in "
    )
    for precision, result in results.items():
        measured, failed, lines = speeds(result.rows), result.header.get("failed", {}), []
        for (network, weights, batch), wanted in _aims(precision):
            key, label = (network, weights, batch), f"{network} {weights} N={batch}"
            if key in measured or label in failed:
                cells = _cells(measured.get(key), failed.get(label, ""), wanted, slower)
                lines.append((network, weights, str(batch), *cells))
        formats = dict.fromkeys(row.config["memory_format"] for row in result.rows if row.method == "compile")
        effort = f", converted ones made with effort={result.header['effort']}" if "effort" in result.header else ""
        about = f"{caption}{' and '.join(formats) or 'no memory format'}{effort}."
        shown[f"speed-{precision}"] = Table(f"Whole networks, {precision}", columns, tuple(lines), about)
    return shown


def _aims(precision: str) -> Iterator[tuple[Key, Wanted]]:
    """The networks of a precision's aims, in their order."""
    for aim in (aim for aim in read_aims().speed if precision in aim.wanted):
        for network in aim.networks:
            for batch in aim.batches:
                yield (network, aim.weights, batch), aim.wanted[precision]


def _cells(speed: Speed | None, failure: str, wanted: Wanted, slower: float) -> tuple[str, ...]:
    aims = times_faster(wanted.floor), times_faster(wanted.goal)
    if speed is None:
        return ("-", "-", "-", *aims, "-", f"failed: {failure.partition(chr(10))[0]}", "-", "-", "-")
    times = (milliseconds(time_us) for time_us in (speed.call_us, speed.graph_us, speed.rival_graph_us))
    gains = times_faster(speed.gain_in_graphs), times_faster(speed.gain_over_dense)
    judged = times_faster(speed.gain), _reached(speed, wanted)
    return (*times, *aims, *judged, *gains, _never_slower(speed, slower))


def _reached(speed: Speed, wanted: Wanted) -> str:
    if speed.gain is None:
        return "-"
    if speed.gain >= wanted.floor:
        return "goal" if speed.gain >= wanted.goal else "floor"
    return "tie" if speed.kept_dense else "no"


def _never_slower(speed: Speed, slower: float) -> str:
    if speed.kept_dense:
        return "tie"
    if speed.gain_over_dense is None:
        return "-"
    return "yes" if speed.gain_over_dense * slower >= 1.0 else "no"
