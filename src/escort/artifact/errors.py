"""What is wrong with a file, and where."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch


class ArtifactError(ValueError):
    """A file that cannot be loaded; the message names the file, the layer, the problem and the remedy."""


@contextmanager
def naming(subject: str) -> Iterator[None]:
    """Turns whatever goes wrong into a ValueError whose message begins with `subject`."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{subject}: {_describe(error)}") from error


@contextmanager
def blaming(path: Path, remedy: str) -> Iterator[None]:
    """Turns whatever goes wrong into an ArtifactError about a file. A damaged one may go wrong anywhere, in torch too.

    A GPU that is out of memory is not the file's fault, and an ArtifactError already says what to do.
    """
    try:
        yield
    except (torch.OutOfMemoryError, ArtifactError):
        raise
    except Exception as error:
        raise ArtifactError(f"{path}: {_describe(error)}; {remedy}") from error


def _describe(error: Exception) -> str:
    if isinstance(error, ValueError):
        return str(error)
    if isinstance(error, KeyError):
        return f"{error} is missing or unknown"
    return f"{type(error).__name__}: {error}"
