"""Tests marked `gpu` are skipped where there is none; a fixture that several files use."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


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
