"""escort forecast: what pruning would gain on this device, before anything is pruned."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from escort import report
from escort.cli.console import Output
from escort.cli.options import ModelOptions, check_page, check_writable, command, effort_of
from escort.network.forecast.forecast import forecast
from escort.network.forecast.page import layer_table, network_table


@command
def main(
    options: ModelOptions,
    output: Output,
    skip: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="A layer that will not be pruned; may repeat. By default the first convolution and depthwise ones.",
        ),
    ] = None,
    page: Annotated[
        Path | None,
        typer.Option("--page", metavar="FILE.html", help="Write a page with the curves, and JSON beside it."),
    ] = None,
) -> None:
    """Forecast how fast a model would be with 50 to 98 % of its weights pruned, from three measurements.

    It says nothing of accuracy. It takes as long as three conversions.
    """
    effort = effort_of(options.effort)
    if page is not None:
        check_page(page)
        check_writable(page.with_suffix(".json"))
    model, inputs = options.load_with_inputs()
    found = forecast(
        model,
        inputs,
        skip=skip,
        precision=options.precision.value,
        effort=effort,
        favor=options.favored,
        progress=True,
    )
    output.result = found.to_json()
    output.text.print(report.terminal(layer_table(found)))
    output.text.print(report.terminal(network_table(found)))
    if page is not None:
        beside = found.write(page)
        output.text.print(f"wrote {page} and {beside}")
