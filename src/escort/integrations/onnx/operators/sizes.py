"""Arithmetic of sizes: what networks compute of the shapes of their inputs, number by number."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from escort.integrations.onnx.errors import NotSupportedError
from escort.integrations.onnx.node import Node
from escort.integrations.onnx.operators.shapes import parts_of
from escort.integrations.onnx.tensors import dtype_of
from escort.integrations.onnx.values import Operand, Sizes, Value, product, sizes_of

_Array = NDArray[Any]


def _array(node: Node, index: int) -> _Array:
    """An input as numbers of Python."""
    operand = node[index]
    if isinstance(operand, Sizes):
        return operand.array
    if isinstance(operand, Tensor):
        return np.asarray(operand.tolist(), dtype=object)
    raise NotSupportedError("it computes sizes with numbers of a map; export the network with inputs of fixed sizes")


def _dtype(node: Node, index: int = 0) -> torch.dtype:
    return node[index].dtype


def _each(function: Callable[[Any], Any]) -> Callable[[Node], Operand]:
    def mapped(node: Node) -> Operand:
        array = _array(node, 0)
        return sizes_of(_over(function, array), _dtype(node))

    return mapped


def _over(function: Callable[[Any], Any], array: _Array) -> _Array:
    """A function of each number."""
    result = np.empty(array.shape, dtype=object)
    result[...] = np.array([function(number) for number in array.reshape(-1).tolist()], dtype=object).reshape(
        array.shape
    )
    return result


def _pairs(function: Callable[[Any, Any], Any]) -> Callable[[Node], Operand]:
    def mapped(node: Node) -> Operand:
        a, b = np.broadcast_arrays(_array(node, 0), _array(node, 1))
        numbers = [function(x, y) for x, y in zip(a.reshape(-1).tolist(), b.reshape(-1).tolist(), strict=True)]
        return sizes_of(np.array([*numbers, None], dtype=object)[:-1].reshape(a.shape), _dtype(node))

    return mapped


def _divide(node: Node) -> Operand:
    """Sizes are not negative, so that rounding down is rounding to zero."""
    return _pairs(operator.floordiv if not _dtype(node).is_floating_point else operator.truediv)(node)


def _modulo(node: Node) -> Operand:
    """Sizes are not negative, so that `fmod` is the same; it is left unread beside numbers that may be."""
    arrays = _array(node, 0), _array(node, 1)
    if not any(
        number < 0 for array in arrays for number in array.reshape(-1).tolist() if not isinstance(number, Value)
    ):
        node.get("fmod", 0)
    return _pairs(operator.mod)(node)


def _cast(node: Node) -> Operand:
    dtype = dtype_of(node.get("to"))
    to_whole = _dtype(node).is_floating_point and not dtype.is_floating_point
    return sizes_of(_over(_floor, _array(node, 0)) if to_whole else _array(node, 0), dtype)


def _floor(number: Any) -> Any:
    return number.floor() if isinstance(number, Value) else math.floor(number)


def _ceil(number: Any) -> Any:
    return number.ceil() if isinstance(number, Value) else math.ceil(number)


def _axes(node: Node) -> tuple[int, ...]:
    return tuple(node.attribute_or_input("axes", 1) or ())


def _unsqueeze(node: Node) -> Operand:
    return sizes_of(np.expand_dims(_array(node, 0), _axes(node)), _dtype(node))


def _squeeze(node: Node) -> Operand:
    return sizes_of(np.squeeze(_array(node, 0), _axes(node) or None), _dtype(node))


def _gather(node: Node) -> Operand:
    indices = np.asarray(node.constant(1, "indices").numpy())
    return sizes_of(np.take(_array(node, 0), indices, axis=node.get("axis", 0)), _dtype(node))


def _slice(node: Node) -> Operand:
    start, end = (int(node.number(index, "part of a shape")) for index in (1, 2))
    for axis in node.attribute_or_input("axes", 3) or ():
        node.axis(axis, 1)
    step = (node.attribute_or_input("steps", 4) or [1])[0]
    return sizes_of(_array(node, 0)[start:end:step], _dtype(node))


def _concat(node: Node) -> Operand:
    arrays = [_array(node, index) for index in range(node.arity)]
    return sizes_of(np.concatenate(arrays, axis=node.get("axis")), _dtype(node))


def _split(node: Node) -> Any:
    array = _array(node, 0)
    axis = node.axis(node.get("axis", 0), array.ndim)
    ends = np.cumsum(np.asarray(parts_of(node, array.shape[axis]), dtype=np.int64))
    if ends[-1] != array.shape[axis]:
        raise NotSupportedError(f"its parts are {ends[-1]} of {array.shape[axis]} sizes; export it anew")
    return tuple(sizes_of(part, _dtype(node)) for part in np.split(array, ends[:-1].tolist(), axis))


def _reshape(node: Node) -> Operand:
    """A 0 stands for the size of its axis, unless `allowzero`."""
    array, shape = _array(node, 0), [int(size) for size in node.constant(1, "shape").reshape(-1).tolist()]
    if not node.get("allowzero", 0):
        if any(size == 0 for size in shape[array.ndim :]):
            raise NotSupportedError(
                f"its shape {shape[:8]} keeps a size beyond {array.ndim} dimensions; export it anew"
            )
        shape = [array.shape[axis] if size == 0 else size for axis, size in enumerate(shape)]
    return sizes_of(array.reshape(shape), _dtype(node))


def _reduce_product(node: Node) -> Operand:
    array, axes, is_idle = _array(node, 0), _axes(node), bool(node.get("noop_with_empty_axes", 0))
    over = {node.axis(axis, array.ndim) for axis in axes} or ({*()} if is_idle else {*range(array.ndim)})
    if over != {*range(array.ndim)}:
        raise NotSupportedError("it multiplies sizes along some axes only; export the network with fixed sizes")
    result = np.asarray(product(array.reshape(-1).tolist()), dtype=object)
    return sizes_of(result.reshape((1,) * array.ndim) if node.get("keepdims", 1) else result, _dtype(node))


def _equal(node: Node) -> Operand:
    """What compares a size with -1 or 0, which no size is; any other comparison depends on the input."""

    def compared(a: Any, b: Any) -> bool:
        if isinstance(a, Value) or isinstance(b, Value):
            plain = b if isinstance(a, Value) else a
            if isinstance(plain, Value) or plain > 0:
                raise NotSupportedError("what it does depends on the input's sizes; export the network with fixed ones")
            return False
        return bool(a == b)

    a, b = np.broadcast_arrays(_array(node, 0), _array(node, 1))
    numbers = [compared(x, y) for x, y in zip(a.reshape(-1).tolist(), b.reshape(-1).tolist(), strict=True)]
    return torch.tensor(numbers, dtype=torch.bool).reshape(a.shape)


def _where(node: Node) -> Operand:
    chosen = node.constant(0, "condition").numpy()
    return sizes_of(np.where(chosen, _array(node, 1), _array(node, 2)), _dtype(node, 1))


def _identity(node: Node) -> Operand:
    return node[0]


def _shape(node: Node) -> Operand:
    shape = _array(node, 0).shape[node.get("start", 0) : node.get("end", None)]
    return torch.tensor(shape, dtype=torch.int64)


#: What is computed of sizes, by operator. What is not here takes them as numbers, as Reshape does, or not at all.
OPERATORS: dict[str, Callable[[Node], Any]] = {
    "Add": _pairs(operator.add),
    "Sub": _pairs(operator.sub),
    "Mul": _pairs(operator.mul),
    "Div": _divide,
    "Mod": _modulo,
    "Neg": _each(operator.neg),
    "Floor": _each(_floor),
    "Ceil": _each(_ceil),
    "Cast": _cast,
    "Unsqueeze": _unsqueeze,
    "Squeeze": _squeeze,
    "Gather": _gather,
    "Slice": _slice,
    "Concat": _concat,
    "Split": _split,
    "Reshape": _reshape,
    "ReduceProd": _reduce_product,
    "Equal": _equal,
    "Where": _where,
    "Identity": _identity,
    "Shape": _shape,
}
