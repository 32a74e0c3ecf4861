"""A copy of a network's graph that a pass rewrites, and what all passes ask of it."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Collection, Mapping
from itertools import count
from typing import Any

import torch
from torch import fx, nn

from escort.network.check import Request
from escort.network.passes.operations import FROZEN, OPERATIONS, TENSORS, attach, fold_scale, may_be_view, mutates
from escort.network.tracing.conv_types import own_type, unsupported
from escort.network.tracing.trace import shape_of
from escort.runtime.stand_in import runs_more


class Rewriting:
    """A graph that is rewritten in place, and why convolutions in it were left alone.

    The network that it was copied from stays as it is. The two share the modules that no pass replaces.

    Attributes:
        request: what was asked for.
        root: what holds the modules and tensors of the graph.
        graph: is rewritten.
        skipped: the convolutions that were left alone, by name, and the reasons.
        constants: nodes that depend on no input.
    """

    def __init__(self, network: fx.GraphModule, request: Request) -> None:
        self.request, self.skipped, self.constants = request, dict[str, str](), set[fx.Node]()
        self.graph = copy.deepcopy(network.graph)
        self.root = fx.GraphModule(network, self.graph, type(network).__name__)
        self._find_constants()
        self.eliminate_dead_code()

    def finished(self) -> fx.GraphModule:
        """The rewritten network in eval mode, which holds only what its graph still refers to."""
        self.eliminate_dead_code()
        result = fx.GraphModule(self.root, self.graph, type(self.root).__name__)
        result.graph.lint()
        return result.eval()

    def eliminate_dead_code(self) -> None:
        def has_effect(node: fx.Node) -> bool:
            # fx by itself removes an in-place operation whose result is not used, such as the statement `x.relu_()`,
            # and keeps an exported program's assertions on its weights, which have been checked by now.
            settled = node.op == "call_function" and self.constants.issuperset(node.all_input_nodes or (node,))
            return mutates(self.root, node) or (node.is_impure() and not settled)

        self.graph.eliminate_dead_code(has_effect)

    def module(self, node: fx.Node) -> nn.Module | None:
        return self.root.get_submodule(str(node.target)) if node.op == "call_module" else None

    def original(self, node: fx.Node) -> nn.Module | None:
        """The module of the user's model that a node calls, or that another pass put the node in the place of."""
        original: nn.Module | None = node.meta.get("original")
        return self.module(node) if original is None else original

    def operation(self, node: fx.Node) -> tuple[str, dict[str, Any]]:
        """What `node` does and its arguments by name, constant weights and statistics as tensors."""
        module = self.module(node)
        key = node.target if node.op in ("call_function", "call_method") else own_type(module)
        name, names = OPERATIONS.get(key, ("", ("input",)))
        arguments = dict(zip(names, node.args, strict=False)) | node.kwargs
        if module is not None and name:
            if runs_more(module) and unsupported(module) is not None:
                return "", {}
            arguments |= {name: getattr(module, name, None) for name in names[1:]}
        elif name in ("conv", "transposed", "linear", "norm", "prelu"):
            arguments |= {key: self.value(arguments[key]) for key in TENSORS if key in arguments}
        if name == "conv" and arguments.pop("transposed", False):
            name = "transposed"
        return name, arguments

    def is_settled(self, arguments: Mapping[str, Any]) -> bool:
        """Whether nothing but the input of an operation is computed from the network's inputs."""
        nodes: list[fx.Node] = []
        fx.map_arg({key: value for key, value in arguments.items() if key != "input"}, nodes.append)
        return not nodes

    def put(self, modules: Mapping[fx.Node, tuple[str, nn.Module]]) -> dict[fx.Node, nn.Module]:
        """Puts a module, under a name like the one given, in the place of each node.

        Returns:
            The nodes that call the modules now, on what the old ones' first arguments were.
        """
        for node in modules:  # they let go of their weights, whose owners' names may then be free
            node.args, node.kwargs = node.args[:1] or (node.kwargs["input"],), {}
        self.eliminate_dead_code()
        taken = self._targets(modules)
        bases = {base for base, _ in modules.values()}  # what calls F.conv2d may have convolutions inside of it
        originals = [self.original(node) for node in modules]  # before another module has their name
        calls: dict[fx.Node, nn.Module] = {}
        for (node, (base, module)), original in zip(modules.items(), originals, strict=True):
            name = _free(base, taken | (bases - {base}))
            taken.add(name)
            attach(self.root, name, module)
            with self.graph.inserting_before(node):
                call = self.graph.call_module(name, node.args)
            call.meta = node.meta | {"original": original}
            self.merge(node, call)
            calls[call] = module
        return calls

    def call_before(self, node: fx.Node, base: str, module: nn.Module) -> None:
        """Lets a module, under a name like `base`, change what `node` takes."""
        name = _free(base, self._targets())
        attach(self.root, name, module)
        with self.graph.inserting_before(node):
            changed = self.graph.call_module(name, node.args)
        note_shape(changed, module)
        node.args = (changed,)

    def _targets(self, beside: Collection[fx.Node] = ()) -> set[str]:
        """The names of the modules and tensors that nodes, beside some, refer to."""
        nodes = (node for node in self.graph.nodes if node.op in ("call_module", "get_attr") and node not in beside)
        return {str(node.target) for node in nodes}

    def merge(self, node: fx.Node, into: fx.Node) -> None:
        node.replace_all_uses_with(into)
        self.graph.erase_node(node)

    def fold_norm(self, node: fx.Node, arguments: Mapping[str, Any], conv: nn.Conv2d, times: int = 1) -> bool:
        """Moves a batch norm into the convolution whose result it normalises; False where it does something else.

        Args:
            node: the norm; where this succeeds, its uses become those of its input.
            times: for each channel of the norm the convolution has so many, one after the other.
        """
        weight, bias, mean, variance = (arguments.get(key) for key in TENSORS)
        if arguments.get("training") or mean is None or variance is None:
            return False  # it uses the statistics of the batch
        if not self.is_settled(arguments):
            return False  # it depends on another input
        items = list(node.users) if node.target is FROZEN else []  # (output, saved mean, saved deviation), both empty
        if any(item.target is not operator.getitem or item.args[1] != 0 for item in items):
            return False
        scale = (variance.double() + arguments.get("eps", 1e-5)).rsqrt()
        scale = scale if weight is None else scale * weight.double()
        shift = (0.0 if bias is None else bias.double()) - mean.double() * scale
        if not fold_scale(conv, scale.repeat_interleave(times), shift.repeat_interleave(times)):
            return False
        for merged in (*items, node):
            self.merge(merged, node if merged in items else arguments["input"])
        return True

    def _find_constants(self) -> None:
        """Marks what depends on no input: attributes and numbers of dimensions, and what is computed from them.

        So a masked weight is one, and what a model asserts about dimensions, which keeps no norm from fusing then.
        """
        are_written = written(self.root, self.graph)
        for node in self.graph.nodes:
            inputs = node.all_input_nodes
            if node in are_written:
                continue
            computed = node.op in ("call_function", "call_method") and not (
                node.is_impure() or mutates(self.root, node)
            )
            is_constant = computed and inputs and self.constants.issuperset(inputs)
            if node.op == "get_attr" or is_constant or _rank(node) is not None:
                self.constants.add(node)

    def value(self, argument: Any) -> Any:
        """The value of a constant node; any other argument as it is."""
        if argument not in self.constants:
            return argument
        if (rank := _rank(argument)) is not None:
            return rank
        if argument.op == "get_attr":
            return operator.attrgetter(argument.target)(self.root)
        args, kwargs = fx.map_arg((argument.args, argument.kwargs), self.value)
        with torch.no_grad():
            if argument.op == "call_function":
                return argument.target(*args, **kwargs)
            return getattr(args[0], argument.target)(*args[1:], **kwargs)


def written(root: fx.GraphModule, graph: fx.Graph) -> set[fx.Node]:
    """The nodes of a graph that another one writes to, and what these are views of."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        pending = list(node.all_input_nodes) if mutates(root, node) else []
        while pending:
            source = pending.pop()
            if source not in found:
                found.add(source)
                pending += source.all_input_nodes[:1] if may_be_view(source) else []
    return found


def note_shape(node: fx.Node, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Notes the shape of what a new node makes by a function of its first argument, where that one's is known."""
    if (noted := shape_of(node.args[0])) is not None:
        result = function(torch.empty(noted[0], dtype=noted[1], device="meta"))
        node.meta["shape"] = result.shape, result.dtype


def _free(base: str, taken: set[str]) -> str:
    """`base`, or with a number behind it, whichever names nothing and nothing around something."""
    names = (f"{base}_{i}" if i else base for i in count())
    return next(name for name in names if not any(t == name or t.startswith(name + ".") for t in taken))


def _rank(node: fx.Node) -> int | None:
    """The dimensions of a tensor, for a node that computes their number; None for any other."""
    asks = node.target is getattr and node.args[1:] == ("ndim",)
    asks |= node.op == "call_method" and node.target in ("dim", "ndimension")
    shape = shape_of(node.args[0]) if asks else None
    return None if shape is None else len(shape[0])
