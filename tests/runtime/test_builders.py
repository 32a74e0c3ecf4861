"""Layers as JSON: what torch.nn offers survives the trip, and nothing else gets in."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

from escort.layers import (
    AdaptiveAvgPool2d,
    AvgPool2d,
    Concat,
    FusedConv2d,
    Gate,
    LocalResponseNorm,
    MaxPool2d,
    NormedConcat,
    Squeeze,
    Upsample,
)
from escort.runtime.saved import builders
from escort.runtime.saved.limits import MAX_COUNT, MAX_DEEP, MAX_SCALE, MAX_WINDOW
from tests.artifact.networks import through_json


def rebuilt(layer: nn.Module) -> nn.Module:
    twin = builders.build_layer(through_json(builders.describe_layer(layer)))
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
        (FusedConv2d(nn.Conv2d(4, 6, 3), "leaky_relu", False, 0.2), (2, 4, 6, 6)),
        (FusedConv2d(nn.Conv2d(4, 6, 3), "prelu"), (2, 4, 6, 6)),
        (FusedConv2d(nn.Conv2d(4, 6, 3), "relu", zeros=(0, 1, 2, 0)), (2, 4, 6, 6)),
        (MaxPool2d(3, 2, 1), (2, 4, 6, 6)),
        (LocalResponseNorm(5, 0.1, 0.5, 2.0), (2, 4, 6, 6)),
        (AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False), (2, 4, 6, 6)),
        (AdaptiveAvgPool2d((2, None)), (2, 4, 6, 6)),
        (Upsample(scale_factor=1.5, mode="bilinear", align_corners=True), (2, 4, 6, 6)),
        (NormedConcat(4, eps=1e-3, activation="relu"), (2, 4, 6, 6)),
        (Squeeze(8, 2, "relu", "hardsigmoid", ("reduce", "expand")), (2, 8, 6, 6)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_a_layer_computes_the_same_when_rebuilt(layer: nn.Module, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    layer.eval()
    x = torch.randn(shape)
    assert torch.equal(rebuilt(layer)(x.clone()), layer(x.clone()))


@pytest.mark.parametrize("layer", [Concat(), Gate()])
def test_a_layer_of_several_inputs_computes_the_same_when_rebuilt(layer: nn.Module) -> None:
    x, gates = torch.randn(2, 4, 6, 6), torch.randn(2, 4, 1, 1)
    inputs = (x, gates) if isinstance(layer, Gate) else (x, x + 1, x)
    assert torch.equal(rebuilt(layer.eval())(*inputs), layer(*inputs))


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
        (nn.TransformerEncoderLayer(4, 2), "TransformerEncoderLayer cannot be saved"),
        (_changed(), "changed after it was made"),
        (_resized(), "changed after it was made"),
        (_hooked(), "make pruning permanent"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_layer_that_its_arguments_do_not_describe_is_refused(layer: nn.Module, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        builders.describe_layer(layer.eval())


class _Applied(nn.Module):
    """A layer that takes several tensors or gives several."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result = self.layer(x, x, x) if isinstance(self.layer, nn.MultiheadAttention) else self.layer(x)
        return result[0]


@pytest.mark.parametrize(
    "layer",
    [
        nn.LSTM(4, 6, num_layers=2, bidirectional=True, batch_first=True),
        nn.LSTM(4, 6, bias=False, proj_size=3),
        nn.GRU(4, 6, 2, dropout=0.1),
        nn.RNN(4, 6, nonlinearity="relu"),
        nn.MultiheadAttention(4, 2, dropout=0.1),
        nn.MultiheadAttention(4, 2, bias=False, add_bias_kv=True, add_zero_attn=True, batch_first=True),
        nn.MultiheadAttention(4, 2, kdim=4, vdim=4),
    ],
    ids=lambda layer: f"{type(layer).__name__}",
)
def test_a_layer_of_several_tensors_computes_the_same_when_rebuilt(layer: nn.Module) -> None:
    torch.manual_seed(0)
    layer.eval()
    x = torch.randn(3, 5, 4)
    with torch.no_grad():
        torch.testing.assert_close(_Applied(rebuilt(layer))(x), _Applied(layer)(x))


def record(name: str, **arguments: Any) -> dict[str, Any]:
    return {"type": name, "arguments": arguments}


CONV = {"in_channels": 4, "out_channels": 4, "kernel_size": 3}
AT_THE_LIMIT: list[tuple[dict[str, Any], dict[str, Any]]] = [
    (
        record("Linear", in_features=1, out_features=MAX_COUNT),
        record("Linear", in_features=1, out_features=MAX_COUNT + 1),
    ),
    (record("Linear", in_features=2, out_features=2), record("Linear", in_features=True, out_features=2)),
    (record("Linear", in_features=2, out_features=2), record("Linear", in_features=2.0, out_features=2)),
    (record("Linear", in_features=2, out_features=2), record("Linear", in_features=-1, out_features=2)),
    (record("Linear", in_features=2, out_features=2), record("Linear", in_features=2**70, out_features=2)),
    (record("Linear", in_features=2, out_features=2), record("Linear", in_features=2)),
    (record("Linear", in_features=2, out_features=2), record("Linear", in_features=2, out_features=2, dtype="x")),
    (
        record("Linear", in_features=2, out_features=2),
        record("Linear", in_features=2, out_features=2, device={"device": "cpu"}),
    ),
    (record("Conv2d", **CONV), record("Conv2d", **CONV | {"out_channels": 2**40})),
    (record("Conv2d", **CONV), record("Conv2d", **CONV, bias=1)),
    (record("Conv2d", **CONV, padding="same"), record("Conv2d", **CONV, padding="eval")),
    (record("Conv2d", **CONV, stride=MAX_WINDOW), record("Conv2d", **CONV, stride=MAX_WINDOW + 1)),
    (record("Conv2d", **CONV, stride=1), record("Conv2d", **CONV, stride=0)),
    (record("Conv2d", **CONV, dilation=MAX_WINDOW), record("Conv2d", **CONV, dilation=[1, MAX_WINDOW + 1])),
    (record("AdaptiveAvgPool2d", output_size=MAX_WINDOW), record("AdaptiveAvgPool2d", output_size=10**9)),
    (record("AdaptiveAvgPool2d", output_size=[1, None]), record("AdaptiveAvgPool2d", output_size=[1] * 7)),
    (record("Upsample", scale_factor=MAX_SCALE), record("Upsample", scale_factor=1e6)),
    (record("Upsample", scale_factor=0.5), record("Upsample", scale_factor=-0.5)),
    (record("Upsample", scale_factor=2.0), record("Upsample", scale_factor={"float": "nan"})),
    (record("Upsample", scale_factor=2.0), record("Upsample", scale_factor=2.0, mode="__import__('os')")),
    (record("ZeroPad2d", padding=MAX_WINDOW), record("ZeroPad2d", padding=2**40)),
    (
        record("LSTM", input_size=1, hidden_size=1, num_layers=MAX_DEEP),
        record("LSTM", input_size=1, hidden_size=1, num_layers=MAX_DEEP + 1),
    ),
    (record("LeakyReLU", negative_slope=0.1), record("LeakyReLU", negative_slope="0) if False else (print(1)")),
    (record("LeakyReLU", negative_slope=0.1), record("LeakyReLU", negative_slope={"value": 0})),
    (record("ReLU"), record("ReLU", inplace=1)),
    (record("ReLU"), record("Sequential")),
    (record("ReLU"), record("escort.SparseConv2d")),
    (
        record("Embedding", num_embeddings=2, embedding_dim=2),
        record("Embedding", num_embeddings=2, embedding_dim=2, _weight=[1]),
    ),
    (record("escort.MaxPool2d", kernel_size=3, padding=1), record("escort.MaxPool2d", kernel_size=3, padding=2)),
    (record("escort.MaxPool2d", kernel_size=3, padding=1), record("escort.MaxPool2d", kernel_size=3, padding=-4)),
    (record("escort.MaxPool2d", kernel_size=3, stride=1), record("escort.MaxPool2d", kernel_size=3, stride=0)),
    (record("escort.MaxPool2d", kernel_size=3, dilation=1), record("escort.MaxPool2d", kernel_size=3, dilation=-1)),
    (
        record("escort.FusedConv2d", conv={"layer": record("Conv2d", **CONV)}),
        record("escort.FusedConv2d", conv={"layer": record("Linear", in_features=2, out_features=2)}),
    ),
    (
        record("escort.FusedConv2d", conv={"layer": record("Conv2d", **CONV)}, activation="relu6"),
        record("escort.FusedConv2d", conv={"layer": record("Conv2d", **CONV)}, activation="exp"),
    ),
    (
        record("escort.FusedConv2d", conv={"layer": record("Conv2d", **CONV)}, zeros=[MAX_WINDOW, 0, 0, 0]),
        record("escort.FusedConv2d", conv={"layer": record("Conv2d", **CONV)}, zeros=[MAX_WINDOW + 1, 0, 0, 0]),
    ),
]


@pytest.mark.parametrize(("allowed", "refused"), AT_THE_LIMIT, ids=lambda record: str(record)[:100])
def test_arguments_within_the_limits_and_beyond(allowed: dict[str, Any], refused: dict[str, Any]) -> None:
    builders.build_layer(through_json(allowed))
    with pytest.raises((ValueError, TypeError, KeyError)):
        builders.build_layer(through_json(refused))


def test_every_layer_has_bounded_arguments() -> None:
    for name, cls in builders.LAYERS.items():
        for parameter in inspect.signature(cls).parameters.values():
            known = parameter.name in builders._ARGUMENTS or parameter.name in ("conv", "args", "kwargs")
            ignored = parameter.name in ("device", "dtype", "process_group", "min_value", "max_value")
            assert known or ignored or parameter.name.startswith("_"), f"{name} takes {parameter.name}"
