"""Networks on a GPU in which much stands between convolutions: by our kernels, in every precision, saved and loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from escort.layers import OnPlanes
from escort.problem import Precision
from tests.network.gpu.networks import (
    PRECISIONS,
    assert_close,
    assert_same,
    converted,
    each,
    on_gpu,
    pruned,
    samples,
    saved_and_loaded,
)
from tests.network.models import Between

pytestmark = pytest.mark.gpu

LAYERS = {"AdaptiveAvgPool2d", "AvgPool2d", "Concat", "Gate", "LocalResponseNorm", "Upsample"}


@each(*PRECISIONS)
def test_what_stands_between_convolutions_is_right(precision: Precision, tmp_path: Path) -> None:
    model = on_gpu(pruned(Between()), precision)
    fast, x = converted(precision, model, 4, 3, 32, 32), samples(precision, 4, 3, 32, 32)
    found = {type(module).__name__ for module in fast.network.modules() if isinstance(module, OnPlanes)}
    assert found - {"FusedLinear"} == LAYERS  # which is measured
    assert fast.plan.not_captured is None and fast.plan.not_saved is None
    for shape in ((4, 3, 32, 32), (1, 3, 32, 32), (3, 3, 48, 40)):
        for _ in range(3):  # by the steps, and by replays
            assert_close(fast, model, samples(precision, *shape), precision)
    for layer, method in (("depthwise.0", "depthwise"), ("reduce", "gemv")):
        candidates = [each for each in fast.plan.layers[layer].candidates if each.method == method]
        assert any(each.time_us is not None or "predicted" in str(each.reason) for each in candidates), candidates
    back, sources = saved_and_loaded(fast, tmp_path / "model")
    assert {"average_pool.cu", "gate.cu", "local_response_norm.cu", "resize.cu"} <= sources
    with torch.inference_mode():
        assert_same(back(x), fast(x), precision)


@each("fp16", "tf32")
def test_squeeze_excitation_is_one_launch(precision: Precision, tmp_path: Path) -> None:
    model = on_gpu(pruned(nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), Excited(), nn.Conv2d(16, 8, 1))), precision)
    fast, x = converted(precision, model, 4, 3, 32, 32), samples(precision, 4, 3, 32, 32)
    for shape in ((4, 3, 32, 32), (1, 3, 32, 32), (3, 3, 48, 40)):
        for _ in range(3):
            assert_close(fast, model, samples(precision, *shape), precision)
    if fast.plan.memory_format != "channels_last":
        pytest.skip("the network was kept in NCHW, which has no such kernel")
    assert "squeeze-excitation" in fast.plan.skipped["1.fc1"] and "1.fc2" not in fast.plan.layers
    assert fast.plan.not_captured is None and fast.plan.not_saved is None
    back, sources = saved_and_loaded(fast, tmp_path / "model")
    assert "squeeze.cu" in sources
    with torch.inference_mode():
        assert_same(back(x), fast(x), precision)


class Excited(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(16, 8, 1), nn.Conv2d(8, 16, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(self.fc2(F.silu(self.fc1(F.adaptive_avg_pool2d(x, 1)))))
