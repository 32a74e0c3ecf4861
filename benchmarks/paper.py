"""escort paper: the Escoin paper's study on this device, as rows, tables and plots."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from benchmarks import counters, exhibits, study
from benchmarks.bench import NETWORKS
from benchmarks.result_files import Item, Result, read_results
from benchmarks.study import QUESTIONS, Study
from escort import report
from escort.artifact.files import replace_file
from escort.cli import models
from escort.cli.console import Output, command_line, note, progress, reporting
from escort.cli.options import JsonOption, check_writable
from escort.network.convert import COMPILE_BUDGET_S
from escort.planner.machine import find_device
from escort.problem import Precision
from escort.report import Section, Table

_QUESTIONS, _NETWORKS = ",".join(study.PAPER_QUESTIONS), ",".join(study.PAPER_BATCH)
_SPARSITIES = ",".join(f"{sparsity:g}" for sparsity in study.SPARSITIES)


def main(
    questions: Annotated[str, typer.Option(metavar="Q,...", help=f"Some of {', '.join(QUESTIONS)}.")] = _QUESTIONS,
    networks: Annotated[str, typer.Option(metavar="NAME,...", help="Some of the paper's.")] = _NETWORKS,
    batch: Annotated[int | None, typer.Option(min=1, help="Images, as many as in the paper by default.")] = None,
    dtype: Annotated[
        str | None,
        typer.Option(metavar="P,...", help="Precisions, those that each question is about by default."),
    ] = None,
    only: Annotated[str, typer.Option("--layers", metavar="GLOB,...", help="Only layers named like these.")] = "*",
    sparsities: Annotated[
        str, typer.Option("--sparsity", metavar="S,...", help="Shares of zeros of networks and break-even layers.")
    ] = _SPARSITIES,
    patterns: Annotated[
        str, typer.Option(metavar="FILE.npz,...", help="Files of sparsity patterns, for the question of that name.")
    ] = "",
    methods: Annotated[
        str, typer.Option(metavar="M,...", help="Compare only these methods, as those of a file must all be.")
    ] = "",
    device: Annotated[str, typer.Option(help="cuda, cuda:1 or cpu.")] = "cuda",
    search: Annotated[int, typer.Option(min=1, help="Most configurations of a method that are tried on a layer.")] = 16,
    budget_s: Annotated[float, typer.Option(min=0.0, help="Seconds of timing per layer.")] = 0.5,
    compile_budget_s: Annotated[
        float, typer.Option(min=0.0, help="Seconds of compiling kernels for the weights of a whole network.")
    ] = COMPILE_BUDGET_S,
    seed: Annotated[int, typer.Option(help="Of random positions, weights and inputs.")] = 0,
    ncu: Annotated[bool, typer.Option("--ncu", help="Read hardware counters, with NVIDIA Nsight Compute.")] = False,
    out: Annotated[Path, typer.Option(help="Folder of results, plots and a page; results it holds are kept.")] = Path(
        "out/paper"
    ),
    again: Annotated[bool, typer.Option("--again", help="Measure anew what the folder holds already.")] = False,
    results: Annotated[
        Path | None, typer.Option("--render", metavar="DIR", help="Measure nothing: tables and plots of these results.")
    ] = None,
    document: Annotated[
        Path | None,
        typer.Option("--into", metavar="FILE.md", help="With --render: replace this file's tables and plots."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Reproduce the paper's study: layers, ablation, baselines, whole networks, and where the time goes.

    Results are written after every measurement; the same command goes on where a run was cut off.
    """
    with reporting(as_json) as output:
        if document is not None and results is None:
            raise ValueError("--into goes with --render DIR, the folder of results that the tables are made from")
        if results is not None:
            found = read_results(results)
            if document is not None:
                _render(document, results, found)
            _write(out, found)
            _show(output, found)
            return
        wanted = _names(questions, "--questions", QUESTIONS)
        asked = Study(
            str(find_device(device)),
            _names(networks, "--networks", study.PAPER_BATCH),
            batch,
            only,
            tuple(_share(text) for text in sparsities.split(",")),
            search,
            budget_s,
            compile_budget_s,
            seed,
            models.attribute(f"{NETWORKS}:NETWORKS") if {"rq4", "breakdown"} & set(wanted) else {},
            tuple(Path(name) for name in patterns.split(",") if name),
            tuple(name for name in methods.split(",") if name),
        )
        parts = [part for name in wanted for part in QUESTIONS[name]]
        if ncu and (reason := counters.unavailable()):
            note(f"no hardware counters: {reason}")
        elif ncu:
            parts.append(study.COUNTERS)
        dtypes = None if dtype is None else _names(dtype, "--dtype", get_args(Precision))
        failures = _measure(asked, study.plan(asked, parts, dtypes), out, again)
        found = read_results(out)
        _write(out, found)
        _show(output, found)
        output.result = {**output.result, "output": str(out), "failures": failures}
        for stem, result in found.items():
            if left_out := result.header.get("left_out"):
                note(f"{stem}: {len(left_out)} configurations were left out; its header says why")
        for what, why in failures.items():
            note(f"failed: {what}: {why}")
        output.failed = bool(failures)


def _measure(asked: Study, work: dict[str, list[Item]], out: Path, again: bool) -> dict[str, str]:
    with progress() as bar:
        task = bar.add_task("starting", total=sum(map(len, work.values())))

        def begin(stem: str, label: str) -> None:
            bar.update(task, description=f"{stem}: {label}")
            bar.advance(task)

        return study.run(asked, work, out, command_line(), again=again, begin=begin)


def _write(out: Path, found: dict[str, Result]) -> None:
    """The plots, and a page with everything."""
    out.mkdir(parents=True, exist_ok=True)
    sections: list[Section] = list(exhibits.tables(found).values())
    try:
        for name, plot in exhibits.plots(found).items():
            report.write_svg(out / f"{name}.svg", plot)
            sections.append(plot)
    except ImportError as error:
        note(f"no plots: {error}; draw them later with escort paper --render {out}")
    replace_file(out / "report.html", lambda path: report.write_html(path, "Escort: the paper's study", sections))


def _render(document: Path, results: Path, found: dict[str, Result]) -> None:
    check_writable(document)
    try:
        rendered = exhibits.render(document.read_text(encoding="utf-8"), found)
    except ValueError as error:
        raise ValueError(f"{document}, with {results}: {error}") from error
    replace_file(document, lambda path: path.write_text(rendered, encoding="utf-8"))
    try:
        for name, plot in exhibits.illustrations(rendered, found).items():
            report.write_svg(document.parent / f"{name}.svg", plot)
    except ImportError as error:
        note(f"the plots of {document} stay as they are: {error}")


def _show(output: Output, found: dict[str, Result]) -> None:
    """In short: sums and aims, whole networks, and where layers break even."""
    tables = exhibits.tables(found)
    for name, table in tables.items():
        if name in ("totals", "aims", "sparse-aims", "pattern-aims", "break-even") or name.startswith("networks-"):
            output.text.print(report.terminal(table))
    output.result = {
        "tables": {name: _as_json(table) for name, table in tables.items()},
        "rows": {stem: [asdict(row) for row in result.rows] for stem, result in found.items()},
    }


def _as_json(table: Table) -> list[dict[str, str]]:
    return [dict(zip(table.columns, row, strict=True)) for row in table.rows]


def _names(text: str, option: str, known: Iterable[str]) -> tuple[Any, ...]:
    """The names in a list with commas, in its order."""
    there = tuple(known)
    names = tuple(dict.fromkeys(text.split(",")))
    unknown = [name for name in names if name not in there]
    if unknown:
        raise ValueError(f"{option}: there is no {', '.join(map(repr, unknown))}; there are {', '.join(there)}")
    return names


def _share(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"--sparsity takes shares of zeros such as 0.9, got {text!r}") from None
