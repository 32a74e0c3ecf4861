"""What is wrong, and where: errors that name the layer, step or tensor."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from escort.report import printable


@contextmanager
def naming(subject: str) -> Iterator[None]:
    """Turns whatever goes wrong into a ValueError whose message begins with `subject`, printable."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{printable(subject)}: {said(error)}") from error


def said(error: Exception) -> str:
    """What an error says, with its type where that says more."""
    if isinstance(error, ValueError):
        return str(error)
    if isinstance(error, KeyError):
        return f"{error} is missing or unknown"
    return f"{type(error).__name__}: {error}"
