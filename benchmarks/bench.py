"""escort bench: layers and networks against their rivals, in one run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from fnmatch import fnmatch
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import nn

from benchmarks import suite
from benchmarks.suite import Row
from escort import report
from escort.artifact.files import replace_file
from escort.cli import models
from escort.cli.console import command_line, note, progress, reporting
from escort.cli.options import (
    CheckpointOption,
    JsonOption,
    PrecisionName,
    PrecisionOption,
    check_writable,
    numbers,
    place,
)
from escort.methods import for_device
from escort.planner.machine import Machine, find_device
from escort.problem import Precision

#: Where networks without a module are looked up: there when run in the repository.
NETWORKS = "benchmarks.networks"
#: Share of the cores that may be in use by others before a result is worth a warning.
_BUSY = 0.4


class LayerSet(str, Enum):
    """Layers that ship with the package."""

    PAPER = "paper"


def main(
    layer_set: Annotated[LayerSet | None, typer.Option("--set", help="The paper's 39 layers.")] = None,
    patterns: Annotated[Path | None, typer.Option(help="The layers of an .npz of sparsity patterns.")] = None,
    network: Annotated[
        str | None,
        typer.Option(help="A whole network: a name in benchmarks/networks.py, or package.module:factory."),
    ] = None,
    sparsity: Annotated[
        float | None, typer.Option(help="Prune every convolution of the network but the first to this share of zeros.")
    ] = None,
    checkpoint: CheckpointOption = None,
    size: Annotated[
        str | None, typer.Option("--input", metavar="C,H,W", help="One input's shape, for package.module:factory.")
    ] = None,
    against: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME,...",
            help="Other ways to run the network: "
            + "; ".join(f"{', '.join(names)} on {device}" for device, names in suite.RIVALS.items())
            + ".",
        ),
    ] = None,
    batch: Annotated[
        str, typer.Option(metavar="N,...", help="Batch sizes; 'paper' for those of the paper's networks.")
    ] = "8",
    device: Annotated[str, typer.Option(help="What to measure: cpu, cuda, or cuda:1 and so on.")] = "cpu",
    dtype: PrecisionOption = PrecisionName.FP32,
    only: Annotated[
        str | None, typer.Option("--layers", metavar="GLOB", help="Only the layers named like this.")
    ] = None,
    output_path: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Result file, benchmarks/results/DEVICE/NAME.json by default; with --layers none by default.",
        ),
    ] = None,
    search: Annotated[
        int | None,
        typer.Option(min=1, help="Most configurations of a method that are tried on a layer; all by default."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of random positions, weights and inputs.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Time layers or a network against dense rivals; every output is checked before its timing."""
    with reporting(as_json) as output:
        if sum(choice is not None for choice in (layer_set, patterns, network)) != 1:
            raise ValueError("choose one of --set paper, --patterns FILE.npz and --network NAME")
        where = str(find_device(device))
        if where == "cpu" and dtype is not PrecisionName.FP32:
            raise ValueError(f"--dtype {dtype.value} is for GPUs, the CPU computes in fp32; add --device cuda")
        batches = (None,) if batch == "paper" else numbers(batch, "--batch")
        precision: Precision = dtype.value
        rivals = [name for names in against or [] for name in names.split(",")]
        torch.manual_seed(seed)
        if network is not None:
            if only is not None or search is not None:
                raise ValueError("--layers and --search go with --set or --patterns; a network is timed as a whole")
            if batches == (None,):
                raise ValueError("--batch paper goes with --set or --patterns; give a network's batch sizes as numbers")
            subject = _Subject.of(network, checkpoint, sparsity, size)
            name, ours = f"{subject.name}-{subject.weights}", "escort"
        else:
            if sparsity is not None or against or checkpoint is not None or size is not None:
                raise ValueError("--sparsity, --against, --checkpoint and --input go with --network")
            layers = _layers(patterns, batches, only, seed, precision, where)
            name, ours = layers[0].weights, "direct"
        if output_path is not None:
            check_writable(output_path)
        elif only is None:
            stem = name if dtype is PrecisionName.FP32 else f"{name}-{dtype.value}"
            output_path = Path("benchmarks/results") / _folder(where) / f"{stem}.json"
            output_path.parent.mkdir(parents=True, exist_ok=True)

        head = suite.header(command_line(), where)
        if where == "cpu" and head["load_average"] > _BUSY * (os.cpu_count() or 1):
            note(
                f"warning: other processes keep this machine busy (load average {head['load_average']}): ratios to "
                "dense methods come out far too high; measure on an idle machine"
            )
        if network is None:
            rows = _race_layers(layers, where, search, seed)
        else:
            rows = _race_network(subject, [n for n in batches if n], rivals, precision, where)
        if output_path is not None:
            replace_file(output_path, lambda path: suite.write_results(path, head, rows))
        means = suite.geometric_means(rows, ours)
        output.result = {
            "output": None if output_path is None else str(output_path),
            "header": head,
            "rows": [asdict(row) for row in rows],
            "geometric_means": means,
        }
        caption = f"{report.machine_line(Machine.here(where))}, {dtype.value}, medians in microseconds."
        output.text.print(report.terminal(_times(rows, ours, caption)))
        output.text.print(report.terminal(_means(means, ours)))
        if output_path is not None:
            output.text.print(f"wrote {output_path}")


@dataclass(frozen=True)
class _Subject:
    """A network to be timed; `input_size` is (C, H, W)."""

    name: str
    weights: str
    model: nn.Module
    input_size: tuple[int, ...]

    @classmethod
    def of(cls, network: str, checkpoint: Path | None, sparsity: float | None, size: str | None) -> _Subject:
        input_size = None if size is None else numbers(size, "--input")
        if ":" not in network:
            known = models.attribute(f"{NETWORKS}:NETWORKS")
            if network not in known:
                raise ValueError(f"--network {network}: there are {', '.join(known)}, and package.module:factory")
            input_size = input_size or known[network].input_size
            model = models.load(f"{NETWORKS}:{known[network].factory.__name__}", checkpoint)
        else:
            model = models.load(network, checkpoint)
        if input_size is None or len(input_size) != 3:
            raise ValueError(f"--network {network} takes images of one size; give it, for example --input 3,224,224")
        weights = "random" if checkpoint is None else checkpoint.stem
        if sparsity is not None:
            suite.prune_all_but_first(model, sparsity)
            weights += f"-{sparsity:.2f}"
        return cls(network.rpartition(":")[2], weights, model, input_size)


def _folder(device: str) -> str:
    """Results are kept by device: `cpu`, or the GPU's name as in `h200`."""
    if device == "cpu":
        return "cpu"
    return torch.cuda.get_device_name(device).removeprefix("NVIDIA ").lower().replace(" ", "-")


def _layers(
    patterns: Path | None, batches: Sequence[int | None], only: str | None, seed: int, dtype: Precision, device: str
) -> list[suite.Layer]:
    layers: list[suite.Layer] = []
    for batch in batches:
        if patterns is None:
            layers += suite.paper_layers(batch, seed, dtype=dtype, device=device)
        else:
            layers += suite.pattern_layers(patterns, batch, seed, dtype=dtype, device=device)
    if only is None:
        return layers
    found = [layer for layer in layers if fnmatch(layer.name, only)]
    if not found:
        raise ValueError(f"--layers {only}: no layer is named so; there are {', '.join(x.name for x in layers)}")
    return found


def _race_layers(layers: list[suite.Layer], device: str, search: int | None, seed: int) -> list[Row]:
    rows: list[Row] = []
    with progress() as bar:
        task = bar.add_task("compiling", total=len(layers))
        methods = suite.narrowed(layers, for_device(device), search)
        for layer in layers:
            bar.update(task, description=f"timing {layer.network} {layer.name}")
            rows += suite.measure_layer(layer, methods=methods.pop(0), seed=seed)
            bar.advance(task)
    return rows


def _race_network(
    subject: _Subject, batches: Sequence[int], against: list[str], precision: Precision, device: str
) -> list[Row]:
    rows: list[Row] = []
    for batch in batches:
        note(f"{subject.name}, {subject.weights}, batch {batch}: converting, then timing against eager torch")
        x = torch.randn(batch, *subject.input_size)
        model, (x,) = place(subject.model, (x,), device, PrecisionName(precision))
        rows += suite.measure_network(
            model,
            x,
            network=subject.name,
            weights=subject.weights,
            against=against,
            precision=precision,
            progress=True,
        )
    return rows


def _times(rows: list[Row], ours: str, caption: str) -> report.Table:
    """One line per layer and batch: the best time of each method, and how many times faster ours is."""
    best = suite.best_times(rows)
    rivals = list(dict.fromkeys(row.method for row in rows if row.method != ours))
    columns = (
        "Network",
        "Layer",
        "Batch",
        *(f"{m}, µs" for m in (ours, *rivals)),
        *(f"vs {rival}" for rival in rivals),
    )
    lines = []
    for (network, layer, batch), times in best.items():
        cells = [f"{times[m]:,.0f}" if m in times else "-" for m in (ours, *rivals)]
        ratios = [f"{times[m] / times[ours]:.2f}x" if m in times and ours in times else "-" for m in rivals]
        lines.append((network, layer, str(batch), *cells, *ratios))
    return report.Table("Best time of each method", columns, tuple(lines), caption)


def _means(means: dict[str, dict[str, float]], ours: str) -> report.Table:
    rivals = list(dict.fromkeys(rival for found in means.values() for rival in found))
    lines = [(name, *(f"{found[m]:.2f}x" if m in found else "-" for m in rivals)) for name, found in means.items()]
    columns = ("Network", *(f"vs {rival}" for rival in rivals))
    return report.Table(f"How many times faster {ours} is, geometric mean", columns, tuple(lines))
