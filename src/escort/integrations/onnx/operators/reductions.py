"""What is computed along axes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from escort.integrations.onnx.errors import NotSupportedError
from escort.integrations.onnx.node import Node
from escort.integrations.onnx.operators.elementwise import convert
from escort.integrations.onnx.values import Operand


def _reduction(
    function: Callable[..., Any], before: Callable[..., Any] | None = None, after: Callable[..., Any] | None = None
) -> Callable[[Node], Operand]:
    """A function along axes, with what is computed number by number before and behind it."""

    def mapped(node: Node) -> Operand:
        x = node.x
        axes, all_if_none = node.attribute_or_input("axes", 1) or [], not node.get("noop_with_empty_axes", 0)
        if not axes and all_if_none:
            axes = list(range(x.ndim))
        dims, keepdims, dtype = [node.axis(axis, x.ndim) for axis in axes], bool(node.get("keepdims", 1)), x.dtype
        result = x if before is None else node.call(before, x)
        if dims:
            result = function(node, result, sorted(dims), keepdims)
        result = result if after is None else node.call(after, result)
        return result if result.dtype == dtype else convert(node, result, dtype)

    return mapped


def _along(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda node, x, dims, keepdims: node.call(function, x, dims, keepdims)


def _product(node: Node, x: Any, dims: list[int], keepdims: bool) -> Any:
    """torch multiplies along one axis at a time."""
    for dim in reversed(dims):
        x = node.call(torch.prod, x, dim, keepdims)
    return x


def _mean(node: Node, x: Any, dims: list[int], keepdims: bool) -> Any:
    if not x.dtype.is_floating_point:
        raise NotSupportedError(f"it takes the mean of numbers of {x.dtype}; cast them to float32 before")
    return node.call(torch.mean, x, dims, keepdims)


def _argument(function: Callable[..., Any]) -> Callable[[Node], Operand]:
    def mapped(node: Node) -> Operand:
        x, keepdims = node.x, bool(node.get("keepdims", 1))
        axis = node.axis(node.get("axis", 0), x.ndim)
        if not node.get("select_last_index", 0):
            return node.call(function, x, axis, keepdims)
        found = node.call(function, node.call(torch.flip, x, [axis]), axis, keepdims)
        last = node.known(node.shape(x)[axis], "last indices") - 1
        return node.call(torch.add, node.call(torch.neg, found), last)

    return mapped


def top_k(node: Node) -> Any:
    """By a sort that keeps the order of equal numbers, as ONNX wants it."""
    x = node.x
    count, axis = int(node.number(1, "count")), node.axis(node.get("axis", -1), x.ndim)
    found = node.call(torch.sort, x, stable=True, dim=axis, descending=bool(node.get("largest", 1)))
    return tuple(node.call(torch.narrow, part, axis, 0, count) for part in node.parts(found, 2))


def cumulative_sum(node: Node) -> Operand:
    x, axis = node.x, int(node.number(1, "axis"))
    if node.get("exclusive", 0):
        raise NotSupportedError(
            "it leaves out the number itself (exclusive), which torch does not; subtract it instead"
        )
    turned = node.call(torch.flip, x, [axis]) if node.get("reverse", 0) else x
    sums = convert(node, node.call(torch.cumsum, turned, axis), x.dtype)
    return node.call(torch.flip, sums, [axis]) if node.get("reverse", 0) else sums


OPERATORS: dict[str, Callable[[Node], Any]] = {
    "ReduceMean": _reduction(_mean),
    "ReduceSum": _reduction(_along(torch.sum)),
    "ReduceMax": _reduction(_along(torch.amax)),
    "ReduceMin": _reduction(_along(torch.amin)),
    "ReduceProd": _reduction(_product),
    "ReduceL1": _reduction(_along(torch.sum), torch.abs),
    "ReduceL2": _reduction(_along(torch.sum), torch.square, torch.sqrt),
    "ReduceSumSquare": _reduction(_along(torch.sum), torch.square),
    "ReduceLogSum": _reduction(_along(torch.sum), None, torch.log),
    "ReduceLogSumExp": _reduction(_along(torch.logsumexp)),
    "ArgMax": _argument(torch.argmax),
    "ArgMin": _argument(torch.argmin),
    "TopK": top_k,
    "CumSum": cumulative_sum,
}
