"""Compiled kernels on disk: each is compiled once per machine instead of once per process.

An entry is one file, named by its key, the hash of all that its binary was made from. Its first lines are the format,
the SHA-256 of the key and of what follows, and a JSON description; then comes the binary. Files are written aside and
renamed, and a damaged one counts as absent, so that any number of processes can share a folder in whatever state it is.
A folder that cannot be written costs the time to compile, and one warning.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: The folder, by default $XDG_CACHE_HOME/escort or ~/.cache/escort.
FOLDER_VARIABLE = "ESCORT_CACHE_DIR"
#: The size of all entries at most, in MB; 0 keeps none. The least recently used go first.
LIMIT_VARIABLE = "ESCORT_CACHE_MB"

_DEFAULT_MB = 256
_FORMAT = b"escort-kernel 1\n"
_SUFFIX, _TEMPORARY = ".kernel", ".part"
_ABANDONED_S = 3600  # a file that is not renamed by then was left behind by a process that was killed
_warned: set[Path | None] = set()


@dataclass(frozen=True)
class Entry:
    """A file of the cache.

    Attributes:
        size_bytes: of the file.
        used: when it was last written or read, in seconds since the epoch.
        description: what was stored with the binary; empty where the file is damaged.
    """

    path: Path
    size_bytes: int
    used: float
    description: Mapping[str, Any]


def folder() -> Path:
    """Where entries lie; the folder need not exist. Raises OSError where there is neither a setting nor a home."""
    if chosen := os.environ.get(FOLDER_VARIABLE):
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME", "")
    try:
        return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "escort"
    except RuntimeError as error:
        raise OSError(f"there is no home folder for the cache; set {FOLDER_VARIABLE}") from error


def limit_bytes() -> int:
    """The size of all entries at most."""
    text = os.environ.get(LIMIT_VARIABLE, str(_DEFAULT_MB))
    if not text.isdecimal():
        raise ValueError(f"{LIMIT_VARIABLE} takes a size in MB, such as {_DEFAULT_MB}, got {text!r}")
    return int(text) * 10**6


def load(key: str) -> tuple[dict[str, Any], bytes] | None:
    """The description and the binary stored under a key, or None where there is no such entry or it is damaged."""
    try:
        path = folder() / (key + _SUFFIX)
        content = path.read_bytes()
    except OSError:
        return None
    parsed = _parse(key, content)
    if parsed is not None:
        with contextlib.suppress(OSError):  # then it counts as unused since it was written
            os.utime(path)
    return parsed


def store(key: str, description: Mapping[str, Any], binary: bytes) -> None:
    """Writes an entry and makes room for it; where that cannot be done, warns once and goes on."""
    limit = limit_bytes()
    if limit == 0:
        return
    content = json.dumps(description, sort_keys=True).encode() + b"\n" + binary
    content = _FORMAT + _checksum(key, content) + b"\n" + content
    directory: Path | None = None
    try:
        directory = folder()
        directory.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(_TEMPORARY, dir=directory)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
            os.replace(temporary, directory / (key + _SUFFIX))
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        _evict(directory, limit)
    except OSError as error:
        if directory not in _warned:
            _warned.add(directory)
            warnings.warn(
                f"the kernel cache {directory or ''} cannot be written ({error.strerror or error}): every process "
                f"compiles kernels anew; make room, or set {FOLDER_VARIABLE} to a folder that can be written",
                RuntimeWarning,
                stacklevel=2,
            )


def entries() -> list[Entry]:
    """All entries, damaged ones too, the most recently used first."""
    listed = []
    for path, size, used in _files(folder(), _SUFFIX):
        try:
            parsed = _parse(path.stem, path.read_bytes())
        except OSError:
            parsed = None
        listed.append(Entry(path, size, used, {} if parsed is None else parsed[0]))
    return sorted(listed, key=lambda entry: -entry.used)


def clear() -> tuple[int, int]:
    """Removes all entries; returns how many, and their size in bytes."""
    files = [*_files(folder(), _SUFFIX), *_files(folder(), _TEMPORARY)]
    for path, _, _ in files:
        path.unlink(missing_ok=True)
    return len(files), sum(size for _, size, _ in files)


def _parse(key: str, content: bytes) -> tuple[dict[str, Any], bytes] | None:
    """Description and binary of a file, or None where it is not exactly what was written under that key."""
    start, end = len(_FORMAT), len(_FORMAT) + 64
    rest = content[end + 1 :]
    if content[:start] != _FORMAT or content[start:end] != _checksum(key, rest):
        return None
    line, _, binary = rest.partition(b"\n")
    return json.loads(line), binary


def _checksum(key: str, content: bytes) -> bytes:
    return hashlib.sha256(key.encode() + content).hexdigest().encode()


def _files(directory: Path, suffix: str) -> Iterator[tuple[Path, int, float]]:
    """Path, size and time of last use of the files of that kind; another process may remove them at any time."""
    for path in directory.glob(f"*{suffix}"):
        try:
            status = path.stat()
        except FileNotFoundError:
            continue
        yield path, status.st_size, status.st_mtime


def _evict(directory: Path, limit: int) -> None:
    """Removes the least recently used entries until the others fit, and what killed processes left behind."""
    for path, _, written in _files(directory, _TEMPORARY):
        if time.time() - written > _ABANDONED_S:
            path.unlink(missing_ok=True)
    total = 0
    for path, size, _ in sorted(_files(directory, _SUFFIX), key=lambda file: -file[2]):
        total += size
        if total > limit:
            path.unlink(missing_ok=True)
