"""Networks on a GPU in which much stands between convolutions: by our kernels, in every precision, saved and loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import escort
from escort.artifact import kernels
from escort.layers import OnPlanes
from escort.problem import Precision
from tests.network.gpu.networks import PRECISIONS, assert_close, assert_same, converted, each, on_gpu, pruned, samples
from tests.network.models import Between

pytestmark = pytest.mark.gpu

LAYERS = {"AdaptiveAvgPool2d", "AvgPool2d", "Concat", "Gate", "LocalResponseNorm", "Upsample"}


@each(*PRECISIONS)
def test_what_stands_between_convolutions_is_right(precision: Precision, tmp_path: Path) -> None:
    model = on_gpu(pruned(Between()), precision)
    fast, x = converted(precision, model, 4, 3, 32, 32), samples(precision, 4, 3, 32, 32)
    assert {type(module).__name__ for module in fast.network.modules() if isinstance(module, OnPlanes)} == LAYERS
    assert fast.plan.not_captured is None and fast.plan.not_saved is None
    for shape in ((4, 3, 32, 32), (1, 3, 32, 32), (3, 3, 48, 40)):
        for _ in range(3):  # by the steps, and by replays
            assert_close(fast, model, samples(precision, *shape), precision)
    for layer, method in (("depthwise.0", "depthwise"), ("reduce", "gemv")):
        candidates = [each for each in fast.plan.layers[layer].candidates if each.method == method]
        assert any(each.time_us is not None or "predicted" in str(each.reason) for each in candidates), candidates
    escort.save(fast, tmp_path / "model", kernels=True)
    data = kernels.beside(tmp_path / "model")
    sources = {binary.source for binary in kernels.read(data, kernels.digest(data.read_bytes()))}
    assert {"average_pool.cu", "gate.cu", "local_response_norm.cu", "resize.cu"} <= sources
    back = escort.load(tmp_path / "model", kernels=True)
    with torch.inference_mode():
        assert_same(back(x), fast(x), precision)
