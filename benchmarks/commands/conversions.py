"""python -m benchmarks conversions: how long converting and loading take, and what little search costs in speed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from benchmarks import exhibits, suite
from benchmarks.commands.options import NETWORKS_HELP, PROGRAM, RunOptions
from benchmarks.commands.rows import results_folder
from benchmarks.result_files import Item, Result, measure
from benchmarks.suite import Conversion
from escort import report
from escort.cli.console import Output, command_line, note
from escort.cli.options import check_writable, command, effort_of, numbers

#: Those of the table in which conversions were found to take minutes, as far as they are here.
_NETWORKS = ("resnet50", "resnet18", "vgg16_bn", "mobilenet_v2")
_TIMING = (
    "convert and load: wall time in a fresh process, whose imports, model and device are ready before; escort: median "
    "time of a call, both efforts raced in turn in one process, or of one effort by its timer: CUDA graph replays, "
    "calls each waited for (call) or back to back, or the host's part of calls that replay no graph (host)"
)


@dataclass(frozen=True)
class ConversionOptions:
    """Which networks, how they are converted, and what is measured besides."""

    networks: Annotated[list[str] | None, typer.Argument(metavar="[NETWORK]...", help=NETWORKS_HELP)] = None
    sparsity: Annotated[
        float, typer.Option(help="Prune every convolution of a network but the first to this share of zeros.")
    ] = 0.9
    patterns: Annotated[
        Path | None,
        typer.Option(help="An .npz of sparsity patterns, by which convolutions are pruned: those of equal shape."),
    ] = None
    size: Annotated[
        str | None, typer.Option("--input", metavar="C,H,W", help="One input's shape, for package.module:factory.")
    ] = None
    effort: Annotated[
        str, typer.Option(metavar="fast|best|SECONDS,...", help="What compiling kernels for the weights may take.")
    ] = "fast"
    conversions: Annotated[
        bool, typer.Option("--conversions/--no-conversions", help="Time conversions, and loads with --load.")
    ] = True
    load: Annotated[
        bool, typer.Option("--load", help="Time loading and the first call, too, where there is no compiler.")
    ] = False
    choices: Annotated[
        bool,
        typer.Option(
            "--choices/--no-choices", help="Race what the effort fast chooses against what an exhaustive search does."
        ),
    ] = True
    search_s: Annotated[
        float,
        typer.Option("--search-s", min=0.0, help="Seconds after which an exhaustive search leaves layers as they are."),
    ] = suite.SEARCH_S
    calls: Annotated[
        bool, typer.Option("--calls", help="Time calls of what was converted, too, and the host's part of one.")
    ] = False
    limit_s: Annotated[float, typer.Option(min=1.0, help="Seconds after which a process is given up.")] = 1200.0
    again: Annotated[bool, typer.Option("--again", help="Measure anew what the file holds already.")] = False

    def work(self, options: RunOptions, device: str) -> list[Item]:
        """The conversions, and behind them all the races and calls."""
        efforts = [effort_of(text) for text in self.effort.split(",")]
        patterns = None if self.patterns is None else str(self.patterns.resolve())
        conversions = [
            Conversion(
                network=network,
                batch=batch,
                device=device,
                precision=options.precision.value,
                sparsity=self.sparsity,
                patterns=patterns,
                input_size=None if self.size is None else numbers(self.size, "--input"),
                seed=options.seed,
            )
            for network in self.networks or _NETWORKS
            for batch in options.batches
        ]
        convert = partial(suite.measure_conversion, with_load=self.load, limit_s=self.limit_s, say=note)
        choose = partial(suite.measure_choices, search_s=self.search_s, limit_s=self.limit_s, say=note)
        call = partial(suite.measure_calls, limit_s=self.limit_s, say=note)
        converted = [replace(conversion, effort=effort) for conversion in conversions for effort in efforts]
        return [
            *(Item(one.label, partial(convert, one)) for one in converted if self.conversions),
            *(Item(f"{one.label} against exhaustive", partial(choose, one)) for one in conversions if self.choices),
            *(Item(f"calls of {one.label}", partial(call, one)) for one in conversions if self.calls),
        ]


@command
def main(chosen: ConversionOptions, options: RunOptions, output: Output) -> None:
    """Time conversions in fresh processes, with empty and with filled caches, and what little search costs in speed.

    The file is written after every measurement; the same command goes on where a run was cut off.
    """
    device = options.find_device()
    work = chosen.work(options, device)
    path = options.output_path
    if path is None:
        path = results_folder(device) / f"conversions-{options.precision.value}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
    check_writable(path)
    head = suite.header(command_line(PROGRAM), device)
    head |= {"timing": _TIMING, "study": {"device": device, "seed": options.seed}}
    failures = measure(
        {path.stem: work}, path.parent, head, again=chosen.again, begin=lambda _, label: note(f"{label}: measuring")
    )
    result = Result.read(path)
    for what, why in failures.items():
        note(f"failed: {what}: {why}")
    for line in result.header["left_out"]:
        note(line)
    tables = exhibits.tables({f"conversions-{options.precision.value}": result})
    for name, table in tables.items():
        if name != "conditions":
            output.text.print(report.terminal(table))
    output.text.print(f"wrote {path}")
    rows = [row.to_json() for row in result.rows]
    output.result = {"output": str(path), "header": result.header, "rows": rows, "failures": failures}
    output.failed = bool(failures)
