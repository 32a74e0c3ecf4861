"""Text on terminals: what comes from files, models and exceptions is shown, and never acted upon."""

from __future__ import annotations

from typing import Any

import rich.console
import rich.progress
import rich.text


def printable(text: str) -> str:
    """A text in one line whose every character is seen.

    Line ends, control characters, the escape sequences that start with them, and characters that reorder or hide others
    are written as Python writes them in a string, such as ``\\x1b`` and ``\\u202e``.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def cell(text: str) -> str:
    """A text as a cell of a CSV file: in one line, and for a spreadsheet no formula."""
    text = printable(text)
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text


class Console(rich.console.Console):
    """A rich console for which a string is text: no markup, no emoji codes, no colours for numbers, and printable.

    Where a style is wanted it is given a :class:`rich.text.Text`, whose string :func:`printable` has seen.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    @property
    def is_watched(self) -> bool:
        """Whether somebody sees what changes on it, as a progress bar does; elsewhere that would only leave lines."""
        return self.is_terminal or self.is_jupyter

    def render_str(self, text: str, **options: Any) -> rich.text.Text:
        """Every string that is printed comes through here, and so do those in a table's cells."""
        return super().render_str(printable(text), **options)


class Description(rich.progress.TextColumn):
    """What a progress bar is about, as text."""

    def __init__(self) -> None:
        super().__init__("{task.description}", markup=False)

    def render(self, task: rich.progress.Task) -> rich.text.Text:
        return rich.text.Text(printable(task.description))
