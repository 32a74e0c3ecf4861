"""The sources that the tests compile, and a driver that records its calls in the place of CUDA's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from escort.cuda.kernel import Kernel, kernel
from tests.cuda.kernels import FakeDriver, install, write_copy, write_scale


@pytest.fixture
def scale(tmp_path: Path) -> Path:
    return write_scale(tmp_path)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return write_copy(tmp_path)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    return install(monkeypatch)


@pytest.fixture
def compiled(driver: FakeDriver, scale: Path) -> Kernel:
    return kernel(scale, {"FACTOR": 2}, torch.device("cuda:0"))
