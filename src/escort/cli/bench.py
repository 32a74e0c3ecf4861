"""escort bench: a converted model against the other ways to run it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Any

import typer

from escort import report
from escort.cli.console import Output, command_line
from escort.cli.options import ModelOptions, command, effort_of
from escort.cli.rivals import RIVALS, Result, measure
from escort.network.plan_table import machine_line
from escort.planner.machine import Machine


@command
def main(
    options: ModelOptions,
    output: Output,
    against: Annotated[
        str, typer.Option(metavar="NAME,...", help=f"What to run it against: some of {', '.join(RIVALS)}.")
    ] = ",".join(RIVALS),
) -> None:
    """Time a model, converted and as it is, side by side on random inputs; every output is checked first."""
    names, effort = [name for name in against.split(",") if name], effort_of(options.effort)
    model, inputs = options.load_with_inputs()
    machine = Machine.here(str(inputs[0].device))
    results = measure(model, inputs, names, options.precision.value, effort, progress=True)
    output.result = {
        "command": command_line(),
        "machine": machine.to_json(),
        "precision": options.precision.value,
        "input_shapes": [list(x.shape) for x in inputs],
        "results": [asdict(result) | {"speedup": _speedup(result, results)} for result in results],
    }
    caption = f"{options.precision.value} on {machine_line(machine)}; {_HOW_TIMED[results[0].timer]}"
    columns = "", "Setup", "Time, µs", "vs escort", "Error", ""
    rows = tuple(_row(result, results) for result in results)
    output.text.print(report.terminal(report.Table("A forward", columns, rows, caption)))


#: What each timer means to a reader.
_HOW_TIMED = {
    "calls": "medians of calls that take turns",
    "graph": "device time, medians of replays of CUDA graphs",
    "events": "device time of calls, which includes waiting for the host",
}


def _speedup(result: Result, results: Sequence[Result]) -> float | None:
    """How many times as long as the converted model it takes."""
    ours = results[0].time_us
    return None if ours is None or result.time_us is None else result.time_us / ours


def _row(result: Result, results: Sequence[Result]) -> tuple[str, ...]:
    speedup = _speedup(result, results)
    time = "-" if result.time_us is None else f"{result.time_us:,.0f}"
    ratio = "-" if speedup is None else f"{speedup:.2f}x"
    error = "-" if result.rel_error is None else f"{result.rel_error:.1e}"
    kept = "converting does not pay: the model is kept as it is" if result.config.get("kept_dense") else ""
    return result.method, _setup(result), time, ratio, error, result.reason or kept


def _setup(result: Result) -> str:
    settings: dict[str, Any] = {name: value for name, value in result.config.items() if name != "kept_dense"}
    return ", ".join(f"{name} {value}" for name, value in settings.items()) or "-"
