"""The command line of the benchmarks: python -m benchmarks COMMAND."""

from __future__ import annotations

import os

import typer

from benchmarks.commands import (
    check,
    conversions,
    everything,
    forecast,
    layers,
    networks,
    paper,
    ranking,
    render,
    scaling,
    speed,
    zoo,
)

app = typer.Typer(
    help="Measure what Escort's documents quote.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)
for module in (layers, networks, speed, conversions, forecast, ranking, scaling, paper, render, check, zoo):
    app.command(module.__name__.rpartition(".")[2])(module.main)
app.command("all")(everything.main)

if __name__ == "__main__":
    os.environ.setdefault("ESCORT_KEEP_PLANS", "0")  # what is published was measured in the run that says so
    app(prog_name="python -m benchmarks")
