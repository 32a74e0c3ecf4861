"""One self-contained HTML page: a title and a sequence of sections.

A page holds its styles and plots, asks the network for nothing and follows the reader's light or dark theme. Everything
in it but the plots is escaped text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from escort.report.chart import Figure
from escort.report.table import Table
from escort.report.template import render


@dataclass(frozen=True)
class Text:
    """Paragraphs."""

    kind: ClassVar[str] = "text"
    heading: str
    paragraphs: tuple[str, ...]


@dataclass(frozen=True)
class Facts:
    """A few figures that a reader should see first, by label."""

    kind: ClassVar[str] = "facts"
    heading: str
    facts: Mapping[str, str]


Section = Text | Facts | Table | Figure


def write_html(path: str | Path, title: str, sections: Sequence[Section]) -> None:
    """Write the page. Raises ValueError where `path` is no .html file, and OSError where it cannot be written."""
    check_page_name(path)
    Path(path).write_text(render("page.html.j2", title=title, sections=sections), encoding="utf-8")


def check_page_name(path: str | Path) -> None:
    """Raises ValueError where a path is none of a page."""
    if Path(path).suffix != ".html":
        raise ValueError(f"{path}: a page is an .html file; name it so")
