"""The command line: one file per command."""

from __future__ import annotations

from typing import Annotated

import typer

import escort
from escort.cli import bench, cache, convert, demo, doctor, plan, prune, run

app = typer.Typer(
    help="Run pruned PyTorch CNNs faster: prune, convert, run, and see why each layer runs as it does.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)
for module in (demo, prune, convert, run, plan, bench, cache, doctor):
    app.command(module.__name__.rpartition(".")[2])(module.main)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"escort {escort.__version__}")
        raise typer.Exit


@app.callback()
def _app(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass
