"""escort convert: measure every layer and save the fastest network."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich import filesize

import escort
from escort import report
from escort.artifact.kernels import beside
from escort.cli import models
from escort.cli.console import Output
from escort.cli.images import layer_of
from escort.cli.options import ConvertOptions, check_page, check_writable, command
from escort.network import plan_page
from escort.network.plan import plan_table
from escort.planner.machine import find_device

#: What files of other kinds end in, as which a converted model would be read, or one of which it would replace.
_OTHERS = (*models.SUFFIXES, ".py", ".json", ".html")


@dataclass(frozen=True)
class ImageOptions:
    """Images of bytes, which the converted model normalises."""

    mean: Annotated[
        str,
        typer.Option(
            metavar="R,G,B",
            help="The converted model takes images of bytes, N,H,W,C: it subtracts this from pixels in 0..1.",
        ),
    ] = ""
    deviation: Annotated[
        str, typer.Option("--std", metavar="R,G,B", help="And divides them by this; both have a value per channel.")
    ] = ""


@command
def main(
    options: ConvertOptions,
    normalise: ImageOptions,
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
    page: Annotated[
        Path | None,
        typer.Option(
            "--report", metavar="FILE.html", help="Write a page: layers by time before and after, and what to do next."
        ),
    ] = None,
) -> None:
    """Convert a pruned model: every convolution runs by whichever method measures fastest on this machine."""
    if output_path is None:
        if Path(options.model).suffix != models.ONNX_SUFFIX:
            raise ValueError("name the file to write, for example --output model.escort")
        output_path = Path(options.model).with_suffix(".escort")
    if output_path.suffix.lower() in _OTHERS:
        raise ValueError(f"--output {output_path}: a converted model is no {output_path.suffix} file; name it .escort")
    check_writable(output_path, options.model, options.checkpoint)
    if page is not None:
        check_page(page)
    if kernels and find_device(options.device).type == "cpu":
        raise ValueError("--kernels is for GPUs; add --device cuda")
    if kernels:
        check_writable(beside(output_path), options.model, options.checkpoint)
    converted = options.convert(remeasure=remeasure, images=layer_of(normalise.mean, normalise.deviation))
    escort.save(converted, output_path, kernels=kernels)
    plan = converted.plan
    output.result = {"output": str(output_path), "bytes": output_path.stat().st_size, **plan.to_json()}
    output.text.print(report.terminal(plan_table(plan)))
    for path in [output_path, beside(output_path)] if kernels else [output_path]:
        output.text.print(f"wrote {path}, {filesize.decimal(path.stat().st_size)}")
    if page is not None:
        plan_page.write(plan, page)
        output.text.print(f"wrote {page}")
