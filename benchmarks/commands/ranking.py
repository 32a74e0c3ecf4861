"""python -m benchmarks ranking: whether candidates of layers rank in the planner as they do in loops of their own."""

from __future__ import annotations

from typing import Annotated

import torch
import typer

from benchmarks import suite
from benchmarks.commands.options import NETWORKS_HELP, SeedOption
from benchmarks.suite import Subject
from escort.cli.console import Output, note
from escort.cli.engines import placed_on
from escort.cli.options import command, numbers
from escort.report import Table, terminal


@command
def main(
    networks: Annotated[list[str], typer.Argument(metavar="NETWORK...", help=NETWORKS_HELP)],
    output: Output,
    sparsity: Annotated[
        float | None, typer.Option(help="Prune every convolution of a network but the first to this share of zeros.")
    ] = None,
    size: Annotated[
        str | None, typer.Option("--input", metavar="C,H,W", help="One input's shape, where the name does not tell it.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Samples of an input.")] = 1,
    threads: Annotated[int | None, typer.Option(help="On as many cores; by default torch's number.")] = None,
    seed: SeedOption = 0,
) -> None:
    """Time the candidates of layers on the CPU as the planner does and each in a process of its own, and compare."""
    torch.manual_seed(seed)
    input_size = None if size is None else numbers(size, "--input")
    rows, results = [], []
    with placed_on(threads):
        for network in networks:
            subject = Subject.load(network, sparsity=sparsity, input_size=input_size)
            ranked = suite.rank(subject.model, torch.randn(batch, *subject.input_size), note)
            agree, pairs = (sum(counts) for counts in zip(*(each.pairs for each in ranked), strict=True))
            chosen = sum(each.alone_us[0] for each in ranked)
            loss = chosen / sum(min(each.alone_us) for each in ranked) - 1.0
            worst = max(each.loss for each in ranked)
            results.append({"network": subject.name, "layers": len(ranked), "pairs": pairs, "agree": agree})
            results[-1] |= {"loss": loss, "worst": worst}
            rows.append((subject.name, str(len(ranked)), f"{agree} of {pairs}", f"{loss:.1%}", f"{worst:.1%}"))
    output.result = {"results": results}
    columns = "Network", "Layers", "Pairs in the same order", "Time lost by wrong choices", "In the worst layer"
    output.text.print(terminal(Table("The planner's ranking against loops of their own", columns, tuple(rows))))
