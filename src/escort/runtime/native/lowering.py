"""Which operations and layers run in a native program: a closed table of functions, and one of layers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from escort.layers import AdaptiveAvgPool2d, AvgPool2d, Concat, Gate, MaxPool2d, SamePad, SparseConv2d, Upsample
from escort.layers.operator import output_shape
from escort.methods import by_name
from escort.runtime.native.call import NotNativeError
from escort.runtime.native.operations import Operations
from escort.runtime.native.values import Value

_ACTIVATED = "relu relu6 sigmoid tanh silu hardsigmoid hardswish"
_COMBINED = {
    **{"add": "add", "sub": "subtract", "mul": "multiply", "maximum": "maximum", "minimum": "minimum"},
    **dict.fromkeys(("div", "truediv", "true_divide"), "divide"),
}
#: Functions by name, whichever of torch's modules they are in; those in place have the same names. Each is given the
#: step and then what the function is given.
OPERATIONS: Mapping[str, Callable[..., Value]] = {
    **{
        name: lambda step, *args, kind=name, **kwargs: step.activated(kind, *args, **kwargs)
        for name in _ACTIVATED.split()
    },
    **{
        name: lambda step, *args, combine=combine, **kwargs: step.combined(combine, *args, **kwargs)
        for name, combine in _COMBINED.items()
    },
    **{
        name: getattr(Operations, name)
        for name in """
        adaptive_avg_pool2d avg_pool2d cat channel_shuffle clamp gelu hardtanh interpolate leaky_relu linear max_pool2d
        batch_norm mean pad pixel_shuffle prelu softmax stack
        """.split()
    },
    **{"concat": Operations.cat, "constant_pad_nd": Operations.constant_pad, "_softmax": Operations.softmax},
    **{"_adaptive_avg_pool2d": Operations.adaptive_avg_pool2d, "neg": Operations.negated, "pow": Operations.power},
    **{
        f"upsample_{mode}2d": lambda step, *args, mode=mode: step.upsample(mode, *args)
        for mode in ("nearest", "bilinear", "bicubic")
    },
    **{name: Operations.rearranged for name in ("contiguous", "clone", "reshape", "flatten")},
}
_POOL = "kernel_size stride padding"
#: Layers: the function that each calls, and which of its attributes are arguments behind the input.
LAYERS: Mapping[type[nn.Module], tuple[Callable[..., Value], str]] = {
    **{cls: (Operations.max_pool2d, f"{_POOL} dilation ceil_mode") for cls in (MaxPool2d, nn.MaxPool2d)},
    **{
        cls: (Operations.avg_pool2d, f"{_POOL} ceil_mode count_include_pad divisor_override")
        for cls in (AvgPool2d, nn.AvgPool2d)
    },
    **{cls: (Operations.adaptive_avg_pool2d, "output_size") for cls in (AdaptiveAvgPool2d, nn.AdaptiveAvgPool2d)},
    Gate: (OPERATIONS["mul"], ""),
    Concat: (lambda step, *parts: step.cat(parts, 1), ""),
    **{
        cls: (Operations.interpolate, "size scale_factor mode align_corners recompute_scale_factor")
        for cls in (Upsample, nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d)
    },
    nn.BatchNorm2d: (Operations.batch_norm_layer, "running_mean running_var weight bias training eps"),
    nn.PixelShuffle: (Operations.pixel_shuffle, "upscale_factor"),
    nn.Linear: (Operations.linear, "weight bias"),
    **{cls: (Operations.rearranged, "") for cls in (nn.Flatten, nn.Unflatten)},
    nn.ChannelShuffle: (Operations.channel_shuffle, "groups"),
    **{cls: (Operations.constant_pad, "padding value") for cls in (nn.ConstantPad2d, nn.ZeroPad2d)},
    **{
        getattr(nn, name): (OPERATIONS[name.lower()], "")
        for name in ("ReLU", "Sigmoid", "Tanh", "SiLU", "Hardsigmoid", "Hardswish")
    },
    **{cls: (Operations.hardtanh, "min_val max_val") for cls in (nn.ReLU6, nn.Hardtanh)},
    nn.LeakyReLU: (Operations.leaky_relu, "negative_slope"),
    nn.GELU: (Operations.gelu, "approximate"),
    nn.PReLU: (Operations.prelu, "weight"),
    nn.Softmax: (Operations.softmax, "dim"),
}


_SHAPE_KEEPING_LAYERS = frozenset(
    cls
    for cls, (function, _) in LAYERS.items()
    if function in (Operations.batch_norm_layer, Operations.hardtanh, Operations.leaky_relu, Operations.gelu)
    or function in (Operations.prelu, Operations.softmax, *(OPERATIONS[name] for name in _ACTIVATED.split()))
)


def has_operation(layer: nn.Module) -> bool:
    """Whether calls of a layer may become instructions."""
    if isinstance(layer, SparseConv2d):
        return by_name(layer.plan.method, layer.plan.problem.device).is_native
    return type(layer) in LAYERS or isinstance(layer, SamePad)


#: Functions whose results have the shape of their first argument, whatever else they are given.
_SHAPE_KEEPING = frozenset((*_ACTIVATED.split(), *"batch_norm gelu hardtanh leaky_relu prelu softmax".split()))


def keeps_shape(called: nn.Module | str) -> bool:
    """Whether the result of a layer or of a function of that name has the shape of its first argument."""
    if isinstance(called, str):
        return called.rstrip("_") in _SHAPE_KEEPING
    return type(called) in _SHAPE_KEEPING_LAYERS


def settings(layer: nn.Module) -> list[Any]:
    """The attributes of a layer, besides tensors, that its calls depend on."""
    names = LAYERS[type(layer)][1].split() if type(layer) in LAYERS else []
    return [getattr(layer, name) for name in names if name not in layer._parameters and name not in layer._buffers]


def empty_result(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """What a layer of the table makes of tensors without memory."""
    if isinstance(layer, SparseConv2d):
        return _empty_convolved(layer, *args, **kwargs)
    twin = copy.copy(layer)  # other threads call the layer meanwhile
    twin.__dict__ |= {
        kind: {name: x if x is None else torch.empty_like(x, device="meta") for name, x in vars(layer)[kind].items()}
        for kind in ("_parameters", "_buffers")
    }
    return twin(*args, **kwargs)


def _empty_convolved(layer: SparseConv2d, x: Tensor, residual: Tensor | None = None) -> Tensor:
    problem = layer.plan.problem
    shape = output_shape(problem, x)
    if x.ndim != 4 or x.shape[1] != layer.in_channels or x.dtype is not problem.storage or min(shape) < 1:
        raise ValueError(f"it takes other inputs than {x.dtype} of shape {tuple(x.shape)}")
    if (residual is not None) is not layer.residual or (residual is not None and residual.shape != shape):
        raise ValueError("its residual is not like its result")
    return torch.empty(shape, dtype=x.dtype, device="meta")


def lower_layer(step: Operations, layer: nn.Module, *args: Any) -> Value:
    """What calls of a layer become."""
    if isinstance(layer, SparseConv2d):
        return step.conv(layer, *args)
    if isinstance(layer, SamePad):
        return step.same_pad(layer, *args)
    if type(layer) not in LAYERS:
        raise NotNativeError(f"is a {type(layer).__name__}")
    function, names = LAYERS[type(layer)]
    settings = [getattr(layer, name) for name in names.split()]
    return function(step, *args, *[step.parameter(x) if isinstance(x, Tensor) else x for x in settings])
