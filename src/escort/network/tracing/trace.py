"""From a model to graphs: of the whole, or of as many of its modules as can be traced."""

from __future__ import annotations

import inspect
import operator
import traceback
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.graph import CodeGen, _PyTreeCodeGen
from torch.fx.immutable_collections import immutable_dict, immutable_list
from torch.utils._pytree import tree_map_only, tree_unflatten

from escort.network.example import Example
from escort.network.tracing.conv_types import is_leaf
from escort.network.tracing.state import State, same_draws
from escort.network.tracing.tracer import Call, Tracer
from escort.network.values import difference, tensors_of
from escort.runtime import Program
from escort.runtime.stand_in import adopt, is_patched

#: What makes a new tensor of its operands.
_ARITHMETIC = (operator.add, operator.sub, operator.mul, operator.truediv, torch.add, torch.sub, torch.mul, torch.div)
_NOT_THE_MODEL = (str(Path(torch.__file__).parent), str(Path(__file__).parent), "<")  # in a traceback


class Untraceable(Exception):  # noqa: N818 - it says what the module is
    """torch.fx cannot turn this module into a graph; the message says why."""


def trace(model: nn.Module, example: Example, stateful: frozenset[str] = frozenset()) -> tuple[nn.Module, str | None]:
    """`model` as a graph whose nodes know their shapes on the example, or with graphs in the place of some modules.

    A module that is a graph already, such as ``torch.export.load(path).module()``, keeps its graph.

    Args:
        model: a plain copy, in eval mode, whose modules become part of the result.
        stateful: the paths of those modules that a call changes; their forwards run as they are.

    Returns:
        The network, an fx.GraphModule if the whole could be traced, and why it could not, or None.
    """
    tracing = _Tracing(model, example, stateful)
    while tracing.gives_up():
        pass
    return tracing.assembled(model), tracing.reasons.get(model)


def shape_of(node: Any) -> tuple[torch.Size, torch.dtype] | None:
    """The shape and type of a node's result on the example, as :func:`trace` noted it; None for anything else."""
    return node.meta.get("shape") if isinstance(node, fx.Node) else None


@dataclass
class _Tracing:
    """Which modules of a model are replaced by which graphs.

    Attributes:
        calls: how each module is called on the example, or why no graph can take such calls.
        known: the graphs of modules, as far as they were asked for; None for modules that stay as they are.
        reasons: why they stay.
    """

    model: nn.Module
    example: Example
    stateful: frozenset[str]
    calls: dict[nn.Module, Call | ValueError] = field(default_factory=dict)
    known: dict[nn.Module, fx.GraphModule | None] = field(default_factory=dict)
    reasons: dict[nn.Module, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.state = State(self.model)
        for path in self.stateful:
            module = self.model.get_submodule(path)
            self.known[module], self.reasons[module] = None, "its forward changes what it keeps in itself"
        hooks = [module.register_forward_pre_hook(self.note, with_kwargs=True) for module in self.model.modules()]
        with _removed(hooks):
            self.example.run(self.model)

    def note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call: Call | ValueError
        try:
            call = Call.of(module, args, kwargs)
        except ValueError as error:
            call = error
        if self.calls.setdefault(module, call) != call:
            self.calls[module] = ValueError("it is called in several ways")

    def graph(self, module: nn.Module) -> fx.GraphModule | None:
        if module not in self.known:
            self.known[module] = None
            if is_patched(module):
                self.reasons[module] = f"{type(module).__name__}: code of its own is called instead of its forward"
            elif module in self.calls and (module is self.model or not _is_elementary(module)):
                try:
                    self.known[module] = self.traced(module)
                except Untraceable as error:
                    self.reasons[module] = str(error)
        return self.known[module]

    def traced(self, module: nn.Module) -> fx.GraphModule:
        """A graph in which modules that cannot be traced are called as they are.

        Modules that are called in ways that no graph of their own can take, with a list of tensors for example, are
        traced as part of this one where that is possible.
        """
        before = self.leaves(module)
        try:
            return self.attempt(module, before)
        except Untraceable:
            for inner in _inner(module):
                self.graph(inner)
            leaves = self.leaves(module)
            if len(leaves) == len(before):
                raise
        forwards = [leaf for leaf in leaves if leaf in before or not isinstance(self.calls.get(leaf), ValueError)]
        if len(before) < len(forwards) < len(leaves):
            with suppress(Untraceable):
                return self.attempt(module, forwards)
        return self.attempt(module, leaves)

    def leaves(self, module: nn.Module) -> list[nn.Module]:
        return [inner for inner in _inner(module) if inner in self.known and self.known[inner] is None]

    def attempt(self, module: nn.Module, leaves: list[nn.Module]) -> fx.GraphModule:
        try:
            if isinstance(module, fx.GraphModule):
                return _with_plain_arguments(module)
            call = self.calls[module]
            if isinstance(call, ValueError):
                raise call
            if module is not self.model and any(type(value) in (int, float) for value in call.constants.values()):
                raise ValueError("it is called with a number, which may depend on the size of the input")
            root = _Alone(module) if is_leaf(module) else module
            tracer = Tracer(call, inspect.signature(module.forward), leaves)
            graph = tracer.trace(root)
            if tracer.refused is not None:
                raise tracer.refused
            _make_constants_anew(graph)
            _read_before_convolutions(graph, root)
            graph._tracer_cls = None  # a copy out of a pickle is traced by torch.fx alone
            traced = fx.GraphModule(root, graph, type(module).__name__)
            Program.of(traced)  # raises for what no program can hold
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a model's forward may raise anything
            raise Untraceable(_explain(module, error)) from error
        finally:
            if kept := self.state.with_proxies(module):
                self.state.restore(self.model)
        if kept:
            raise Untraceable(f"{type(module).__name__}: its forward sets {', '.join(kept)}")
        return traced

    def used(self, module: nn.Module) -> Iterator[nn.Module]:
        """The modules inside of one, itself included, that are replaced by graphs."""
        graph = self.graph(module)
        if graph is not None:
            yield module
        for inner in module.children() if graph is None else self.called(graph).values():
            yield from self.used(inner)

    def called(self, graph: fx.GraphModule) -> dict[str, nn.Module]:
        """The modules that a graph calls and that have an inside, by their paths."""
        paths = dict.fromkeys(str(node.target) for node in graph.graph.nodes if node.op == "call_module")
        modules = {path: graph.get_submodule(path) for path in paths}
        return {path: module for path, module in modules.items() if not _is_layer(module)}

    def gives_up(self) -> bool:
        """Runs the model, and each graph on what its module gets; gives up graphs that compute something else.

        fx takes ``x += y`` for ``x = x + y``, which differs where x is also known by another name.

        Returns:
            Whether there was one, so that the modules inside of it may have graphs of their own.
        """
        graphs = {module: self.known[module] for module in self.used(self.model)}
        checks = {m: _Check(graph, bool(self.stateful)) for m, graph in graphs.items() if graph is not None}
        hooks = []
        for module, check in checks.items():
            hooks.append(module.register_forward_pre_hook(check.before, with_kwargs=True, prepend=True))
            hooks.append(module.register_forward_hook(check.behind, with_kwargs=True))
        with _removed(hooks), same_draws():
            self.example.run(self.model)
        wrong = {module: check.error for module, check in checks.items() if check.error is not None}
        for module, error in wrong.items():
            self.known[module], self.reasons[module] = None, _explain(module, error)
        return bool(wrong)

    def assembled(self, module: nn.Module) -> nn.Module:
        """The module with everything in it replaced that has a graph."""
        graph = self.known.get(module)
        if graph is None:
            for name, child in module._modules.items():
                if child is not None:
                    module._modules[name] = self.assembled(child)
            return module
        for path, child in self.called(graph).items():
            if not isinstance(child, fx.GraphModule):
                graph.set_submodule(path, self.assembled(child))
        if graph is not module:
            adopt(graph, module)
        return graph


class _Alone(nn.Module):
    """A convolution as a whole model."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.conv(*args, **kwargs)


class _Check:
    """Whether a graph computes what its module does, found out while that is called."""

    def __init__(self, graph: fx.GraphModule, stateful: bool) -> None:
        self.graph, self.stateful = graph, stateful
        self.error: Exception | None = None
        self._inputs: Any = None
        self._state: State | None = None
        self._is_done = False

    def before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self._inputs is None and not self._is_done:
            self._inputs = tree_map_only(Tensor, Tensor.clone, (args, kwargs))
            self._state = State(module) if self.stateful else None

    def behind(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self._is_done:
            return
        self._is_done = True  # before the graph calls modules that are checked themselves
        (args, kwargs), self._inputs = self._inputs, None
        after = None
        if self._state is not None:
            after = State(module)
            self._state.restore(module)
        try:
            _keep_types(self.graph, output)
            if problem := difference(_run_noting_shapes(self.graph, args, kwargs), output):
                raise ValueError(f"its graph computes something else: {problem}")
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            self.error = error
        if after is not None:
            after.restore(module)


def _keep_types(graph: fx.GraphModule, output: Any) -> None:
    """Makes a graph return ordered dicts where its module does; fx takes them for plain ones."""

    def kept(value: Any, argument: Any) -> Any:
        if isinstance(value, dict) and isinstance(argument, dict) and value.keys() == argument.keys():
            items = {key: kept(value[key], argument[key]) for key in value}
            return graph.graph.call_function(OrderedDict, (items,)) if type(value) is OrderedDict else items
        if type(value) in (list, tuple) and isinstance(argument, list | tuple) and len(value) == len(argument):
            return type(value)(kept(*pair) for pair in zip(value, argument, strict=True))
        return argument

    node = next(node for node in graph.graph.nodes if node.op == "output")
    with graph.graph.inserting_before(node):
        node.args = (kept(output, node.args[0]),)
    graph.recompile()


#: What a convolution's output has of its input.
_KEPT = ("ndim", "dtype", "device")


def _make_constants_anew(graph: fx.Graph) -> None:
    """Copies, in each run, the tensors that a forward makes of nothing where they may be written to or returned."""
    for node in list(graph.nodes):
        if node.op != "get_attr" or not str(node.target).startswith("_tensor_constant"):
            continue
        if all(user.op == "call_function" and user.target in _ARITHMETIC for user in node.users):
            continue
        users = list(node.users)
        with graph.inserting_after(node):
            copied = graph.call_function(torch.clone, (node,))
        for user in users:
            user.replace_input_with(node, copied)


def _read_before_convolutions(graph: fx.Graph, module: nn.Module) -> None:
    """Lets what a convolution's output has of its input be read from the input, as a norm does that checks dimensions.

    Only what computes with the output still needs it then, and can be fused.
    """
    for node in graph.nodes:
        while (x := _input_of_convolution(node, module)) is not None:
            node.replace_input_with(node.args[0], x)


def _input_of_convolution(read: fx.Node, module: nn.Module) -> fx.Node | None:
    """The input of the convolution from whose output a node reads what both have; else None."""
    is_read = read.op == "call_function" and read.target is getattr and read.args[1] in _KEPT
    is_read |= read.op == "call_method" and read.target == "dim"
    conv = read.args[0] if is_read else None
    if not isinstance(conv, fx.Node) or conv.op != "call_module":
        return None
    is_convolution = isinstance(module.get_submodule(str(conv.target)), nn.modules.conv._ConvNd)
    return conv.args[0] if is_convolution and conv.args else None  # type: ignore[return-value]


class _Shapes(fx.Interpreter):
    """Runs a graph as its code does. A node notes the shape and type of its result, or how many tensors it holds."""

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> tuple[Any, Any]:
        args, kwargs = super().fetch_args_kwargs_from_env(n)
        return _plain(args), _plain(kwargs)

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            n.meta["shape"] = result.shape, result.dtype
        else:
            n.meta["holds"] = len(tensors_of(result))
        return result


def _plain(value: Any) -> Any:
    """The lists and dicts of a graph, which nobody may change, as its code makes them for a module that does."""
    if isinstance(value, immutable_list):
        return [_plain(item) for item in value]
    if isinstance(value, immutable_dict):
        return {key: _plain(item) for key, item in value.items()}
    return tuple(map(_plain, value)) if type(value) is tuple else value


def _run_noting_shapes(graph: fx.GraphModule, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    beyond = _placeholders(graph.graph)[len(args) :]
    named = [kwargs[str(node.target)] if node.target in kwargs else node.args[0] for node in beyond]
    return _Shapes(graph).run(*args, *named)


def _placeholders(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.op == "placeholder"]


def _with_plain_arguments(module: fx.GraphModule) -> fx.GraphModule:
    """A graph that takes and returns what the module does, where it takes tensors packed by pytree."""
    graph = module.graph
    if isinstance(graph._codegen, _PyTreeCodeGen):
        info = graph._codegen.pytree_info
        if len(_placeholders(graph)) != len(info.orig_args):
            raise ValueError("it takes tensors in lists or dicts")
        if info.out_spec is not None:
            output = next(node for node in graph.nodes if node.op == "output")
            output.args = (tree_unflatten(list(output.args[0]), info.out_spec),)
        graph.set_codegen(CodeGen())
        module.recompile()
    return module


def _is_layer(module: nn.Module) -> bool:
    """Whether a module is a convolution or another layer of torch, which graphs call."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return True
    return type(module).__module__.startswith(("torch.nn.", "torch.ao.nn.")) and not isinstance(module, nn.Sequential)


def _is_elementary(module: nn.Module) -> bool:
    """Whether a graph of a module would show nothing new. Other convolutions are rewritten in graphs."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return type(module) is nn.Conv2d and module.padding_mode == "zeros"
    return _is_layer(module)


def _inner(module: nn.Module) -> list[nn.Module]:
    return [inner for inner in module.modules() if inner is not module]


def _explain(module: nn.Module, error: Exception) -> str:
    reason = str(error).strip().partition("\n\n")[0] or type(error).__name__  # fx appends the whole node
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(_NOT_THE_MODEL)]
    where = f" (at {frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line})" if frames else ""
    return f"{type(module).__name__}: {reason}{where}"


@contextmanager
def _removed(hooks: list[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
