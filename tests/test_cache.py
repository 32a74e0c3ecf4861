"""Entries on disk: whatever happens to the folder, what comes back is what was stored or nothing."""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from escort import cache

KEY, OTHER = "a" * 64, "b" * 64
DESCRIPTION = {"source": "direct.cu", "registers": 40}
BINARY = bytes(range(256)) + b"\n" * 5


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    folder = tmp_path / "home" / "cache"
    monkeypatch.setenv("ESCORT_CACHE_DIR", str(folder))
    monkeypatch.setattr(cache, "_warned", set())
    monkeypatch.setattr(cache, "_sizes", {})
    return folder


def stored(key: str = KEY, binary: bytes = BINARY) -> Path:
    cache.store("kernel", key, DESCRIPTION, binary)
    return cache.folder() / f"{key}.kernel"


def test_what_was_stored_comes_back() -> None:
    assert cache.load("kernel", KEY) is None
    stored()
    assert cache.load("kernel", KEY) == (DESCRIPTION, BINARY)
    assert cache.load("kernel", OTHER) is None


def test_storing_again_replaces() -> None:
    stored()
    stored(binary=b"newer")
    assert cache.load("kernel", KEY) == (DESCRIPTION, b"newer") and len(cache.entries("kernel")) == 1


def test_a_changed_byte_is_noticed_wherever_it_is() -> None:
    path = stored()
    content = path.read_bytes()
    for position in range(len(content)):
        path.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
        if position != len(b"escort-kernel 1\n") + 64:  # the line end behind the checksum, which tells nothing
            assert cache.load("kernel", KEY) is None, position


def test_a_truncated_or_longer_file_is_noticed() -> None:
    path = stored()
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        assert cache.load("kernel", KEY) is None, length
    path.write_bytes(content + b"\0")
    assert cache.load("kernel", KEY) is None


@pytest.mark.parametrize("content", [b"", b"\x7fELF", b"escort-kernel 1\n", b"escort-kernel 1\n" + b"0" * 65])
def test_a_foreign_file_is_no_entry(folder: Path, content: bytes) -> None:
    folder.mkdir(parents=True)
    (folder / f"{KEY}.kernel").write_bytes(content)
    assert cache.load("kernel", KEY) is None
    assert cache.entries("kernel")[0].description == {}


def test_an_entry_under_another_key_is_foreign() -> None:
    path = stored()
    shutil.copy(path, path.with_stem(OTHER))
    assert cache.load("kernel", OTHER) is None and cache.load("kernel", KEY) is not None


def test_the_least_recently_used_go_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESCORT_CACHE_MB", "1")
    keys = [letter * 64 for letter in "abcdef"]
    for age, key in enumerate(keys[:5]):
        os.utime(stored(key, bytes(190_000)), (0, time.time() - 100 + age))
    assert cache.load("kernel", keys[0]) is not None  # the oldest is the latest used now
    stored(keys[5], bytes(190_000))
    left = {entry.key for entry in cache.entries("kernel")}
    assert left == {keys[0], keys[4], keys[5]}  # three quarters of the limit


def test_the_folder_is_listed_once_and_when_it_may_be_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESCORT_CACHE_MB", "1")
    scandir, listings = os.scandir, []
    monkeypatch.setattr(os, "scandir", lambda directory: listings.append(directory) or scandir(directory))
    counts = []
    for number in range(400):  # of 10 kB each: four times what the folder may hold
        stored(f"{number:064x}", bytes(10_000))
        counts.append(len(listings))
    assert counts[90] == 2  # for files of either kind
    assert counts[-1] < 2 * 20
    assert sum(entry.size_bytes for entry in cache.entries("kernel")) <= 10**6


def test_no_megabytes_keep_nothing(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setenv("ESCORT_CACHE_MB", "0")
    stored()
    assert cache.load("kernel", KEY) is None and not folder.exists()


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
    assert cache.load("kernel", KEY) is None


def test_threads_that_cannot_write_warn_once(folder: Path) -> None:
    folder.parent.parent.mkdir(exist_ok=True)
    folder.parent.touch()
    together = threading.Barrier(8)

    def store(number: int) -> None:
        together.wait(20)
        cache.store("kernel", f"{number:064x}", {})

    with warnings.catch_warnings(record=True) as caught, ThreadPoolExecutor(8) as pool:
        warnings.simplefilter("always")
        list(pool.map(store, range(8)))
    assert len(caught) == 1


def test_a_read_only_folder_is_still_read(monkeypatch: pytest.MonkeyPatch) -> None:
    stored()

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(cache, "_write", refuse)
    monkeypatch.setattr(os, "utime", refuse)
    with pytest.warns(RuntimeWarning, match="Permission denied"):
        stored(OTHER)
    assert cache.load("kernel", KEY) == (DESCRIPTION, BINARY)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device that is always full")
def test_a_full_disk_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    open_file = os.open

    def full(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        handle = open_file(path, flags, *args, **kwargs)
        if not flags & os.O_CREAT:
            return handle
        os.close(handle)
        return open_file("/dev/full", os.O_WRONLY)

    monkeypatch.setattr(os, "open", full)
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


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _link(path: Path) -> None:
    path.symlink_to(shutil.copy(stored(OTHER), path.parent / "elsewhere"))


def _link_to_nothing(path: Path) -> None:
    path.symlink_to("nowhere")


def _folder(path: Path) -> None:
    path.mkdir()


@pytest.mark.parametrize("make", [_pipe, _link, _link_to_nothing, _folder])
def test_what_is_no_file_counts_as_absent(make: Callable[[Path], None]) -> None:
    path = stored()
    good = cache.load("kernel", KEY)
    path.unlink()
    make(path)
    assert cache.load("kernel", KEY) is None
    assert not any(entry.description for entry in cache.entries("kernel") if entry.key == path.stem)
    if path.is_dir():
        with pytest.warns(RuntimeWarning, match="Is a directory"):
            stored()
        return
    stored()  # takes its place
    assert cache.load("kernel", KEY) == good and not path.is_symlink()


def test_a_link_is_not_followed_and_not_written_through(folder: Path) -> None:
    target = stored().rename(folder / "precious")
    content = target.read_bytes()
    (folder / f"{KEY}.kernel").symlink_to(target)
    assert cache.load("kernel", KEY) is None
    stored(binary=b"newer")
    assert target.read_bytes() == content
    (folder / f"{OTHER}.kernel").symlink_to(target)
    assert cache.clear("kernel")[0] == 2 and target.read_bytes() == content


def test_a_file_of_another_user_counts_as_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    stored()
    fstat, own = os.fstat, os.geteuid()

    def of_another(descriptor: int) -> os.stat_result:
        status = list(fstat(descriptor))
        is_folder = os.path.isdir(f"/proc/self/fd/{descriptor}")
        status[4] = own if is_folder else own + 1
        return os.stat_result(status)

    monkeypatch.setattr(os, "fstat", of_another)
    assert cache.load("kernel", KEY) is None


def unused(says: str) -> None:
    """The folder is neither read nor written, and one warning gives the reason and the remedy."""
    files = set(cache.folder().iterdir())
    with pytest.warns(RuntimeWarning, match=says) as caught:
        assert cache.load("kernel", KEY) is None
        stored(OTHER)
        assert cache.load("kernel", KEY) is None
    assert len(caught) == 1 and set(cache.folder().iterdir()) == files
    for refuses in (partial(cache.entries, "kernel"), partial(cache.clear, "plan"), cache.check_folder):
        with pytest.raises(cache.UnsafeFolderError, match=says):
            refuses()


@pytest.mark.parametrize("mode", [0o720, 0o702, 0o1777])
def test_a_folder_that_others_can_write_is_not_used(folder: Path, mode: int) -> None:
    stored()
    folder.chmod(mode)
    unused("can be written by others, .*chmod go-w.*ESCORT_CACHE_DIR")
    folder.chmod(0o755)
    assert cache.load("kernel", KEY) == (DESCRIPTION, BINARY)


def test_a_folder_of_another_owner_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    stored()
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    unused(f"belongs to user {os.getuid()}, .*ESCORT_CACHE_DIR to a folder of your own")


def test_a_new_folder_is_the_users_alone(folder: Path) -> None:
    before = os.umask(0)
    try:
        stored()
    finally:
        os.umask(before)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert cache.load("kernel", KEY) == (DESCRIPTION, BINARY)


@pytest.mark.parametrize("description", [b"[]", b"{", b"[" * 100_000, b'"text"', b"\xff"])
def test_a_forged_description_counts_as_absent(description: bytes) -> None:
    path = stored()
    content = description + b"\n" + BINARY
    digest = hashlib.sha256(KEY.encode() + content).hexdigest().encode()
    path.write_bytes(b"escort-kernel 1\n" + digest + b"\n" + content)
    assert cache.load("kernel", KEY) is None and cache.entries("kernel")[0].description == {}


def test_threads_share_a_folder() -> None:
    keys = [f"{number:064x}" for number in range(40)]
    threads = [threading.Thread(target=stored, args=(key,)) for key in keys]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(cache.load("kernel", key) == (DESCRIPTION, BINARY) for key in keys)


def test_clear_removes_all(folder: Path) -> None:
    paths = [stored(), stored(OTHER)]
    size = sum(path.stat().st_size for path in paths)
    (folder / "yours.txt").touch()
    assert cache.clear("kernel") == (2, size)
    assert [path.name for path in folder.iterdir()] == ["yours.txt"]
    assert cache.clear("kernel") == (0, 0)


def test_where_the_folder_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ESCORT_CACHE_DIR", "/somewhere")
    assert cache.folder() == Path("/somewhere")
    monkeypatch.delenv("ESCORT_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.folder() == tmp_path / "escort"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # which the XDG specification says to ignore
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache.folder() == tmp_path / "home" / ".cache" / "escort"


def test_kinds_are_told_apart(folder: Path) -> None:
    path = stored()
    assert cache.load("plan", KEY) is None and not cache.entries("plan")
    shutil.copy(path, path.with_suffix(".plan"))
    assert cache.load("plan", KEY) is None
    cache.store("plan", KEY, {"method": "direct"})
    assert cache.load("plan", KEY) == ({"method": "direct"}, b"") and cache.load("kernel", KEY) == (DESCRIPTION, BINARY)
    assert cache.clear("kernel")[0] == 1
    assert [entry.description for entry in cache.entries("plan")] == [{"method": "direct"}]


def test_kinds_share_the_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESCORT_CACHE_MB", "1")
    cache.store("plan", KEY, {"method": "direct"})
    os.utime(cache.folder() / f"{KEY}.plan", (0, time.time() - 100))
    cache.store("plan", OTHER, {"method": "dense"})
    for letter in "cdefg":
        stored(letter * 64, bytes(190_000))
    assert cache.load("plan", OTHER) is not None  # which makes it the latest used
    stored("h" * 64, bytes(190_000))
    assert cache.load("plan", KEY) is None and cache.load("plan", OTHER) is not None
