"""A few hundred changed files in each run; `make fuzz` loads many."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from escort.artifact import load
from tests.artifact.forgery import sealed
from tests.fuzz import files
from tests.fuzz.mutate import mutate


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return files.saved(tmp_path_factory.mktemp("sources"))


@pytest.mark.parametrize(("number", "count"), [(0, 150), (1, 50)])
def test_changed_files_load_or_are_refused(sources: list[Path], number: int, count: int) -> None:
    outcomes = files.try_files(sources[number], 0, count)
    assert outcomes["refused"] > count / 2 and outcomes["loaded"] > count / 20


def test_the_same_seed_makes_the_same_file(sources: list[Path]) -> None:
    data = sources[0].read_bytes()
    changed = [mutate(data, seed) for seed in range(30)]
    assert changed == [mutate(data, seed) for seed in range(30)]
    assert len(set(changed)) > 25


def test_changed_files_are_sealed(sources: list[Path]) -> None:
    """All but a tenth: the others would be refused for their checksum, and nothing behind it would be tried."""
    data = sources[0].read_bytes()
    changed = [mutate(data, seed) for seed in range(1000)]
    right = [hashlib.sha256(file[:35] + b"0" * 64 + file[99:]).hexdigest().encode() == file[35:99] for file in changed]
    assert sum(right) > 750


def test_what_goes_wrong_is_named_by_its_seed_and_kept(
    sources: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "MOST_SECONDS", 0.0)
    monkeypatch.setattr(files, "_KEPT", tmp_path)
    with pytest.raises(AssertionError, match="run it again: .* --source .*/residual.escort --first 7 --count 1"):
        files.try_files(sources[0], 7, 3)
    assert (tmp_path / "residual.escort").read_bytes() == sources[0].read_bytes()


def test_an_unchanged_file_that_is_sealed_again_loads(sources: list[Path], tmp_path: Path) -> None:
    for source in sources:
        data = source.read_bytes()
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        header["__metadata__"]["sha256"] = "0" * 64
        (tmp_path / "again").write_bytes(sealed(json.dumps(header, separators=(",", ":")).encode(), data[8 + size :]))
        load(tmp_path / "again", remeasure=False)
