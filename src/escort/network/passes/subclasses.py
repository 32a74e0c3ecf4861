"""Convolutions whose class has a forward of its own, replaced by torch's where they compute the same.

Many models pad as TensorFlow does, by as many zeros as the input size asks for (timm's `Conv2dSame` and its like). Such
a convolution becomes one of torch's own, behind the zeros.
"""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from escort.layers import SamePad
from escort.network.check import Request
from escort.network.passes.rewriting import Rewriting
from escort.network.tracing.conv_types import behaviour, overrides, remade, standardises, unsupported
from escort.network.tracing.trace import shape_of


def rewrite(network: fx.GraphModule, request: Request) -> tuple[fx.GraphModule, dict[str, str]]:
    """Replaces subclasses of torch's convolutions in a graph by torch's own.

    Returns:
        The new network, and for every subclass that computes something else its name and the reason.
    """
    rewriting = Rewriting(network, request)
    found: dict[fx.Node, tuple[str, nn.Module]] = {}
    pads: dict[fx.Node, SamePad] = {}
    for node in rewriting.graph.nodes:
        module, name = rewriting.module(node), str(node.target)
        if not isinstance(module, nn.modules.conv._ConvNd) or not overrides(module):
            continue
        if reason := request.left_alone(name, module):
            rewriting.skipped[name] = reason
            continue
        inputs = (*node.args, *node.kwargs.values())
        if (noted := shape_of(inputs[0])) is not None and len(noted[0]) < module.weight.ndim:
            continue  # without samples
        is_hooked = module._forward_hooks or module._forward_pre_hooks
        kind = None if len(inputs) > 1 or is_hooked else behaviour(module)
        if kind is None:
            rewriting.skipped[name] = _reason(module)
            continue
        node.args, node.kwargs = inputs, {}  # its forward may have had a name of its own for it
        if kind == "plain":
            found[node] = name, remade(module, padding_mode=module.padding_mode)
        else:
            padding = constant_padding(module)
            found[node] = name, remade(module, padding=padding or 0)
            if padding is None:
                pads[node] = SamePad(module.kernel_size, module.stride, module.dilation)
    for node, call in zip(found, rewriting.put(found), strict=True):
        if node in pads:
            rewriting.call_before(call, f"{call.target}_pad", pads[node])
    return rewriting.finished(), rewriting.skipped


def _reason(module: nn.Module) -> str:
    """Why a subclass is left alone."""
    if not module._forward_hooks and standardises(module):
        return (
            f"{type(module).__name__} normalises its weight in every call, so that pruned weights do not stay zero; "
            "replace it by a convolution of torch.nn with the normalised weight, then prune that"
        )
    return str(unsupported(module))


def constant_padding(conv: Any) -> Any:
    """The padding argument that is "same" padding for inputs of any size, or None where it depends on the size."""
    axes = list(zip(conv.kernel_size, conv.stride, conv.dilation, strict=True))
    if any(stride > 1 and size > 1 for size, stride, _ in axes):
        return None
    totals = [(size - 1) * dilation for size, _, dilation in axes]
    if all(total % 2 == 0 for total in totals):
        return tuple(total // 2 for total in totals)
    return "same" if all(stride == 1 for _, stride, _ in axes) else None
