"""python -m benchmarks render: tables and plots of results; nothing is measured."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from benchmarks import exhibits
from benchmarks.commands.pages import show, write_page
from benchmarks.result_files import Result, read_results
from escort import report
from escort.artifact.files import replace_file
from escort.cli.console import Output, note
from escort.cli.options import check_writable, command


@dataclass(frozen=True)
class RenderOptions:
    """Which results, and where they are shown."""

    folder: Annotated[Path, typer.Argument(metavar="RESULTS", help="The folder of a study's results.")]
    documents: Annotated[
        list[Path] | None,
        typer.Option("--into", metavar="FILE.md", help="Replace this file's tables and plots; may be repeated."),
    ] = None
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of plots and a page; out/paper by default where there is no --into."),
    ] = None


@command
def main(options: RenderOptions, output: Output) -> None:
    """Show results of a study: in documents, as a page with plots, and in short on the terminal."""
    results = read_results(options.folder)
    for document in options.documents or []:
        _render(document, options.folder, results)
    out = options.out or (None if options.documents else Path("out/paper"))
    if out is not None:
        write_page(out, results)
    show(output, results)


def _render(document: Path, folder: Path, results: dict[str, Result]) -> None:
    check_writable(document)
    try:
        rendered = exhibits.render(document.read_text(encoding="utf-8"), results)
    except ValueError as error:
        raise ValueError(f"{document}, with {folder}: {error}") from error
    replace_file(document, lambda path: path.write_text(rendered, encoding="utf-8"))
    try:
        for path, plot in exhibits.illustrations(rendered, results).items():
            report.write_svg(document.parent / path, plot)
    except ImportError as error:
        note(f"the plots of {document} stay as they are: {error}")
