"""What each operation of torch becomes in a native program: a closed table of functions, and one of layers."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any, get_args

import torch
from torch import Tensor, nn

from escort.kernels import _cpu
from escort.layers import AdaptiveAvgPool2d, AvgPool2d, Concat, Gate, MaxPool2d, SamePad, SparseConv2d, Upsample
from escort.layers.operator import output_shape
from escort.layers.pad import same_zeros
from escort.layers.pool import pair
from escort.methods import by_name
from escort.problem import Activation
from escort.runtime.native import windows
from escort.runtime.native.call import Call, NotNativeError
from escort.runtime.native.values import Operand, Sizes, Value, contiguous_strides

Number = int | float
_ACTIVATIONS = frozenset(get_args(Activation))


class Operations(Call):
    """A step that is lowered by one of its methods.

    They take the arguments of torch's operations by their names, with values in the place of tensors, and return the
    value of the result. They raise NotNativeError where no instructions give it.
    """

    def conv(self, layer: SparseConv2d, input: Any, residual: Any = None) -> Value:  # noqa: A002
        x = self.tensor(input, ndim=4)
        op = layer.op(x.shape)
        if op is None:
            raise NotNativeError(f"is run by {layer.plan.method}, which has no operation for that")
        samples = x.shape[0]
        inputs = self.samples(x, samples), None if residual is None else self.samples(residual, samples)
        return self.make(op, samples, *inputs)

    def max_pool2d(
        self,
        input: Any,  # noqa: A002
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        dilation: Any = 1,
        ceil_mode: bool = False,
        return_indices: bool = False,
    ) -> Value:
        x = self.tensor(input, ndim=4)
        window = pair(kernel_size), pair(stride or kernel_size), pair(padding), pair(dilation)
        op = _cpu.MaxPool2d(x.shape[1], x.shape[2:], self.result_shape[2:], window)
        return self.make(op, x.shape[0], self.samples(x, x.shape[0]))

    def _average(self, x: Value, rows: list[windows.Window], columns: list[windows.Window]) -> Value:
        op = _cpu.AveragePool(x.shape[1], x.shape[2:], rows, columns)
        return self.make(op, x.shape[0], self.samples(x, x.shape[0]))

    def avg_pool2d(
        self,
        input: Any,  # noqa: A002
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
    ) -> Value:
        x = self.tensor(input, ndim=4)
        steps = zip(
            x.shape[2:],
            self.result_shape[2:],
            pair(kernel_size),
            pair(stride or kernel_size),
            pair(padding),
            strict=True,
        )
        rows, columns = (windows.pooled(*axis, count_padding=count_include_pad) for axis in steps)
        if divisor_override is not None:
            rows, columns = windows.divided(rows, divisor_override), windows.divided(columns, 1)
        return self._average(x, rows, columns)

    def adaptive_avg_pool2d(self, input: Any, output_size: Any) -> Value:  # noqa: A002
        x = self.tensor(input, ndim=4)
        rows, columns = (windows.adaptive(*axis) for axis in zip(x.shape[2:], self.result_shape[2:], strict=True))
        return self._average(x, rows, columns)

    def mean(self, input: Any, dim: Any = None, keepdim: bool = False) -> Value:  # noqa: A002
        x = self.tensor(input, ndim=4)
        if not isinstance(dim, (tuple, list)) or sorted(axis % 4 for axis in dim) != [2, 3]:
            raise NotNativeError("averages other axes than rows and columns")
        whole = [[(0, size, float(size))] for size in x.shape[2:]]
        return self._average(x, *whole)

    def interpolate(
        self,
        input: Any,  # noqa: A002
        size: Any = None,
        scale_factor: Any = None,
        mode: str = "nearest",
        align_corners: bool | None = None,
        recompute_scale_factor: bool | None = None,
        antialias: bool = False,
    ) -> Value:
        x = self.tensor(input, ndim=4)
        if mode not in windows.RESIZES or antialias:
            raise NotNativeError(f"is interpolated by {mode}{', antialiased' if antialias else ''}")
        if scale_factor is None or recompute_scale_factor:
            factors: Any = None, None
        else:
            factors = scale_factor if isinstance(scale_factor, (tuple, list)) else (scale_factor, scale_factor)
        axes = zip(x.shape[2:], self.result_shape[2:], factors, strict=True)
        rows, columns = (windows.resized(*axis, mode, bool(align_corners)) for axis in axes)
        op = _cpu.Resize(x.shape[1], x.shape[2:], rows, columns)
        return self.make(op, x.shape[0], self.samples(x, x.shape[0]))

    def linear(self, input: Any, weight: Any, bias: Any = None) -> Value:  # noqa: A002
        x, weight = self.tensor(input), self.tensor(weight, ndim=2)
        out_features, in_features = weight.shape
        samples = math.prod(x.shape) // in_features
        added = None if bias is None else _whole(self.tensor(bias, ndim=1))
        return self.make(
            _cpu.Linear(in_features, out_features), samples, self.samples(x, samples), _whole(weight), added
        )

    def pad(self, input: Any, pad: Any, mode: str = "constant", value: Number | None = None) -> Value:  # noqa: A002
        x = self.tensor(input, ndim=4)
        if mode != "constant" or len(pad) > 4:
            raise NotNativeError(
                f"pads by mode {mode}" if mode != "constant" else "pads other axes than rows and columns"
            )
        op = _cpu.Pad(x.shape[1], x.shape[2:], [*pad, *[0] * (4 - len(pad))], float(value or 0.0))
        return self.make(op, x.shape[0], self.samples(x, x.shape[0]))

    def constant_pad(self, input: Any, pad: Any, value: Number = 0.0) -> Value:  # noqa: A002
        return self.pad(input, pad, "constant", value)

    def same_pad(self, layer: SamePad, input: Any) -> Value:  # noqa: A002
        x = self.tensor(input, ndim=4)
        axes = zip(x.shape[2:], layer.kernel_size, layer.stride, layer.dilation, strict=True)
        totals = [int(same_zeros(*axis)) for axis in axes]
        return self.pad(x, [zeros for total in reversed(totals) for zeros in (total // 2, total - total // 2)])

    def cat(self, tensors: Any, dim: int = 0) -> Value:
        parts = [self.tensor(part) for part in tensors]
        shape = self.result_shape
        if dim % len(shape) != 1 or any(len(part.shape) != len(shape) for part in parts):
            raise NotNativeError("joins along another axis than that of the channels")
        return self.join(parts)

    def channel_shuffle(self, input: Any, groups: int) -> Value:  # noqa: A002
        x = self.contiguous(self.tensor(input, ndim=4))
        samples, channels, *plane = x.shape
        of_group, inner = channels // groups, math.prod(plane)
        op = _cpu.Copy((of_group, groups, inner), (inner, of_group * inner, 1))
        return self.make(op, samples, self.samples(x, samples))

    def pixel_shuffle(self, input: Any, upscale_factor: int) -> Value:  # noqa: A002
        x = self.contiguous(self.tensor(input, ndim=4))
        samples, channels, height, width = x.shape
        r, plane = upscale_factor, height * width
        op = _cpu.Copy((channels // r**2, height, r, width, r), (r * r * plane, width, r * plane, 1, plane))
        return self.make(op, samples, self.samples(x, samples))

    def batch_norm(
        self,
        input: Any,  # noqa: A002
        running_mean: Any,
        running_var: Any,
        weight: Any = None,
        bias: Any = None,
        *options: Any,
        **others: Any,
    ) -> Value:
        """options: training, momentum and eps, as torch's function takes them."""
        settings = dict(zip(("training", "momentum", "eps"), options, strict=False)) | others
        x, epsilon = self.tensor(input, ndim=4), settings.pop("eps", 1e-5)
        if settings.pop("training", False) or running_mean is None or settings.keys() > {"momentum"}:
            raise NotNativeError("computes with the statistics of the batch")
        of_channels = [
            None if each is None else _whole(self.tensor(each)) for each in (running_mean, running_var, weight, bias)
        ]
        op = _cpu.BatchNorm(x.shape[1], x.shape[2:], epsilon)
        return self.make(op, x.shape[0], self.samples(x, x.shape[0]), *of_channels)

    def batch_norm_layer(self, input: Any, *tensors: Any) -> Value:  # noqa: A002
        *tensors_of_channels, training, epsilon = tensors
        return self.batch_norm(input, *tensors_of_channels, training=training, eps=epsilon)

    def rearranged(self, input: Any, *_: Any, **__: Any) -> Value:  # noqa: A002
        """A contiguous copy, of which the result is a view: it is called where the result is no view of the input."""
        x = self.contiguous(self.tensor(input), copy=True)
        return Value(x.storage, 0, self.result_shape, contiguous_strides(self.result_shape))

    def activated(self, kind: str, input: Any, inplace: bool = False) -> Value:  # noqa: A002
        return self.elementwise("first", self.tensor(input), None, kind)

    def combined(self, combine: str, input: Any, other: Any, *, alpha: Number = 1) -> Value:  # noqa: A002
        if alpha != 1:
            raise NotNativeError("scales an operand")
        return self.elementwise(combine, input, other)

    def leaky_relu(self, input: Any, negative_slope: float = 0.01, inplace: bool = False) -> Value:  # noqa: A002
        return self.elementwise("first", self.tensor(input), None, "leaky_relu", negative_slope)

    def gelu(self, input: Any, approximate: str = "none") -> Value:  # noqa: A002
        return self.elementwise("first", self.tensor(input), None, "gelu" if approximate == "none" else "gelu_tanh")

    def hardtanh(
        self,
        input: Any,  # noqa: A002
        min_val: Number = -1.0,
        max_val: Number = 1.0,
        inplace: bool = False,
    ) -> Value:
        return self.clamp(input, min_val, max_val)

    def clamp(self, input: Any, min: Any = None, max: Any = None) -> Value:  # noqa: A002
        x = self.tensor(input)
        if not all(bound is None or isinstance(bound, (int, float)) for bound in (min, max)):
            raise NotNativeError("is bounded by tensors")
        if max is None or min is None:
            return self.elementwise(*(("maximum", x, min) if max is None else ("minimum", x, max)))
        if (min, max) == (0, 6):
            return self.elementwise("first", x, None, "relu6")
        return self.elementwise("minimum", self.aside(x.shape).elementwise("maximum", x, min), max)

    def elementwise(self, combine: str, a: Any, b: Any, activation: str = "none", slope: float = 0.0) -> Value:
        """activate(combine(a, b)) with broadcasting; operands are values or numbers, and b may be missing."""
        if activation not in _ACTIVATIONS:
            raise NotNativeError(f"is a {activation}, which kernels do not know")
        shape = self.result_shape
        outer = shape if len(shape) > 1 else (1, *(shape or (1,)))
        values = [self.tensor(value) for value in ((a, b) if b is not None else (a,))]
        strides = [_broadcast(value, outer) for value in values]
        for i, each in enumerate(strides):
            last = next((each[j] for j in reversed(range(1, len(outer))) if outer[j] > 1), 1)
            if last not in (0, 1):
                values[i] = self.contiguous(values[i])
                strides[i] = _broadcast(values[i], outer)
        sizes, inner = _collapsed(outer[1:], [each[1:] for each in strides])
        kind = get_args(Activation).index(activation)
        op = _cpu.Elementwise(combine, kind, slope, sizes, inner[0], inner[1] if len(inner) > 1 else ())
        operands = [Operand(value.storage, value.offset, each[0]) for value, each in zip(values, strides, strict=True)]
        return self.make(op, outer[0], *operands)


def _whole(value: Value) -> Operand:
    """A tensor that all samples read."""
    if not value.is_contiguous:
        raise NotNativeError("has a weight or bias that is not contiguous")
    return Operand(value.storage, value.offset, 0)


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
        batch_norm mean pad pixel_shuffle
        """.split()
    },
    **{"concat": Operations.cat, "constant_pad_nd": Operations.constant_pad},
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
}


def has_operation(layer: nn.Module) -> bool:
    """Whether calls of a layer may become instructions."""
    if isinstance(layer, SparseConv2d):
        return by_name(layer.plan.method, layer.plan.problem.device).is_native
    return type(layer) in LAYERS or isinstance(layer, SamePad)


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
