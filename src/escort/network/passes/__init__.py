"""What rewrites a network before its layers are planned, one file per pass.

A pass takes a graph and the request. It returns the graph that takes its place, and the convolutions that it left alone
with the reasons; of several reasons the first counts. Passes return a graph of their own, so that the original can be
compared with the result; `pool` and `planes`, which stand behind all of them, write to the graph that they get.

Two are not in PASSES: with `channels_last` and without it the network is tried, and `widen` comes first where a CPU is
given a model of 16 bits.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import fx, nn

from escort.network.check import Request
from escort.network.passes import activations, fuse, linear, padding, planes, pool, rows, subclasses, transposed
from escort.network.passes.operations import replace_module
from escort.network.tracing.graphs import graphs
from escort.runtime.stand_in import adopt

Pass = Callable[[fx.GraphModule, Request], tuple[fx.GraphModule, dict[str, str]]]

#: The passes that every network goes through, in this order. Those before `fuse` make 2-d convolutions of torch.
PASSES: tuple[Pass, ...] = (
    activations.rewrite,
    subclasses.rewrite,
    padding.rewrite,
    rows.rewrite,
    transposed.rewrite,
    linear.rewrite,
    fuse.rewrite,
    pool.rewrite,
    planes.rewrite,
)


def rewrite(network: nn.Module, request: Request) -> tuple[nn.Module, dict[str, str]]:
    """Sends all graphs of a network through the passes.

    Returns:
        The network, which is written to unless it is a graph, and the convolutions that were left alone, and why.
    """
    skipped: dict[str, str] = {}
    for path, graph in graphs(network):
        prefix = f"{path}." if path else ""
        result = graph
        for each in PASSES:
            result, left_alone = each(result, request.inside(prefix))
            skipped = {prefix + name: reason for name, reason in left_alone.items()} | skipped
        adopt(result, graph)
        if not path:
            network = result
        else:
            replace_module(network, path, result)
    pool.replace_modules(network)
    if request.device.type == "cuda":
        planes.replace_modules(network)
    return network, skipped
