"""The options that several commands take, declared once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.networks import NETWORKS
from escort.cli.options import PrecisionName, PrecisionOption, device_for, numbers

#: What results say they were made by.
PROGRAM = "python -m benchmarks"
#: What names a network.
NETWORKS_HELP = f"{', '.join(NETWORKS)}, torchvision:NAME, package.module:factory, or a torch.export archive (.pt2)."
SeedOption = Annotated[int, typer.Option(help="Of random positions, weights and inputs.")]


@dataclass(frozen=True)
class RunOptions:
    """Batch sizes, device and precision of a run, and where its rows go."""

    batch: Annotated[str, typer.Option(metavar="N,...", help="Batch sizes.")] = "8"
    device: Annotated[str, typer.Option(help="What to measure: cpu, cuda, or cuda:1 and so on.")] = "cpu"
    precision: PrecisionOption = PrecisionName.FP32
    output_path: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Result file, benchmarks/results/DEVICE/NAME.json by default.",
        ),
    ] = None
    seed: SeedOption = 0

    @property
    def batches(self) -> tuple[int, ...]:
        return numbers(self.batch, "--batch")

    def find_device(self) -> str:
        """The device with its number. Raises ValueError where it is not here or does not know the precision."""
        return str(device_for(self.precision, self.device))
