"""Quantized weights become floats; what is quantized between layers is rounded as the file says, and stays float."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from escort.integrations.onnx.errors import NotSupportedError
from escort.integrations.onnx.node import Node
from escort.integrations.onnx.tensors import dtype_of
from escort.integrations.onnx.values import Operand

#: What the user is told.
WEIGHTS = "quantized weights were turned into float32, and are computed with as such"
ROUNDED = (
    "results between layers are rounded to integers and back, as the file says, which takes time and keeps layers from "
    "being fused; pass rounding=False to leave the rounding out and keep its bounds, or export the network unquantized"
)
BOUNDED = "results between layers that the file rounds to integers are bounded as they are there, and not rounded"


def quantize(node: Node) -> Operand:
    """Integers, and beside them the same numbers in float32, which is what is computed on with."""
    x, scale, zero = _scaling(node, node.get("output_dtype", 0))
    _check_type(node, "precision", scale)
    if isinstance(x, Tensor):
        steps = node.call(torch.round, node.call(torch.div, x, scale))
        return _integers(node, node.call(torch.add, steps, zero.to(torch.float32)), zero.dtype)
    low, high = _bounds(zero)
    rounded = node.call(torch.round, node.call(torch.div, x, scale)) if node.context.rounding else None
    node.notice(ROUNDED if node.context.rounding else BOUNDED)
    if rounded is None:
        rounded = node.call(torch.div, x, scale)
    shifted = node.call(torch.add, rounded, zero.to(torch.float32)) if bool((zero != 0).any()) else rounded
    bounded = node.call(torch.clamp, shifted, low, high)
    integers = node.builder.method("to", bounded, zero.dtype)
    node.context.unrounded[integers.node] = bounded
    return integers


def dequantize(node: Node) -> Operand:
    x, scale, zero = _scaling(node, 0)
    _check_type(node, "output_dtype", scale)
    if isinstance(x, Tensor):
        node.notice(WEIGHTS)
        floats = (x.to(torch.float32) - zero.to(torch.float32)) * scale
        return node.derived(floats.to(scale.dtype), x)
    floats = node.context.unrounded.get(x.node)
    if floats is None:
        floats = node.builder.method("to", x, torch.float32)
    shifted = node.call(torch.sub, floats, zero.to(torch.float32)) if bool((zero != 0).any()) else floats
    return node.call(torch.mul, shifted, scale)


def _scaling(node: Node, output_type: int) -> tuple[Any, Any, Tensor]:
    """The first input, and scale and zero point in its shape: of the whole, of an axis, or of blocks of an axis."""
    x, scale = node.x, node.constant(1, "scale")
    if not scale.dtype.is_floating_point:
        raise NotSupportedError(f"its scale is of {scale.dtype}; export it with scales of float32")
    integer = dtype_of(output_type) if output_type else (x.dtype if node.op == "DequantizeLinear" else torch.uint8)
    zero = node.constant(2, "zero point") if node.has(2) else torch.zeros((), dtype=integer)
    if zero.dtype.is_floating_point:
        raise NotSupportedError(f"it quantizes to {zero.dtype}, and integers are what is computed here")
    return x, _shaped(node, x, scale), _shaped(node, x, zero)


def _check_type(node: Node, name: str, scale: Tensor) -> None:
    """Raises NotSupportedError where a node asks for another type than its scale's, which is what is computed in."""
    asked = node.get(name, 0)
    if asked and dtype_of(asked) != scale.dtype:
        raise NotSupportedError(
            f"its {name} is {dtype_of(asked)}, and its scale of {scale.dtype}; export it with {name} 0"
        )


def _shaped(node: Node, x: Any, numbers: Tensor) -> Tensor:
    """Scales or zero points in a shape that goes with x."""
    axis, block = node.get("axis", 1), node.get("block_size", 0)
    if numbers.numel() == 1:
        return numbers.reshape(())
    axis = node.axis(axis, x.ndim)
    if block:
        size = node.known(node.shape(x)[axis], "blocks")
        return numbers.repeat_interleave(block, axis).narrow(axis, 0, size)
    if numbers.ndim != 1:
        raise NotSupportedError(f"its scale is of shape {list(numbers.shape)}, and must be one per channel")
    return numbers.reshape(*(-1 if each == axis else 1 for each in range(x.ndim)))


def _bounds(zero: Tensor) -> tuple[float, float]:
    limits = torch.iinfo(zero.dtype)
    return float(limits.min), float(limits.max)


def _integers(node: Node, x: Any, dtype: torch.dtype) -> Any:
    limits = torch.iinfo(dtype)
    return node.call(lambda x: x.clamp(limits.min, limits.max).to(dtype), x)


OPERATORS: dict[str, Callable[[Node], Operand]] = {"QuantizeLinear": quantize, "DequantizeLinear": dequantize}
