"""What is a right answer: the float64 convolution with its epilogue, and the comparison that every result must pass."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from escort.problem import Epilogue, Problem

#: Largest relative error ``||out - ref|| / ||ref||`` that a result of each precision may have.
ERROR_BOUND = {"fp32": 1e-5, "tf32": 1e-3, "fp16": 2e-3, "bf16": 1.5e-2}

_CHUNK = 2**24  # elements of x that are computed at a time


def conv2d(
    problem: Problem,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    slope: torch.Tensor | None = None,
) -> torch.Tensor:
    """``activation(conv2d(x, weight) + bias + residual)`` in float64, which TF32 settings do not touch.

    Args:
        x: (N, C, H, W)
        weight: (K, C / groups, R, S), on any device.
        bias: (K,), on any device.
        residual: (N, K, out_height, out_width), on the device of x.
        slope: (K,), on any device, of an activation that has slopes.

    Returns:
        (N, K, out_height, out_width) float64, on the device of x.
    """
    weight = weight.to(x.device, torch.float64)
    bias = None if bias is None else bias.to(x.device, torch.float64)
    # A few samples at a time: in float64, and lowered within torch, a batch may need many times the memory of x.
    samples = max(1, _CHUNK // math.prod(x.shape[1:]))
    inputs = x.split(samples)
    residuals = [None] * len(inputs) if residual is None else residual.split(samples)
    parts = [
        activate(_conv2d(problem, *part, weight, bias), problem.epilogue, slope)
        for part in zip(inputs, residuals, strict=True)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _conv2d(
    problem: Problem,
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    top, bottom, left, right = problem.padding
    padded = F.pad(x.double(), (left, right, top, bottom))
    y = F.conv2d(padded, weight, bias, stride=problem.stride, dilation=problem.dilation, groups=problem.groups)
    if residual is not None:
        y += residual.double()
    return y


def activate(y: torch.Tensor, epilogue: Epilogue, slope: torch.Tensor | None = None) -> torch.Tensor:
    """The activation of an epilogue as torch defines it, in the type of y (N, K, height, width).

    Args:
        slope: (K,) on any device, where the activation is "prelu".
    """
    match epilogue.activation:
        case "none":
            return y
        case "leaky_relu":
            return F.leaky_relu(y, epilogue.negative_slope)
        case "prelu":
            assert slope is not None
            return torch.prelu(y, slope.to(y.device, y.dtype))
        case "gelu":
            return F.gelu(y)
        case "gelu_tanh":
            return F.gelu(y, approximate="tanh")
        case name:
            function: Callable[[torch.Tensor], torch.Tensor] = getattr(F, name)
            return function(y)


def compare(out: torch.Tensor, ref: torch.Tensor) -> float:
    """The relative error ``||out - ref|| / ||ref||``.

    It is infinite where `out` holds a NaN or has another shape. Where the reference is zero it is the norm of `out`.
    """
    if out.shape != ref.shape:
        return float("inf")
    ref = ref.double()
    error = float(torch.linalg.vector_norm(out.double() - ref))
    norm = float(torch.linalg.vector_norm(ref))
    if math.isnan(error):
        return float("inf")
    return error / norm if norm > 0.0 else error
