"""Batch norms that no convolution takes, with a concatenation before them and a ReLU behind: one pass over the maps."""

from __future__ import annotations

from collections import Counter

from torch import fx, nn

from escort.layers import Concat, NormedConcat
from escort.network.passes.operations import OPERATIONS, replace_module
from escort.runtime.stand_in import runs_more


def join_norms(network: fx.GraphModule) -> None:
    """Replaces such norms in a network in channels_last, which is written to. They keep their paths and tensors."""
    calls = Counter(node.target for node in network.graph.nodes if node.op == "call_module")
    for node in list(network.graph.nodes):
        norm = _called(network, node)
        if type(norm) is not nn.BatchNorm2d or calls[node.target] > 1 or norm.training or runs_more(norm):
            continue
        if norm.affine and norm.track_running_stats and len(node.args) == 1:
            _join(network, node, norm)
    network.graph.lint()
    network.recompile()


def _join(network: fx.GraphModule, node: fx.Node, norm: nn.BatchNorm2d) -> None:
    users = list(node.users)
    has_relu = len(users) == 1 and _is_relu(network, users[0], node)
    settings = norm.num_features, norm.eps, norm.momentum, True, True, "relu" if has_relu else "none"
    joined = NormedConcat(*settings)  # type: ignore[arg-type]
    joined._parameters, joined._buffers = norm._parameters, norm._buffers
    replace_module(network, str(node.target), joined.requires_grad_(False).eval())
    if has_relu:
        users[0].replace_all_uses_with(node)
        network.graph.erase_node(users[0])
    source = node.args[0]
    if isinstance(source, fx.Node) and type(_called(network, source)) is Concat and len(source.users) == 1:
        node.args = source.args
        network.graph.erase_node(source)


def _called(network: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    return network.get_submodule(str(node.target)) if node.op == "call_module" else None


def _is_relu(network: fx.GraphModule, node: fx.Node, of: fx.Node) -> bool:
    """Whether a node is a ReLU of another one and nothing else."""
    module = _called(network, node)
    key = node.target if module is None else type(module)
    is_plain = module is None or not runs_more(module)
    return OPERATIONS.get(key, ("",))[0] == "relu" and is_plain and node.args[:1] == (of,) and "out" not in node.kwargs
