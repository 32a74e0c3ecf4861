"""Padding by what the input holds (reflect, replicate, circular), as an operation in front of the convolution."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import fx, nn

from escort.network.check import Request
from escort.network.passes.rewriting import Rewriting, note_shape
from escort.network.tracing.conv_types import overrides, remade


def rewrite(network: fx.GraphModule, request: Request) -> tuple[fx.GraphModule, dict[str, str]]:
    """Replaces convolutions of a graph that pad with other numbers than zeros by padding and a convolution without.

    Returns:
        The new network, and the convolutions that the user wants left alone.
    """
    rewriting = Rewriting(network, request)
    found: dict[fx.Node, tuple[str, nn.Module]] = {}
    pads: list[tuple[Any, str]] = []
    for node in rewriting.graph.nodes:
        operation, _ = rewriting.operation(node)
        module: Any = rewriting.module(node)
        if operation != "conv" or module is None or module.padding_mode == "zeros" or overrides(module):
            continue
        name = str(node.target)
        if reason := request.left_alone(name, rewriting.original(node) or module):
            rewriting.skipped[name] = reason
            continue
        found[node] = name, remade(module, padding=0)
        pads.append((list(module._reversed_padding_repeated_twice), module.padding_mode))
    for call, (zeros, mode) in zip(rewriting.put(found), pads, strict=True):
        with rewriting.graph.inserting_before(call):
            padded = rewriting.graph.call_function(F.pad, (*call.args, zeros), {"mode": mode})
        note_shape(padded, partial(F.pad, pad=zeros, mode=mode))
        call.args = (padded,)
    return rewriting.finished(), rewriting.skipped
