"""Tables: columns and rows of text, rendered for terminals, Markdown and HTML."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from io import StringIO
from typing import ClassVar

import rich.box
import rich.console
import rich.table
import rich.text

from escort.report.console import Console, printable
from escort.report.template import render

_WIDTH = 160  # columns of a table that no terminal shows


@dataclass(frozen=True)
class Table:
    """Rows of cells, one per column; columns of numbers are set flush right."""

    kind: ClassVar[str] = "table"
    heading: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"table {self.heading!r} has {len(self.columns)} columns, got the row {row}")

    @property
    def numeric(self) -> tuple[bool, ...]:
        """For each column, whether there are numbers in it, with or without units, and nothing else."""
        return tuple(
            bool(cells) and all(re.fullmatch(r"[-+]?[\d,.]+(e-?\d+)?( ?[%x])?|-", cell) for cell in cells)
            for cells in ([row[index] for row in self.rows] for index in range(len(self.columns)))
        )


def terminal(table: Table) -> rich.console.Group:
    """The table for a rich console, below its heading and above its caption, which may be wider than it is.

    Whatever is in its cells is text, in one line.
    """
    out = rich.table.Table(box=rich.box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for index, (column, numeric) in enumerate(zip(table.columns, table.numeric, strict=True)):
        out.add_column(_text(column), justify="right" if numeric else "left", no_wrap=numeric or index == 0)
    for row in table.rows:
        out.add_row(*map(_text, row))
    caption = [_text(table.caption, "table.caption")] if table.caption else []
    return rich.console.Group(_text(table.heading, "table.title"), out, *caption)


def _text(cell: str, style: str = "") -> rich.text.Text:
    return rich.text.Text(printable(cell), style)


def text(table: Table) -> str:
    """The table as a terminal shows it, as wide as the terminal that there is."""
    console = Console(file=StringIO(), width=shutil.get_terminal_size((_WIDTH, 24)).columns, color_system=None)
    with console.capture() as capture:
        console.print(terminal(table))
    return "\n".join(line.rstrip() for line in capture.get().splitlines()).strip("\n")


def markdown(table: Table) -> str:
    """The same rows as a Markdown table, columns of numbers flush right, with the caption as a paragraph behind it."""

    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    rules = ("---:" if numeric else "---" for numeric in table.numeric)
    lines = [line(table.columns), line(rules), *(line(row) for row in table.rows)]
    return "\n".join(lines + ([f"\n{table.caption}"] if table.caption else []))


def html(table: Table) -> str:
    """The table as an element of a page or a notebook."""
    return render("table.html.j2", table=table)
