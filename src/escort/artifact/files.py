"""Files that are written as a whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Lets `write` write a file of the same name in a temporary folder beside `path`, and moves it to `path`.

    Another process, or a later one after a crash, finds the old file or the new one. Whatever fails leaves the old one.
    """
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".escort-") as folder:
        unfinished = Path(folder) / path.name
        write(unfinished)
        with open(unfinished, "rb") as file:
            os.fsync(file.fileno())
        os.replace(unfinished, path)
