"""What most commands are tried on."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from tests.cli.invoking import succeed
from tests.cli.named import TINY


@pytest.fixture(autouse=True)
def restore_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Naming a model puts the working directory on the import path, for good."""
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.fixture(autouse=True)
def idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tests keep the cores busy, which commands would say."""
    monkeypatch.setattr("escort.planner.cores.busy_share", lambda: 0.0)


@pytest.fixture(scope="session")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pruned") / "pruned.safetensors"
    succeed("prune", TINY, "--sparsity", 0.9, "--skip", "0", "--output", path)
    return path


@pytest.fixture(scope="session")
def saved(pruned: Path) -> Path:
    path = pruned.with_name("model.escort")
    succeed("convert", TINY, "--checkpoint", pruned, "--input", "2,3,16,16", "--output", path)
    return path


@pytest.fixture
def images(tmp_path: Path) -> Path:
    image = pytest.importorskip("PIL.Image")
    folder = tmp_path / "images"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (3, 20, 24, 3), dtype=np.uint8)
    for name, values in zip(("b.png", "a.jpg", "c.PNG"), pixels, strict=True):
        image.fromarray(values).save(folder / name)
    (folder / "notes.txt").write_text("not an image")
    return folder


@pytest.fixture
def batch(tmp_path: Path) -> Path:
    path = tmp_path / "batch.npy"
    np.save(path, np.random.default_rng(0).standard_normal((5, 3, 16, 16), dtype=np.float32))
    return path
