"""Measurements as tables for terminals and Markdown, as plots, and as one self-contained HTML page."""

from escort.report.chart import (
    Figure,
    bar_chart,
    horizontal_bars,
    line_chart,
    require_matplotlib,
    scatter_chart,
    write_svg,
)
from escort.report.console import Console, Description, cell, printable
from escort.report.page import Facts, Section, Text, check_page_name, write_html
from escort.report.table import Table, html, markdown, terminal, text

__all__ = [
    "Console",
    "Description",
    "Facts",
    "Figure",
    "Section",
    "Table",
    "Text",
    "bar_chart",
    "cell",
    "check_page_name",
    "horizontal_bars",
    "html",
    "line_chart",
    "markdown",
    "printable",
    "require_matplotlib",
    "scatter_chart",
    "terminal",
    "text",
    "write_html",
    "write_svg",
]
