"""A network's graph in channels_last, which tensor cores read.

Every torch operator hands on the memory format of what it is given, so a network stays in channels_last from the first
convolution that is asked for it. What must change: a ``view`` of NCHW tensors is none of others; and where only our
convolutions read a tensor, the order of its channels is free, which makes the filters' :func:`escort.sparse.split`
leave little over.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import fx

from escort.fuse import FusedConv2d, mutates
from escort.methods.sparse_tc.tiling import ELEMENTS, Element
from escort.problem import Precision
from escort.sparse import StretchedCSR, spread_channels

_VIEWS = {"view": "reshape", torch.ops.aten.view.default: torch.ops.aten.reshape.default}
_LYING = ("as_strided", "view_as", "stride", "is_contiguous", "storage_offset", "data_ptr")


def precluded(network: fx.GraphModule, precision: Precision) -> str | None:
    """Why a network of FusedConv2d's is not tried in channels_last, or None where it is."""
    if precision not in ELEMENTS:
        return f"tensor cores multiply no {precision}"
    for node in network.graph.nodes:
        if node.op not in ("call_function", "call_method"):
            continue
        name = str(getattr(node.target, "__name__", node.target)).partition(".")[0]
        if name in _LYING or (name == "view" and any(isinstance(value, torch.dtype) for value in node.args)):
            return f"{node.name} depends on how a tensor lies"
        if node.target in _VIEWS and any(mutates(network, user) for user in node.users):
            return f"what {node.name} shows is written to"
    return None


def rewrite(network: fx.GraphModule, precision: Precision) -> fx.GraphModule:
    """A copy of a network, computing the same, for tensors in channels_last; nothing may have `precluded` it."""
    network = copy.deepcopy(network)
    for node in network.graph.nodes:
        if node.op in ("call_function", "call_method"):
            node.target = _VIEWS.get(node.target, node.target)
    network.recompile()
    for node in network.graph.nodes:
        _reorder(network, node, ELEMENTS[precision])
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def best_order(weights: Sequence[torch.Tensor], element: Element) -> torch.Tensor:
    """The order of their input channels, (C,) int64, for weights (K, C, R, S) that read the same tensor."""
    taps = torch.cat([weight.permute(0, 2, 3, 1).flatten(0, 2) for weight in weights])
    order = spread_channels(StretchedCSR.from_dense(taps[:, :, None, None]), element.kept, element.of)
    return torch.from_numpy(order).long().to(taps.device)


def _reorder(network: fx.GraphModule, node: fx.Node, element: Element) -> None:
    """Changes the order of the channels that a convolution writes, if convolutions alone read them."""
    writer, readers = _convolution(network, node), [_convolution(network, user) for user in node.users]
    if writer is None or writer.residual or writer.conv.groups > 1:
        return
    weights = [reader.conv.weight for reader in readers if reader is not None and reader.conv.groups == 1]
    if len(weights) < len(readers) or not weights or any(node in user.args[1:] for user in node.users):
        return
    channels = best_order(weights, element)
    with torch.no_grad():
        for tensor in (writer.conv.weight, writer.conv.bias):
            if tensor is not None:
                tensor.copy_(tensor[channels])
        for weight in weights:
            weight.copy_(weight[:, channels])


def _convolution(network: fx.GraphModule, node: fx.Node) -> FusedConv2d | None:
    module = network.get_submodule(str(node.target)) if node.op == "call_module" else None
    return module if isinstance(module, FusedConv2d) else None
