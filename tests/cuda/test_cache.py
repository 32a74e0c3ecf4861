"""Binaries on disk: whatever happens to the folder, what comes back is what was stored or nothing."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import pytest

from escort.cuda import cache

KEY, OTHER = "a" * 64, "b" * 64
DESCRIPTION = {"source": "direct.cu", "registers": 40}
BINARY = bytes(range(256)) + b"\n" * 5


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    folder = tmp_path / "home" / "cache"
    monkeypatch.setenv("ESCORT_CACHE_DIR", str(folder))
    monkeypatch.setattr(cache, "_warned", set())
    return folder


def stored(key: str = KEY, binary: bytes = BINARY) -> Path:
    cache.store(key, DESCRIPTION, binary)
    return cache.folder() / f"{key}.kernel"


def test_what_was_stored_comes_back() -> None:
    assert cache.load(KEY) is None
    stored()
    assert cache.load(KEY) == (DESCRIPTION, BINARY)
    assert cache.load(OTHER) is None


def test_storing_again_replaces() -> None:
    stored()
    stored(binary=b"newer")
    assert cache.load(KEY) == (DESCRIPTION, b"newer") and len(cache.entries()) == 1


def test_a_changed_byte_is_noticed_wherever_it_is() -> None:
    path = stored()
    content = path.read_bytes()
    for position in range(len(content)):
        path.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
        if position != len(b"escort-kernel 1\n") + 64:  # the line end behind the checksum, which tells nothing
            assert cache.load(KEY) is None, position


def test_a_truncated_or_longer_file_is_noticed() -> None:
    path = stored()
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        assert cache.load(KEY) is None, length
    path.write_bytes(content + b"\0")
    assert cache.load(KEY) is None


@pytest.mark.parametrize("content", [b"", b"\x7fELF", b"escort-kernel 1\n", b"escort-kernel 1\n" + b"0" * 65])
def test_a_foreign_file_is_no_entry(folder: Path, content: bytes) -> None:
    folder.mkdir(parents=True)
    (folder / f"{KEY}.kernel").write_bytes(content)
    assert cache.load(KEY) is None
    assert cache.entries()[0].description == {}


def test_an_entry_under_another_key_is_foreign() -> None:
    path = stored()
    shutil.copy(path, path.with_stem(OTHER))
    assert cache.load(OTHER) is None and cache.load(KEY) is not None


def test_the_least_recently_used_go_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESCORT_CACHE_MB", "1")
    keys = [letter * 64 for letter in "abcd"]
    for age, key in enumerate(keys[:3]):
        os.utime(stored(key, bytes(300_000)), (0, time.time() - 100 + age))
    assert cache.load(keys[0]) is not None  # the oldest is the latest used now
    stored(keys[3], bytes(300_000))
    assert {entry.path.stem for entry in cache.entries()} == {keys[0], keys[2], keys[3]}


def test_no_megabytes_keep_nothing(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setenv("ESCORT_CACHE_MB", "0")
    stored()
    assert cache.load(KEY) is None and not folder.exists()


@pytest.mark.parametrize("text", ["", "many", "-1", "1.5"])
def test_a_bad_limit_is_named(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("ESCORT_CACHE_MB", text)
    with pytest.raises(ValueError, match="ESCORT_CACHE_MB"):
        cache.limit_bytes()


def test_a_folder_that_cannot_be_written_costs_one_warning(folder: Path) -> None:
    folder.parent.parent.mkdir(exist_ok=True)
    folder.parent.touch()  # a file where a folder should be made, which stops even root
    with pytest.warns(RuntimeWarning, match="Not a directory.*ESCORT_CACHE_DIR"):
        stored()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stored()
    assert cache.load(KEY) is None


def test_a_read_only_folder_is_still_read(monkeypatch: pytest.MonkeyPatch) -> None:
    stored()

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "mkstemp", refuse)
    monkeypatch.setattr(os, "utime", refuse)
    with pytest.warns(RuntimeWarning, match="Permission denied"):
        stored(OTHER)
    assert cache.load(KEY) == (DESCRIPTION, BINARY)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device that is always full")
def test_a_full_disk_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    make = tempfile.mkstemp

    def full(*args: Any, **kwargs: Any) -> tuple[int, str]:
        handle, path = make(*args, **kwargs)
        os.close(handle)
        return os.open("/dev/full", os.O_WRONLY), path

    monkeypatch.setattr(tempfile, "mkstemp", full)
    with pytest.warns(RuntimeWarning, match="No space left"):
        stored()
    assert not any(folder.iterdir())


def test_what_killed_processes_left_is_removed(folder: Path) -> None:
    folder.mkdir(parents=True)
    old, fresh = folder / "old.part", folder / "fresh.part"
    old.touch()
    fresh.touch()
    os.utime(old, (0, time.time() - 7200))
    stored()
    assert not old.exists() and fresh.exists()  # which another process may be writing


def test_clear_removes_all(folder: Path) -> None:
    paths = [stored(), stored(OTHER)]
    size = sum(path.stat().st_size for path in paths)
    (folder / "yours.txt").touch()
    assert cache.clear() == (2, size)
    assert [path.name for path in folder.iterdir()] == ["yours.txt"]
    assert cache.clear() == (0, 0)


def test_where_the_folder_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ESCORT_CACHE_DIR", "/somewhere")
    assert cache.folder() == Path("/somewhere")
    monkeypatch.delenv("ESCORT_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.folder() == tmp_path / "escort"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # which the XDG specification says to ignore
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache.folder() == tmp_path / "home" / ".cache" / "escort"
