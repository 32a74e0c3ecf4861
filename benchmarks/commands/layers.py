"""python -m benchmarks layers: every method on the paper's layers, or on those of a pattern file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks import suite
from benchmarks.commands.options import RunOptions
from benchmarks.commands.rows import Results
from benchmarks.findings.methods import OURS
from benchmarks.suite import Layer, Row
from escort.cli.console import Output, progress
from escort.cli.options import command
from escort.methods import for_device


@dataclass(frozen=True)
class LayerOptions:
    """Which layers, and how much is tried on them."""

    patterns: Annotated[
        Path | None, typer.Option(help="The layers of an .npz of sparsity patterns, instead of the paper's 39.")
    ] = None
    only: Annotated[
        str | None,
        typer.Option(
            "--layers", metavar="GLOB", help="Only the layers named like this; no file is written but --output."
        ),
    ] = None
    search: Annotated[
        int | None,
        typer.Option(min=1, help="Most configurations of a method that are tried on a layer; all by default."),
    ] = None


@command
def main(chosen: LayerOptions, options: RunOptions, output: Output) -> None:
    """Time single layers: every method against dense rivals, every output checked before its timing.

    With --batch paper the batch sizes are those of the paper's networks.
    """
    device = options.find_device()
    batches = (None,) if options.batch == "paper" else options.batches
    torch.manual_seed(options.seed)
    layers = _layers(chosen, batches, options, device)
    results = Results.begin(options, device, layers[0].weights, OURS, kept=chosen.only is None)
    results.finish(output, _race(layers, device, chosen.search, options.seed))


def _layers(chosen: LayerOptions, batches: Sequence[int | None], options: RunOptions, device: str) -> list[Layer]:
    layers: list[Layer] = []
    for batch in batches:
        if chosen.patterns is None:
            layers += suite.paper_layers(batch, options.seed, precision=options.precision.value, device=device)
        else:
            layers += suite.pattern_layers(
                chosen.patterns, batch, options.seed, precision=options.precision.value, device=device
            )
    if chosen.only is None:
        return layers
    named = [layer for layer in layers if fnmatch(layer.name, chosen.only)]
    if not named:
        names = ", ".join(layer.name for layer in layers)
        raise ValueError(f"--layers {chosen.only}: no layer is named so; there are {names}")
    return named


def _race(layers: list[Layer], device: str, search: int | None, seed: int) -> list[Row]:
    rows: list[Row] = []
    with progress() as bar:
        task = bar.add_task("compiling", total=len(layers))
        limited = suite.limited(layers, for_device(device), search)
        for layer in layers:
            bar.update(task, description=f"timing {layer.network} {layer.name}")
            rows += suite.measure_layer(layer, methods=limited.pop(0), seed=seed)
            bar.advance(task)
    return rows
