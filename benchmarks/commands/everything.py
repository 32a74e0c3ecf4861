"""python -m benchmarks all: everything that documents quote, measured on this machine into one folder."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks import suite
from benchmarks.ahead import Ahead
from benchmarks.commands.options import PROGRAM, AheadOption, SecondsOption, SeedOption
from benchmarks.commands.parts import Part, parts, with_seconds
from benchmarks.commands.telling import telling
from benchmarks.result_files import Item, Result, find_results, measure
from benchmarks.study import run
from escort import report
from escort.cli.console import Output, command_line, note
from escort.cli.engines import placed_on
from escort.cli.options import VerboseOption, command
from escort.planner.machine import find_device


@dataclass(frozen=True)
class EverythingOptions:
    """What is measured, and where it goes."""

    into: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the results, such as benchmarks/results/NAME; it may hold some. --list does without."
        ),
    ] = None
    device: Annotated[str | None, typer.Option(help="cuda, cuda:1 or cpu; by default the GPU where there is one.")] = (
        None
    )
    only: Annotated[
        str,
        typer.Option(
            metavar="GLOB[:GLOB],...",
            help="Only files named like these and, behind a colon, only their items named like that, in this order: "
            "'speed-*:resnet50*,layers-fp16'.",
        ),
    ] = "*"
    patterns: Annotated[
        Path,
        typer.Option(help="Folder of files of sparsity patterns; what needs one that is not there is left out."),
    ] = Path("shared/data/patterns")
    threads: Annotated[
        int | None, typer.Option(help="Threads on the CPU, on as many cores. By default torch's number, on all cores.")
    ] = None
    ncu: Annotated[bool, typer.Option("--ncu", help="Read hardware counters, with NVIDIA Nsight Compute.")] = False
    listed: Annotated[
        bool, typer.Option("--list", help="Say what would be measured and how long; measure nothing.")
    ] = False
    seconds: SecondsOption = None
    ahead: AheadOption = 0
    seed: SeedOption = 0
    verbose: VerboseOption = 0

    def chosen(self, device: str, known: Mapping[str, Result], ahead: Ahead) -> list[Part]:
        """The items that are wanted, in the order in which they are named, each with what its part says of it.

        Raises:
            ValueError: where there are none.
        """
        made = [
            with_seconds(part, known)
            for part in parts(device, self.patterns, seed=self.seed, ncu=self.ncu, ahead=ahead)
        ]
        found, taken = list[Part](), set[tuple[str, str]]()
        for name in self.only.split(","):
            files, _, labels = name.partition(":")
            for part in made:
                named = {stem: items for stem, items in part.work.items() if fnmatch(stem, files)}
                for stem, items in named.items():
                    new = [each for each in items if fnmatch(each.label, labels or "*")]
                    if new := [each for each in new if (stem, each.label) not in taken]:
                        found.append(replace(part, work={stem: new}))
                        taken.update((stem, each.label) for each in new)
        if not found:
            raise ValueError(f"--only {self.only}: nothing is named so; --list says what there is")
        return found


@command
def main(options: EverythingOptions, output: Output) -> None:
    """Measure everything that documents quote on this machine's device, into a folder.

    Files are written after every measurement; the same command goes on where a run was cut off.
    """
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if not options.listed:
        device = str(find_device(device))
    if device != "cpu" and options.threads is not None:
        raise ValueError("--threads is for the CPU; leave it out, or give --device cpu")
    into, ahead = options.into, Ahead(options.ahead)
    known = {} if into is None else find_results(into)
    chosen = options.chosen(device, known, ahead)
    if not options.listed:
        if into is None:
            raise ValueError(
                "name the folder of the results, for example --into benchmarks/results/NAME; or add --list"
            )
        into.mkdir(parents=True, exist_ok=True)
        with placed_on(options.threads):
            missing = [item for part in chosen for item in part.missing(known)]
            with ahead.of(item.compilation for item in missing):
                failures = _measure(chosen, into, options.seconds, device, ahead)
        output.failed = bool(failures)
        for what, why in failures.items():
            note(f"failed: {what}: {why}")
        known = find_results(into)
    by_file: dict[str, list[Item]] = {}
    for part in chosen:
        for stem, items in part.work.items():
            by_file.setdefault(stem, []).extend(items)
    left = [_left(stem, items, known.get(stem)) for stem, items in by_file.items()]
    output.text.print(report.terminal(_table(left)))
    output.result = {"output": None if into is None else str(into), "left": left}
    if not (options.patterns / "resnet50_magnitude_90.npz").is_file():
        note(f"{options.patterns} holds no resnet50_magnitude_90.npz: what is about real patterns is left out")


def _measure(chosen: Sequence[Part], into: Path, seconds: float | None, device: str, ahead: Ahead) -> dict[str, str]:
    """What failed, of all parts, one behind the other in the time that there is."""
    line, failures = command_line(PROGRAM), dict[str, str]()
    last = None if seconds is None else time.perf_counter() + seconds
    for part in chosen:
        left = None if last is None else max(last - time.perf_counter(), 0.0)
        with telling(part.work) as told:
            about: dict[str, Any] = {"seconds": left, "begin": told.begin, "end": told.end}
            if part.study is not None:
                failures |= run(part.study, part.work, into, line, **about)
            else:
                head = suite.header(line, device) | part.head
                failures |= measure(part.work, into, head, ahead=ahead, **about)
    return failures


def _left(stem: str, items: Sequence[Item], result: Result | None) -> dict[str, Any]:
    """What a file holds of the items, what it lacks, and how many seconds that takes."""
    head = {} if result is None else result.header
    missing = [item for item in items if item.label not in head.get("finished", ())]
    failed = sum(item.label in head.get("failed", ()) for item in missing)
    seconds = sum(item.seconds for item in missing)
    return {"file": stem, "items": len(items), "left": len(missing), "failed": failed, "seconds": round(seconds)}


def _table(left: Sequence[dict[str, Any]]) -> report.Table:
    lines = [tuple(str(value) for value in of_file.values()) for of_file in left]
    total = sum(of_file["seconds"] for of_file in left)
    columns = ("File", "Items", "To measure", "Of them failed", "About, s")
    caption = f"About {total / 60:.0f} minutes are left, as items of these kinds took before or roughly take."
    return report.Table("What is measured, and what is left", columns, tuple(lines), caption)
