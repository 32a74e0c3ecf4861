"""Linear layers of few samples, as behind a network's convolutions: by a kernel of ours where that is faster."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import fx, nn

from escort.layers import FusedLinear
from escort.layers.planes.base import Planes
from escort.layers.planes.linear import ACTIVATIONS
from escort.layers.pool import POOLED_ON_GPU
from escort.network.check import Request
from escort.network.passes.operations import OPERATIONS, mutates, replace_module, uses_of_paths
from escort.network.tracing.trace import shape_of
from escort.planner.timing import race_on_gpu
from escort.problem import Activation
from escort.runtime.stand_in import runs_more

_FLATTENS = (torch.flatten, torch.ops.aten.flatten.using_ints, "flatten")
#: Of a layer that was measured and stays torch's.
SLOWER = "is faster by torch: the kernel for few samples takes"


def fuse_linears(network: fx.GraphModule, request: Request) -> dict[str, str]:
    """Joins linear layers of few samples with a flattening before them and an activation behind them.

    A network on a GPU is written to. Modules keep their paths and share their tensors with those that they replace.

    Returns:
        The layers that stay torch's as they were measured to be faster so, or were by the plan that is followed.
    """
    slower: dict[str, str] = {}
    uses = uses_of_paths(network)
    for node in list(network.graph.nodes):
        linear = network.get_submodule(node.target) if node.op == "call_module" else None
        if type(linear) is not nn.Linear or linear.bias is None or runs_more(linear) or uses[node.target] > 1:
            continue
        noted = shape_of(node.args[0]) if len(node.args) == 1 and not node.kwargs else None
        if noted is None or noted[1] not in POOLED_ON_GPU or noted[1] != linear.weight.dtype or len(noted[0]) != 2:
            continue
        last, name = _activation(network, node)
        maps = _flattened(network, cast(fx.Node, node.args[0]))
        layer = FusedLinear.of(linear, name, flattens=maps is not None)
        shape = torch.Size((*noted[0], 1, 1)) if maps is None else cast(Any, shape_of(maps))[0]
        planned = None if request.pinned is None else request.pinned.skipped.get(str(node.target), "")
        reason = _measured(layer, shape) if planned is None else planned if planned.startswith(SLOWER) else None
        if reason is not None:
            slower |= {str(node.target): reason} if reason else {}
            continue
        replace_module(network, str(node.target), layer)
        if maps is not None:
            flat = cast(fx.Node, node.args[0])
            node.args = (maps,)
            network.graph.erase_node(flat)
        if last is not node:
            last.replace_all_uses_with(node)
            network.graph.erase_node(last)
    return slower


def _activation(network: fx.GraphModule, node: fx.Node) -> tuple[fx.Node, Activation]:
    """What alone reads a node and is an activation that the kernel has, and which; else the node, and none."""
    user = next(iter(node.users)) if len(node.users) == 1 else node
    key: Any = user.target
    if user.op == "call_module":
        module = network.get_submodule(key)
        key = None if runs_more(module) else type(module)
    name = OPERATIONS.get(key, ("",))[0]
    if user is node or name not in ACTIVATIONS or "out" in user.kwargs or user.all_input_nodes != [node]:
        return node, "none"
    return user, name


def _flattened(network: fx.GraphModule, flat: fx.Node) -> fx.Node | None:
    """The maps that a node flattens, where a layer alone reads the result; None where it does something else."""
    options: Any = None
    if flat.op == "call_module":
        module = network.get_submodule(str(flat.target))
        if type(module) is nn.Flatten and not runs_more(module):
            options = {"start_dim": module.start_dim, "end_dim": module.end_dim}
    elif flat.op in ("call_function", "call_method") and flat.target in _FLATTENS:
        options = dict(zip(("input", "start_dim", "end_dim"), flat.args, strict=False)) | dict(flat.kwargs)
    if options is None or len(flat.users) != 1 or not flat.all_input_nodes:
        return None
    maps, between = flat.all_input_nodes[0], flat.next
    noted = shape_of(maps)
    if noted is None or len(noted[0]) != 4 or options.get("start_dim", 0) != 1 or options.get("end_dim", -1) != -1:
        return None
    while between not in flat.users:
        if mutates(network, between):
            return None  # perhaps the maps
        between = between.next
    return maps


def _measured(layer: FusedLinear, shape: torch.Size) -> str | None:
    """Why a layer stays torch's, an empty text where the kernel does not take it; None where the kernel is faster."""
    weight = layer.weight
    if not weight.is_cuda:  # it is rewritten for a GPU that is not there, and runs as torch does
        return None
    if layer.work(layer.settings(), Planes(tuple(shape), weight.dtype, weight.device, is_last=False)) is None:
        return ""
    x = torch.randn(shape, device=weight.device).to(weight.dtype)
    # Which way maps will lie is not known yet: those in NHWC the kernel transposes, and torch copies.
    lying = [x, x.to(memory_format=torch.channels_last)] if layer.flattens else [x.flatten(1)]
    for each in lying:
        ways = [lambda each=each: layer(each), lambda each=each: layer.by_torch(each.flatten(1))]
        ours, torchs = race_on_gpu(ways, weight.device, budget_s=0.1)
        if ours.time_us is None or torchs.time_us is None:
            return ours.reason or ""
        if ours.time_us > torchs.time_us:
            return f"{SLOWER} {ours.time_us / torchs.time_us:.2f} of its time"
    return None
