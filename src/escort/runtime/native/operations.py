"""What each operation of torch becomes in a native program: the methods of a step that is lowered."""

from __future__ import annotations

import math
from typing import Any, get_args

from escort.kernels import _cpu
from escort.layers import SamePad, SparseConv2d
from escort.layers.pad import same_zeros
from escort.layers.pool import pair
from escort.problem import Activation
from escort.runtime.native import windows
from escort.runtime.native.call import Call, NotNativeError
from escort.runtime.native.values import Operand, Sizes, Value, collapsed, contiguous_strides

Number = int | float
_ACTIVATIONS = frozenset(get_args(Activation))


class Operations(Call):
    """A step that is lowered by one of its methods.

    They take the arguments of torch's operations by their names, with values in the place of tensors, and return the
    value of the result. They raise NotNativeError where no instructions give it.
    """

    def conv(self, layer: SparseConv2d, input: Any, residual: Any = None) -> Value:  # noqa: A002
        x = self.tensor(input, ndim=4)
        op = layer.prepared(x.shape).op
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
        x = self.tensor(input)
        axes = sorted(axis % len(x.shape) for axis in (dim if isinstance(dim, (tuple, list)) else (dim or 0,)))
        first = len(x.shape) - len(axes)
        if first < 1 or axes != list(range(first, len(x.shape))):
            raise NotNativeError("averages other axes than the last ones")
        samples, size = x.shape[0], math.prod(x.shape[first:])
        op = _cpu.AveragePool(math.prod(x.shape[1:first]), (1, size), [(0, 1, 1.0)], [(0, size, float(size))])
        return self.make(op, samples, self.samples(x, samples))

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
        if antialias:
            raise NotNativeError("is interpolated with antialiasing")
        if scale_factor is None or recompute_scale_factor:
            factors: Any = None, None
        else:
            factors = scale_factor if isinstance(scale_factor, (tuple, list)) else (scale_factor, scale_factor)
        return self.resize(mode, input, factors, bool(align_corners))

    def resize(self, mode: str, input: Any, factors: Any, align_corners: bool) -> Value:  # noqa: A002
        """factors: of rows and columns, by which torch was asked to scale; None each where it was asked for sizes."""
        x = self.tensor(input, ndim=4)
        if mode == "area":
            return self.adaptive_avg_pool2d(x, self.result_shape[2:])
        if mode not in windows.RESIZES:
            raise NotNativeError(f"is interpolated by {mode}")
        axes = zip(x.shape[2:], self.result_shape[2:], factors, strict=True)
        op: _cpu.Op
        if mode == "bicubic":
            op = _cpu.Bicubic(x.shape[1], x.shape[2:], *(windows.cubic(*axis, align_corners) for axis in axes))
        else:
            op = _cpu.Resize(x.shape[1], x.shape[2:], *(windows.resized(*axis, mode, align_corners) for axis in axes))
        return self.make(op, x.shape[0], self.samples(x, x.shape[0]))

    def upsample(self, mode: str, input: Any, size: Any, *options: Any) -> Value:  # noqa: A002
        """options: align_corners unless the nearest is taken, and then the factors, as one list or one by one."""
        align_corners, scales = (False, options) if "nearest" in mode else (options[0], options[1:])
        factors = scales if len(scales) == 2 else (scales and scales[0]) or (None, None)
        return self.resize(mode, input, factors, align_corners)

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
        if mode != "constant" or len(pad) > 6:
            raise NotNativeError(f"pads by mode {mode}" if mode != "constant" else "pads samples")
        before, after = (*pad, *[0] * 6)[4:6]
        if before or after:
            return self._with_channels(self._padded(x, pad[:4], value or 0.0), before, after, value or 0.0)
        return self._padded(x, pad, value or 0.0)

    def _padded(self, x: Value, borders: Any, value: Number) -> Value:
        """With what is put at the left, right, top and bottom of its planes."""
        borders = [*borders, *[0] * (4 - len(borders))]
        rows, columns = x.shape[2] + borders[2] + borders[3], x.shape[3] + borders[0] + borders[1]
        if (rows, columns) == x.shape[2:] and self.result_shape != x.shape:
            return x
        op = _cpu.Pad(x.shape[1], x.shape[2:], borders, float(value))
        return self.aside((*x.shape[:2], rows, columns)).make(op, x.shape[0], self.samples(x, x.shape[0]))

    def _with_channels(self, x: Value, before: int, after: int, value: Number) -> Value:
        """With so many channels of one value in front of it and behind it; with fewer where they are negative."""
        samples, channels, *plane = x.shape
        cut = max(-before, 0)
        kept = channels - cut - max(-after, 0)
        parts = [Value(x.storage, x.offset + cut * x.strides[1], (samples, kept, *plane), x.strides)]
        for count, place in ((before, 0), (after, 2)):
            if count > 0:
                parts.insert(place, self.aside((samples, count, *plane)).elementwise("first", value, None))
        return self.join(parts)

    def constant_pad(self, input: Any, pad: Any, value: Number = 0.0) -> Value:  # noqa: A002
        return self.pad(input, pad, "constant", value)

    def same_pad(self, layer: SamePad, input: Any) -> Value:  # noqa: A002
        x = self.tensor(input, ndim=4)
        axes = zip(x.shape[2:], layer.kernel_size, layer.stride, layer.dilation, strict=True)
        totals = [int(same_zeros(*axis)) for axis in axes]
        return self.pad(x, [zeros for total in reversed(totals) for zeros in (total // 2, total - total // 2)])

    def cat(self, tensors: Any, dim: int = 0) -> Value:
        parts = [self.tensor(part) for part in tensors]
        if any(len(part.shape) != len(self.result_shape) for part in parts):
            raise NotNativeError("joins tensors of other axes")
        return self.join(parts, dim % len(self.result_shape))

    def stack(self, tensors: Any, dim: int = 0) -> Value:
        axis = dim % len(self.result_shape)
        parts = [self.tensor(part) for part in tensors]
        return self.join([_with_axis(part, axis) for part in parts], axis)

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
        values = [None if each is None else self.tensor(each) for each in (running_mean, running_var, weight, bias)]
        if any(value is not None and value.shape != x.shape[1:2] for value in values):
            raise NotNativeError("normalises another number of channels")
        of_channels = [None if value is None else _whole(value) for value in values]
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

    def prelu(self, input: Any, weight: Any) -> Value:  # noqa: A002
        x, slopes = self.tensor(input), self.tensor(weight, ndim=1)
        shape = slopes.shape if len(x.shape) < 2 else (*slopes.shape, *[1] * (len(x.shape) - 2))
        return self.elementwise("slope", x, Value(slopes.storage, slopes.offset, shape, slopes.strides * len(shape)))

    def softmax(self, input: Any, dim: int | None = None, *_: Any, **__: Any) -> Value:  # noqa: A002
        """The options behind dim are a number of torch's own and the result's type, which is known."""
        x = self.tensor(input)
        if dim is None:
            raise NotNativeError("does not say along which axis it is normalised")
        axis, samples = dim % max(len(x.shape), 1), x.shape[0]
        if axis == 0:
            raise NotNativeError("is normalised along the samples")
        op = _cpu.Softmax(math.prod(x.shape[1:axis]), x.shape[axis], math.prod(x.shape[axis + 1 :]))
        return self.make(op, samples, self.samples(x, samples))

    def power(self, input: Any, exponent: Any) -> Value:  # noqa: A002
        if exponent != 2:
            raise NotNativeError("raises to another power than 2")
        return self.elementwise("multiply", input, input)

    def negated(self, input: Any) -> Value:  # noqa: A002
        return self.elementwise("multiply", input, -1.0)

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
        sizes, inner = collapsed(outer[1:], [each[1:] for each in strides])
        kind = get_args(Activation).index(activation)
        op = _cpu.Elementwise(combine, kind, slope, sizes, inner[0], inner[1] if len(inner) > 1 else ())
        operands = [Operand(value.storage, value.offset, each[0]) for value, each in zip(values, strides, strict=True)]
        return self.make(op, outer[0], *operands)


def _with_axis(value: Value, axis: int) -> Value:
    """With another axis, of size 1."""
    shape, strides = ((*sizes[:axis], 1, *sizes[axis:]) for sizes in (value.shape, value.strides))
    return Value(value.storage, value.offset, shape, strides)


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
