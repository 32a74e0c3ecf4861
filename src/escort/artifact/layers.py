"""The layers of a network as JSON: the class, out of a closed list, and the arguments of its constructor."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from escort.artifact.arguments import decode, encode
from escort.layers import MaxPool2d, SamePad
from escort.layers.pool import pair
from escort.network.fused import FusedConv2d

#: The type of a convolution that runs from its compressed filter. Its plan says all about it, so it has no arguments.
SPARSE = "escort.SparseConv2d"
#: Layers that can be stored: their constructors' arguments can be read off their attributes.
LAYERS: dict[str, type[nn.Module]] = {
    **{
        name: getattr(nn, name)
        for name in """
        AdaptiveAvgPool1d AdaptiveAvgPool2d AdaptiveAvgPool3d AdaptiveMaxPool1d AdaptiveMaxPool2d AlphaDropout AvgPool1d
        AvgPool2d AvgPool3d BatchNorm1d BatchNorm2d BatchNorm3d Bilinear CELU ChannelShuffle ConstantPad1d ConstantPad2d
        Conv1d Conv2d Conv3d ConvTranspose1d ConvTranspose2d ConvTranspose3d Dropout Dropout1d Dropout2d Dropout3d ELU
        Embedding FeatureAlphaDropout Flatten Fold GELU GLU GroupNorm Hardshrink Hardsigmoid Hardswish Hardtanh Identity
        InstanceNorm1d InstanceNorm2d InstanceNorm3d LPPool1d LPPool2d LayerNorm LeakyReLU Linear LocalResponseNorm
        LogSigmoid LogSoftmax MaxPool1d MaxPool2d MaxPool3d Mish PReLU PixelShuffle PixelUnshuffle RMSNorm RReLU ReLU
        ReLU6 ReflectionPad1d ReflectionPad2d ReplicationPad1d ReplicationPad2d SELU SiLU Sigmoid Softmax Softmax2d
        Softmin Softplus Softshrink Softsign SyncBatchNorm Tanh Tanhshrink Threshold Unflatten Unfold Upsample
        UpsamplingBilinear2d UpsamplingNearest2d ZeroPad1d ZeroPad2d ZeroPad3d
        """.split()
    },
    "escort.FusedConv2d": FusedConv2d,
    "escort.MaxPool2d": MaxPool2d,
    "escort.SamePad": SamePad,
}


def describe_layer(layer: nn.Module) -> dict[str, Any]:
    """The class of a layer and its constructor's arguments. Raises ValueError where they do not say all about it."""
    cls = type(layer)
    name = next((name for name, known in LAYERS.items() if known is cls), None)
    if name is None:
        raise ValueError(f"a {cls.__module__}.{cls.__qualname__} cannot be saved; use a layer of torch.nn")
    if layer._forward_hooks or layer._forward_pre_hooks:
        raise ValueError("forward hooks cannot be saved; remove them, and make pruning permanent, before converting")
    arguments = {}
    for parameter in inspect.signature(cls).parameters.values():
        if parameter.name == "bias":
            value = layer.bias is not None
        elif parameter.kind is not parameter.POSITIONAL_OR_KEYWORD or parameter.name in ("device", "dtype"):
            continue
        else:
            value = getattr(layer, parameter.name, parameter.default)
        if isinstance(value, nn.Module):
            arguments[parameter.name] = {"layer": describe_layer(value)}
        elif value is not parameter.default:
            arguments[parameter.name] = encode(value)
    record = {"type": name, "arguments": arguments}
    twin = build_layer(record)
    settings = {key: getattr(layer, key, None) for key in _settings(twin)}
    if _settings(twin) != settings or _shapes(twin) != _shapes(layer):
        raise ValueError(f"this {name} was changed after it was made; replace it by a new {name} before converting")
    return record


def build_layer(record: Mapping[str, Any]) -> nn.Module:
    """The layer behind :func:`describe_layer`, on the meta device: its tensors have shapes and no memory."""
    if record["type"] not in LAYERS:
        raise ValueError(f"there is no layer of type {record['type']!r}")
    if not {"device", "dtype"}.isdisjoint(record["arguments"]):
        raise ValueError("where a layer lies and its type are not for the file to say")
    arguments = {
        name: build_layer(value["layer"]) if isinstance(value, dict) and [*value] == ["layer"] else decode(value, {})
        for name, value in record["arguments"].items()
    }
    with torch.device("meta"):
        layer = LAYERS[record["type"]](**arguments)
    if isinstance(layer, MaxPool2d):
        _check_window(layer)
    return layer.requires_grad_(False).eval()


def _settings(layer: nn.Module) -> dict[str, Any]:
    return {key: value for key, value in vars(layer).items() if not key.startswith("_")}


def _shapes(layer: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in layer.state_dict().items()}


def _check_window(pool: nn.MaxPool2d) -> None:
    """Raises ValueError for a window that torch would refuse on every call: our kernel does not check it."""
    settings = pool.kernel_size, pool.stride, pool.padding, pool.dilation
    for size, stride, padding, dilation in zip(*map(pair, settings), strict=True):
        if min(size, stride, dilation) < 1 or not 0 <= 2 * padding <= size:
            raise ValueError(
                f"a pooling window of {size} has no stride {stride}, padding {padding}, dilation {dilation}"
            )
