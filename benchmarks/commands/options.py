"""The options that several commands take, declared once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.networks import NETWORKS
from benchmarks.suite import BOTH_FORMATS
from escort.cli.options import PrecisionName, PrecisionOption, device_for, numbers
from escort.problem import MemoryFormat

#: What results say they were made by.
PROGRAM = "python -m benchmarks"
#: What names a network.
NETWORKS_HELP = f"{', '.join(NETWORKS)}, torchvision:NAME, package.module:factory, or a torch.export archive (.pt2)."
SeedOption = Annotated[int, typer.Option(help="Of random positions, weights and inputs.")]
SecondsOption = Annotated[
    float | None,
    typer.Option(min=0.0, metavar="S", help="Seconds after which nothing more begins; the same command goes on later."),
]
#: What :data:`FormatsOption` is by default.
FORMATS = ",".join(BOTH_FORMATS)
FormatsOption = Annotated[
    str, typer.Option(metavar="F,...", help="The memory formats in which whole networks are tried on a GPU.")
]
AheadOption = Annotated[
    int,
    typer.Option(
        min=0,
        metavar="N",
        help="Let so many processes compile ahead what torch.compile makes of networks that are still to come.",
    ),
]


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


def memory_formats(names: str) -> list[MemoryFormat]:
    """Those of :data:`FormatsOption`. Raises ValueError for one that there is not."""
    wanted = names.split(",")
    if unknown := set(wanted) - set(BOTH_FORMATS):
        raise ValueError(f"--formats: there is no {', '.join(sorted(unknown))}; there are {', '.join(BOTH_FORMATS)}")
    return [name for name in BOTH_FORMATS if name in wanted]
