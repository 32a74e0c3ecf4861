"""Sparse linear layers as pointwise convolutions of one pixel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from escort.network.check import Request
from escort.network.passes.lifting import Lifting
from escort.network.passes.operations import convolution_name, new_conv2d
from escort.network.passes.rewriting import Rewriting
from escort.network.tracing.trace import shape_of
from escort.problem import TORCH_DTYPE

#: The least share of zeros in the weights of a layer for which a sparse method may pay.
LEAST_SPARSITY = 0.7


def rewrite(network: fx.GraphModule, request: Request) -> tuple[fx.GraphModule, dict[str, str]]:
    """Replaces linear layers of (N, C) in a graph, if most of their weights are zero, by convolutions of (N, C, 1, 1).

    What follows such a layer number by number or channel by channel moves to (N, C, 1, 1), too. Where the dense method
    is the fastest for one it runs as a matrix product, as before.

    Returns:
        The new network, and the sparse layers that the user wants left alone.
    """
    rewriting = Rewriting(network, request)
    found: dict[fx.Node, tuple[str, nn.Module]] = {}
    for node in rewriting.graph.nodes:
        operation, arguments = rewriting.operation(node)
        if operation == "linear" and _is_understood(rewriting, arguments, request):
            name = convolution_name(node)
            conv = new_conv2d(arguments["weight"][:, :, None, None], arguments.get("bias"), 1, 0, 1, 1)
            if reason := request.left_alone(name, rewriting.original(node) or conv):
                rewriting.skipped[name] = reason
                continue
            found[node] = name, conv
    Lifting(
        rewriting,
        ndim=2,
        widen=(slice(None), slice(None), None, None),
        narrow=(slice(None), slice(None), 0, 0),
        wide_shape=lambda shape: torch.Size((*shape, 1, 1)),
    ).lift(rewriting.put(found))
    return rewriting.finished(), rewriting.skipped


def _is_understood(rewriting: Rewriting, arguments: dict[str, Any], request: Request) -> bool:
    """Whether a linear layer is sparse and takes (N, C), in the precision of the convolutions."""
    shape, weight, bias = shape_of(arguments["input"]), arguments["weight"], arguments.get("bias")
    if shape is None or len(shape[0]) != 2 or not rewriting.is_settled(arguments) or weight.ndim != 2:
        return False
    if weight.dtype is not TORCH_DTYPE[request.precision] or sparsity(weight) < LEAST_SPARSITY:
        return False
    return all(bool(torch.isfinite(tensor).all()) for tensor in (weight, bias) if tensor is not None)


def sparsity(weight: Tensor) -> float:
    """The share of zeros in a tensor that is not empty."""
    return 1.0 - int(torch.count_nonzero(weight)) / max(weight.numel(), 1)
