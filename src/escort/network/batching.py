"""Depth first: a batch run through a network a few samples at a time, so that activations stay in cache.

Layer by layer, a batch of large samples writes and reads every activation from memory; sample by sample the next layer
finds it in cache. That is only the same computation if no operation mixes samples, which is decided here.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.utils._pytree import tree_map

from escort.layers import MaxPool2d, SamePad, SparseConv2d
from escort.network.tracer import has_hooks

# Modules and functions that treat each sample for itself, whatever their arguments.
_MODULES = (
    SparseConv2d,
    MaxPool2d,
    SamePad,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool2d,
    nn.AvgPool2d,
    nn.BatchNorm2d,
    nn.Conv2d,
    nn.Dropout,
    nn.Hardsigmoid,
    nn.Hardswish,
    nn.Identity,
    nn.Linear,
    nn.LocalResponseNorm,
    nn.MaxPool2d,
    nn.ReLU,
    nn.ReLU6,
    nn.SiLU,
    nn.Sigmoid,
)
_FUNCTIONS = {
    F.adaptive_avg_pool2d,
    F.avg_pool2d,
    F.dropout,
    F.hardsigmoid,
    F.hardswish,
    F.max_pool2d,
    F.relu,
    F.relu6,
    F.sigmoid,
    F.silu,
    operator.add,
    operator.iadd,
    operator.mul,
    torch.add,
    torch.mul,
    torch.pixel_shuffle,
    torch.relu,
    torch.sigmoid,
    "relu",
    "sigmoid",
}


def mixing(network: nn.Module) -> str | None:
    """Why the samples of a batch cannot be run apart from each other, or None where they can."""
    if not isinstance(network, fx.GraphModule):
        return "the network could not be traced"
    inputs = [node for node in network.graph.nodes if node.op == "placeholder"]
    if sum("constant" not in node.meta for node in inputs) != 1:
        return "the network takes several inputs"
    for node in network.graph.nodes:
        if node.op in ("placeholder", "output") or "constant" in node.meta:
            continue
        if not _keeps_apart(network, node):
            return f"{node.format_node()} may mix samples"
    return None


def _keeps_apart(network: fx.GraphModule, node: fx.Node) -> bool:
    # Operands other than activations and plain numbers could carry a batch of their own.
    if node.op == "get_attr":
        return False
    if node.op == "call_module":
        module = network.get_submodule(str(node.target))
        if has_hooks(module) or (isinstance(module, nn.BatchNorm2d) and module.running_mean is None):
            return False  # hooks may do anything, and such a norm computes with the statistics of the batch
        return type(module) in _MODULES or (type(module) is nn.Flatten and module.start_dim == 1)
    if node.target in (torch.flatten, "flatten"):
        return _argument(node, 1, "start_dim", 0) >= 1
    if node.target is torch.unflatten:
        return _argument(node, 1, "dim", 0) == 1
    if node.target is torch.permute:
        return _argument(node, 1, "dims", (1,))[0] == 0
    if node.target is operator.getitem:
        index = _argument(node, 1, "index", None)
        return isinstance(index, tuple) and index[0] == slice(None)
    if node.target in (torch.cat, torch.concat):
        return _argument(node, 1, "dim", 0) == 1
    if node.target in (torch.mean, "mean"):
        dims = _argument(node, 1, "dim", 0)
        return all(dim > 0 for dim in (dims if isinstance(dims, (tuple, list)) else (dims,)))
    return node.target in _FUNCTIONS


def _argument(node: fx.Node, position: int, name: str, default: Any) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def run_in_parts(network: Callable[[torch.Tensor], Any], x: torch.Tensor, samples: int) -> Any:
    """``network(x)``, for a network that does not mix samples, `samples` of them at a time.

    x: (N, ...). The parts of every output tensor are joined along the batch.
    """

    def joined(*parts: Any) -> Any:
        return torch.cat(parts) if isinstance(parts[0], torch.Tensor) else parts[0]

    return tree_map(joined, *(network(part) for part in x.split(samples)))
