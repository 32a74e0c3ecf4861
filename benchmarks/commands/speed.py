"""python -m benchmarks speed: converted networks against torch.compile, network by network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks import exhibits, suite
from benchmarks.ahead import Ahead, Compilation
from benchmarks.commands.options import (
    FORMATS,
    PROGRAM,
    AheadOption,
    FormatsOption,
    SecondsOption,
    SeedOption,
    memory_formats,
)
from benchmarks.commands.rows import results_folder
from benchmarks.commands.telling import telling
from benchmarks.findings.aims import read_aims
from benchmarks.findings.break_even import SEMI_STRUCTURED, sparsity_of
from benchmarks.findings.speed import Key
from benchmarks.result_files import Item, Result, measure
from benchmarks.suite import NetworkRace, Row, Subject
from escort import report
from escort.cli.console import Output, command_line, note
from escort.cli.options import VerboseOption, command, effort_of, numbers
from escort.methods import by_name
from escort.planner.machine import find_device
from escort.problem import TORCH_DTYPE, Precision

_PRECISIONS: tuple[Precision, ...] = "fp16", "tf32", "fp32"
#: How networks are converted: strict float32 gains most by kernels that are compiled for the weights.
EFFORTS: dict[str, str] = {"fp32": "best"}


@dataclass(frozen=True)
class SpeedOptions:
    """Which networks, how they are converted, and where the rows go."""

    networks: Annotated[
        list[str] | None, typer.Argument(metavar="[NETWORK]...", help="Some of those that have aims; by default all.")
    ] = None
    batch: Annotated[str | None, typer.Option(metavar="N,...", help="Only these of the aims' batch sizes.")] = None
    precision: Annotated[
        str | None, typer.Option(metavar="P,...", help="Precisions, by default all of the aims; the CPU has fp32.")
    ] = None
    weights: Annotated[
        str | None, typer.Option(metavar="W,...", help="Only these of the aims' weights, such as random-0.90.")
    ] = None
    patterns: Annotated[
        Path,
        typer.Option(
            help="Folder of the files of sparsity patterns that aims name, such as resnet50_magnitude_90.npz."
        ),
    ] = Path("shared/data/patterns")
    effort: Annotated[
        str | None,
        typer.Option(
            metavar="fast|best|SECONDS",
            help="What compiling kernels for the weights may take; by default best in fp32, and else fast.",
        ),
    ] = None
    formats: FormatsOption = FORMATS
    against: Annotated[
        str,
        typer.Option(
            metavar="M,...",
            help="Also against the network with all convolutions by these dense methods of GPUs: "
            f"{', '.join(suite.BY_METHOD)} (pip install 'escort-sparse\\[cudnn]').",
        ),
    ] = ""
    device: Annotated[str, typer.Option(help="cuda, cuda:1 or cpu.")] = "cuda"
    budget_s: Annotated[float, typer.Option(min=0.0, help="Seconds of timing per clock and network.")] = 5.0
    seed: SeedOption = 0
    out: Annotated[
        Path | None, typer.Option(help="Folder of the results, benchmarks/results/DEVICE by default; it may hold some.")
    ] = None
    seconds: SecondsOption = None
    ahead: AheadOption = 0
    again: Annotated[bool, typer.Option("--again", help="Measure anew what the folder holds already.")] = False
    verbose: VerboseOption = 0

    def precisions(self, device: str) -> list[Precision]:
        """Those that are measured on a device. Raises ValueError for those that it does not have."""
        there: tuple[Precision, ...] = ("fp32",) if device == "cpu" else _PRECISIONS
        names = there if self.precision is None else self.precision.split(",")
        if unknown := set(names) - set(there):
            raise ValueError(
                f"--precision: there is no {', '.join(sorted(unknown))} on {device}; there are {', '.join(there)}"
            )
        return [precision for precision in there if precision in names]

    def rivals(self, device: str) -> list[str]:
        """The methods of --against. Raises ValueError for one that there is not, or of which something is missing."""
        names = self.against.split(",") if self.against else []
        for name in names:
            if name not in suite.BY_METHOD or device == "cpu":
                raise ValueError(f"--against: there is no {name} on {device}; there are {', '.join(suite.BY_METHOD)}")
            if reason := by_name(name, device).missing():
                raise ValueError(f"--against: {name}: {reason}")
        return names

    def chosen(self, precision: Precision) -> list[Key]:
        """Networks, weights and batch sizes of a precision's aims, in the order in which the options name them.

        Raises:
            ValueError: for a network that has none.
        """
        aims = read_aims().speed
        known = list(dict.fromkeys(network for aim in aims for network in aim.networks))
        keys = []
        if unknown := set(self.networks or ()) - set(known):
            raise ValueError(f"there is no aim for {', '.join(sorted(unknown))}; there are {', '.join(known)}")
        batches = None if self.batch is None else numbers(self.batch, "--batch")
        weights = None if self.weights is None else self.weights.split(",")
        for aim in (aim for aim in aims if precision in aim.wanted):
            for network in aim.networks:
                for batch in aim.batches:
                    wanted = (not self.networks or network in self.networks) and (not batches or batch in batches)
                    if wanted and (not weights or aim.weights in weights):
                        keys.append((network, aim.weights, batch))
        order: tuple[Sequence[object], ...] = weights or (), self.networks or (), batches or ()

        def place(key: Key) -> list[int]:
            return [names.index(of) if names else 0 for names, of in zip(order, (key[1], key[0], key[2]), strict=True)]

        return sorted(keys, key=place)

    def item(self, key: Key, precision: Precision, device: str, ahead: Ahead) -> Item:
        """One network to be measured. Raises ValueError where an option is wrong, or a file is missing."""
        name, weights, batch = key
        of_file, formats = self.file_of(weights), memory_formats(self.formats)
        effort = effort_of(self.effort or EFFORTS.get(precision, "fast"))
        race = NetworkRace(self.rivals(device), precision, effort, rounds=25, budget_s=self.budget_s, ahead=ahead)

        def measure() -> list[Row]:
            torch.manual_seed(self.seed)
            is_2_4 = weights == SEMI_STRUCTURED
            sparsity = None if of_file or is_2_4 else sparsity_of(weights)
            subject = Subject.load(name, sparsity=sparsity, semi_structured=is_2_4, patterns=of_file)
            storage = TORCH_DTYPE[precision]
            model, x = subject.model.to(device, storage), torch.randn(batch, *subject.input_size).to(device, storage)
            return suite.measure_speed(model, x, network=name, weights=weights, race=race, formats=formats)

        compilation = None if device == "cpu" else Compilation(name, batch, precision, device, tuple(formats))
        return Item(f"{name} {weights} N={batch}", measure, compilation)

    def has_file(self, weights: str) -> bool:
        """Whether weights are random, or their file of patterns is there."""
        return weights.startswith("random-") or (self.patterns / f"{weights}.npz").is_file()

    def file_of(self, weights: str) -> Path | None:
        """The file of patterns that weights come from. Raises ValueError where it is missing."""
        if weights.startswith("random-"):
            return None
        path = self.patterns / f"{weights}.npz"
        if not self.has_file(weights):
            raise ValueError(f"there is no {path}; name the folder that holds it with --patterns")
        return path


@command
def main(options: SpeedOptions, output: Output) -> None:
    """Race converted networks against torch.compile of the dense models in CUDA graphs: the table of aims.

    A network's precisions follow one another. The files are written after each; the same command goes on where a run
    was cut off.
    """
    device = str(find_device(options.device))
    ahead = Ahead(options.ahead)
    work = {
        f"speed-{precision}": [options.item(key, precision, device, ahead) for key in options.chosen(precision)]
        for precision in options.precisions(device)
    }
    folder = options.out or results_folder(device)
    folder.mkdir(parents=True, exist_ok=True)
    head = suite.header(command_line(PROGRAM), device) | {"study": {"device": device, "seed": options.seed}}
    head |= {} if options.effort is None else {"effort": effort_of(options.effort)}
    with telling(work) as told:
        failures = measure(
            work,
            folder,
            head,
            again=options.again,
            seconds=options.seconds,
            ahead=ahead,
            interleaved=True,
            begin=told.begin,
            end=told.end,
        )
    paths = {stem: folder / f"{stem}.json" for stem in work}
    results = {stem: Result.read(path) for stem, path in paths.items() if path.is_file()}
    for what, why in failures.items():
        note(f"failed: {what}: {why}")
    tables = exhibits.tables(results)
    for name, table in tables.items():
        if name in results:
            output.text.print(report.terminal(table))
    rows = {stem: [row.to_json() for row in result.rows] for stem, result in results.items()}
    output.result = {"output": str(folder), "rows": rows, "failures": failures}
    output.failed = bool(failures)
