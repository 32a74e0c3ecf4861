"""What is wrong with a file, and where."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from escort.runtime.saved.errors import said


class ArtifactError(ValueError):
    """A file that cannot be loaded; the message names the file, the layer, the problem and the remedy."""


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
        raise ArtifactError(f"{path}: {said(error)}; {remedy}") from error
