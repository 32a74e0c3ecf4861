"""Layers as JSON: what torch.nn offers survives the trip, and nothing else gets in."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

from escort.artifact import layers
from escort.layers import MaxPool2d
from escort.network.fused import FusedConv2d
from tests.artifact.networks import through_json


def rebuilt(layer: nn.Module) -> nn.Module:
    twin = layers.build_layer(through_json(layers.describe_layer(layer)))
    twin.load_state_dict(layer.state_dict(), assign=True)
    return twin


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.AdaptiveAvgPool2d((1, None)), (2, 4, 6, 6)),
        (nn.AvgPool2d(2, divisor_override=3), (2, 4, 6, 6)),
        (nn.BatchNorm1d(4, affine=False, track_running_stats=False), (2, 4)),
        (nn.BatchNorm2d(4, eps=0.1, momentum=None), (2, 4, 6, 6)),
        (nn.ConstantPad2d(1, float("-inf")), (2, 4, 6, 6)),
        (nn.Conv1d(4, 6, 3, stride=2, groups=2), (2, 4, 9)),
        (nn.Conv2d(4, 6, 3, padding="same", padding_mode="reflect", bias=False), (2, 4, 6, 6)),
        (nn.ConvTranspose2d(4, 4, 3, 2, 1, 1, groups=2, dilation=2), (2, 4, 6, 6)),
        (nn.Dropout(0.3), (2, 4)),
        (nn.ELU(0.5), (2, 4)),
        (nn.Flatten(2), (2, 4, 6, 6)),
        (nn.GELU("tanh"), (2, 4)),
        (nn.GroupNorm(2, 4), (2, 4, 6, 6)),
        (nn.Hardswish(), (2, 4)),
        (nn.Hardtanh(-2, 3.0), (2, 4)),
        (nn.Identity(1, b=2), (2, 4)),
        (nn.InstanceNorm2d(4, affine=True), (2, 4, 6, 6)),
        (nn.LayerNorm((4, 6), bias=False), (2, 4, 6)),
        (nn.LeakyReLU(0.2), (2, 4)),
        (nn.Linear(4, 3, bias=False), (2, 4)),
        (nn.Linear(4, 3), (2, 4)),
        (nn.LocalResponseNorm(3, alpha=1e-2, k=2.0), (2, 4, 6, 6)),
        (nn.MaxPool2d((3, 2), stride=1, ceil_mode=True), (2, 4, 6, 6)),
        (nn.PReLU(4, 0.3), (2, 4)),
        (nn.PixelShuffle(2), (2, 4, 6, 6)),
        (nn.ReLU6(inplace=True), (2, 4)),
        (nn.ReflectionPad2d((1, 2, 0, 1)), (2, 4, 6, 6)),
        (nn.Softmax(1), (2, 4)),
        (nn.Unflatten(1, (2, 2)), (2, 4)),
        (nn.Upsample(scale_factor=1.5, mode="bilinear", align_corners=True), (2, 4, 6, 6)),
        (nn.Upsample((9, 7)), (2, 4, 6, 6)),
        (nn.UpsamplingNearest2d(scale_factor=2), (2, 4, 6, 6)),
        (FusedConv2d(nn.Conv2d(4, 6, 3), "relu6", residual=False), (2, 4, 6, 6)),
        (MaxPool2d(3, 2, 1), (2, 4, 6, 6)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_a_layer_computes_the_same_when_rebuilt(layer: nn.Module, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    layer.eval()
    x = torch.randn(shape)
    assert torch.equal(rebuilt(layer)(x.clone()), layer(x.clone()))


class _Doubling(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def _changed() -> nn.Module:
    layer = nn.Linear(3, 4)
    layer.out_features = 5
    return layer


def _resized() -> nn.Module:
    layer = nn.Linear(3, 4)
    layer.weight = nn.Parameter(torch.zeros(4, 2))
    return layer


def _hooked() -> nn.Module:
    return torch_prune.l1_unstructured(nn.Linear(3, 4), "weight", 0.5)


@pytest.mark.parametrize(
    ("layer", "complaint"),
    [
        (_Doubling(3, 4), "_Doubling cannot be saved; use a layer of torch.nn"),
        (nn.MultiheadAttention(4, 2), "MultiheadAttention cannot be saved"),
        (_changed(), "changed after it was made"),
        (_resized(), "changed after it was made"),
        (_hooked(), "make pruning permanent"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_layer_that_its_arguments_do_not_describe_is_refused(layer: nn.Module, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        layers.describe_layer(layer.eval())


@pytest.mark.parametrize(
    ("record", "complaint"),
    [
        ({"type": "Sequential", "arguments": {}}, "no layer of type 'Sequential'"),
        ({"type": "Linear", "arguments": {"in_features": -1, "out_features": 2}}, "negative"),
        ({"type": "Linear", "arguments": {"in_features": 2**70, "out_features": 2}}, "64 bits"),
        ({"type": "Linear", "arguments": {"in_features": 2}}, "out_features"),
        (
            {"type": "Linear", "arguments": {"in_features": 2, "out_features": 2, "device": {"device": "cpu"}}},
            "where a layer lies",
        ),
        ({"type": "escort.MaxPool2d", "arguments": {"kernel_size": 3, "padding": -4}}, "pooling window"),
        ({"type": "escort.MaxPool2d", "arguments": {"kernel_size": 3, "padding": 2}}, "pooling window"),
        ({"type": "escort.MaxPool2d", "arguments": {"kernel_size": 3, "stride": 0}}, "pooling window"),
        ({"type": "escort.MaxPool2d", "arguments": {"kernel_size": 3, "dilation": -1}}, "pooling window"),
    ],
)
def test_a_forged_layer_is_refused(record: dict[str, Any], complaint: str) -> None:
    with pytest.raises(Exception, match=complaint):
        layers.build_layer(record)
