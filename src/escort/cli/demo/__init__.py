"""escort demo: the whole way on real data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from escort.cli.console import Output
from escort.cli.demo.digits import run_demo
from escort.cli.options import command


@command
def main(
    output: Output,
    out: Annotated[Path, typer.Option(help="Folder for summary.json, report.html and the saved model.")] = Path(
        "out/demo"
    ),
    seed: Annotated[int, typer.Option(help="Of the split, the first weights and the order of the digits.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="A far smaller network for a few seconds.")] = False,
) -> None:
    """Train a small CNN on handwritten digits, prune it, convert it, and compare accuracy and speed."""
    output.result = run_demo(out, seed=seed, quick=quick, console=output.text)
