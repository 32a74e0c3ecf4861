"""Pooling."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from escort.integrations.onnx.errors import NotSupportedError
from escort.integrations.onnx.node import Node
from escort.integrations.onnx.operators.windows import Window
from escort.integrations.onnx.values import Operand, Value

_MAX: dict[int, Any] = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}
_AVERAGE: dict[int, Any] = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}
_AVERAGES: dict[int, Any] = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


def max_pool(node: Node) -> Operand:
    if node.wants(1):
        raise NotSupportedError("it returns where the maxima lie; leave that out, or do it after the network")
    x, window = _window(node)
    least = -math.inf if x.dtype.is_floating_point else torch.iinfo(x.dtype).min
    ceil_mode = bool(node.get("ceil_mode", 0))
    padding: tuple[int, ...] = window.before
    if not _torch_pads(window, window.size):
        window, ceil_mode = _rounded(node, x, window, ceil_mode), False
        x, padding = window.padded(node, x, least), (0,) * len(window.size)
    return node.module(
        lambda: _MAX[len(window.size)](window.size, window.stride, padding, window.dilation, ceil_mode=ceil_mode), {}, x
    )


def average_pool(node: Node) -> Operand:
    x, window = _window(node)
    if window.reach != window.size:
        raise NotSupportedError("its window is dilated, and averages of such windows are not computed here")
    ceil_mode, counts = bool(node.get("ceil_mode", 0)), bool(node.get("count_include_pad", 0))
    if _torch_pads(window, window.size):
        return node.module(
            lambda: _AVERAGE[len(window.size)](window.size, window.stride, window.before, ceil_mode, counts), {}, x
        )
    rounded = _rounded(node, x, window, ceil_mode)
    sizes = [node.known(size, "divisors") for size in node.shape(x)[2:]]
    inside = torch.ones(1, 1, *sizes)
    if counts:  # zeros that the file asks for are counted, those that complete the last window are not
        inside = F.pad(inside, window.padding, value=1.0)
        beyond = [
            n for pair in zip(window.before, rounded.before, window.after, rounded.after, strict=True) for n in pair
        ]
        inside = F.pad(inside, _differences(beyond), value=0.0)
    else:
        inside = F.pad(inside, rounded.padding)
    average = _AVERAGES[len(window.size)]
    share = average(inside, window.size, window.stride).to(x.dtype)
    summed = node.call(average, rounded.padded(node, x), window.size, window.stride)
    return node.call(torch.div, summed, share)


def _differences(quadruples: list[int]) -> list[int]:
    """What the second padding adds to the first, for (before, before, after, after) of each axis, as F.pad takes it."""
    pairs = [quadruples[i : i + 4] for i in range(0, len(quadruples), 4)]
    return [n for first, second, third, fourth in reversed(pairs) for n in (second - first, fourth - third)]


def lp_pool(node: Node) -> Operand:
    """The p-th root of the sum of p-th powers, with zeros around the map."""
    x, window = _window(node)
    power = float(node.get("p", 2))
    if window.reach != window.size:
        raise NotSupportedError("its window is dilated, and norms of such windows are not computed here")
    window = _rounded(node, x, window, bool(node.get("ceil_mode", 0)))
    powers = node.call(torch.pow, node.call(torch.abs, window.padded(node, x)), power)
    mean = node.call(_AVERAGES[len(window.size)], powers, window.size, window.stride)
    return node.call(torch.pow, node.call(torch.mul, mean, float(math.prod(window.size))), 1.0 / power)


def _window(node: Node) -> tuple[Value, Window]:
    x = node.variable()
    size = node.get("kernel_shape")
    if len(size) not in _MAX:
        raise NotSupportedError(f"its window has {len(size)} dimensions, and must have one to three")
    window = Window.of(node, size, x)
    if window.same:
        node.known(None, "paddings (auto_pad)")
    return x, window


def _torch_pads(window: Window, size: tuple[int, ...]) -> bool:
    """Whether torch's pooling has the paddings itself."""
    return window.is_symmetric and all(2 * n <= each for n, each in zip(window.before, size, strict=True))


def _rounded(node: Node, x: Value, window: Window, ceil_mode: bool) -> Window:
    """The window with as much behind the map as its last position needs."""
    if not ceil_mode:
        return window
    after = []
    axes = zip(node.shape(x)[2:], window.reach, window.stride, window.before, window.after, strict=True)
    for size, reach, stride, before, behind in axes:
        known = node.known(size, "paddings (ceil_mode)")
        count = -(-(known + before + behind - reach) // stride) + 1
        if (count - 1) * stride >= known + before:  # a window must not begin behind the map
            count -= 1
        after.append(max((count - 1) * stride + reach - known - before, behind))
    return Window(window.size, window.stride, window.dilation, window.before, tuple(after))


def _global(largest: bool) -> Any:
    def function(node: Node) -> Operand:
        x = node.variable()
        if x.ndim == 4:
            return node.module(lambda: (nn.AdaptiveMaxPool2d if largest else nn.AdaptiveAvgPool2d)(1), {}, x)
        return node.call(torch.amax if largest else torch.mean, x, list(range(2, x.ndim)), True)

    return function


def global_lp_pool(node: Node) -> Operand:
    x, power = node.variable(), float(node.get("p", 2))
    powers = node.call(torch.pow, node.call(torch.abs, x), power)
    return node.call(torch.pow, node.call(torch.sum, powers, list(range(2, x.ndim)), True), 1.0 / power)


OPERATORS = {
    "MaxPool": max_pool,
    "AveragePool": average_pool,
    "LpPool": lp_pool,
    "GlobalAveragePool": _global(largest=False),
    "GlobalMaxPool": _global(largest=True),
    "GlobalLpPool": global_lp_pool,
}
