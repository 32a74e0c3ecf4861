"""Fusing: a convolution and what runs behind it (batch norm, residual add, activation) become one module.

The fused network computes what the graph computes in eval mode, and each 2-d convolution in it is a
:class:`escort.network.fused.FusedConv2d` under the convolution's own qualified name.
"""

from __future__ import annotations

import copy
import operator
import re
from dataclasses import dataclass, field
from itertools import count
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from escort.network.check import Request
from escort.network.fused import FusedConv2d, unsupported
from escort.network.passes.operations import (
    CONV,
    FROZEN,
    OPERATIONS,
    TENSORS,
    attach,
    convolution_name,
    fold_scale,
    mutates,
    new_conv2d,
)
from escort.network.trace import shape_of
from escort.network.tracer import adopt, has_hooks

_NOT_2D = "it is transposed or not 2-d"


def rewrite(graph_module: fx.GraphModule, request: Request) -> tuple[fx.GraphModule, dict[str, str]]:
    """Replaces every 2-d convolution by a :class:`FusedConv2d` with what runs behind it.

    A convolution called several times becomes several modules: `name`, `name_1`, ... Residual adds are fused where the
    nodes carry shapes, as :func:`escort.network.trace.trace` leaves them. `graph_module` is left as it is; the result
    shares with it the modules that are not convolutions.

    Returns:
        The new graph module in eval mode, and for every convolution left alone its name and the reason.
    """
    graph = copy.deepcopy(graph_module.graph)
    fuser = _Fuser(request, fx.GraphModule(graph_module, graph), graph)
    fuser.find_constants()
    fuser.eliminate_dead_code()
    fuser.replace_convolutions()
    for node in list(graph.nodes):
        fuser.absorb(node)
    fuser.eliminate_dead_code()
    # A new module takes over only what the graph still refers to.
    result = fx.GraphModule(fuser.root, graph, type(graph_module).__name__)
    result.graph.lint()
    return result.eval(), fuser.skipped


@dataclass
class _Fuser:
    """A graph that is rewritten in place, the fused convolutions in it, and why others are none."""

    request: Request
    root: fx.GraphModule
    graph: fx.Graph
    fused: dict[fx.Node, FusedConv2d] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    constants: set[fx.Node] = field(default_factory=set)

    def eliminate_dead_code(self) -> None:
        def has_effect(node: fx.Node) -> bool:
            # fx by itself removes an in-place operation whose result is not used, such as the statement `x.relu_()`,
            # and keeps an exported program's assertions on its weights, which have been checked by now.
            settled = node.op == "call_function" and self.constants.issuperset(node.all_input_nodes or (node,))
            return mutates(self.root, node) or (node.is_impure() and not settled)

        self.graph.eliminate_dead_code(has_effect)

    def operation(self, node: fx.Node) -> tuple[str, dict[str, Any]]:
        """What `node` does and its arguments by name, constant weights and statistics as tensors."""
        module = self.module(node)
        key = node.target if node.op in ("call_function", "call_method") else type(module)
        if isinstance(module, nn.Conv2d):
            key = nn.Conv2d  # a subclass, perhaps; obstacle() tells whether it computes the same
        name, names = OPERATIONS.get(key, ("", ("input",)))
        arguments = dict(zip(names, node.args, strict=False)) | node.kwargs
        if module is not None and name:
            if has_hooks(module) and name != "conv":
                return "", {}
            arguments |= {name: getattr(module, name, None) for name in names[1:]}
        elif name in ("conv", "norm"):
            arguments |= {key: self.value(arguments[key]) for key in TENSORS if key in arguments}
        return name, arguments

    def replace_convolutions(self) -> None:
        convolutions = self.take_convolutions()
        rest = [node for node in self.graph.nodes if node not in convolutions]
        taken = {str(node.target) for node in rest if node.op in ("call_module", "get_attr")}
        bases = {base for base, _ in convolutions.values()}
        for node, (base, conv) in convolutions.items():
            names = (f"{base}_{i}" if i else base for i in count())
            # A module that calls F.conv2d with a weight of its own may have convolutions inside of it.
            others = taken | (bases - {base})
            name = next(n for n in names if not any(t == n or t.startswith(n + ".") for t in others))
            taken.add(name)
            module = FusedConv2d(conv)
            if (original := self.module(node)) is not None:
                adopt(module, original)
            attach(self.root, name, module)
            with self.graph.inserting_before(node):
                call = self.graph.call_module(name, node.args)
            call.meta = node.meta
            self.fused[call] = module
            self.merge(node, call)

    def take_convolutions(self) -> dict[fx.Node, tuple[str, nn.Conv2d]]:
        """The convolutions to replace, by name; their nodes let go of the weights. Notes why others are left alone."""
        convolutions: dict[fx.Node, tuple[str, nn.Conv2d]] = {}
        for node in list(self.graph.nodes):
            operation, arguments = self.operation(node)
            if reason := self.obstacle(node, operation, arguments):
                self.skipped[convolution_name(node)] = reason
                continue
            if operation != "conv":
                continue
            weight, *others = (arguments.get(key) for key in CONV[1:])
            name, conv = convolution_name(node), new_conv2d(cast(Tensor, weight), *others)
            if reason := self.request.left_alone(name, self.module(node) or conv):
                self.skipped[name] = reason
                continue
            convolutions[node] = name, conv
            node.args, node.kwargs = (arguments["input"],), {}
        self.eliminate_dead_code()
        return convolutions

    def obstacle(self, node: fx.Node, operation: str, arguments: dict[str, Any]) -> str | None:
        """Why a convolution must be left alone, or None; None for everything else too."""
        module = self.module(node)
        if isinstance(module, nn.modules.conv._ConvNd):
            reason = unsupported(module)
        elif operation == "conv":
            inputs: list[fx.Node] = []
            fx.map_arg({**arguments, "input": None}, inputs.append)
            if inputs:
                reason = f"its weight, bias or geometry depends on the input through {inputs[0]}"
            else:
                reason = _NOT_2D if arguments["weight"].ndim != 4 or arguments.get("transposed") else None
        elif node.op == "call_function" and re.match(r"conv(\dd|_transpose)", getattr(node.target, "__name__", "")):
            reason = _NOT_2D
        else:
            return None
        shape = shape_of(arguments.get("input"))
        if reason is None and shape is not None and len(shape[0]) != 4:
            reason = f"its input has shape {tuple(shape[0])}; add a batch dimension"
        return reason

    def absorb(self, node: fx.Node) -> None:
        """Moves what `node` does into the convolution that it follows, where that computes the same."""
        operation, arguments = self.operation(node)
        source: Any = arguments.get("input")
        if operation == "identity" and not arguments["training"] and isinstance(source, fx.Node):
            self.merge(node, source)
        elif operation == "norm" and self.is_open(source) and not self.fused[source].residual:
            self.absorb_norm(node, source, arguments)
        elif operation == "add":
            self.absorb_add(node, arguments)
        elif operation and self.is_open(source):
            limits = arguments.get("min_val", -1.0), arguments.get("max_val", 1.0)
            if operation == "hardtanh" and limits == (0.0, 6.0):
                operation = "relu6"
            if operation in ("relu", "relu6"):
                self.fused[source].activation = "relu" if operation == "relu" else "relu6"
                self.merge(node, source)

    def absorb_norm(self, node: fx.Node, source: fx.Node, arguments: dict[str, Any]) -> None:
        weight, bias, mean, variance = (arguments.get(key) for key in TENSORS)
        if arguments.get("training") or mean is None or variance is None:
            return  # it uses the statistics of the batch
        if any(isinstance(value, fx.Node) for key, value in arguments.items() if key != "input"):
            return  # it depends on another input
        items = list(node.users) if node.target is FROZEN else []  # (output, saved mean, saved deviation), both empty
        if any(item.target is not operator.getitem or item.args[1] != 0 for item in items):
            return
        scale = (variance.double() + arguments.get("eps", 1e-5)).rsqrt()
        scale = scale if weight is None else scale * weight.double()
        shift = (0.0 if bias is None else bias.double()) - mean.double() * scale
        self.fused[source].remember_weight()
        if fold_scale(self.fused[source].conv, scale, shift):
            for merged in (*items, node):
                self.merge(merged, node if merged in items else source)

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

    def merge(self, node: fx.Node, into: fx.Node) -> None:
        node.replace_all_uses_with(into)
        self.graph.erase_node(node)

    def module(self, node: fx.Node) -> nn.Module | None:
        return self.root.get_submodule(str(node.target)) if node.op == "call_module" else None

    def find_constants(self) -> None:
        """Marks what depends on no input: attributes, and what is computed from them, such as a masked weight."""
        for node in self.graph.nodes:
            inputs = node.all_input_nodes
            computed = node.op in ("call_function", "call_method") and not (
                node.is_impure() or mutates(self.root, node)
            )
            if node.op == "get_attr" or (computed and inputs and self.constants.issuperset(inputs)):
                self.constants.add(node)

    def value(self, argument: Any) -> Any:
        """The value of a constant node; any other argument as it is."""
        if argument not in self.constants:
            return argument
        if argument.op == "get_attr":
            return operator.attrgetter(argument.target)(self.root)
        args, kwargs = fx.map_arg((argument.args, argument.kwargs), self.value)
        with torch.no_grad():
            if argument.op == "call_function":
                return argument.target(*args, **kwargs)
            return getattr(args[0], argument.target)(*args[1:], **kwargs)
