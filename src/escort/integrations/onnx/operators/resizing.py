"""Maps of other sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from escort.integrations.onnx.errors import NotSupportedError
from escort.integrations.onnx.limits import MAX_CONSTANT
from escort.integrations.onnx.node import Node
from escort.integrations.onnx.operators.weights import Rule, weights
from escort.integrations.onnx.values import Operand, Value, Whole

_HALVES = ("half_pixel", "pytorch_half_pixel", "half_pixel_symmetric")
_LINEAR = {3: "linear", 4: "bilinear", 5: "trilinear"}


@dataclass(frozen=True)
class _Axis:
    """What becomes of an axis.

    Attributes:
        size: its new size; None where only the factor is given.
        factor: that of its sizes, by which positions are computed; None where a size is open.
    """

    size: Whole | None
    factor: float | None


def resize(node: Node) -> Operand:
    """By torch where it has the rule; else along each axis by a constant matrix."""
    x, rule = node.variable(), Rule.of(node)
    axes = {axis: each for axis, each in _axes(node, x).items() if _changes(node, x, axis, each)}
    if not axes:
        return x
    if rule.coordinates == "align_corners":
        _check_corners(node, x, axes)
    mode = _mode_of_torch(rule, x, axes)
    if mode is not None:
        return _interpolated(node, x, axes, rule, mode)
    result: Any = x
    for axis, each in axes.items():
        size = node.known(node.shape(x)[axis], f"weights ({rule.mode}, {rule.coordinates})")
        if each.factor is None:
            node.known(None, f"weights ({rule.mode}, {rule.coordinates})")
        assert each.factor is not None
        target = each.size if isinstance(each.size, int) else int(np.floor(size * each.factor))
        result = _along(node, result, axis, weights(rule, size, target, each.factor))
    return result


def _axes(node: Node, x: Value) -> dict[int, _Axis]:
    """What becomes of which axes. In opset 10 and Upsample the factors are the second input, later the third."""
    axes = [node.axis(axis, x.ndim) for axis in node.get("axes", list(range(x.ndim)))]
    policy = node.text("keep_aspect_ratio_policy", "stretch", "stretch not_larger not_smaller")
    index = 1 if node.op == "Upsample" or node.arity == 2 else 2
    if node.has(index) and not (node.is_constant(index) and not node.constant(index, "factors").numel()):
        # The shortest decimal of a float32 is what its exporter was given: 10 numbers times 0.7 are 7, and not 6.
        factors = [float(str(np.float32(factor))) for factor in node.constant(index, "factors").reshape(-1).tolist()]
        if len(factors) != len(axes) or not all(0.0 < factor < MAX_CONSTANT for factor in factors):
            raise NotSupportedError(f"its factors {factors[:8]} are not one above 0 for each of {len(axes)} axes")
        return {axis: _Axis(None, factor) for axis, factor in zip(axes, factors, strict=True)}
    sizes = node.wholes(3, "sizes")
    if len(sizes) != len(axes) or any(isinstance(size, int) and size < 1 for size in sizes):
        raise NotSupportedError(f"its sizes are not one above 0 for each of {len(axes)} axes; export it anew")
    stretched = {}
    for axis, size in zip(axes, sizes, strict=True):
        own = node.shape(x)[axis]
        stretched[axis] = _Axis(size, size / own if isinstance(size, int) and own else None)
    if policy == "stretch":
        return stretched
    ratios = [node.known(None, "sizes") if each.factor is None else each.factor for each in stretched.values()]
    ratio = min(ratios) if policy == "not_larger" else max(ratios)
    return {axis: _Axis(int(np.floor(ratio * (node.shape(x)[axis] or 0) + 0.5)), ratio) for axis in axes}


def _changes(node: Node, x: Value, axis: int, becomes: _Axis) -> bool:
    own = node.sizes(x)[axis]
    if isinstance(own, Value) and isinstance(becomes.size, Value):
        return own.node is not becomes.size.node
    return becomes.factor != 1.0 or (becomes.size is not None and becomes.size != own)


def _check_corners(node: Node, x: Value, axes: dict[int, _Axis]) -> None:
    """Raises NotSupportedError where corners would lie between positions, on which ONNX and its runtime disagree."""
    for axis, each in axes.items():
        own, factor = node.shape(x)[axis], each.factor
        if each.size is None and factor is not None and (factor * (1 if own is None else own)) % 1 != 0.0:
            raise NotSupportedError("its factors make no whole sizes, so that no corners align; export it with sizes")


def _mode_of_torch(rule: Rule, x: Value, axes: dict[int, _Axis]) -> str | None:
    """What torch calls the rule; None where it has none like it."""
    if x.ndim not in _LINEAR or not x.dtype.is_floating_point or rule.antialias or rule.exclude_outside:
        return None
    if min(axes) < 2 or any(isinstance(each.size, int) and not _is_ratio(x, axis, each) for axis, each in axes.items()):
        return None
    if rule.mode == "nearest":
        factors = [each.factor for each in axes.values()]
        is_floor = rule.nearest == "floor" or (rule.nearest == "round_prefer_floor" and set(factors) == {2.0})
        # Where a map grows by a whole factor no new position lies in the middle of two old ones.
        is_whole = all(factor is not None and factor == int(factor) for factor in factors)
        is_half = (rule.coordinates in _HALVES and rule.nearest.startswith("round")) or (
            rule.coordinates == "tf_half_pixel_for_nn" and rule.nearest == "floor"
        )
        return "nearest" if (rule.coordinates == "asymmetric" and is_floor) or (is_whole and is_half) else None
    becomes_one = any(each.size == 1 for each in axes.values())  # for which one of the rules has an exception
    if rule.coordinates not in ("half_pixel", "align_corners") and (
        rule.coordinates != "pytorch_half_pixel" or becomes_one
    ):
        return None
    if rule.mode == "cubic":
        return "bicubic" if x.ndim == 4 and rule.cubic == -0.75 else None
    return _LINEAR[x.ndim]


def _is_ratio(x: Value, axis: int, becomes: _Axis) -> bool:
    """Whether a factor is that of the sizes, as torch takes it."""
    own = x.shape[axis]
    return own is None or becomes.factor == becomes.size / own  # type: ignore[operator]


def _interpolated(node: Node, x: Value, axes: dict[int, _Axis], rule: Rule, mode: str) -> Any:
    options: dict[str, Any] = {"mode": mode}
    if mode != "nearest":
        options["align_corners"] = rule.coordinates == "align_corners"
    if next(iter(axes.values())).size is None:
        factors = [axes[axis].factor if axis in axes else 1.0 for axis in range(2, x.ndim)]
        return node.call(F.interpolate, x, scale_factor=tuple(factors), **options)
    sizes = [axes[axis].size if axis in axes else node.sizes(x)[axis] for axis in range(2, x.ndim)]
    return node.call(F.interpolate, x, size=tuple(sizes), **options)


def _along(node: Node, x: Any, axis: int, matrix: NDArray[Any]) -> Any:
    """Numbers along an axis times a matrix (new size, old size); where it only chooses, they are gathered."""
    if np.all((matrix == 0.0) | (matrix == 1.0)) and np.all(matrix.sum(1) == 1.0):
        return node.call(torch.index_select, x, axis, torch.from_numpy(matrix.argmax(1)))
    if not x.dtype.is_floating_point:
        raise NotSupportedError(f"it interpolates numbers of {x.dtype}; cast them to float32 before")
    order = [other for other in range(x.ndim) if other != axis]
    last = node.call(torch.permute, x, (*order, axis))
    product = node.call(torch.matmul, last, torch.from_numpy(matrix.T.copy()).to(x.dtype))
    back = list(range(x.ndim - 1))
    back.insert(axis, x.ndim - 1)
    return node.call(torch.permute, product, tuple(back))


def depth_to_space(node: Node) -> Operand:
    x, block = node.variable(), node.get("blocksize")
    if node.text("mode", "DCR", "DCR CRD") == "CRD":
        return node.call(F.pixel_shuffle, x, block)
    n, channels, height, width = _four(node, x)
    inner = node.known(channels if isinstance(channels, int) else None, "channels") // max(block * block, 1)
    blocks = node.call(torch.reshape, x, (n, block, block, inner, height, width))
    moved = node.call(torch.permute, blocks, (0, 3, 4, 1, 5, 2))
    return node.call(torch.reshape, moved, (n, inner, height * block, width * block))


def space_to_depth(node: Node) -> Operand:
    x, block = node.variable(), node.get("blocksize")
    n, channels, height, width = _four(node, x)
    rows, columns = height // block, width // block
    order = (0, 3, 5, 1, 2, 4) if node.text("mode", "DCR", "DCR CRD") == "DCR" else (0, 1, 3, 5, 2, 4)
    blocks = node.call(torch.reshape, x, (n, channels, rows, block, columns, block))
    moved = node.call(torch.permute, blocks, order)
    return node.call(torch.reshape, moved, (n, channels * (block * block), rows, columns))


def _four(node: Node, x: Value) -> list[Whole]:
    if x.ndim != 4:
        raise NotSupportedError(f"it takes (N, C, H, W) and is given {x.ndim} dimensions; export it anew")
    return node.sizes(x)


def grid_sample(node: Node) -> Operand:
    mode = node.text("mode", "linear", "linear bilinear nearest cubic bicubic")
    mode = {"linear": "bilinear", "cubic": "bicubic"}.get(mode, mode)
    padding = node.text("padding_mode", "zeros", "zeros border reflection")
    corners = bool(node.get("align_corners", 0))
    return node.call(F.grid_sample, node.x, node.input(1), mode=mode, padding_mode=padding, align_corners=corners)


OPERATORS: dict[str, Callable[[Node], Operand]] = {
    "Resize": resize,
    "Upsample": resize,
    "DepthToSpace": depth_to_space,
    "SpaceToDepth": space_to_depth,
    "GridSample": grid_sample,
}
