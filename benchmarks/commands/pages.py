"""The results of a study as a page with plots, and in short for the terminal."""

from __future__ import annotations

from pathlib import Path

from benchmarks import exhibits
from benchmarks.result_files import Result
from escort import report
from escort.artifact.files import replace_file
from escort.cli.console import Output, note
from escort.report import Section, Table

#: The tables that the terminal shows: by name, and those that there are for each precision.
_IN_SHORT = ("totals", "aims", "sparse-aims", "pattern-aims", "break-even")
_SHORT_BY_PRECISION = ("networks-", "inference-", "speed-", "calls-", "conversions-", "choices-", "callers-")


def write_page(folder: Path, results: dict[str, Result]) -> None:
    """The plots, and a page with everything."""
    folder.mkdir(parents=True, exist_ok=True)
    sections: list[Section] = list(exhibits.tables(results).values())
    try:
        for name, plot in exhibits.plots(results).items():
            report.write_svg(folder / f"{name}.svg", plot)
            sections.append(plot)
    except ImportError as error:
        note(f"no plots: {error}; draw them later with python -m benchmarks render {folder}")
    replace_file(folder / "report.html", lambda path: report.write_html(path, "Escort: the paper's study", sections))


def show(output: Output, results: dict[str, Result]) -> None:
    """In short: sums and aims, whole networks, and where layers break even."""
    tables = exhibits.tables(results)
    for name, table in tables.items():
        if name in _IN_SHORT or name.startswith(_SHORT_BY_PRECISION):
            output.text.print(report.terminal(table))
    output.result = {
        "tables": {name: _as_json(table) for name, table in tables.items()},
        "rows": {stem: [row.to_json() for row in result.rows] for stem, result in results.items()},
    }


def _as_json(table: Table) -> list[dict[str, str]]:
    return [dict(zip(table.columns, row, strict=True)) for row in table.rows]
