"""python -m benchmarks paper: the Escoin paper's study on a device, as rows, tables and plots."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from benchmarks import counters
from benchmarks.ahead import Ahead
from benchmarks.commands.options import (
    FORMATS,
    PROGRAM,
    AheadOption,
    FormatsOption,
    SecondsOption,
    SeedOption,
    memory_formats,
)
from benchmarks.commands.pages import show, write_page
from benchmarks.commands.telling import telling
from benchmarks.networks import NETWORKS
from benchmarks.paper_layers import PAPER_BATCH
from benchmarks.result_files import Item, read_results
from benchmarks.study import COUNTERS, PAPER_QUESTIONS, QUESTIONS, SPARSITIES, Study, plan, run
from escort.cli.console import Output, command_line, note
from escort.cli.options import EffortOption, VerboseOption, command, effort_of
from escort.planner.machine import find_device
from escort.problem import Precision


@dataclass(frozen=True)
class SubjectOptions:
    """What is studied."""

    questions: Annotated[str, typer.Option(metavar="Q,...", help=f"Some of {', '.join(QUESTIONS)}.")] = ",".join(
        PAPER_QUESTIONS
    )
    networks: Annotated[str, typer.Option(metavar="NAME,...", help="Some of the paper's.")] = ",".join(PAPER_BATCH)
    batch: Annotated[int | None, typer.Option(min=1, help="Samples, as many as in the paper by default.")] = None
    precision: Annotated[
        str | None,
        typer.Option(metavar="P,...", help="Precisions, those that each question is about by default."),
    ] = None
    only: Annotated[str, typer.Option("--layers", metavar="GLOB,...", help="Only layers named like these.")] = "*"
    sparsity: Annotated[
        str, typer.Option(metavar="S,...", help="Shares of zeros of networks and break-even layers.")
    ] = ",".join(f"{sparsity:g}" for sparsity in SPARSITIES)
    patterns: Annotated[
        str, typer.Option(metavar="FILE.npz,...", help="Files of sparsity patterns, for the question of that name.")
    ] = ""
    methods: Annotated[
        str, typer.Option(metavar="M,...", help="Compare only these methods, as those of a file must all be.")
    ] = ""


@dataclass(frozen=True)
class MeasureOptions:
    """How it is measured, and where the results go."""

    device: Annotated[str, typer.Option(help="cuda, cuda:1 or cpu.")] = "cuda"
    search: Annotated[int, typer.Option(min=1, help="Most configurations of a method that are tried on a layer.")] = 16
    budget_s: Annotated[float, typer.Option(min=0.0, help="Seconds of timing per layer.")] = 0.5
    effort: EffortOption = "best"
    formats: FormatsOption = FORMATS
    seed: SeedOption = 0
    ncu: Annotated[bool, typer.Option("--ncu", help="Read hardware counters, with NVIDIA Nsight Compute.")] = False
    out: Annotated[Path, typer.Option(help="Folder of results, plots and a page; results it holds are kept.")] = Path(
        "out/paper"
    )
    seconds: SecondsOption = None
    ahead: AheadOption = 0
    again: Annotated[bool, typer.Option("--again", help="Measure anew what the folder holds already.")] = False
    verbose: VerboseOption = 0


@command
def main(subject: SubjectOptions, measure: MeasureOptions, output: Output) -> None:
    """Reproduce the paper's study: layers, ablation, baselines, whole networks, and where the time goes.

    Results are written after every measurement; the same command goes on where a run was cut off.
    """
    questions = _names(subject.questions, "--questions", QUESTIONS)
    study = _study(subject, measure)
    parts = [part for name in questions for part in QUESTIONS[name]]
    if measure.ncu and (reason := counters.unavailable()):
        note(f"no hardware counters: {reason}")
    elif measure.ncu:
        parts.append(COUNTERS)
    precisions = None if subject.precision is None else _names(subject.precision, "--precision", get_args(Precision))
    failures = _measure(study, plan(study, parts, precisions), measure)
    results = read_results(measure.out)
    write_page(measure.out, results)
    show(output, results)
    output.result = {**output.result, "output": str(measure.out), "failures": failures}
    for stem, result in results.items():
        if left_out := result.header.get("left_out"):
            note(f"{stem}: {len(left_out)} configurations were left out; its header says why")
    for what, why in failures.items():
        note(f"failed: {what}: {why}")
    output.failed = bool(failures)


def _study(subject: SubjectOptions, measure: MeasureOptions) -> Study:
    return Study(
        device=str(find_device(measure.device)),
        networks=_names(subject.networks, "--networks", PAPER_BATCH),
        batch=subject.batch,
        layers=subject.only,
        sparsities=tuple(_share(text) for text in subject.sparsity.split(",")),
        search=measure.search,
        budget_s=measure.budget_s,
        effort=effort_of(measure.effort),
        formats=memory_formats(measure.formats),
        seed=measure.seed,
        factories=NETWORKS,
        patterns=tuple(Path(name) for name in subject.patterns.split(",") if name),
        methods=tuple(name for name in subject.methods.split(",") if name),
        ahead=Ahead(measure.ahead),
    )


def _measure(study: Study, work: dict[str, list[Item]], options: MeasureOptions) -> dict[str, str]:
    with telling(work) as told:
        return run(
            study,
            work,
            options.out,
            command_line(PROGRAM),
            again=options.again,
            seconds=options.seconds,
            begin=told.begin,
            end=told.end,
        )


def _names(text: str, option: str, known: Iterable[str]) -> tuple[Any, ...]:
    """The names in a list with commas, in its order."""
    choices = tuple(known)
    names = tuple(dict.fromkeys(text.split(",")))
    unknown = [name for name in names if name not in choices]
    if unknown:
        raise ValueError(f"{option}: there is no {', '.join(map(repr, unknown))}; there are {', '.join(choices)}")
    return names


def _share(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"--sparsity takes shares of zeros such as 0.9, got {text!r}") from None
