"""``torch.compile(model, backend="escort")``: each graph that Dynamo cuts out of a model is converted on its own.

Dynamo hands a backend graphs in which the model's weights are inputs. They become tensors of the graph again, under the
names that the model has them by, so that a conversion finds convolutions whose weights are constants.
"""

from __future__ import annotations

import copy
import inspect
import logging
import re
import threading
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import attrgetter, is_
from typing import Any, get_args

import torch
from torch import Tensor, fx, nn

from escort.network.check import Request, settle_effort, settle_favor, settle_methods, settle_skip
from escort.network.convert import convert
from escort.network.model import ConvertedModel
from escort.network.passes.operations import OPERATIONS
from escort.network.passes.rewriting import Rewriting, written
from escort.problem import Precision

_log = logging.getLogger(__name__)
#: What `options` of torch.compile may hold: what a conversion can be asked for, and who wants to see its plan.
_OPTIONS = frozenset(inspect.signature(convert).parameters) - {"model", "example_inputs", "example_kwargs"} | {
    "on_plan"
}
#: How often one graph is converted before it is taken for one whose weights go on changing.
_MOST_CONVERSIONS = 8
#: What Dynamo notes of inputs that are a module's parameters, buffers and other tensors.
_STATIC = "_dynamo_static_input_type"
_PATH = re.compile(r"_(?:modules|parameters|buffers)\['([^']+)'\]")
_LAYERS = ("conv", "transposed", "linear")
_version = attrgetter("_version")


def backend(
    graph: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """The backend that torch.compile knows as "escort", by this package's entry point.

    A graph is converted in its first call, with weights as they are then. Where one of them is written to or replaced
    later, the graph is converted anew. A graph that needs gradients, trains, or cannot be converted runs as it is, and
    a warning says so; one without layers to convert does so without a warning.

    Args:
        graph: what Dynamo cut out.
        example_inputs: of the graph, weights and sizes among them.
        options: the arguments of :func:`escort.convert` by name (``skip`` and plans name layers as the model does);
            ``on_plan`` is called with the plan of each converted graph.
        mode: there is none; `options` has what can be asked for.

    Raises:
        ValueError, TypeError: for an option that there is not.
    """
    if mode is not None:
        raise ValueError(f'backend "escort" has no mode {mode!r}; pass options={{"effort": "best"}}, say')
    asked = dict(options or {})
    device = next((x.device for x in example_inputs if isinstance(x, Tensor)), torch.device("cpu"))
    _check(asked, device)
    reason = _why_not(graph, example_inputs)
    if reason:
        warnings.warn(f'a graph of torch.compile(..., backend="escort") runs as it is: {reason}', stacklevel=2)
    if reason is not None:
        return graph.forward
    return _Converted(graph, asked)


def _check(asked: Mapping[str, Any], device: torch.device) -> None:
    """Raises ValueError or TypeError for options that no graph could be converted with."""
    if unknown := ", ".join(sorted(asked.keys() - _OPTIONS)):
        raise ValueError(f'backend "escort" has no option {unknown}; it takes {", ".join(sorted(_OPTIONS))}')
    settle_effort(asked.get("effort", "fast"))
    settle_methods(asked.get("methods"), device)
    settle_favor(asked.get("favor"), device)
    settle_skip(asked.get("skip"))
    if asked.get("precision") not in (None, *get_args(Precision)):
        raise ValueError(f"precision is one of {get_args(Precision)}, got {asked['precision']!r}")


def _why_not(graph: fx.GraphModule, example_inputs: Sequence[Any]) -> str | None:
    """Why a graph is not converted; None where it is, and empty where there is nothing in it to convert."""
    operations = [_operation(node) for node in graph.graph.nodes]
    if not any(name in _LAYERS for name, _ in operations):
        return ""
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in example_inputs):
        return (
            "its weights or inputs need gradients, and converted layers have none; call the model under "
            "torch.inference_mode() or torch.no_grad()"
        )
    placeholders = graph.graph.find_nodes(op="placeholder")
    sizes = _sizes(placeholders)
    for place, node in enumerate(placeholders):
        if isinstance(node.meta.get("example_value"), torch.SymInt | torch.SymFloat) and place not in sizes:
            return f"its input {node.name} is a number that changes, and conversion fixes numbers; pass it as a tensor"
    for name, arguments in operations:
        uses_batch = name == "norm" and arguments.get("running_mean") is None
        if arguments.get("training") is True and not uses_batch:
            return "it is in training mode; call model.eval()"
    return None


def _operation(node: fx.Node) -> tuple[str, dict[str, Any]]:
    """What a node does and its arguments by name, as far as conversion knows it."""
    if node.op not in ("call_function", "call_method"):
        return "", {}
    name, names = OPERATIONS.get(node.target, ("", ()))
    return name, dict(zip(names, node.args, strict=False)) | node.kwargs


class _Converted:
    """A graph of Dynamo's that is converted when it is first called, and whenever its weights changed.

    Attributes:
        graph: as Dynamo cut it out.
        asked: the options of the conversion.
    """

    def __init__(self, graph: fx.GraphModule, asked: dict[str, Any]) -> None:
        self.graph = graph
        self.asked = dict(asked)
        self._on_plan = self.asked.pop("on_plan", None)
        placeholders = graph.graph.find_nodes(op="placeholder")
        is_written = written(graph, graph.graph)
        self._names: dict[int, str] = {}
        for place, node in enumerate(placeholders):
            if _STATIC in node.meta.get("tensor_dict", {}) and node not in is_written:
                self._names[place] = _name(node, self._names.values())
        self._sizes = _sizes(placeholders)
        left = self._names.keys() | self._sizes.keys()
        self._inputs = [place for place in range(len(placeholders)) if place not in left]
        self._frozen = _Frozen()
        self._returned: dict[int, Tensor] = {}
        self._network: ConvertedModel | None = None
        self._is_left = False  # as it is
        self._conversions = 0
        self._turn = threading.Lock()

    def __call__(self, *args: Any) -> Any:
        weights = [args[place] for place in self._names]
        if not self._is_left and not self._frozen.holds(weights):
            with self._turn:
                if not self._is_left and not self._frozen.holds(weights):
                    self._convert(args, weights)
        if self._is_left or self._network is None:
            return self.graph(*args)
        outputs = self._network(*[args[place] for place in self._inputs])
        if not self._returned:
            return outputs
        computed = iter(outputs)
        count = len(outputs) + len(self._returned)
        return tuple(self._returned[i] if i in self._returned else next(computed) for i in range(count))

    def _convert(self, args: Sequence[Any], weights: list[Tensor]) -> None:
        if self._conversions == _MOST_CONVERSIONS:
            self._leave(f"its weights changed {_MOST_CONVERSIONS} times; convert the model once they stay")
            return
        if self._conversions:
            _log.warning("weights of a compiled graph changed: it is converted anew")
        self._conversions += 1
        try:
            model, returned = self._with_weights(weights)
            network = convert(model, tuple(args[place] for place in self._inputs), **self.asked)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of whatever the graph calls
            self._leave(str(error))
            return
        self._network, self._returned = network, returned
        self._frozen = _Frozen(weights, returned.values())
        plan = network.plan
        _log.info("converted a graph of %d layers: %s", len(plan.layers), plan.reason or f"{plan.speedup:.2f}x as fast")
        if self._on_plan is not None:
            self._on_plan(plan)

    def _leave(self, reason: str) -> None:
        warnings.warn(f'a graph of torch.compile(..., backend="escort") runs as it is: {reason}', stacklevel=4)
        self._is_left, self._network, self._frozen = True, None, _Frozen()

    def _with_weights(self, weights: list[Tensor]) -> tuple[fx.GraphModule, dict[int, Tensor]]:
        """The graph with weights as tensors of its own, and sizes read off the inputs that have them.

        Returns:
            The graph without those of its outputs that depend on weights alone, such as a weight with a mask applied,
            which a module keeps; and these by their place.
        """
        graph = copy.deepcopy(self.graph.graph)
        placeholders = graph.find_nodes(op="placeholder")
        root = fx.GraphModule(self.graph, graph, "Graph")
        for node in graph.nodes:
            node.meta = {}
        with graph.inserting_before(placeholders[-1].next):
            for (place, name), weight in zip(self._names.items(), weights, strict=True):
                _register(root, name, weight)
                placeholders[place].replace_all_uses_with(graph.get_attr(name))
            for place, (holder, axis) in self._sizes.items():
                size = graph.call_method("size", (placeholders[holder], axis))
                placeholders[place].replace_all_uses_with(size)
        for place in (*self._names, *self._sizes):
            graph.erase_node(placeholders[place])
        device = weights[0].device if weights else torch.device("cpu")
        rewriting = Rewriting(root, Request(device, "fp32"))  # which asks for nothing here
        (output,) = rewriting.graph.find_nodes(op="output")
        with torch.inference_mode(False):
            returned = {i: rewriting.value(x) for i, x in enumerate(output.args[0]) if x in rewriting.constants}
        output.args = (tuple(x for i, x in enumerate(output.args[0]) if i not in returned),)
        return rewriting.finished(), returned


class _Frozen:
    """Tensors as they were when a graph was converted.

    Args:
        tensors: are passed anew in each call, and may be others then.
        kept: are not.

    Those of inference mode count no versions.
    """

    def __init__(self, tensors: list[Tensor] | None = None, kept: Iterable[Tensor] = ()) -> None:
        self._tensors = tensors
        self._kept = [x for x in kept if not x.is_inference()]
        self._counted = [i for i, x in enumerate(tensors or []) if not x.is_inference()]
        self._state = self._now(tensors or [])

    def holds(self, tensors: list[Tensor]) -> bool:
        """Whether they are the same tensors, and nothing was written to them since."""
        return self._tensors is not None and all(map(is_, tensors, self._tensors)) and self._now(tensors) == self._state

    def _now(self, tensors: list[Tensor]) -> tuple[list[int], ...]:
        versions = [tensors[i]._version for i in self._counted]
        return versions, [*map(_version, self._kept)], [*map(Tensor.data_ptr, tensors)]


def _name(node: fx.Node, taken: Any) -> str:
    """What the model calls a weight, or the graph where two models call one so."""
    source = getattr(node.meta.get("grapharg"), "source", None)
    text = getattr(source, "name", "")
    path = _PATH.findall(text() if callable(text) else text)
    name = ".".join(path)
    around = any(other == name or other.startswith(f"{name}.") or name.startswith(f"{other}.") for other in taken)
    return node.name if not path or around else name


def _sizes(placeholders: Sequence[fx.Node]) -> dict[int, tuple[int, int]]:
    """For each input that is the size of a tensor: the place of that tensor among the inputs, and the axis."""
    values = [node.meta.get("example_value") for node in placeholders]
    symbols = {i: value.node.expr for i, value in enumerate(values) if isinstance(value, torch.SymInt)}
    found: dict[int, tuple[int, int]] = {}
    for holder, value in enumerate(values):
        for axis, size in enumerate(value.shape if isinstance(value, Tensor) else ()):
            if isinstance(size, torch.SymInt):
                found |= {i: (holder, axis) for i, symbol in symbols.items() if symbol == size.node.expr}
    return found


def _register(root: nn.Module, name: str, weight: Tensor) -> None:
    *path, leaf = name.split(".")
    for part in path:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    if isinstance(weight, nn.Parameter):
        root.register_parameter(leaf, weight)
    else:
        root.register_buffer(leaf, weight)
