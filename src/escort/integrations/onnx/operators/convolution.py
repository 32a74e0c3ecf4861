"""Convolutions and products of matrices."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from escort.integrations.onnx.errors import NotSupportedError
from escort.integrations.onnx.node import Node
from escort.integrations.onnx.operators.windows import Window, check_pads
from escort.integrations.onnx.values import Operand, Value

_CONVOLUTIONS: dict[int, Any] = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}
_TRANSPOSED: dict[int, Any] = {3: nn.ConvTranspose1d, 4: nn.ConvTranspose2d, 5: nn.ConvTranspose3d}
_FUNCTIONS: dict[int, Any] = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}


def conv(node: Node) -> Operand:
    """A module where the filter is constant. Paddings that are not symmetric stand in front of it."""
    weight = node.input(1)
    if weight.ndim not in _CONVOLUTIONS:
        raise NotSupportedError(f"its filter is of shape {list(weight.shape)}, and must be of one to three dimensions")
    size = _kernel_size(node, weight)
    window = Window.of(node, size, node.x)
    x, padding = (node.x, window.before) if window.is_symmetric else (window.padded(node, node.x), (0,) * len(size))
    settings: dict[str, Any] = {
        "stride": window.stride,
        "padding": padding,
        "dilation": window.dilation,
        "groups": _groups(node),
    }
    bias = node.input(2) if node.has(2) else None
    if not isinstance(weight, Tensor) or isinstance(bias, Value) or isinstance(x, Tensor):
        return node.call(_FUNCTIONS[weight.ndim], x, weight, bias, **settings)
    return node.module(
        lambda: _CONVOLUTIONS[weight.ndim](
            weight.shape[1] * settings["groups"], weight.shape[0], size, bias=bias is not None, **settings
        ),
        _state(x, weight, bias),
        x,
    )


def _kernel_size(node: Node, weight: Tensor | Value) -> tuple[int, ...]:
    size = tuple(node.known(each, "filter's sizes") for each in node.shape(weight)[2:])
    if tuple(said := node.get("kernel_shape", list(size))) != size:
        raise NotSupportedError(f"its kernel_shape {said} is not that of its filter, {list(size)}; export it anew")
    return size


def _groups(node: Node) -> int:
    groups = node.get("group", 1)
    channels = node.shape(node.x)[1]
    weight = node.shape(node.input(1))
    if groups < 1 or (channels is not None and channels % groups):
        raise NotSupportedError(f"its {groups} groups do not divide {channels} channels; export it anew")
    if node.op == "Conv" and weight[1] is not None and channels is not None and weight[1] * groups != channels:
        raise NotSupportedError(f"its filter takes {weight[1] * groups} channels and is given {channels}")
    return int(groups)


def _state(x: Value, weight: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
    """What a module has. Raises NotSupportedError where that is of another type than its input."""
    types = [x.dtype, weight.dtype, *([] if bias is None else [bias.dtype])]
    if len({*types}) > 1:
        raise NotSupportedError(
            f"its input, filter and bias are of {', '.join(map(str, types))}, and must be of one type; export it anew"
        )
    return {"weight": weight} if bias is None else {"weight": weight, "bias": bias}


def conv_transpose(node: Node) -> Operand:
    """A module, and what its paddings at either side differ by cut off behind it."""
    weight = node.constant(1, "filter")
    bias = node.constant(2, "bias") if node.has(2) else None
    x = node.variable()
    if weight.ndim not in _TRANSPOSED:
        raise NotSupportedError(f"its filter is of shape {list(weight.shape)}, and must be of one to three dimensions")
    size, groups = _kernel_size(node, weight), _groups(node)
    more = tuple(node.get("output_padding", None) or [0] * len(size))
    window, before, after = _cut(node, size, more, x)
    both = tuple(min(pair) for pair in zip(before, after, strict=True))
    module = node.module(
        lambda: _TRANSPOSED[weight.ndim](
            weight.shape[0],
            weight.shape[1] * groups,
            size,
            stride=window.stride,
            padding=both,
            output_padding=more,
            groups=groups,
            bias=bias is not None,
            dilation=window.dilation,
        ),
        _state(x, weight, bias),
        x,
    )
    rest = [(b - m, a - m) for b, a, m in zip(before, after, both, strict=True)]
    if not any(n for pair in rest for n in pair):
        return module
    return node.call(F.pad, module, [-n for pair in reversed(rest) for n in pair])


def _cut(
    node: Node, size: tuple[int, ...], more: tuple[int, ...], x: Value
) -> tuple[Window, tuple[int, ...], tuple[int, ...]]:
    """The window, and what is cut off the result before and after the map."""
    auto = node.text("auto_pad", "NOTSET", "NOTSET SAME_UPPER SAME_LOWER VALID")
    wanted = node.get("output_shape", None) or None
    explicit = Window.of(node, size, x, explicit=True)
    if auto in ("NOTSET", "VALID") and wanted is None:
        if auto == "VALID":
            check_pads((*explicit.before, *explicit.after), (), auto)
        return explicit, explicit.before, explicit.after
    totals = []
    for axis, (reach, stride, extra) in enumerate(zip(explicit.reach, explicit.stride, more, strict=True)):
        total = reach + extra - stride
        if wanted is not None:
            known = node.known(node.shape(x)[2 + axis], "paddings (output_shape)")
            total = stride * (known - 1) + extra + reach - wanted[-len(size) :][axis]
        if total < 0:
            raise NotSupportedError("its result is larger than its windows reach; export it with output_padding")
        totals.append(total)
    less, more_cut = tuple(n // 2 for n in totals), tuple(n - n // 2 for n in totals)
    before, after = (less, more_cut) if auto == "SAME_UPPER" else (more_cut, less)
    if wanted is None:
        check_pads((*explicit.before, *explicit.after), (*before, *after), auto)
    return explicit, before, after


def gemm(node: Node) -> Operand:
    """A linear layer where the weights are constant and the input is not transposed."""
    alpha, beta = node.get("alpha", 1.0), node.get("beta", 1.0)
    x, weight, bias = node.x, node.input(1), node.input(2) if node.has(2) else None
    if isinstance(weight, Tensor) and isinstance(x, Value) and not node.get("transA", 0) and x.ndim == weight.ndim == 2:
        rows = weight if node.get("transB", 0) else weight.T
        if bias is None or (isinstance(bias, Tensor) and bias.numel() in (1, rows.shape[0]) and _is_row(bias)):
            flat = None if bias is None else bias.reshape(-1).expand(rows.shape[0])
            return _linear(node, x, _scaled(rows, alpha), None if flat is None else _scaled(flat, beta), weight)
    a, b = (node.call(torch.t, m) if node.get(key, 0) else m for m, key in ((x, "transA"), (weight, "transB")))
    result = node.call(torch.matmul, a, b)
    result = result if alpha == 1.0 else node.call(torch.mul, result, alpha)
    if bias is None:
        return result
    return node.call(torch.add, result, bias if beta == 1.0 else node.call(torch.mul, bias, beta))


def _is_row(bias: Tensor) -> bool:
    """Whether a bias has a number for each column of the result, or one for all."""
    return bias.ndim < 2 or bias.numel() == 1 or bias.shape[-1] == bias.numel()


def _scaled(x: Tensor, factor: float) -> Tensor:
    return x if factor == 1.0 else x * factor


def _linear(node: Node, x: Value, rows: Tensor, bias: Tensor | None, weight: Tensor) -> Value:
    return node.module(
        lambda: nn.Linear(rows.shape[1], rows.shape[0], bias=bias is not None),
        _state(x, node.derived(rows, weight), bias),
        x,
    )


def matmul(node: Node) -> Operand:
    """A linear layer where the right factor is a constant matrix."""
    x, weight = node.x, node.input(1)
    if isinstance(weight, Tensor) and weight.ndim == 2 and isinstance(x, Value) and x.ndim > 1:
        return _linear(node, x, weight.T, None, weight)
    return node.call(torch.matmul, x, weight)


OPERATORS = {"Conv": conv, "ConvTranspose": conv_transpose, "Gemm": gemm, "MatMul": matmul}
