"""A VGG's end on a GPU: linear layers of few images by our kernel, in every precision, saved and loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from escort.layers import FusedLinear
from escort.network.passes import classifiers
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

pytestmark = pytest.mark.gpu


def tiny_vgg() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU()),
        *(nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(7), nn.Flatten(), nn.Linear(64 * 49, 256), nn.ReLU(inplace=True)),
        *(nn.Dropout(), nn.Linear(256, 100)),
    )


@pytest.mark.filterwarnings("ignore:.*was planned for inputs")
@each(*PRECISIONS)
def test_a_classifier_is_right(precision: Precision, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classifiers, "_measured", lambda *_: None)
    model = on_gpu(pruned(tiny_vgg()), precision)
    fast, x = converted(precision, model, 1, 3, 28, 28), samples(precision, 1, 3, 28, 28)
    layers = [module for module in fast.network.modules() if isinstance(module, FusedLinear)]
    assert [(layer.activation, layer.flattens) for layer in layers] == [("relu", True), ("none", False)]
    assert fast.plan.not_captured is None and fast.plan.not_saved is None
    for shape in ((1, 3, 28, 28), (3, 3, 28, 28), (9, 3, 28, 28), (2, 3, 40, 36)):  # also more samples than ours takes
        for _ in range(3):  # by the steps, and by replays
            assert_close(fast, model, samples(precision, *shape), precision)
    back, sources = saved_and_loaded(fast, tmp_path / "model")
    assert "linear.cu" in sources
    with torch.inference_mode():
        assert_same(back(x), fast(x), precision)


@each("fp16")
def test_what_is_measured_stays_right(precision: Precision) -> None:
    model = on_gpu(pruned(tiny_vgg()), precision)
    fast, x = converted(precision, model, 1, 3, 28, 28), samples(precision, 1, 3, 28, 28)
    kept = {name for name, reason in fast.plan.skipped.items() if reason.startswith(classifiers.SLOWER)}
    found = {name for name, module in fast.network.named_modules() if isinstance(module, FusedLinear)}
    assert kept | found == {"8", "11"} and not kept & found
    for _ in range(3):
        assert_close(fast, model, x, precision)
