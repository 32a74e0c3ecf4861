"""escort bench: a converted model against the other ways to run it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Any

import typer

from escort import report
from escort.cli.console import Output, command_line, note
from escort.cli.engines import DISTURBED, ENGINES, Result
from escort.cli.options import EngineOptions, ModelOptions, command, effort_of
from escort.cli.rivals import Race, measure
from escort.network.wording import machine_line
from escort.planner.machine import Machine


@command
def main(
    options: ModelOptions,
    engines: EngineOptions,
    output: Output,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...",
            help=f"What to run it against: some of {', '.join(ENGINES)}; by default all that the device and the files "
            "allow.",
        ),
    ] = None,
) -> None:
    """Time a model, converted and as it is, side by side on random inputs; every output is checked first.

    On the CPU each engine runs in processes of its own, one per round, while no other engine runs.
    """
    names = engines.default(options.device) if against is None else [*dict.fromkeys(filter(None, against.split(",")))]
    race = Race(
        names,
        options.precision.value,
        effort_of(options.effort),
        engines.files,
        engines.rounds,
        progress=True,
        begin=_note_round,
        favor=options.favored,
    )
    with engines.placed(options.device):
        model, inputs = options.load_with_inputs()
        machine = Machine.here(str(inputs[0].device))
        results = measure(model, inputs, race)
    output.result = {
        "command": command_line(),
        "machine": machine.to_json(),
        "precision": options.precision.value,
        "input_shapes": [list(x.shape) for x in inputs],
        "results": [asdict(result) | {"speedup": _speedup(result, results)} for result in results],
    }
    caption = f"{options.precision.value} on {machine_line(machine)}; {_HOW_TIMED[results[0].timer]}"
    columns = "", "Setup", "Time, µs", "Rounds, µs", "vs escort", "Error", ""
    rows = tuple(_row(result, results) for result in results)
    output.text.print(report.terminal(report.Table("A forward", columns, rows, caption)))


def _note_round(method: str, number: int) -> None:
    note(f"round {number + 1}: {method}")


#: What each timer means to a reader.
_HOW_TIMED = {
    "calls": "each engine alone, in a process of its own each round: median of the rounds' medians, from least to most",
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
    spread = f"{min(result.rounds_us):,.0f}-{max(result.rounds_us):,.0f}" if result.rounds_us else "-"
    others = f"others took {result.others:.0%} of the cores meanwhile" if (result.others or 0.0) > DISTURBED else ""
    remark = result.reason or ", ".join(filter(None, (kept, others)))
    return result.method, _setup(result), time, spread, ratio, error, remark


def _setup(result: Result) -> str:
    settings: dict[str, Any] = {name: value for name, value in result.config.items() if name != "kept_dense"}
    return ", ".join(f"{name} {value}" for name, value in settings.items()) or "-"
