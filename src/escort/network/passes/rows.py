"""1-d convolutions as 2-d ones on maps of one row."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, fx, nn

from escort.network.check import Request
from escort.network.passes.lifting import Lifting
from escort.network.passes.operations import convolution_name, per_axis, takes_output_size, zeros_around_maps
from escort.network.passes.rewriting import Rewriting
from escort.network.tracing.conv_types import overrides
from escort.network.tracing.trace import shape_of


def rewrite(network: fx.GraphModule, request: Request) -> tuple[fx.GraphModule, dict[str, str]]:
    """Replaces the 1-d convolutions of a graph, transposed ones too, by 2-d ones of (N, C, 1, L).

    Zeros in front of a convolution, and what follows it number by number or channel by channel, move to (N, C, 1, L),
    too.

    Returns:
        The new network, and the convolutions that the user wants left alone.
    """
    rewriting = Rewriting(network, request)
    found: dict[fx.Node, tuple[str, nn.Module]] = {}
    for node in rewriting.graph.nodes:
        operation, arguments = rewriting.operation(node)
        if operation in ("conv", "transposed") and _is_understood(rewriting, node, arguments):
            name, conv = convolution_name(node), _as_row(operation, arguments)
            if reason := request.left_alone(name, rewriting.original(node) or conv):
                rewriting.skipped[name] = reason
                continue
            found[node] = name, conv
    # Without shapes there may be no samples; with them, an index that begins with the samples is known not to mix them.
    calls = rewriting.put(found)
    pads = [node for node in rewriting.graph.nodes if _is_pad_of(calls, node, rewriting)]
    known = all(shape_of(call.args[0]) is not None for call in calls)
    front = (slice(None), slice(None)) if known else (...,)
    Lifting(
        rewriting,
        ndim=3,
        widen=(*front, None, slice(None)),
        narrow=(*front, 0, slice(None)),
        wide_shape=lambda shape: torch.Size((*shape[:-1], 1, shape[-1])),
    ).lift({*pads, *calls})
    return rewriting.finished(), rewriting.skipped


def _is_understood(rewriting: Rewriting, node: fx.Node, arguments: dict[str, Any]) -> bool:
    """Whether a convolution is a 1-d one that fusing would take if it were 2-d."""
    module, shape = rewriting.module(node), shape_of(arguments.get("input"))
    weight = arguments["weight"]
    if not isinstance(weight, Tensor) or weight.ndim != 3 or not rewriting.is_settled(arguments):
        return False
    if module is not None and (overrides(module) or module.padding_mode != "zeros" or takes_output_size(node)):
        return False
    return shape is None or len(shape[0]) == 3


def _is_pad_of(calls: Collection[fx.Node], node: fx.Node, rewriting: Rewriting) -> bool:
    """Whether a node puts zeros at the ends of rows, and calls of convolutions alone read what it makes."""
    operation, arguments = rewriting.operation(node)
    if operation != "pad" or not node.args or not node.users or not all(user in calls for user in node.users):
        return False
    zeros = zeros_around_maps(arguments)
    return zeros is not None and not any(zeros[:2])


def _as_row(operation: str, arguments: dict[str, Any]) -> nn.Conv2d | nn.ConvTranspose2d:
    """The 2-d convolution with the weights of a 1-d one."""

    def pair(name: str, along_rows: int) -> Any:
        value = per_axis(arguments.get(name), along_rows, axes=1)
        return value if isinstance(value, str) else (along_rows, *value)

    weight, bias, groups = arguments["weight"], arguments.get("bias"), arguments.get("groups") or 1
    first, second, size = weight.shape
    transposed = operation == "transposed"
    conv = (nn.ConvTranspose2d if transposed else nn.Conv2d)(
        *((first, second * groups) if transposed else (second * groups, first)),
        (1, size),
        pair("stride", 1),
        padding=pair("padding", 0),
        dilation=pair("dilation", 1),
        groups=groups,
        device="meta",
        **({"output_padding": pair("output_padding", 0)} if transposed else {}),
    )
    conv.weight = nn.Parameter(weight.detach().unsqueeze(2), requires_grad=False)
    conv.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
    return conv.eval()
