"""The options that several commands take, declared once."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from escort.cli.options import PrecisionName, PrecisionOption, numbers
from escort.planner.machine import find_device

SeedOption = Annotated[int, typer.Option(help="Of random positions, weights and inputs.")]


@dataclass(frozen=True)
class RunOptions:
    """What layers and networks are run on and in, and where the rows go."""

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
        device = str(find_device(self.device))
        if device == "cpu" and self.precision is not PrecisionName.FP32:
            raise ValueError(
                f"--precision {self.precision.value} is for GPUs, the CPU computes in fp32; add --device cuda"
            )
        return device


def command_line() -> str:
    """This process's, for results. Files by name: where they lie on this machine is nobody's business."""
    words = [",".join(Path(name).name for name in word.split(",")) if "/" in word else word for word in sys.argv[1:]]
    return f"python -m benchmarks {shlex.join(words)}"
