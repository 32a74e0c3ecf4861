"""Fusing: a convolution, zeros in front of it, and what runs behind it become one module.

Behind it run batch norm, residual add and activation.

The fused network computes what the graph computes in eval mode, and each 2-d convolution in it is a
:class:`escort.layers.FusedConv2d` under the convolution's own qualified name.
"""

from __future__ import annotations

from operator import add
from typing import Any, cast, get_args

import torch
from torch import Tensor, fx, nn

from escort.layers import FusedConv2d
from escort.network.check import Request
from escort.network.passes.operations import CONV, convolution_name, mutates, new_conv2d, zeros_around_maps
from escort.network.passes.rewriting import Rewriting
from escort.network.tracing.conv_types import not_2d, unsupported
from escort.network.tracing.trace import shape_of
from escort.problem import Activation
from escort.runtime.stand_in import adopt, has_hooks


def rewrite(graph_module: fx.GraphModule, request: Request) -> tuple[fx.GraphModule, dict[str, str]]:
    """Replaces every 2-d convolution by a :class:`FusedConv2d` with what runs in front of it and behind.

    A convolution called several times becomes several modules: `name`, `name_1`, ... Residual adds are fused where the
    nodes carry shapes, as tracing leaves them. `graph_module` is left as it is; the result shares with it the modules
    that are not convolutions.

    Returns:
        The new graph module in eval mode, and for every convolution left alone its name and the reason.
    """
    fuser = _Fuser(graph_module, request)
    fuser.replace_convolutions()
    for node in list(fuser.graph.nodes):
        fuser.absorb(node)
    return fuser.finished(), fuser.skipped


class _Fuser(Rewriting):
    """A graph that is rewritten in place, and the fused convolutions in it."""

    def __init__(self, network: fx.GraphModule, request: Request) -> None:
        super().__init__(network, request)
        self.fused: dict[fx.Node, FusedConv2d] = {}

    def replace_convolutions(self) -> None:
        """Puts a fused convolution in the place of each, and notes why others are left alone."""
        convolutions: dict[fx.Node, tuple[str, nn.Module]] = {}
        for node in list(self.graph.nodes):
            operation, arguments = self.operation(node)
            if reason := self.obstacle(node, operation, arguments):
                self.skipped[convolution_name(node)] = reason
                continue
            if operation != "conv":
                continue
            weight, bias, *geometry = (arguments.get(key) for key in CONV[1:])
            name = convolution_name(node)
            conv = new_conv2d(cast(Tensor, weight).clone(), None if bias is None else bias.clone(), *geometry)
            if reason := self.request.left_alone(name, self.original(node) or conv):
                self.skipped[name] = reason
                continue
            fused = FusedConv2d(conv)
            if (module := self.module(node)) is not None:
                adopt(fused, module)
            convolutions[node] = name, fused
        self.fused = cast(dict[fx.Node, FusedConv2d], self.put(convolutions))

    def obstacle(self, node: fx.Node, operation: str, arguments: dict[str, Any]) -> str | None:
        """Why a convolution must be left alone, or None; None for everything else too."""
        module, weight = self.module(node), arguments.get("weight")
        if isinstance(module, nn.modules.conv._ConvNd):
            reason = unsupported(module)
        elif operation not in ("conv", "transposed"):
            return None
        elif not self.is_settled(arguments):
            return "its weight, bias or geometry depends on the input; make them constants of the model"
        else:
            reason = not_2d(cast(Tensor, weight).ndim - 2, operation == "transposed")
        shape = shape_of(arguments.get("input"))
        if shape is not None and isinstance(weight, Tensor) and len(shape[0]) < weight.ndim < 5:
            reason = f"its input has shape {tuple(shape[0])}; add a batch dimension"
        return reason

    def absorb(self, node: fx.Node) -> None:
        """Moves what `node` does into the convolution that it follows, where that computes the same."""
        operation, arguments = self.operation(node)
        source: Any = arguments.get("input")
        if operation == "identity" and not arguments.get("training", True) and isinstance(source, fx.Node):
            self.merge(node, source)
        elif operation == "norm" and self.is_open(source) and not self.fused[source].residual:
            self.fused[source].remember_weight()
            self.fold_norm(node, arguments, self.fused[source].conv)
        elif operation == "add":
            self.absorb_add(node, arguments)
        elif operation == "pad" and isinstance(source, fx.Node):
            self.absorb_pad(node, source, zeros_around_maps(arguments))
        elif operation and self.is_open(source):
            self.absorb_activation(node, source, operation, arguments)

    def absorb_activation(self, node: fx.Node, conv: fx.Node, operation: str, arguments: dict[str, Any]) -> None:
        found = _activation(operation, arguments, self.fused[conv].conv)
        if found is not None and "out" not in arguments:
            self.fused[conv].activate_by(*found)
            self.merge(node, conv)

    def absorb_pad(self, node: fx.Node, source: fx.Node, zeros: tuple[int, int, int, int] | None) -> None:
        """Lets convolutions add the zeros that a pad adds, if they alone read it: they pad while they read."""
        if zeros is None or not node.users or not all(self.pads_itself(user, node) for user in node.users):
            return
        pending, between = set(node.users), node.next
        while pending:
            if mutates(self.root, between):
                return  # perhaps to what was copied before
            pending.discard(between)
            between = between.next
        for user in node.users:
            fused = self.fused[user]
            top, bottom, left, right = map(add, fused.zeros, zeros)
            fused.zeros = top, bottom, left, right
        self.merge(node, source)
        if self.operation(source)[0] == "pad":
            self.absorb(source)  # until now a pad read it

    def pads_itself(self, user: fx.Node, pad: fx.Node) -> bool:
        """Whether a node is a convolution that a pad's result is the input of, and nobody looks at that input."""
        return user in self.fused and user.args == (pad,) and not has_hooks(self.fused[user])

    def absorb_add(self, node: fx.Node, arguments: dict[str, Any]) -> None:
        left: Any = arguments.get("input")
        right: Any = arguments.get("other")
        if left is right or shape_of(left) is None or shape_of(left) != shape_of(right):
            return  # the same operand twice, or a scalar, a broadcast, a promotion
        if arguments.get("alpha", 1) != 1 or "out" in arguments:
            return
        candidates = [n for n in (left, right) if self.is_open(n) and not self.fused[n].residual]
        if not candidates:
            return
        conv: fx.Node = max(candidates)  # the last in the graph: the other operand exists by then
        residual = left if conv is right else right
        if residual in self.constants:
            return  # it has the example's batch size for ever: the shapes agree by chance
        if mutates(self.root, node) and not (left in self.fused and len(left.users) == 1):
            return  # another node may read the operand that is written to; the fused sum is a new tensor
        between = conv.next
        while between is not node:
            if mutates(self.root, between):
                return  # perhaps to what the convolution reads, which moves down to the add
            between = between.next
        node.prepend(conv)
        conv.args = (conv.args[0], residual)
        self.fused[conv].residual = True
        self.merge(node, conv)

    def is_open(self, node: Any) -> bool:
        """Whether `node` is a fused convolution to which its only user may be added."""
        if node not in self.fused or len(node.users) != 1:
            return False
        return self.fused[node].activation == "none" and not has_hooks(self.fused[node])


#: The activations that bound, by their least and their largest value.
_BOUNDS: dict[tuple[Any, Any], Activation] = {(0.0, 6.0): "relu6", (0.0, None): "relu"}


def _activation(
    operation: str, arguments: dict[str, Any], conv: nn.Conv2d
) -> tuple[Activation, float, Tensor | None] | None:
    """Activation, slope and slopes of the epilogue that an operation behind a convolution is; None for any other."""
    name: Any = operation
    match operation:
        case "leaky_relu":
            slope = arguments.get("negative_slope", 0.01)
            is_number = type(slope) in (int, float) and abs(slope) <= torch.finfo(torch.float32).max
            return ("leaky_relu", float(slope), None) if is_number else None
        case "prelu":
            slopes = arguments.get("weight")
            if not isinstance(slopes, Tensor) or slopes.numel() not in (1, conv.out_channels):
                return None
            return ("prelu", 0.0, slopes.flatten()) if bool(torch.isfinite(slopes).all()) else None
        case "gelu":
            name = {"none": "gelu", "tanh": "gelu_tanh"}.get(arguments.get("approximate", "none"))
        case "hardtanh":
            name = _BOUNDS.get((arguments.get("min_val", -1.0), arguments.get("max_val", 1.0)))
        case "clamp":
            name = _BOUNDS.get((arguments.get("min"), arguments.get("max")))
    return (name, 0.0, None) if name in get_args(Activation) else None
