"""python -m benchmarks networks: a whole network, converted, against other ways to run it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks import suite
from benchmarks.commands.options import NETWORKS_HELP, RunOptions
from benchmarks.commands.rows import Results
from benchmarks.suite import NetworkRace, Row, Subject
from escort.cli.console import Output, note
from escort.cli.options import CheckpointOption, EffortOption, EngineOptions, command, effort_of, numbers
from escort.problem import TORCH_DTYPE


@dataclass(frozen=True)
class NetworkOptions:
    """Which network, what is pruned of it, and what it is raced against."""

    network: Annotated[str, typer.Argument(metavar="NETWORK", help=NETWORKS_HELP)]
    sparsity: Annotated[
        float | None, typer.Option(help="Prune every convolution of the network but the first to this share of zeros.")
    ] = None
    dense_depthwise: Annotated[
        bool, typer.Option("--dense-depthwise", help="Leave depthwise convolutions out of what --sparsity prunes.")
    ] = False
    patterns: Annotated[
        Path | None,
        typer.Option(help="An .npz of sparsity patterns, by which convolutions are pruned: those of equal shape."),
    ] = None
    checkpoint: CheckpointOption = None
    size: Annotated[
        str | None, typer.Option("--input", metavar="C,H,W", help="One input's shape, for package.module:factory.")
    ] = None
    against: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME,...",
            help="Other ways to run the network: "
            + "; ".join(f"{', '.join(names)} on {device}" for device, names in suite.RIVALS.items())
            + ".",
        ),
    ] = None
    eager: Annotated[
        bool, typer.Option("--eager/--no-eager", help="Time eager torch, too; on the CPU it may be left out.")
    ] = True
    effort: EffortOption = "best"

    @property
    def rivals(self) -> list[str]:
        return [name for names in self.against or [] for name in names.split(",")]


@command
def main(chosen: NetworkOptions, engines: EngineOptions, options: RunOptions, output: Output) -> None:
    """Time a whole network, converted, against eager torch and other engines; outputs are checked before timings.

    On the CPU each engine runs in processes of its own, one per round, while no other engine runs.
    """
    device = options.find_device()
    with engines.placed(device):
        _measure(chosen, engines, options, output, device)


def _measure(chosen: NetworkOptions, engines: EngineOptions, options: RunOptions, output: Output, device: str) -> None:
    race = NetworkRace(
        chosen.rivals, options.precision.value, effort_of(chosen.effort), progress=True, files=engines.files
    )
    if device == "cpu":
        race = replace(race, rounds=engines.rounds, eager=chosen.eager)
    elif not chosen.eager:
        raise ValueError("--no-eager is for the CPU: on a GPU errors are weighed against those of eager torch")
    batches = options.batches
    torch.manual_seed(options.seed)
    input_size = None if chosen.size is None else numbers(chosen.size, "--input")
    subject = Subject.load(
        chosen.network,
        checkpoint=chosen.checkpoint,
        sparsity=chosen.sparsity,
        patterns=chosen.patterns,
        input_size=input_size,
        dense_depthwise=chosen.dense_depthwise,
    )
    results = Results.begin(options, device, f"{subject.name}-{subject.weights}", "escort")
    rows: list[Row] = []
    for batch in batches:
        note(f"{subject.name}, {subject.weights}, batch {batch}: converting, then timing")
        x = torch.randn(batch, *subject.input_size).to(device, TORCH_DTYPE[options.precision.value])
        model = subject.model.to(device, TORCH_DTYPE[options.precision.value])
        rows += suite.measure_network(model, x, network=subject.name, weights=subject.weights, race=race)
    results.head["effort"] = race.effort
    results.finish(output, rows)
