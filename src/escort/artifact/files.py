"""Files that are written as a whole or not at all."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable
from pathlib import Path


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Lets `write` write a file of the same name in a temporary folder beside `path`, and moves it to `path`.

    Another process, or a later one after a crash, finds the old file or the new one. Whatever fails leaves the old one
    and nothing else. A symbolic link stays one: the file that it leads to is replaced. The mode stays what it was.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, f"{path} is no file")
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".escort-") as folder:
        unfinished = Path(folder) / path.name
        write(unfinished)
        if path.exists():
            os.chmod(unfinished, path.stat().st_mode & 0o7777)
        with open(unfinished, "rb") as file:
            os.fsync(file.fileno())
        os.replace(unfinished, path)
