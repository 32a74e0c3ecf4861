"""Tests marked `gpu` are skipped where there is none; fixtures that several files use."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from escort.cli import rivals
from escort.cli.engines import turns
from escort.kernels import _cpu
from escort.planner import measure


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(scope="session", autouse=True)
def short_turns() -> Iterator[None]:
    """Engines that are timed in processes of their own run for a moment, at most twice, and are not tried again."""
    told, take_turns = turns.job, turns.take_turns

    def short(engines: Any, expected: Any, bound: float, folder: Path, asked: Any) -> Any:
        return take_turns(engines, expected, bound, folder, replace(asked, rounds=min(asked.rounds, 2)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(turns, "job", lambda *about: {**told(*about), "seconds": 0.01})
        patch.setattr(turns, "_TRIES", 1)
        patch.setattr(rivals, "take_turns", short)
        yield


@pytest.fixture(scope="session", autouse=True)
def always_steady() -> Iterator[None]:
    """Plans of tests are kept, however busy the machine is that they run on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "_SCATTER", math.inf)
        patch.setattr(measure, "_BUSY", 1.0)
        yield


@pytest.fixture(scope="session", autouse=True)
def small_layers_on_threads() -> Iterator[None]:
    """Layers of tests run on all threads, however small they are."""
    _cpu.assume_fork_join_ns(1)
    yield
    _cpu.assume_fork_join_ns(0)


@pytest.fixture(scope="session", autouse=True)
def no_stored_plans() -> Iterator[None]:
    """No test reads or writes the user's plans: many patch the timer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ESCORT_KEEP_PLANS", "0")
        yield


@pytest.fixture
def empty_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A cache in a folder of its own."""
    monkeypatch.setenv("ESCORT_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def plan_store(empty_cache: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans are kept, in a folder of its own."""
    monkeypatch.setenv("ESCORT_KEEP_PLANS", "1")


@pytest.fixture(params=["default", "old settings", "new settings"])
def hostile(request: pytest.FixtureRequest) -> Iterator[None]:
    """What a user may have chosen for the process: TF32 everywhere, by torch's older or newer settings."""
    if request.param == "new settings" and not hasattr(torch.backends, "fp32_precision"):
        pytest.skip("this torch has the old settings only")
    matmul = torch.get_float32_matmul_precision()
    try:
        if request.param == "old settings":
            torch.set_float32_matmul_precision("medium")
            torch.backends.cudnn.allow_tf32 = True
        elif request.param == "new settings":
            torch.backends.fp32_precision = "tf32"
        yield
    finally:
        if request.param == "new settings":
            torch.backends.fp32_precision = "none"
        torch.set_float32_matmul_precision(matmul)


@pytest.fixture
def cudnn(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Stands in for cuDNN on the CPU, and notes the arguments of each call."""
    calls: list[dict[str, Any]] = []

    def convolution(
        x: torch.Tensor, weight: torch.Tensor, padding: Any, stride: Any, dilation: Any, groups: int, **options: Any
    ) -> torch.Tensor:
        calls.append({**options, "x": x, "weight": weight})
        return F.conv2d(x, weight, None, stride, padding, dilation, groups)

    monkeypatch.setattr(torch, "cudnn_convolution", convolution)
    return calls
