"""Entries on disk: what takes long and is the same every time is done once per machine, not once per process.

There are two kinds of entries, compiled kernels and measured plans. An entry is one file, named by its key, the hash of
all that it was made from. Its first lines are its kind and format, the SHA-256 of the key and of what follows, and a
JSON description; then come bytes, such as a kernel's binary. Files are written aside and renamed, and a damaged one
counts as absent, so that any number of processes can share a folder in whatever state it is. A folder that cannot be
written costs the time to do it again, and one warning.

Kernels are code, so the folder must be the user's own, and nobody else may write to it: otherwise it is not used. What
in it is no file of the user's (a link, a pipe, a folder, a file of somebody else) counts as absent.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import secrets
import stat
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

#: What an entry is: a compiled kernel or a measured plan.
Kind = Literal["kernel", "plan"]
KINDS: tuple[Kind, ...] = get_args(Kind)

#: The folder, by default $XDG_CACHE_HOME/escort or ~/.cache/escort.
FOLDER_VARIABLE = "ESCORT_CACHE_DIR"
#: The size of all entries at most, in MB; 0 keeps none. The least recently used go first.
LIMIT_VARIABLE = "ESCORT_CACHE_MB"

_DEFAULT_MB = 256
_TEMPORARY = ".part"
_ABANDONED_S = 3600  # a file that is not renamed by then was left behind by a process that was killed
_KEPT = 0.75  # share of the limit that is left once it was exceeded: room for storing a while without a look around
_CONSEQUENCE = "every process compiles kernels and measures layers anew"
_warned: set[str] = set()
_warning = threading.Lock()
#: For each folder how many bytes lie there at most, as far as this process knows, which has looked once.
_sizes: dict[Path, int] = {}
_trimming = threading.Lock()


@dataclass(frozen=True)
class Entry:
    """A file of the cache.

    Attributes:
        key: what it was stored under, its file's name without the kind behind it.
        size_bytes: of the file.
        used: when it was last written or read, in seconds since the epoch; 0 for one that was added, until it is read.
        description: what was stored; empty where the file is damaged.
    """

    key: str
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


class UnsafeFolderError(OSError):
    """The folder is not the user's alone; the message says what to do."""


def load(kind: Kind, key: str) -> tuple[dict[str, Any], bytes] | None:
    """The description and the bytes stored under a key, or None where there is no such entry or it is damaged."""
    try:
        with _opened(folder()) as directory, _opened_entry(directory, f"{key}.{kind}") as entry:
            parsed = _parse(kind, key, _content(entry))
            if parsed is not None:
                with contextlib.suppress(OSError):  # then it counts as unused since it was written
                    os.utime(entry)
            return parsed
    except UnsafeFolderError as error:
        _warn_once(str(error))
    except OSError:
        pass
    return None


def contains(kind: Kind, key: str) -> bool:
    """Whether there is an entry of that key, damaged or not."""
    try:
        return (folder() / f"{key}.{kind}").exists()
    except OSError:
        return False


def store(kind: Kind, key: str, description: Mapping[str, Any], data: bytes = b"") -> None:
    """Writes an entry and makes room for it; where that cannot be done, warns once and goes on."""
    limit = limit_bytes()
    if limit == 0:
        return
    content = _packed(kind, key, description, data)

    def write(place: Path, directory: int) -> None:
        _write(directory, f"{key}.{kind}", content)
        _make_room(place, directory, len(content), limit)

    _in_folder(write)


def add(kind: Kind, descriptions: Mapping[str, Mapping[str, Any]]) -> tuple[int, int]:
    """Writes entries as far as there is room, by their keys. Until they are read they are the least recently used.

    Returns:
        How many were written, and for how many there was no room. Where writing fails, warns once and stops.
    """
    limit, written, without_room = limit_bytes(), 0, 0

    def write(place: Path, directory: int) -> None:
        nonlocal written, without_room
        sizes = {name: status.st_size for name, status in _files(directory, *(f".{kind}" for kind in KINDS))}
        total = sum(sizes.values())
        for key, description in descriptions.items():
            name, content = f"{key}.{kind}", _packed(kind, key, description)
            grown = total + len(content) - sizes.get(name, 0)
            if grown > limit:
                without_room += 1
                continue
            _write(directory, name, content)
            with contextlib.suppress(FileNotFoundError):  # another process may make room at any time
                os.utime(name, (0, 0), dir_fd=directory, follow_symlinks=False)
            total, written = grown, written + 1
        _sizes[place] = total

    _in_folder(write)
    return written, without_room


def _in_folder(write: Callable[[Path, int], None]) -> None:
    """Has something written, given the folder and its descriptor; where that cannot be done, warns once and goes on."""
    place: Path | str = ""
    try:
        place = folder()
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _opened(place) as directory:
            write(place, directory)
    except UnsafeFolderError as error:
        _warn_once(str(error))
    except OSError as error:
        _warn_once(
            f"the cache {place} cannot be written ({error.strerror or error}): {_CONSEQUENCE}; make room, or set "
            f"{FOLDER_VARIABLE} to a folder that can be written"
        )


@contextlib.contextmanager
def turn(name: str) -> Iterator[None]:
    """Waits for other processes of this machine that have a turn of that name; without a folder nobody waits.

    What the first one of several puts into the folder is there for those after it.
    """
    with contextlib.ExitStack() as held:
        with contextlib.suppress(OSError):
            place = folder()
            place.mkdir(mode=0o700, parents=True, exist_ok=True)
            directory = held.enter_context(_opened(place))
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            lock = os.open(f"{name}.lock", flags, 0o600, dir_fd=directory)
            held.callback(os.close, lock)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def entries(kind: Kind) -> list[Entry]:
    """All entries of a kind, damaged ones too, the most recently used first. Raises UnsafeFolderError."""
    listed, suffix = [], f".{kind}"
    with contextlib.suppress(FileNotFoundError), _opened(folder()) as directory:
        for name, status in _files(directory, suffix):
            key = name.removesuffix(suffix)
            try:
                with _opened_entry(directory, name) as entry:
                    parsed = _parse(kind, key, _content(entry))
            except OSError:
                parsed = None
            listed.append(Entry(key, status.st_size, status.st_mtime, {} if parsed is None else parsed[0]))
    return sorted(listed, key=lambda entry: -entry.used)


def clear(kind: Kind) -> tuple[int, int]:
    """Removes all entries of a kind, and what killed processes left behind; returns how many, and their size in bytes.

    Raises UnsafeFolderError.
    """
    removed = []
    with contextlib.suppress(FileNotFoundError), _opened(folder()) as directory:
        for name, status in _files(directory, f".{kind}", _TEMPORARY):
            _remove(directory, name)
            removed.append(status.st_size)
    return len(removed), sum(removed)


def check_folder() -> None:
    """Raises UnsafeFolderError where there is a folder and it is not used; OSError where it cannot be opened."""
    with contextlib.suppress(FileNotFoundError), _opened(folder()):
        pass


@contextlib.contextmanager
def _opened(place: Path) -> Iterator[int]:
    """The folder's descriptor, to which files are relative from here on, so that nobody can exchange the folder."""
    directory = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        status = os.fstat(directory)
        if status.st_uid != os.geteuid():
            raise UnsafeFolderError(
                f"the cache {place} belongs to user {status.st_uid}, and so is not used: {_CONSEQUENCE}; set "
                f"{FOLDER_VARIABLE} to a folder of your own"
            )
        if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise UnsafeFolderError(
                f"the cache {place} can be written by others, and so is not used: {_CONSEQUENCE}; call chmod go-w on "
                f"it, or set {FOLDER_VARIABLE} to a folder of your own"
            )
        yield directory
    finally:
        os.close(directory)


@contextlib.contextmanager
def _opened_entry(directory: int, name: str) -> Iterator[int]:
    """A file's descriptor. Raises OSError where there is none, or what bears its name is no file of the user's."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # opening a pipe would wait for a writer
    entry = os.open(name, flags, dir_fd=directory)
    try:
        status = os.fstat(entry)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
            raise FileNotFoundError(f"{name} is no file of this user")
        yield entry
    finally:
        os.close(entry)


def _content(entry: int) -> bytes:
    with open(entry, "rb", closefd=False) as file:
        return file.read()


def _write(directory: int, name: str, content: bytes) -> None:
    """Writes a file as a whole or not at all."""
    temporary = f"{secrets.token_hex(8)}{_TEMPORARY}"
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=directory)
    try:
        with open(handle, "wb") as file:
            file.write(content)
        os.replace(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)
    except BaseException:
        _remove(directory, temporary)
        raise


def _packed(kind: Kind, key: str, description: Mapping[str, Any], data: bytes = b"") -> bytes:
    """The content of an entry's file, which :func:`_parse` reads."""
    content = json.dumps(description, sort_keys=True).encode() + b"\n" + data
    return _format(kind) + _checksum(key, content) + b"\n" + content


def _format(kind: Kind) -> bytes:
    return f"escort-{kind} 1\n".encode()


def _parse(kind: Kind, key: str, content: bytes) -> tuple[dict[str, Any], bytes] | None:
    """Description and bytes of a file, or None where it is not exactly what was written under that key."""
    start = len(_format(kind))
    end = start + 64
    rest = content[end + 1 :]
    if content[:start] != _format(kind) or content[start:end] != _checksum(key, rest):
        return None
    line, _, data = rest.partition(b"\n")
    try:
        description = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return (description, data) if isinstance(description, dict) else None


def _checksum(key: str, content: bytes) -> bytes:
    return hashlib.sha256(key.encode() + content).hexdigest().encode()


def _files(directory: int, *suffixes: str) -> list[tuple[str, os.stat_result]]:
    """Name and status of what bears such a suffix and is no folder; another process may remove it at any time."""
    found = []
    with os.scandir(directory) as listing:
        for item in listing:
            if item.name.endswith(suffixes):
                with contextlib.suppress(FileNotFoundError):
                    found.append((item.name, item.stat(follow_symlinks=False)))
    return [(name, status) for name, status in found if not stat.S_ISDIR(status.st_mode)]


def _make_room(place: Path, directory: int, stored: int, limit: int) -> None:
    """Trims the folder where it may be too large.

    Listing it costs a call of the system per entry, so that is done for this process's first entry, and once those that
    it has stored since may have filled the folder. What other processes store meanwhile is counted by them.
    """
    with _trimming:
        if place in _sizes:
            _sizes[place] += stored
        if place not in _sizes or _sizes[place] > limit:
            _sizes[place] = _trim(directory, limit)


def _trim(directory: int, limit: int) -> int:
    """Removes what killed processes left behind and, above the limit, the least recently used; returns what is left."""
    for name, status in _files(directory, _TEMPORARY):
        if time.time() - status.st_mtime > _ABANDONED_S:
            _remove(directory, name)
    files = sorted(_files(directory, *(f".{kind}" for kind in KINDS)), key=lambda file: -file[1].st_mtime)
    total = sum(status.st_size for _, status in files)
    if total > limit:
        while files and total > _KEPT * limit:
            name, status = files.pop()
            _remove(directory, name)
            total -= status.st_size
    return total


def _remove(directory: int, name: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(name, dir_fd=directory)


def _warn_once(message: str) -> None:
    with _warning:  # threads that compile side by side come here at once
        is_new = message not in _warned
        _warned.add(message)
    if is_new:
        warnings.warn(message, RuntimeWarning, stacklevel=3)
