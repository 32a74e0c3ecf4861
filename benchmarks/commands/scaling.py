"""python -m benchmarks scaling: how many samples per second workers of Ray Data predict."""

from __future__ import annotations

import json
import os
import tempfile
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import escort
from benchmarks import suite
from benchmarks.commands.options import NETWORKS_HELP, PROGRAM, SeedOption
from benchmarks.exhibits.scaling import SCALING, scaling_table
from benchmarks.suite.rows import write_lines
from benchmarks.suite.scaling import ScalingRow, measure
from escort import report
from escort.cli.console import Output, command_line, note
from escort.cli.doctor import installed_version
from escort.cli.options import PrecisionName, PrecisionOption, check_writable, command, numbers, place

_SOURCES = ("calls", "arrays", "images")
_TIMING = (
    "samples per second: of calls back to back in one process; of workers from when the last one began until the first "
    "had nothing left; images from the first that was read to the last prediction"
)


@dataclass(frozen=True)
class ScalingOptions:
    """What is measured."""

    network: Annotated[str, typer.Argument(metavar="NETWORK", help=NETWORKS_HELP)]
    sparsity: Annotated[float, typer.Option(help="Prune every convolution but the first to this share of zeros.")] = 0.9
    workers: Annotated[str, typer.Option(metavar="N,...", help="Numbers of workers.")] = "1,2"
    sources: Annotated[str, typer.Option(metavar="calls|arrays|images,...")] = ",".join(_SOURCES)
    batch: Annotated[int, typer.Option(min=1)] = 8
    threads: Annotated[int, typer.Option(min=1, help="Of each worker, on a CPU.")] = 1
    images: Annotated[bool, typer.Option("--bytes", help="The network takes images of bytes, and normalises them.")] = (
        False
    )
    seconds: Annotated[float, typer.Option(min=0.1, help="About how long each rate is measured.")] = 8.0
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu"
    precision: PrecisionOption = PrecisionName.FP32
    output_path: Annotated[Path, typer.Option("--output", "-o", help="Result file; other rows in it stay.")] = SCALING
    seed: SeedOption = 0


@command
def main(options: ScalingOptions, output: Output) -> None:
    """Time one process's calls, and workers of Ray Data on arrays and on images, and say how they scale."""
    sources, counts = options.sources.split(","), numbers(options.workers, "--workers")
    if unknown := set(sources) - set(_SOURCES):
        raise ValueError(f"--sources: there is no {', '.join(sorted(unknown))}; there are {', '.join(_SOURCES)}")
    check_writable(options.output_path)
    head = suite.header(command_line(PROGRAM), "cuda:0" if options.device == "cuda" else "cpu")
    head |= {"timing": _TIMING, "ray": installed_version("ray")}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.escort"
        weights = _convert(options, path)
        _start(options, max(counts))
        for source in sources:
            about = ScalingRow(
                options.network, weights, options.precision.value, source, options.batch, options.threads
            )
            note(f"{source}: measuring")
            for row in measure(path, about, counts, options.seconds):
                rows.append({"run": head, **asdict(row)})
                write_lines(options.output_path, {}, _merged(options.output_path, rows))
    output.text.print(report.terminal(scaling_table(_merged(options.output_path, rows))))
    output.text.print(f"wrote {options.output_path}")
    output.result = {"output": str(options.output_path), "rows": rows}


def _convert(options: ScalingOptions, path: Path) -> str:
    """Saves the converted network, planned for a worker's threads; returns the name of its weights."""
    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)
    subject = suite.Subject.load(options.network, sparsity=options.sparsity)
    x = torch.randn(options.batch, *subject.input_size)
    model, (x,) = place(subject.model, (x,), options.device, options.precision)
    if options.images:
        layer = escort.Images((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)).to(x.device, x.dtype)
        model = torch.nn.Sequential(layer, model).eval()
        x = torch.randint(256, x.movedim(1, 3).shape, dtype=torch.uint8, device=x.device)
    escort.save(escort.convert(model, x, precision=options.precision.value), path)
    return subject.weights + ("-bytes" if options.images else "")


def _start(options: ScalingOptions, most: int) -> None:
    """Starts Ray on this machine. Workers get no more than they ask for, whatever it has."""
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    cores = max(os.cpu_count() or 1, most * options.threads)
    ray.init(address="local", num_cpus=cores, include_dashboard=False)


def _merged(path: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of a file that were measured of something else or elsewhere, and these."""
    kept: list[dict[str, Any]] = []
    with suppress(FileNotFoundError):
        kept = json.loads(path.read_text(encoding="utf-8"))["rows"]
    new = {_key(row) for row in rows}
    return [*(row for row in kept if _key(row) not in new), *rows]


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    hardware = row["run"].get("gpu") or row["run"].get("cpu")
    names = "network weights precision source batch threads workers".split()
    return (row["run"]["device"], hardware, *(row[name] for name in names))
