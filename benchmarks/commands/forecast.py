"""python -m benchmarks forecast: what escort forecast says, against networks that were then pruned otherwise."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from benchmarks import suite
from benchmarks.commands.options import PROGRAM, SecondsOption
from benchmarks.exhibits.forecasts import forecast_table, network_forecast_table
from benchmarks.findings.forecasts import checks
from benchmarks.result_files import Item, Result, measure
from benchmarks.suite.forecasts import SPREADS, Pruned, measure_forecast, measure_pruned
from escort import report
from escort.cli.console import Output, command_line, note
from escort.cli.engines import placed_on
from escort.cli.options import check_writable, command

#: What is forecast by default.
_NETWORKS = ("resnet18", "resnet50", "mobilenet_v2", "yolo", "vgg16")
_TIMING = (
    "forecast: the time that a forecast of the network with weights of another seed says; escort and eager: medians of "
    "calls in a conversion of the pruned network in a fresh process, of the converted one and of the original"
)


@command
def main(
    output: Output,
    networks: Annotated[list[str] | None, typer.Argument(metavar="[NETWORK]...")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Samples of an input.")] = 1,
    threads: Annotated[int | None, typer.Option(help="On as many cores; by default torch's number.")] = None,
    patterns: Annotated[
        list[Path] | None,
        typer.Option(help="An .npz of sparsity patterns, for the network that its name begins with; may repeat."),
    ] = None,
    output_path: Annotated[Path, typer.Option("--output", "-o", help="Result file.")] = Path("out/forecast.json"),
    seconds: SecondsOption = None,
    again: Annotated[bool, typer.Option("--again", help="Measure anew what the file holds already.")] = False,
) -> None:
    """Forecast networks on this machine's CPU, then prune them with other weights and patterns, and compare."""
    check_writable(output_path)
    files = patterns or []
    items: list[Item] = []
    for network in networks or _NETWORKS:
        spreads = [*SPREADS, *(str(path.resolve()) for path in files if path.stem.split("_")[0] == network)]
        held_to = [Pruned(network, spread, batch) for spread in spreads]
        items.append(Item(f"{network} forecast", partial(measure_forecast, held_to)))
        items += [Item(f"{network} {each.weights}", partial(measure_pruned, each)) for each in held_to]
    with placed_on(threads):
        head = suite.header(command_line(PROGRAM)) | {"timing": _TIMING, "study": {"batch": batch}}
        failures = measure(
            {output_path.stem: items},
            output_path.parent,
            head,
            again=again,
            seconds=seconds,
            end=lambda stem, label, outcome: note(f"{label}: {outcome}"),
        )
    result = Result.read(output_path)
    if checks(result.rows):
        output.text.print(report.terminal(forecast_table(result)))
        output.text.print(report.terminal(network_forecast_table(result)))
    rows = [row.to_json() for row in result.rows]
    output.result = {"output": str(output_path), "header": result.header, "rows": rows, "failures": failures}
    output.failed = bool(failures)
