"""A network's graph in channels_last, which tensor cores read.

Torch's operators keep the memory format of their inputs, so a network stays in channels_last from the first convolution
that writes it; maps that it returns lie as the original's do. Two things change. A ``view`` becomes a ``reshape``: what
is a view in NCHW need not be one in channels_last. And where our convolutions alone write and read a tensor, its
channels get the order that suits the methods best (:func:`escort.methods.channel_order`). Tensors that are added have
one order.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from escort.layers import FusedConv2d
from escort.methods import channel_order
from escort.network.check import Request
from escort.network.passes.norms import join_norms
from escort.network.passes.operations import mutates
from escort.network.passes.squeezes import join_squeezes
from escort.network.tracing.trace import shape_of
from escort.planner.cores import on_all_cores
from escort.problem import MemoryFormat

aten = torch.ops.aten

_VIEWS = {"view": "reshape", aten.view.default: aten.reshape.default}
_PER_CHANNEL = (F.max_pool2d, torch.max_pool2d, aten.max_pool2d.default, F.avg_pool2d, aten.avg_pool2d.default)
_STRIDED = ("as_strided", "view_as", "stride", "is_contiguous", "storage_offset", "data_ptr")


def in_memory_formats(
    network: nn.Module, request: Request, expected: Sequence[Tensor]
) -> tuple[dict[MemoryFormat, nn.Module], dict[str, str]]:
    """The network for each memory format in which it is tried, and why it is not tried in one that a GPU could use.

    Args:
        expected: what the original returns, as it lies.
    """
    networks: dict[MemoryFormat, nn.Module] = {"contiguous": network}
    if request.device.type == "cpu":
        return networks, {}
    if reason := precluded(network, request):
        return networks, {"channels_last": reason}
    networks["channels_last"] = rewrite(network, request, expected)
    return networks, {}


def precluded(network: nn.Module, request: Request) -> str | None:
    """Why a network of FusedConv2d's is not tried in channels_last, or None where it is."""
    if not isinstance(network, fx.GraphModule):
        return "the model could not be traced"
    if channel_order([torch.ones(1, 1, 1, 1)], request.precision, str(request.device)) is None:
        return f"no method gains by it in {request.precision}"
    for node in network.graph.nodes:
        if node.op not in ("call_function", "call_method"):
            continue
        name = str(getattr(node.target, "__name__", node.target)).partition(".")[0]
        if name in _STRIDED or (name == "view" and any(isinstance(value, torch.dtype) for value in node.args)):
            return f"{node.name} depends on how a tensor lies"
        if node.target in _VIEWS and any(mutates(network, user) for user in node.users):
            return f"what {node.name} shows is written to"
    return None


def rewrite(network: nn.Module, request: Request, expected: Sequence[Tensor] = ()) -> nn.Module:
    """A copy of a network that computes the same in channels_last; :func:`precluded` must have had no objection.

    Args:
        expected: what the original returns. A caller may take views of maps that lie so.
    """
    assert isinstance(network, fx.GraphModule)
    network = copy.deepcopy(network)
    for node in network.graph.nodes:
        if node.op in ("call_function", "call_method"):
            node.target = _VIEWS.get(node.target, node.target)
    join_norms(network)
    join_squeezes(network)
    groups = [group for alike in _alike(network) if (group := _Group.of(network, alike)) is not None]
    # The order of its inputs is all that a filter's remainder depends on, so that no search waits for another.
    on_all_cores([partial(group.search, request) for group in groups])
    for group in groups:
        group.reorder()
    _return_as(network, expected)
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _return_as(network: fx.GraphModule, expected: Sequence[Tensor]) -> None:
    """Has maps that the original returns in NCHW returned so. What returns several at once is given such maps."""
    (output,) = network.graph.find_nodes(op="output")
    returned = [leaf for leaf in tree_leaves(output.args) if isinstance(leaf, fx.Node)]
    counts = [node.meta.get("holds", 1) for node in returned]
    if sum(counts) != len(expected):
        return
    rest = iter(expected)
    of_nodes = {node: [next(rest) for _ in range(count)] for node, count in zip(returned, counts, strict=True)}
    for node, tensors in of_nodes.items():
        are_maps = all(x.ndim == 4 and x.stride(3) < x.stride(1) for x in tensors)
        if node.meta.get("holds") and are_maps:
            _take_planes(network, node)
        elif shape_of(node) is not None and are_maps and tensors[0].is_contiguous():
            _replace_by_planes(network, output, node)
    network.recompile()


def _take_planes(network: fx.GraphModule, node: fx.Node) -> None:
    """Has a node take maps in NCHW, and so what makes the lists and tuples that it takes."""
    for source in node.all_input_nodes:
        shape = shape_of(source)
        if shape is not None and len(shape[0]) == 4:
            _replace_by_planes(network, node, source)
        elif source.meta.get("holds"):
            _take_planes(network, source)


def _replace_by_planes(network: fx.GraphModule, user: fx.Node, source: fx.Node) -> None:
    if source.op != "placeholder":
        with network.graph.inserting_before(user):
            user.replace_input_with(source, network.graph.call_method("contiguous", (source,)))


def _alike(network: fx.GraphModule) -> list[list[fx.Node]]:
    """The tensors of a network in groups whose channels must have one order, as tensors are added or pooled."""
    groups = {node: [node] for node in network.graph.nodes}
    for node in network.graph.nodes:
        source: Any = None
        if _convolution(network, node) is not None and len(node.args) > 1:
            source = node.args[1]  # what is added
        elif _is_per_channel(network, node):
            source = node.all_input_nodes[0]
        if source is not None and groups[source] is not groups[node]:
            groups[source] += groups[node]
            for other in groups[node]:
                groups[other] = groups[source]
    return list({id(group): group for group in groups.values()}.values())


@dataclass
class _Group:
    """Tensors whose channels have one order, which our convolutions alone write and read.

    Attributes:
        channels: the order that suits the readers best; None where any will do.
    """

    writers: list[FusedConv2d]
    readers: list[FusedConv2d]
    channels: torch.Tensor | None = None

    @classmethod
    def of(cls, network: fx.GraphModule, alike: list[fx.Node]) -> _Group | None:
        """The group of these tensors; None where their order must stay."""
        writers: list[FusedConv2d] = []
        readers: list[FusedConv2d] = []
        for node in alike:
            convolution = _convolution(network, node)
            if convolution is not None:
                writers.append(convolution)
            elif not _is_per_channel(network, node):
                return None
            for user in node.users:
                reader = _convolution(network, user)
                if reader is not None and user.args[0] is node:
                    readers.append(reader)
                elif reader is None and not _is_per_channel(network, user):
                    return None
        if not readers or any(convolution.conv.groups > 1 for convolution in writers + readers):
            return None
        return cls(writers, readers)

    def search(self, request: Request) -> None:
        weights = [reader.conv.weight.detach() for reader in self.readers]
        self.channels = channel_order(weights, request.precision, str(request.device))

    def reorder(self) -> None:
        if self.channels is None:
            return
        with torch.no_grad():
            for fused in {*self.writers, *self.readers}:
                fused.remember_weight()
            for writer in self.writers:
                for tensor in (writer.conv.weight, writer.conv.bias, writer.slope):
                    if tensor is not None:
                        tensor.copy_(tensor[self.channels])
            for reader in self.readers:
                reader.conv.weight.copy_(reader.conv.weight[:, self.channels])


def _convolution(network: fx.GraphModule, node: fx.Node) -> FusedConv2d | None:
    module = network.get_submodule(str(node.target)) if node.op == "call_module" else None
    return module if isinstance(module, FusedConv2d) else None


def _is_per_channel(network: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node computes each channel from the same one of its input."""
    if node.op == "call_module":
        return isinstance(network.get_submodule(str(node.target)), nn.MaxPool2d | nn.AvgPool2d | nn.ReLU | nn.ReLU6)
    return node.op == "call_function" and node.target in _PER_CHANNEL
