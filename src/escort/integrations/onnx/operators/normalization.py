"""Normalisation and softmax."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from escort.integrations.onnx.errors import NotSupportedError
from escort.integrations.onnx.node import Node
from escort.integrations.onnx.values import Operand

_NORMS: dict[int, Any] = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


def batch_norm(node: Node) -> Operand:
    """A module where its numbers are constant."""
    if node.get("training_mode", 0) or any(node.wants(index) for index in range(1, 5)):
        raise NotSupportedError("it normalises with the batch, as in training; export the network in eval mode")
    x, eps = node.x, node.get("epsilon", 1e-5)
    scale, bias, mean, variance = (node.input(index) for index in range(1, 5))
    constants = [each for each in (scale, bias, mean, variance) if isinstance(each, Tensor)]
    if len(constants) < 4 or isinstance(x, Tensor) or x.ndim not in _NORMS:
        return node.call(F.batch_norm, x, mean, variance, scale, bias, False, 0.1, eps)
    keys = ("weight", "bias", "running_mean", "running_var")
    state = dict(zip(keys, constants, strict=True)) | {"num_batches_tracked": torch.zeros((), dtype=torch.int64)}
    return node.module(lambda: _NORMS[x.ndim](constants[0].numel(), eps=eps), state, x)


def instance_norm(node: Node) -> Operand:
    scale, bias = node.input(1), node.input(2)
    return node.call(F.instance_norm, node.x, weight=scale, bias=bias, eps=node.get("epsilon", 1e-5))


def _normalized_shape(node: Node, x: Any) -> list[int]:
    axis = node.axis(node.get("axis", -1), x.ndim)
    return [node.known(size, "normalised sizes") for size in node.shape(x)[axis:]]


def _as_large(node: Node, scale: Any, shape: list[int]) -> Any:
    """A scale with a number for each that is normalised."""
    if list(scale.shape) == shape:
        return scale
    if isinstance(scale, Tensor):
        return node.derived(scale.broadcast_to(shape).contiguous(), scale)
    return node.call(torch.broadcast_to, scale, shape)


def layer_norm(node: Node) -> Any:
    x, eps = node.x, node.get("epsilon", 1e-5)
    shape = _normalized_shape(node, x)
    scale, bias = (_as_large(node, node.input(i), shape) if node.has(i) else None for i in (1, 2))
    normed = node.call(F.layer_norm, x, shape, scale, bias, eps)
    if not node.wants(1) and not node.wants(2):
        return normed
    dims = list(range(x.ndim - len(shape), x.ndim))
    mean = node.call(torch.mean, x, dims, True)
    variance = node.call(torch.mean, node.call(torch.square, node.call(torch.sub, x, mean)), dims, True)
    return normed, mean, node.call(torch.rsqrt, node.call(torch.add, variance, eps))


def rms_norm(node: Node) -> Operand:
    x = node.x
    shape = _normalized_shape(node, x)
    return node.call(F.rms_norm, x, shape, _as_large(node, node.input(1), shape), node.get("epsilon", 1e-5))


def group_norm(node: Node) -> Operand:
    """Until opset 20 scales are those of groups, later those of channels."""
    x, groups = node.x, node.get("num_groups")
    channels = node.known(node.shape(x)[1], "channels")
    scale, bias = node.constant(1, "scale"), node.constant(2, "bias")
    if node.version < 21:
        scale, bias = (node.derived(each.repeat_interleave(channels // groups), each) for each in (scale, bias))
    return node.call(F.group_norm, x, groups, scale, bias, node.get("epsilon", 1e-5))


def local_response_norm(node: Node) -> Operand:
    size = node.get("size")
    settings = size, node.get("alpha", 1e-4), node.get("beta", 0.75), node.get("bias", 1.0)
    if size % 2 == 0:
        raise NotSupportedError(f"it sums {size} channels, of which torch and ONNX take others; use an odd number")
    return node.module(lambda: nn.LocalResponseNorm(*settings), {}, node.variable())


def lp_norm(node: Node) -> Operand:
    """Divides by the norm along an axis, and leaves zeros as they are."""
    x, power, axis = node.x, node.get("p", 2), node.get("axis", -1)
    if power not in (1, 2):
        raise NotSupportedError(f"its norm of power {power} is none that ONNX knows; export it anew")
    absolute = node.call(torch.abs, x)
    powers = absolute if power == 1 else node.call(torch.square, absolute)
    norm = node.call(torch.sum, powers, [axis], True)
    norm = norm if power == 1 else node.call(torch.sqrt, norm)
    return node.call(torch.div, x, node.call(torch.clamp, norm, 1e-37, math.inf))


def _softmax(function: Any) -> Any:
    def mapped(node: Node) -> Operand:
        x = node.x
        return node.call(function, x, dim=node.axis(node.get("axis", -1), x.ndim))

    return mapped


OPERATORS = {
    "BatchNormalization": batch_norm,
    "InstanceNormalization": instance_norm,
    "LayerNormalization": layer_norm,
    "RMSNormalization": rms_norm,
    "GroupNormalization": group_norm,
    "LRN": local_response_norm,
    "LpNormalization": lp_norm,
    "Softmax": _softmax(F.softmax),
    "LogSoftmax": _softmax(F.log_softmax),
}
