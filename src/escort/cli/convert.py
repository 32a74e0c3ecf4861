"""escort convert: measure every layer and save the fastest network."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich import filesize

import escort
from escort import report
from escort.artifact.kernels import beside
from escort.cli.console import Output
from escort.cli.images import layer_of
from escort.cli.models import ONNX_SUFFIX
from escort.cli.options import ModelOptions, check_writable, command
from escort.network.plan import plan_table
from escort.planner.machine import find_device


@command
def main(
    options: ModelOptions,
    output: Output,
    output_path: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="The converted model, for example model.escort; by default named like the ONNX file.",
        ),
    ] = None,
    kernels: Annotated[
        bool,
        typer.Option(
            "--kernels",
            help="Write the compiled kernels too, to OUTPUT.kernels: on such a GPU no compiler is needed to load them.",
        ),
    ] = False,
    remeasure: Annotated[
        bool, typer.Option("--remeasure", help="Measure every layer anew, whatever plans this machine keeps.")
    ] = False,
    mean: Annotated[
        str,
        typer.Option(
            metavar="R,G,B",
            help="The converted model takes images of bytes, N,H,W,C: it subtracts this from pixels in 0..1.",
        ),
    ] = "",
    deviation: Annotated[
        str, typer.Option("--std", metavar="R,G,B", help="And divides them by this; both have a value per channel.")
    ] = "",
) -> None:
    """Convert a pruned model: every convolution runs by whichever method measures fastest on this machine."""
    if output_path is None:
        if Path(options.model).suffix != ONNX_SUFFIX:
            raise ValueError("name the file to write, for example --output model.escort")
        output_path = Path(options.model).with_suffix(".escort")
    check_writable(output_path)
    if kernels and find_device(options.device).type == "cpu":
        raise ValueError("--kernels is for GPUs; add --device cuda")
    converted = options.convert(remeasure=remeasure, images=layer_of(mean, deviation))
    escort.save(converted, output_path, kernels=kernels)
    plan = converted.plan
    output.result = {"output": str(output_path), "bytes": output_path.stat().st_size, **plan.to_json()}
    output.text.print(report.terminal(plan_table(plan)))
    for path in [output_path, beside(output_path)] if kernels else [output_path]:
        output.text.print(f"wrote {path}, {filesize.decimal(path.stat().st_size)}")
