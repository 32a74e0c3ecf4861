"""A model of 16-bit numbers computed in float32, as CPUs do. It takes and returns tensors of its own type still."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.fx.node import map_aggregate

from escort.network.original import plain_copy
from escort.network.tracing.trace import shape_of

#: The methods that make tensors of these types.
_CONVERSIONS = {torch.float16: "half", torch.bfloat16: "bfloat16"}


def rewrite(network: fx.GraphModule, narrow: torch.dtype) -> fx.GraphModule:
    """A graph that computes in float32 what a graph of tensors with shapes computes in a type of 16 bits.

    Tensors of that type are converted where they enter the graph, and back where they leave it. Those that it holds
    are float32 ones of the same numbers, and what makes such tensors in between makes float32 ones.
    """
    result: Any = plain_copy(network)
    result._apply(lambda tensor: tensor.float() if tensor.dtype is narrow else tensor)
    graph: fx.Graph = result.graph
    output = next(node for node in graph.nodes if node.op == "output")
    computed: set[fx.Node] = set()
    for node in list(graph.nodes):
        if node.op not in ("placeholder", "output"):
            _compute_wide(node, narrow)
        noted = shape_of(node)
        if noted is None or noted[1] is not narrow:
            continue
        if node.op == "placeholder":
            _convert_behind(graph, node, output)
        else:
            computed.add(node)
            node.meta["shape"] = noted[0], torch.float32
    with graph.inserting_before(output):
        leaving = {node: graph.call_method("to", (node, narrow)) for node in output.all_input_nodes if node in computed}
    output.args = fx.map_arg(output.args, lambda node: leaving.get(node, node))
    result.recompile()
    return result


def _compute_wide(node: fx.Node, narrow: torch.dtype) -> None:
    """Lets a node make float32 tensors where it says that it makes such of a narrow type."""

    def widened(value: Any) -> Any:
        return torch.float32 if value is narrow else value

    node.args, node.kwargs = (map_aggregate(arguments, widened) for arguments in (node.args, node.kwargs))  # type: ignore[assignment]
    if node.op == "call_method" and node.target == _CONVERSIONS[narrow]:
        node.target = "float"


def _convert_behind(graph: fx.Graph, node: fx.Node, output: fx.Node) -> None:
    """Lets whatever reads a node's result read it in float32, but for the output, which returns it as it came."""
    behind = node.next
    while behind.op == "placeholder":
        behind = behind.next
    with graph.inserting_before(behind):
        wide = graph.call_method("to", (node, torch.float32))
    wide.meta["shape"] = node.meta["shape"][0], torch.float32
    node.replace_all_uses_with(wide, delete_user_cb=lambda user: user not in (wide, output))
