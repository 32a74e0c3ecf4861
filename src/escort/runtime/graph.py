"""From a graph of torch.fx to the inputs, steps and output of a program."""

from __future__ import annotations

import inspect
import operator
from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.fx.graph import CodeGen, _PyTreeCodeGen
from torch.utils import _pytree as pytree

from escort.runtime.stand_in import runs_more
from escort.runtime.steps import REQUIRED, Input, Listing, Method, Step
from escort.runtime.templates import Slot, leaves, mapped

_IDENTITIES = (
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
    nn.Identity,
)
_DROPOUTS = (F.dropout, torch.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout)


def read(network: fx.GraphModule) -> tuple[Listing, dict[str, Any]]:
    """What :class:`escort.runtime.Program` is made of. Functions that give back their input in eval mode are left out.

    Raises:
        ValueError: where the network takes or returns what is no plain value or container.
    """
    reader = _Reader(network)
    for node in network.graph.nodes:
        reader.read(node)
    return Listing(tuple(reader.inputs), tuple(reader.steps), reader.output), reader.owned


class _Reader:
    def __init__(self, network: fx.GraphModule) -> None:
        self.network = network
        self.placeholders = [node for node in network.graph.nodes if node.op == "placeholder"]
        self.inputs = _inputs(network, self.placeholders)
        self.steps: list[Step] = []
        self.owned: dict[str, Any] = {}
        self.values: dict[fx.Node, Any] = {}  # slots, and tuples that are made of them
        self.output: Any = None

    def read(self, node: fx.Node) -> None:
        """Appends the step of a node, unless it gives back its input."""
        if node.op == "placeholder":
            self.values[node] = Slot(self.placeholders.index(node))
            return
        if node.op == "output":
            self.output = _output(self.network, self.template(node.args[0]))
            return
        if (source := _given_back(self.network, node)) is not None:
            self.values[node] = self.values[source]
            return
        target: Any = node.target
        if node.op in ("call_module", "get_attr"):
            self.owned[str(target)] = operator.attrgetter(str(target))(self.network)
        if node.op == "call_function" and isinstance(target, type) and hasattr(target, "_fields"):
            self.values[node] = target(*self.template(tuple(node.args)), **self.template(dict(node.kwargs)))
            return
        if target is OrderedDict:
            self.values[node] = OrderedDict(self.template(node.args[0]))
            return
        kind = {"call_module": "layer", "get_attr": "tensor"}.get(node.op, "call")
        target = Method(str(target)) if node.op == "call_method" else target
        kwargs = self.template({key: value for key, value in node.kwargs.items() if not _says_nothing(key, value)})
        args = self.template(tuple(node.args))
        self.steps.append(Step(kind, target, args, kwargs))  # type: ignore[arg-type]
        self.values[node] = Slot(len(self.inputs) + len(self.steps) - 1)

    def template(self, argument: Any) -> Any:
        return mapped(_plain(argument), lambda leaf: self.values[leaf] if isinstance(leaf, fx.Node) else leaf)


def _says_nothing(keyword: str, value: Any) -> bool:
    """Whether functions of torch pass a keyword on for nothing: the line that a warning blames, no tensor to write."""
    return keyword == "_stacklevel" or (keyword == "out" and value is None)


def _plain(argument: Any) -> Any:
    """An argument of a node with Python's own lists and dicts in the place of fx's."""
    if isinstance(argument, tuple) and hasattr(argument, "_fields"):
        return type(argument)(*map(_plain, argument))
    if isinstance(argument, tuple) and type(argument) is not torch.Size:
        return tuple(map(_plain, argument))
    if isinstance(argument, list):
        return [_plain(item) for item in argument]
    if isinstance(argument, dict):
        kind = OrderedDict if isinstance(argument, OrderedDict) else dict
        return kind([(key, _plain(item)) for key, item in argument.items()])
    return argument


def _given_back(network: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """The input that a node returns as it is in eval mode, if it is such a node."""
    if node.op == "call_module":
        module = network.get_submodule(str(node.target))
        if type(module) not in _IDENTITIES or runs_more(module):
            return None
    elif node.op != "call_function" or not _is_off(node):
        return None
    source = node.args[0] if node.args else node.kwargs.get("input")
    return source if isinstance(source, fx.Node) else None


def _is_off(node: fx.Node) -> bool:
    """Whether a function drops something out, but not now."""
    name = getattr(node.target, "__name__", "")
    if node.target not in _DROPOUTS and name != "stochastic_depth":
        return False
    if node.target is torch.dropout:
        training = node.kwargs.get("train", node.args[2] if len(node.args) > 2 else True)
    else:
        parameters = inspect.signature(node.target).parameters  # type: ignore[arg-type]
        given = dict(zip(parameters, node.args, strict=False)) | node.kwargs
        training = given.get("training", parameters["training"].default)
    return training is False


def _inputs(network: fx.GraphModule, placeholders: list[fx.Node]) -> list[Input]:
    codegen = network.graph._codegen
    if type(codegen) is CodeGen:
        return [_input(str(node.target), node) for node in placeholders]
    if not isinstance(codegen, _PyTreeCodeGen):
        raise ValueError(f"its inputs are packed as {type(codegen).__name__} says; convert fx.symbolic_trace(model)")
    # What is packed, by position and by name, with the numbers of the inputs in the place of tensors.
    packed = pytree.tree_unflatten(list(range(len(placeholders))), codegen.pytree_info.in_spec)
    is_call = isinstance(packed, tuple) and [type(item) for item in packed] == [tuple, dict]
    positional, named = packed if is_call else (packed, {})
    if not all(type(item) is int for item in (*positional, *named.values())):
        raise ValueError("its inputs are packed in containers; pass tensors one by one")
    names = [name for name in codegen.pytree_info.orig_args if name != "self"][: len(positional)]
    names += [str(name) for name in named]
    return [_input(name, node) for name, node in zip(names, placeholders, strict=True)]


def _input(name: str, node: fx.Node) -> Input:
    default = _plain(node.args[0]) if node.args else REQUIRED
    return Input(name, default, node.meta.get("shape"), node.meta.get("fixed", REQUIRED))


def _output(network: fx.GraphModule, output: Any) -> Any:
    spec = getattr(getattr(network.graph._codegen, "pytree_info", None), "out_spec", None)
    if spec is not None:
        output = pytree.tree_unflatten(output if isinstance(output, (tuple, list)) else [output], spec)
    for leaf in leaves(output):
        if pytree.tree_leaves(leaf) != [leaf] and leaf is not None and type(leaf) is not torch.Size:
            raise ValueError(f"its output holds a {type(leaf).__name__}; return tensors, tuples, lists or dicts")
    return output
