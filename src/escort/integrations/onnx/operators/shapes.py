"""What moves numbers and computes none."""

from __future__ import annotations

import operator
from collections.abc import Callable
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from escort.integrations.onnx.errors import NotSupportedError
from escort.integrations.onnx.limits import MAX_CONSTANT
from escort.integrations.onnx.node import Node
from escort.integrations.onnx.values import Operand, Sizes, Value, Whole, product, sizes_of

#: From here on an end means "to the last".
_FAR = 1 << 31


def shape(node: Node) -> Operand:
    x = node.x
    return sizes_of(node.sizes(x)[slice(node.get("start", 0), node.get("end", None))])


def size(node: Node) -> Operand:
    return sizes_of(product(node.sizes(node.x)))


def reshape(node: Node) -> Operand:
    """A size 0 stands for the one of the input, unless `allowzero`."""
    x, sizes = node.x, node.wholes(1, "shape")
    if not node.get("allowzero", 0):
        sizes = [_own(node, x, axis) if _is(each, 0) else each for axis, each in enumerate(sizes)]
    is_flat = isinstance(x, Value) and len(sizes) == 2 and x.ndim > 2 and _is(sizes[1], -1)
    if is_flat and _same(sizes[0], node.sizes(x)[0]):
        return node.call(torch.flatten, x, 1)
    return node.call(torch.reshape, x, tuple(sizes))


def _is(whole: Whole, number: int) -> bool:
    return isinstance(whole, int) and whole == number


def _same(a: Whole, b: Whole) -> bool:
    """Whether two sizes are known to be equal."""
    if isinstance(a, Value) and isinstance(b, Value):
        return a.node is b.node
    return isinstance(a, int) and isinstance(b, int) and a == b


def _own(node: Node, x: Any, axis: int) -> Whole:
    if axis >= x.ndim:
        raise NotSupportedError(f"it keeps size number {axis + 1} of {x.ndim}; export it anew")
    return node.sizes(x)[axis]


def flatten(node: Node) -> Operand:
    x = node.x
    axis = node.get("axis", 1)
    axis = axis + x.ndim if axis < 0 else axis
    if not 0 <= axis <= x.ndim:
        raise NotSupportedError(f"its axis {axis} is beyond {x.ndim} dimensions; export it anew")
    if axis == 1 and x.ndim > 1:
        return node.call(torch.flatten, x, 1)
    before, behind = product(node.sizes(x)[:axis]), product(node.sizes(x)[axis:])
    return node.call(torch.reshape, x, (before, -1) if axis and not _is(before, 0) else (before, behind))


def transpose(node: Node) -> Operand:
    x = node.x
    return node.call(torch.permute, x, tuple(node.get("perm", list(range(x.ndim))[::-1])))


def squeeze(node: Node) -> Operand:
    x = node.x
    axes = node.attribute_or_input("axes", 1)
    if axes is None:
        axes = [axis for axis, each in enumerate(node.shape(x)) if each == 1]
    return node.call(torch.squeeze, x, tuple(node.axis(axis, x.ndim) for axis in axes)) if axes else x


def unsqueeze(node: Node) -> Operand:
    x: Any = node.x
    axes = node.attribute_or_input("axes", 1) or []
    for axis in sorted(node.axis(axis, x.ndim + len(axes)) for axis in axes):
        x = node.call(torch.unsqueeze, x, axis)
    return x


def concat(node: Node) -> Operand:
    return node.call(torch.cat, [node.input(index) for index in range(node.arity)], node.get("axis"))


def split(node: Node) -> tuple[Operand, ...]:
    """Into parts of sizes that are given, or as many equal ones as there are results; the last one may be smaller."""
    x, count = node.x, len(node.outputs)
    axis = node.axis(node.get("axis", 0), x.ndim)
    length = node.shape(x)[axis]
    sizes = parts_of(node, length)
    if sizes is None:
        return node.parts(node.call(torch.chunk, x, count, axis), count)
    return node.parts(node.call(torch.split, x, sizes, axis), count)


def parts_of(node: Node, length: int | None) -> list[int] | None:
    """The sizes of the parts that a node splits an axis of a length into; None where that is left open."""
    sizes, count = node.attribute_or_input("split", 1), len(node.outputs)
    if (wanted := node.get("num_outputs", count)) != count:
        raise NotSupportedError(f"its num_outputs is {wanted}, and it has {count} results; export it anew")
    if sizes is not None or length is None:
        return sizes
    each = -(-length // count)
    return [min(each, length - each * part) for part in range(count)]


def slices(node: Node) -> Operand:
    """Parts along axes; what goes backwards is gathered."""
    x: Any = node.x
    starts, ends = node.wholes(1, "start"), node.wholes(2, "end")
    axes = [node.axis(axis, x.ndim) for axis in node.attribute_or_input("axes", 3) or range(len(starts))]
    steps = node.attribute_or_input("steps", 4) or [1] * len(starts)
    if not len(starts) == len(ends) == len(axes) == len(steps) or 0 in steps:
        raise NotSupportedError("its starts, ends, axes and steps are not as many as one another, or a step is 0")
    taken: list[slice] = [slice(None)] * x.ndim
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        if step < 0:
            x = _backwards(node, x, axis, (start, end, step))
        else:
            taken[axis] = slice(_start(start), None if isinstance(end, int) and end >= _FAR else end, _step(step))
    while taken and taken[-1] == slice(None):
        taken.pop()
    return node.call(operator.getitem, x, tuple(taken)) if taken else x


def _start(start: Whole) -> Whole | None:
    return None if _is(start, 0) else start


def _step(step: int) -> int | None:
    return None if step == 1 else step


def _backwards(node: Node, x: Any, axis: int, numbers: tuple[Whole, Whole, int]) -> Any:
    start, end, step = numbers
    length = node.known(node.shape(x)[axis], "slices that go backwards")
    if isinstance(start, Value) or isinstance(end, Value):
        node.known(None, "slices that go backwards")
    # A negative end counts from the back; one before the first number takes that, too.
    start = min(start + length if start < 0 else start, length - 1)  # type: ignore[operator, type-var]
    end = max(end + length if end < 0 else end, -1)  # type: ignore[operator, type-var]
    return node.call(torch.index_select, x, axis, torch.arange(length)[_indices(start, end, step)])


def _indices(start: Any, end: Any, step: int) -> Tensor:
    return torch.tensor(list(range(start, end, step)), dtype=torch.int64)


def gather(node: Node) -> Operand:
    """By constant numbers, or by a tensor of them."""
    x, indices = node.x, node.input(1)
    axis = node.axis(node.get("axis", 0), x.ndim)
    if isinstance(indices, Tensor):
        length = node.shape(x)[axis]
        if indices.ndim == 0:
            return node.call(torch.select, x, axis, int(indices))
        if bool((indices < 0).any()):
            indices = torch.where(indices < 0, indices + node.known(length, "indices from the back"), indices)
    flat = node.call(torch.reshape, indices, (-1,))
    taken = node.call(torch.index_select, x, axis, _from_front(node, x, axis, flat))
    sizes = node.sizes(x)
    shape = (*sizes[:axis], *node.sizes(indices), *sizes[axis + 1 :])
    return taken if indices.ndim == 1 else node.call(torch.reshape, taken, shape)


def _from_front(node: Node, x: Any, axis: int, indices: Any) -> Any:
    """Indices without those that count from the back."""
    if isinstance(indices, Tensor) or indices.dtype == torch.uint8:
        return indices.to(torch.int64) if isinstance(indices, Tensor) else indices
    length = node.sizes(x)[axis]
    return node.call(torch.where, node.call(torch.lt, indices, 0), node.call(torch.add, indices, length), indices)


def gather_elements(node: Node) -> Operand:
    x, indices = node.x, node.input(1)
    axis = node.axis(node.get("axis", 0), x.ndim)
    if isinstance(indices, Tensor):
        length = node.shape(x)[axis]
        if bool((indices < 0).any()):
            indices = torch.where(indices < 0, indices + node.known(length, "indices from the back"), indices)
    return node.call(torch.gather, x, axis, _from_front(node, x, axis, indices))


def expand(node: Node) -> Operand:
    """To the shape that x and a tensor of the given shape would be broadcast to."""
    x = node.x
    return node.call(torch.broadcast_to, x, tuple(_broadcast(node.sizes(x), node.wholes(1, "shape"))))


def _broadcast(own: list[Whole], wanted: list[Whole]) -> list[Whole]:
    pairs = zip_longest(reversed(own), reversed(wanted), fillvalue=1)
    return [a if _is(b, 1) else b for a, b in pairs][::-1]


def tile(node: Node) -> Operand:
    return node.call(torch.tile, node.x, tuple(node.wholes(1, "repeats")))


def constant(node: Node) -> Operand:
    for name, dtype in (("value_int", torch.int64), ("value_float", torch.float32)):
        for key in (name, f"{name}s"):
            if (value := node.get(key, None)) is not None:
                return torch.tensor(value, dtype=dtype)
    value = node.get("value", None)
    if not isinstance(value, Tensor):
        raise NotSupportedError("its value is a text or no tensor, which no network computes with")
    return value


def constant_of_shape(node: Node) -> Operand:
    """One number, seen as a tensor of the shape."""
    value = node.get("value", None)
    one = torch.zeros(1) if value is None else value
    sizes = node.wholes(0, "shape")
    if isinstance(node[0], Sizes):
        return node.call(torch.broadcast_to, node.builder.tensor(one.reshape(())), tuple(sizes))
    return node.call(torch.broadcast_to, one.reshape(()), tuple(sizes))


def ranges(node: Node) -> Operand:
    """Up to a size of the input it is counted by a sum of ones, which lie where the network does."""
    start, step = node.number(0, "start"), node.number(2, "step")
    if isinstance(node[1], Sizes) and isinstance(start, int) and isinstance(step, int) and step > 0:
        count = -((start - node.wholes(1, "limit")[0]) // step)
        ones = node.call(torch.broadcast_to, node.builder.tensor(torch.ones((), dtype=torch.int64)), (count,))
        counted = node.call(torch.sub, node.call(torch.cumsum, ones, 0), 1)
        return node.call(torch.add, node.call(torch.mul, counted, step), start)
    limit = node.number(1, "limit")
    if step == 0 or abs((limit - start) / step) > MAX_CONSTANT:
        raise NotSupportedError(f"its range from {start} to {limit} in steps of {step} is none of a network")
    return node.call(torch.arange, start, limit, step, dtype=node.constant(0, "start").dtype)


def pad(node: Node) -> Operand:
    """At either side of each axis; by numbers of the map as torch does it, or gathered."""
    x = node.x
    mode = node.text("mode", "constant", "constant reflect edge wrap")
    value = node.get("value", 0.0)  # which other modes do not use
    amounts = node.wholes(1, "paddings") if node.has(1) else list(node.get("pads"))
    axes = [node.axis(axis, x.ndim) for axis in node.attribute_or_input("axes", 3) or range(len(amounts) // 2)]
    if len(amounts) != 2 * len(axes):
        raise NotSupportedError(f"it has {len(amounts)} paddings for {len(axes)} axes; export it anew")
    pairs: list[tuple[Whole, Whole]] = [(0, 0)] * x.ndim
    for axis, before, after in zip(axes, amounts[: len(axes)], amounts[len(axes) :], strict=True):
        pairs[axis] = before, after
    first = next((axis for axis, pair in enumerate(pairs) if not (_is(pair[0], 0) and _is(pair[1], 0))), x.ndim)
    if first == x.ndim:
        return x
    if mode == "constant":
        value = node.number(2, "value") if node.has(2) else value
        return node.call(F.pad, x, _flat(pairs[first:]), "constant", value)
    if mode in ("reflect", "edge") and x.ndim in (3, 4, 5) and first >= 2 and x.dtype.is_floating_point:
        return node.call(F.pad, x, _flat(pairs[2:]), "reflect" if mode == "reflect" else "replicate")
    for axis, (before, after) in enumerate(pairs):
        if not (_is(before, 0) and _is(after, 0)):
            length = node.known(node.shape(x)[axis], f"paddings of mode {mode}")
            indices = _padded_indices(length, before, after, mode)
            x = node.call(torch.index_select, x, axis, indices)
    return x


def _flat(pairs: list[tuple[Whole, Whole]]) -> list[Whole]:
    return [n for pair in reversed(pairs) for n in pair]


def _padded_indices(length: int, before: Whole, after: Whole, mode: str) -> Tensor:
    """Which numbers stand where after padding."""
    if not isinstance(before, int) or not isinstance(after, int) or max(before, after) > MAX_CONSTANT:
        raise NotSupportedError(f"its paddings of mode {mode} are none of a network, or depend on the input's sizes")
    indices = np.arange(length)[max(-before, 0) : length - max(-after, 0)]
    return torch.from_numpy(np.pad(indices, (max(before, 0), max(after, 0)), mode=mode))  # type: ignore[call-overload]


def trilu(node: Node) -> Operand:
    diagonal = int(node.number(1, "diagonal")) if node.has(1) else 0
    return node.call(torch.triu if node.get("upper", 1) else torch.tril, node.x, diagonal)


def einsum(node: Node) -> Operand:
    equation = node.get("equation").decode("ascii", "replace")
    if not set(equation) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ,.-> "):
        raise NotSupportedError("its equation holds other characters than letters, commas, dots and an arrow")
    return node.call(torch.einsum, equation, *(node.input(index) for index in range(node.arity)))


OPERATORS: dict[str, Callable[[Node], Any]] = {
    "Shape": shape,
    "Size": size,
    "Reshape": reshape,
    "Flatten": flatten,
    "Transpose": transpose,
    "Squeeze": squeeze,
    "Unsqueeze": unsqueeze,
    "Concat": concat,
    "Split": split,
    "Slice": slices,
    "Gather": gather,
    "GatherElements": gather_elements,
    "Expand": expand,
    "Tile": tile,
    "Constant": constant,
    "ConstantOfShape": constant_of_shape,
    "Range": ranges,
    "Pad": pad,
    "Trilu": trilu,
    "Einsum": einsum,
}
