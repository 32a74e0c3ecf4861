"""What each operation of torch becomes in a native program: a closed table of functions and of layers.

A function of the table takes a :class:`Call` and the arguments of the operation by torch's names, with values in the
place of tensors. It returns the value of the result, or raises NotNativeError.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, get_args

from torch import nn

from escort.kernels import _cpu
from escort.layers import MaxPool2d, SamePad, SparseConv2d
from escort.layers.pad import same_zeros
from escort.layers.pool import pair
from escort.methods import by_name
from escort.problem import Activation
from escort.runtime.native import windows
from escort.runtime.native.call import Call, NotNativeError
from escort.runtime.native.values import Operand, Sizes, Value, contiguous_strides

Number = int | float
_ACTIVATIONS = frozenset(get_args(Activation))


def _conv(call: Call, layer: SparseConv2d, input: Any, residual: Any = None) -> Value:  # noqa: A002
    x = call.tensor(input, ndim=4)
    op = layer.op(x.shape)
    if op is None:
        raise NotNativeError(f"is run by {layer.plan.method}, which has no operation for that")
    if residual is not None and call.tensor(residual).shape != call.result_shape:
        raise NotNativeError("adds a residual of another shape than its result")
    samples = x.shape[0]
    inputs = call.samples(x, samples), None if residual is None else call.samples(residual, samples)
    return call.make(op, samples, *inputs)


def _max_pool(
    call: Call,
    input: Any,  # noqa: A002
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
) -> Value:
    x = call.tensor(input, ndim=4)
    window = pair(kernel_size), pair(stride or kernel_size), pair(padding), pair(dilation)
    op = _cpu.MaxPool2d(x.shape[1], x.shape[2:], call.result_shape[2:], window)
    return call.make(op, x.shape[0], call.samples(x, x.shape[0]))


def _average(call: Call, x: Value, rows: list[windows.Window], columns: list[windows.Window]) -> Value:
    op = _cpu.AveragePool(x.shape[1], x.shape[2:], rows, columns)
    return call.make(op, x.shape[0], call.samples(x, x.shape[0]))


def _avg_pool(
    call: Call,
    input: Any,  # noqa: A002
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Value:
    x = call.tensor(input, ndim=4)
    steps = zip(
        x.shape[2:], call.result_shape[2:], pair(kernel_size), pair(stride or kernel_size), pair(padding), strict=True
    )
    rows, columns = (windows.pooled(*axis, count_padding=count_include_pad) for axis in steps)
    if divisor_override is not None:
        rows, columns = windows.divided(rows, divisor_override), windows.divided(columns, 1)
    return _average(call, x, rows, columns)


def _adaptive_avg_pool(call: Call, input: Any, output_size: Any) -> Value:  # noqa: A002
    x = call.tensor(input, ndim=4)
    rows, columns = (windows.adaptive(*axis) for axis in zip(x.shape[2:], call.result_shape[2:], strict=True))
    return _average(call, x, rows, columns)


def _mean(call: Call, input: Any, dim: Any = None, keepdim: bool = False) -> Value:  # noqa: A002
    x = call.tensor(input, ndim=4)
    if not isinstance(dim, (tuple, list)) or sorted(axis % 4 for axis in dim) != [2, 3]:
        raise NotNativeError("averages other axes than rows and columns")
    whole = [[(0, size, float(size))] for size in x.shape[2:]]
    return _average(call, x, *whole)


def _interpolate(
    call: Call,
    input: Any,  # noqa: A002
    size: Any = None,
    scale_factor: Any = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> Value:
    x = call.tensor(input, ndim=4)
    if mode not in windows.RESIZES or antialias:
        raise NotNativeError(f"is interpolated by {mode}{', antialiased' if antialias else ''}")
    if scale_factor is None or recompute_scale_factor:
        factors: Any = None, None
    else:
        factors = scale_factor if isinstance(scale_factor, (tuple, list)) else (scale_factor, scale_factor)
    axes = zip(x.shape[2:], call.result_shape[2:], factors, strict=True)
    rows, columns = (windows.resized(*axis, mode, bool(align_corners)) for axis in axes)
    op = _cpu.Resize(x.shape[1], x.shape[2:], rows, columns)
    return call.make(op, x.shape[0], call.samples(x, x.shape[0]))


def _linear(call: Call, input: Any, weight: Any, bias: Any = None) -> Value:  # noqa: A002
    x, weight = call.tensor(input), call.tensor(weight, ndim=2)
    out_features, in_features = weight.shape
    samples = math.prod(x.shape) // in_features
    added = None if bias is None else _whole(call.tensor(bias, ndim=1))
    return call.make(_cpu.Linear(in_features, out_features), samples, call.samples(x, samples), _whole(weight), added)


def _whole(value: Value) -> Operand:
    """A tensor that all samples read."""
    if not value.is_contiguous:
        raise NotNativeError("has a weight or bias that is not contiguous")
    return Operand(value.storage, value.offset, 0)


def _pad(call: Call, input: Any, pad: Any, mode: str = "constant", value: Number | None = None) -> Value:  # noqa: A002
    x = call.tensor(input, ndim=4)
    if mode != "constant" or len(pad) > 4:
        raise NotNativeError("pads other axes than rows and columns" if mode == "constant" else f"pads by mode {mode}")
    op = _cpu.Pad(x.shape[1], x.shape[2:], [*pad, *[0] * (4 - len(pad))], float(value or 0.0))
    return call.make(op, x.shape[0], call.samples(x, x.shape[0]))


def _same_pad(call: Call, layer: SamePad, input: Any) -> Value:  # noqa: A002
    x = call.tensor(input, ndim=4)
    axes = zip(x.shape[2:], layer.kernel_size, layer.stride, layer.dilation, strict=True)
    totals = [int(same_zeros(*axis)) for axis in axes]
    return _pad(call, x, [zeros for total in reversed(totals) for zeros in (total // 2, total - total // 2)])


def _cat(call: Call, tensors: Any, dim: int = 0) -> Value:
    parts = [call.tensor(part) for part in tensors]
    shape = call.result_shape
    if dim % len(shape) != 1 or any(len(part.shape) != len(shape) for part in parts):
        raise NotNativeError("joins along another axis than that of the channels")
    return call.join(parts)


def _channel_shuffle(call: Call, input: Any, groups: int) -> Value:  # noqa: A002
    x = call.contiguous(call.tensor(input, ndim=4))
    samples, channels, *plane = x.shape
    grouped, inner = (groups, channels // groups, math.prod(plane)), math.prod(plane)
    op = _cpu.Copy((grouped[1], groups, inner), (inner, grouped[1] * inner, 1))
    return call.make(op, samples, call.samples(x, samples))


def _rearranged(call: Call, input: Any, *_: Any, **__: Any) -> Value:  # noqa: A002
    """A contiguous copy, of which the result is a view: it is called where the result is no view of the input."""
    x = call.contiguous(call.tensor(input), copy=True)
    return Value(x.storage, 0, call.result_shape, contiguous_strides(call.result_shape))


def _activated(kind: str, slope: float = 0.0) -> Callable[..., Value]:
    def lowered(call: Call, input: Any, inplace: bool = False) -> Value:  # noqa: A002
        return _elementwise(call, "first", call.tensor(input), None, kind, slope)

    return lowered


def _leaky_relu(call: Call, input: Any, negative_slope: float = 0.01, inplace: bool = False) -> Value:  # noqa: A002
    return _elementwise(call, "first", call.tensor(input), None, "leaky_relu", negative_slope)


def _gelu(call: Call, input: Any, approximate: str = "none") -> Value:  # noqa: A002
    return _elementwise(call, "first", call.tensor(input), None, "gelu" if approximate == "none" else "gelu_tanh")


def _hardtanh(
    call: Call,
    input: Any,  # noqa: A002
    min_val: Number = -1.0,
    max_val: Number = 1.0,
    inplace: bool = False,
) -> Value:
    return _clamp(call, input, min_val, max_val)


def _clamp(call: Call, input: Any, min: Any = None, max: Any = None) -> Value:  # noqa: A002
    x = call.tensor(input)
    if not all(bound is None or isinstance(bound, (int, float)) for bound in (min, max)):
        raise NotNativeError("is bounded by tensors")
    if max is None or min is None:
        return _elementwise(call, *(("maximum", x, min) if max is None else ("minimum", x, max)))
    if (min, max) == (0, 6):
        return _elementwise(call, "first", x, None, "relu6")
    raised = call.aside(lambda inner: _elementwise(inner, "maximum", x, min), x.shape)
    return _elementwise(call, "minimum", raised, max)


def _combined(combine: str) -> Callable[..., Value]:
    def lowered(call: Call, input: Any, other: Any, *, alpha: Number = 1) -> Value:  # noqa: A002
        if alpha != 1:
            raise NotNativeError("scales an operand")
        return _elementwise(call, combine, input, other)

    return lowered


def _elementwise(call: Call, combine: str, a: Any, b: Any, activation: str = "none", slope: float = 0.0) -> Value:
    """activate(combine(a, b)) with broadcasting; operands are values or numbers, and b may be missing."""
    if activation not in _ACTIVATIONS:
        raise NotNativeError(f"is a {activation}, which kernels do not know")
    shape = call.result_shape
    outer = shape if len(shape) > 1 else (1, *(shape or (1,)))
    values = [call.tensor(value) for value in ((a, b) if b is not None else (a,))]
    strides = [_broadcast(value, outer) for value in values]
    for i, each in enumerate(strides):
        last = next((each[j] for j in reversed(range(1, len(outer))) if outer[j] > 1), 1)
        if last not in (0, 1):
            values[i] = call.contiguous(values[i])
            strides[i] = _broadcast(values[i], outer)
    sizes, inner = _collapsed(outer[1:], [each[1:] for each in strides])
    kind = get_args(Activation).index(activation)
    op = _cpu.Elementwise(combine, kind, slope, sizes, inner[0], inner[1] if len(inner) > 1 else ())
    operands = [Operand(value.storage, value.offset, each[0]) for value, each in zip(values, strides, strict=True)]
    return call.make(op, outer[0], *operands)


def _broadcast(value: Value, shape: Sizes) -> Sizes:
    """The strides with which a value is read for a result of that shape: 0 along axes where it is repeated."""
    missing = len(shape) - len(value.shape)
    own = (*[1] * missing, *value.shape), (*[0] * missing, *value.strides)
    if any(size not in (1, wanted) for size, wanted in zip(own[0], shape, strict=True)):
        raise NotNativeError("writes to an operand that is broadcast")
    return tuple(0 if size == 1 else stride for size, stride in zip(*own, strict=True))


def _collapsed(shape: Sizes, strides: list[Sizes]) -> tuple[Sizes, list[Sizes]]:
    """A shape of fewer axes, and strides that read the same: neighbours that lie alike in all operands become one."""
    axes: list[tuple[int, tuple[int, ...]]] = []  # the last one first
    for size, *steps in reversed(list(zip(shape, *strides, strict=True))):
        if size == 1:
            continue
        if axes and all(step == inner * axes[-1][0] for step, inner in zip(steps, axes[-1][1], strict=True)):
            axes[-1] = axes[-1][0] * size, axes[-1][1]
        else:
            axes.append((size, tuple(steps)))
    axes = axes[::-1] or [(1, (0,) * len(strides))]
    return tuple(size for size, _ in axes), [tuple(steps[i] for _, steps in axes) for i in range(len(strides))]


#: Functions by name, whichever of torch's modules they are in; those in place have the same names.
OPERATIONS: Mapping[str, Callable[..., Value]] = {
    **{name: _activated(name) for name in "relu relu6 sigmoid tanh silu hardsigmoid hardswish".split()},
    **{"leaky_relu": _leaky_relu, "gelu": _gelu, "hardtanh": _hardtanh, "clamp": _clamp},
    **{"add": _combined("add"), "sub": _combined("subtract"), "mul": _combined("multiply")},
    **{"div": _combined("divide"), "truediv": _combined("divide"), "true_divide": _combined("divide")},
    **{"maximum": _combined("maximum"), "minimum": _combined("minimum")},
    **{"max_pool2d": _max_pool, "avg_pool2d": _avg_pool, "adaptive_avg_pool2d": _adaptive_avg_pool, "mean": _mean},
    **{"interpolate": _interpolate, "linear": _linear, "pad": _pad, "cat": _cat, "concat": _cat},
    **{"channel_shuffle": _channel_shuffle},
    **{name: _rearranged for name in "contiguous clone reshape flatten".split()},
}

#: Layers: each calls a function of the table with arguments that its attributes say.
LAYERS: Mapping[type[nn.Module], Callable[..., Value]] = {
    SparseConv2d: _conv,
    SamePad: _same_pad,
    **{
        cls: lambda call, layer, x: _max_pool(
            call, x, layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.ceil_mode
        )
        for cls in (MaxPool2d, nn.MaxPool2d)
    },
    nn.AvgPool2d: lambda call, layer, x: _avg_pool(
        call,
        x,
        layer.kernel_size,
        layer.stride,
        layer.padding,
        layer.ceil_mode,
        layer.count_include_pad,
        layer.divisor_override,
    ),
    nn.AdaptiveAvgPool2d: lambda call, layer, x: _adaptive_avg_pool(call, x, layer.output_size),
    **{
        cls: lambda call, layer, x: _interpolate(
            call, x, layer.size, layer.scale_factor, layer.mode, layer.align_corners, layer.recompute_scale_factor
        )
        for cls in (nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d)
    },
    nn.Linear: lambda call, layer, x: _linear(call, x, call.parameter(layer.weight), call.parameter(layer.bias)),
    **{cls: lambda call, layer, x: _rearranged(call, x) for cls in (nn.Flatten, nn.Unflatten)},
    nn.ChannelShuffle: lambda call, layer, x: _channel_shuffle(call, x, layer.groups),
    **{
        cls: lambda call, layer, x: _pad(call, x, layer.padding, value=getattr(layer, "value", 0.0))
        for cls in (nn.ZeroPad2d, nn.ConstantPad2d)
    },
    **{
        cls: lambda call, layer, x, name=name: OPERATIONS[name](call, x)
        for name, cls in {
            **{"relu": nn.ReLU, "sigmoid": nn.Sigmoid, "tanh": nn.Tanh, "silu": nn.SiLU},
            **{"hardsigmoid": nn.Hardsigmoid, "hardswish": nn.Hardswish},
        }.items()
    },
    nn.ReLU6: lambda call, layer, x: _hardtanh(call, x, layer.min_val, layer.max_val),
    nn.Hardtanh: lambda call, layer, x: _hardtanh(call, x, layer.min_val, layer.max_val),
    nn.LeakyReLU: lambda call, layer, x: _leaky_relu(call, x, layer.negative_slope),
    nn.GELU: lambda call, layer, x: _gelu(call, x, layer.approximate),
}


def has_operation(layer: nn.Module) -> bool:
    """Whether the table has a layer."""
    if isinstance(layer, SparseConv2d):
        return by_name(layer.plan.method, layer.plan.problem.device).is_native
    return type(layer) in LAYERS
