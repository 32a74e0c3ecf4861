"""What stands between convolutions, by our kernels for GPUs: norms, averages, gates, joins, resizing, linear layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from escort.layers import (
    AdaptiveAvgPool2d,
    AvgPool2d,
    Concat,
    FusedConv2d,
    Gate,
    LocalResponseNorm,
    MaxPool2d,
    Upsample,
)
from escort.layers.pool import POOLED_ON_GPU
from escort.network.check import Request
from escort.network.passes.classifiers import fuse_linears
from escort.network.passes.operations import OPERATIONS, mutates, replace_module
from escort.network.tracing.trace import shape_of
from escort.runtime.stand_in import runs_more

aten = torch.ops.aten
Layer = Callable[..., nn.Module]

_NORM, _AVERAGE = "size alpha beta k", "kernel_size stride padding ceil_mode count_include_pad divisor_override"
_RESIZE = "size scale_factor mode align_corners recompute_scale_factor"
#: The layer in the place of each of torch's, and the names of its arguments.
_MODULES: Mapping[type[nn.Module], tuple[Layer, str]] = {
    nn.LocalResponseNorm: (LocalResponseNorm, _NORM),
    nn.AvgPool2d: (AvgPool2d, _AVERAGE),
    nn.AdaptiveAvgPool2d: (AdaptiveAvgPool2d, "output_size"),
    **dict.fromkeys((nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d), (Upsample, _RESIZE)),
}
#: The same for functions, whose first argument is the input.
_FUNCTIONS: Mapping[Any, tuple[Layer, str]] = {
    F.interpolate: (Upsample, _RESIZE),
    F.local_response_norm: (LocalResponseNorm, _NORM),
    **dict.fromkeys((F.avg_pool2d, aten.avg_pool2d.default), (AvgPool2d, _AVERAGE)),
    **dict.fromkeys((F.adaptive_avg_pool2d, aten.adaptive_avg_pool2d.default), (AdaptiveAvgPool2d, "output_size")),
}
_JOINS = (torch.cat, torch.concat, aten.cat.default)
_MEANS = (torch.mean, aten.mean.dim, "mean")


def rewrite(network: fx.GraphModule, request: Request) -> tuple[fx.GraphModule, dict[str, str]]:
    """Replaces what our kernels compute in a graph, which is written to, where it runs on a GPU.

    Returns:
        The graph, and the linear layers that were measured and left alone.
    """
    if request.device.type != "cuda":
        return network, {}
    replace_modules(network)
    for node in list(network.graph.nodes):
        if node.op not in ("call_function", "call_method") or mutates(network, node):
            continue
        if node.target in _FUNCTIONS:
            _replace_function(network, node)
        elif node.target in _MEANS:
            _replace_mean(network, node)
        elif node.target in _JOINS:
            _replace_join(network, node)
        elif OPERATIONS.get(node.target, ("",))[0] == "product":
            _replace_product(network, node)
    left_alone = fuse_linears(network, request)
    _pass_through(network)
    network.graph.lint()
    network.recompile()
    return network, left_alone


def _pass_through(network: fx.GraphModule) -> None:
    """Lets adaptive pooling return its input where that has the pooled size already and nothing else reads it."""
    calls: dict[str, list[fx.Node]] = {}
    for node in network.graph.nodes:
        if node.op == "call_module" and type(network.get_submodule(node.target)) is AdaptiveAvgPool2d:
            calls.setdefault(node.target, []).append(node)
    for name, nodes in calls.items():
        sources = [node.args[0] for node in nodes]
        pool = network.get_submodule(name)
        if not runs_more(pool) and all(_is_made_for_one(network, source) for source in sources):
            replace_module(network, name, AdaptiveAvgPool2d(pool.output_size, aliases=True).eval())  # type: ignore[arg-type]


def _is_made_for_one(network: fx.GraphModule, node: Any) -> bool:
    """Whether a node makes a tensor of its own, which one other reads."""
    if not isinstance(node, fx.Node) or node.op != "call_module" or len(node.users) != 1:
        return False
    return type(network.get_submodule(str(node.target))) in (FusedConv2d, MaxPool2d)


def replace_modules(network: nn.Module) -> None:
    """Replaces the modules in a network, which is written to, unless hooks would be lost."""
    for name, module in list(network.named_modules()):
        if type(module) in _MODULES and not runs_more(module):
            layer, names = _MODULES[type(module)]
            settings = {key: getattr(module, key) for key in names.split()}
            replace_module(network, name, layer(**settings).eval())


def _replace_function(network: fx.GraphModule, node: fx.Node) -> None:
    """Puts a layer in the place of a function call, unless arguments of the call are computed."""
    layer, names = _FUNCTIONS[node.target]
    arguments = dict(zip(["input", *names.split()], node.args, strict=False)) | dict(node.kwargs)
    x = arguments.pop("input")
    if any(arguments.pop(key) for key in arguments.keys() - set(names.split())):
        return  # such as antialias
    if not any(isinstance(value, fx.Node) for value in _flat(arguments.values())) and isinstance(x, fx.Node):
        settings = {key: value for key, value in arguments.items() if value != []}  # aten's empty stride is the default
        _call(network, node, layer(**settings), (x,))


def _replace_mean(network: fx.GraphModule, node: fx.Node) -> None:
    """Puts a pooling layer in the place of an average over rows and columns."""
    arguments = dict(zip(("input", "dim", "keepdim"), node.args, strict=False)) | dict(node.kwargs)
    x, dim, keeps = arguments.get("input"), arguments.get("dim"), arguments.get("keepdim", False)
    noted = shape_of(x)
    if noted is None or len(noted[0]) != 4 or not noted[1].is_floating_point:
        return
    if arguments.keys() - {"input", "dim", "keepdim"}:
        return
    if not isinstance(dim, (list, tuple)) or not all(type(axis) is int for axis in dim):
        return
    if sorted(axis % 4 for axis in dim) != [2, 3] or type(keeps) is not bool:
        return
    users = list(node.users)
    _call(network, node, AdaptiveAvgPool2d(1), (x,))
    if keeps:
        return
    with network.graph.inserting_after(node):
        flat = network.graph.call_function(torch.flatten, (node, 1))
    flat.meta, node.meta = dict(node.meta), {}
    for user in users:
        user.replace_input_with(node, flat)


def _replace_product(network: fx.GraphModule, node: fx.Node) -> None:
    """Puts a gate in the place of a product of maps with one number for each of their channels."""
    operands: list[Any] = [*node.args, *node.kwargs.values()]
    shapes = [noted for noted in map(shape_of, operands) if noted is not None]
    if len(operands) != 2 or len(shapes) != 2:
        return
    (x, its_type), (gates, their_type) = shapes
    if tuple(gates)[2:] != (1, 1):
        operands, (x, gates) = operands[::-1], (gates, x)
    is_gated = len(x) == len(gates) == 4 and tuple(gates) == (*x[:2], 1, 1) and x[2] * x[3] > 1
    if is_gated and its_type == their_type and its_type.is_floating_point:
        _call(network, node, Gate(), tuple(operands))


def _replace_join(network: fx.GraphModule, node: fx.Node) -> None:
    """Puts a layer in the place of a concatenation of maps along their channels."""
    arguments = dict(zip(("tensors", "dim"), node.args, strict=False)) | dict(node.kwargs)
    parts, dim = arguments.pop("tensors", None), arguments.pop("dim", 0)
    if arguments or dim not in (1, -3) or not isinstance(parts, (list, tuple)) or len(parts) < 2:
        return
    noted = [shape_of(part) for part in parts]
    types = {None if each is None else (len(each[0]), each[1]) for each in noted}
    if len(types) == 1 and types <= {(4, dtype) for dtype in POOLED_ON_GPU}:
        _call(network, node, Concat(), tuple(parts))


def _call(network: fx.GraphModule, node: fx.Node, layer: nn.Module, args: tuple[Any, ...]) -> None:
    name = f"{node.name}_layer"
    network.add_submodule(name, layer.eval())
    node.op, node.target, node.args, node.kwargs = "call_module", name, args, {}


def _flat(values: Any) -> list[Any]:
    return [leaf for value in values for leaf in (_flat(value) if isinstance(value, (list, tuple)) else [value])]
