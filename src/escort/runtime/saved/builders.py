"""The layers of a program as JSON: a class, out of a closed list, and bounded arguments of its constructor."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, get_args

import torch
from torch import nn

from escort.layers import (
    AdaptiveAvgPool2d,
    AvgPool2d,
    Concat,
    FusedConv2d,
    FusedLinear,
    Gate,
    Images,
    LocalResponseNorm,
    MaxPool2d,
    NormedConcat,
    SamePad,
    SparseConv2d,
    Squeeze,
    Upsample,
)
from escort.layers.planes.squeeze import are_names
from escort.layers.pool import pair
from escort.problem import Activation
from escort.runtime.saved.limits import MAX_COUNT, MAX_DEEP, MAX_SCALE, MAX_WINDOW
from escort.runtime.saved.values import decode, encode
from escort.runtime.stand_in import has_hooks, is_patched

#: The type of a convolution that runs from its compressed filter. Its plan says all about it, so it has no arguments.
SPARSE = "escort.SparseConv2d"
#: The record of a layer that is a module of the model's own: nothing about it is in the file.
OWN = {"type": "model"}
#: Layers that can be stored: their constructors' arguments can be read off their attributes.
LAYERS: dict[str, type[nn.Module]] = {
    **{
        name: getattr(nn, name)
        for name in """
        AdaptiveAvgPool1d AdaptiveAvgPool2d AdaptiveAvgPool3d AdaptiveMaxPool1d AdaptiveMaxPool2d AlphaDropout AvgPool1d
        AvgPool2d AvgPool3d BatchNorm1d BatchNorm2d BatchNorm3d Bilinear CELU ChannelShuffle ConstantPad1d ConstantPad2d
        Conv1d Conv2d Conv3d ConvTranspose1d ConvTranspose2d ConvTranspose3d Dropout Dropout1d Dropout2d Dropout3d ELU
        Embedding FeatureAlphaDropout Flatten Fold GELU GLU GRU GroupNorm Hardshrink Hardsigmoid Hardswish Hardtanh
        Identity
        InstanceNorm1d InstanceNorm2d InstanceNorm3d LPPool1d LPPool2d LSTM LayerNorm LeakyReLU Linear LocalResponseNorm
        LogSigmoid LogSoftmax MaxPool1d MaxPool2d MaxPool3d Mish MultiheadAttention PReLU PixelShuffle PixelUnshuffle
        RMSNorm RNN RReLU ReLU
        ReLU6 ReflectionPad1d ReflectionPad2d ReplicationPad1d ReplicationPad2d SELU SiLU Sigmoid Softmax Softmax2d
        Softmin Softplus Softshrink Softsign SyncBatchNorm Tanh Tanhshrink Threshold Unflatten Unfold Upsample
        UpsamplingBilinear2d UpsamplingNearest2d ZeroPad1d ZeroPad2d ZeroPad3d
        """.split()
    },
    **{
        f"escort.{cls.__name__}": cls
        for cls in (
            *(AdaptiveAvgPool2d, AvgPool2d, Concat, FusedConv2d, Gate, LocalResponseNorm, MaxPool2d, SamePad),
            *(FusedLinear, Images, NormedConcat, Squeeze, Upsample),
        )
    },
}
_DESCRIBED = frozenset((*LAYERS.values(), SparseConv2d))


def _each(value: Any, holds: Callable[[Any], bool]) -> bool:
    """Whether it holds of a value, or of each of up to six in a sequence."""
    if isinstance(value, (list, tuple)):
        return len(value) <= 6 and all(item is None or holds(item) for item in value)
    return holds(value)


def _is_count(value: Any) -> bool:
    return _each(value, lambda item: type(item) is int and 0 <= item <= MAX_COUNT)


def _is_step(value: Any) -> bool:
    return _each(value, lambda item: type(item) is int and 1 <= item <= MAX_WINDOW)


def _is_size(value: Any) -> bool:
    return _each(value, lambda item: type(item) is int and 0 <= item <= MAX_WINDOW)


def _is_margin(value: Any) -> bool:
    return value in ("same", "valid") or _each(value, lambda item: type(item) is int and abs(item) <= MAX_WINDOW)


def _is_dim(value: Any) -> bool:
    return type(value) is int and abs(value) <= MAX_COUNT


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and not math.isnan(value)


def _is_finite(value: Any) -> bool:
    return _each(value, lambda item: type(item) in (int, float) and math.isfinite(item))


def _is_factor(value: Any) -> bool:
    return _each(value, lambda item: type(item) in (int, float) and 0 < item <= MAX_SCALE)


_WORDS = frozenset(
    "zeros reflect replicate circular nearest linear bilinear bicubic trilinear area nearest-exact none tanh "
    "relu".split()
)
#: What a constructor's argument of a name must be, besides None. torch gives an argument one meaning in all classes.
_ARGUMENTS: dict[str, Callable[[Any], bool]] = {
    name: check
    for names, check in (
        (
            "divisor_override embed_dim embedding_dim groups hidden_size in1_features in2_features in_channels "
            "in_features input_size kdim normalized_shape num_channels num_embeddings num_features num_groups "
            "num_heads num_parameters out_channels out_features proj_size unflattened_size vdim",
            _is_count,
        ),
        ("dilation downscale_factor kernel_size stride upscale_factor", _is_step),
        ("output_padding output_size size zeros", _is_size),
        ("padding", _is_margin),
        ("dim end_dim padding_idx start_dim", _is_dim),
        (
            "alpha beta dropout eps init k lambd lower max_norm max_val min_val momentum negative_slope norm_type p "
            "threshold upper value",
            _is_number,
        ),
        (
            "add_bias_kv add_zero_attn affine aliases align_corners batch_first bias bidirectional ceil_mode "
            "channels_last count_include_pad elementwise_affine flattens inplace recompute_scale_factor residual "
            "return_indices scale_grad_by_freq sparse track_running_stats",
            lambda value: type(value) is bool,
        ),
        ("approximate mode nonlinearity padding_mode", lambda value: value in _WORDS),
        ("activation gate_activation", lambda value: value in get_args(Activation)),
        ("names", are_names),
        ("scale_factor", _is_factor),
        ("mean std scale", _is_finite),
        ("num_layers", lambda value: type(value) is int and 1 <= value <= MAX_DEEP),
    )
    for name in names.split()
}
_RECURRENT = "input_size hidden_size num_layers bias batch_first dropout bidirectional"
_SIGNATURES = {  # of constructors that take anything
    nn.LSTM: f"{_RECURRENT} proj_size".split(),
    nn.GRU: _RECURRENT.split(),
    nn.RNN: f"{_RECURRENT} nonlinearity".split(),
}


def _parameters(cls: type[nn.Module]) -> dict[str, Any]:
    """The arguments that a class is stored with, and their defaults."""
    if cls in _SIGNATURES:
        return dict.fromkeys(_SIGNATURES[cls], inspect.Parameter.empty)
    parameters = inspect.signature(cls).parameters.values()
    return {
        parameter.name: parameter.default
        for parameter in parameters
        if parameter.name in _ARGUMENTS or (cls is FusedConv2d and parameter.name == "conv")
    }


def is_own(layer: nn.Module) -> bool:
    """Whether a layer is of a class that no file describes, or runs other code, so that a new model must have it."""
    return type(layer) not in _DESCRIBED or is_patched(layer)


def check_hooks(module: nn.Module) -> None:
    """Raises ValueError for a module with hooks: they are code."""
    if has_hooks(module):
        raise ValueError("forward hooks cannot be saved; remove them, and make pruning permanent, before converting")


def describe_layer(layer: nn.Module) -> dict[str, Any]:
    """The class of a layer and its constructor's arguments. Raises ValueError where they do not say all about it."""
    cls = type(layer)
    name = next((name for name, known in LAYERS.items() if known is cls), None)
    if name is None:
        raise ValueError(f"a {cls.__module__}.{cls.__qualname__} cannot be saved; use a layer of torch.nn")
    check_hooks(layer)
    arguments = {}
    for parameter, default in _parameters(cls).items():
        value = _argument(layer, parameter, default)
        if isinstance(value, nn.Module):
            arguments[parameter] = {"layer": describe_layer(value)}
        elif type(value) is not type(default) or value != default:
            arguments[parameter] = encode(value)
    record = {"type": name, "arguments": arguments}
    twin = build_layer(record)
    settings = {key: getattr(layer, key, None) for key in _settings(twin)}
    if _settings(twin) != settings or _shapes(twin) != _shapes(layer):
        raise ValueError(f"this {name} was changed after it was made; replace it by a new {name} before converting")
    return record


def _argument(layer: nn.Module, parameter: str, default: Any) -> Any:
    """What a constructor must have been given."""
    if isinstance(layer, nn.MultiheadAttention) and parameter in ("bias", "add_bias_kv"):
        return (layer.in_proj_bias if parameter == "bias" else layer.bias_k) is not None
    value = getattr(layer, parameter, default)
    return value is not None if parameter == "bias" and not isinstance(value, bool) else value


def build_layer(record: Mapping[str, Any]) -> nn.Module:
    """The layer behind :func:`describe_layer`, on the meta device: its tensors have shapes and no memory.

    Raises:
        ValueError, KeyError, TypeError: for a class or an argument that is not in the lists or beyond its bounds.
    """
    name, given = record["type"], record["arguments"]
    if name not in LAYERS:
        raise ValueError(f"there is no layer of type {name!r}")
    cls = LAYERS[name]
    arguments = {}
    for parameter in _parameters(cls):
        if parameter not in given:
            continue
        if parameter == "conv":
            arguments[parameter] = _inner_conv(given["conv"])
            continue
        value = decode(given[parameter])
        if value is not None and not _ARGUMENTS[parameter](value):
            raise ValueError(f"no {name} has {parameter} {value!r}")
        arguments[parameter] = value
    if unknown := sorted(given.keys() - arguments.keys()):
        raise ValueError(f"a saved {name} has no argument {unknown[0]!r}")
    with torch.device("meta"):
        layer = cls(**arguments)
    if isinstance(layer, MaxPool2d):
        _check_window(layer)
    return layer.requires_grad_(False).eval()


def _inner_conv(data: Any) -> nn.Module:
    if not isinstance(data, dict) or [*data] != ["layer"] or data["layer"]["type"] != "Conv2d":
        raise ValueError("it holds a Conv2d")
    return build_layer(data["layer"])


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
