"""Max pooling by our kernel, lest it take longer than the convolutions around it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import fx, nn

from escort.layers import MaxPool2d
from escort.network.check import Request
from escort.network.passes.operations import replace_module
from escort.runtime.stand_in import runs_more

_FUNCTIONS = (F.max_pool2d, torch.max_pool2d, torch.ops.aten.max_pool2d.default)
_ARGUMENTS = "input kernel_size stride padding dilation ceil_mode return_indices".split()


def rewrite(network: fx.GraphModule, request: Request) -> tuple[fx.GraphModule, dict[str, str]]:
    """Replaces max pooling in a graph, which is written to; pooling that returns indices stays as it is.

    Returns:
        The graph, and no convolution that was left alone.
    """
    replace_modules(network)
    for node in network.graph.nodes:
        if node.op == "call_function" and node.target in _FUNCTIONS:
            _replace_function(network, node)
    network.recompile()
    return network, {}


def replace_modules(network: nn.Module) -> None:
    """Replaces the modules in a network, which is written to, unless hooks would be lost."""
    for name, module in list(network.named_modules()):
        if type(module) is nn.MaxPool2d and not (module.return_indices or runs_more(module)):
            sizes = module.kernel_size, module.stride, module.padding, module.dilation
            replace_module(network, name, MaxPool2d(*sizes, ceil_mode=module.ceil_mode).eval())


def _replace_function(network: fx.GraphModule, node: fx.Node) -> None:
    """Puts a module in the place of a function call, unless arguments of the call are computed."""
    arguments = dict(zip(_ARGUMENTS, node.args, strict=False)) | dict(node.kwargs)
    x = arguments.pop("input")
    if arguments.pop("return_indices", False) or any(isinstance(value, fx.Node) for value in arguments.values()):
        return
    name = f"{node.name}_pool"
    window = {key: value for key, value in arguments.items() if value != []}  # aten's empty stride is the default
    network.add_submodule(name, MaxPool2d(**window))  # type: ignore[arg-type]
    node.op, node.target, node.args, node.kwargs = "call_module", name, (x,), {}
