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
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.autograd.graph import increment_version
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from escort.integrations.placing import put
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
#: How often the weights of one graph change before it is left as it is.
_MOST_CHANGES = 8
#: What Dynamo notes of inputs that are a module's parameters, buffers and other tensors.
_STATIC = "_dynamo_static_input_type"
_PATH = re.compile(r"_(?:modules|parameters|buffers)\['([^']+)'\]")
_LAYERS = ("conv", "transposed", "linear")
_INSTANCE_NORM = ("input", "running_mean", "running_var", "weight", "bias", "use_input_stats")


def _count_fused_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Counts what a fused step writes to weights, as torch does for all other optimizers."""
    for group in optimizer.param_groups:
        if group.get("fused"):
            for weight in group["params"]:
                if weight.grad is not None:
                    increment_version(weight)


register_optimizer_step_post_hook(_count_fused_step)


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
        _warn(reason, stacklevel=3)
    if reason is not None:
        return graph.forward
    return _Converted(graph, asked)


def _check(asked: Mapping[str, Any], device: torch.device) -> None:
    """Raises ValueError or TypeError for options that no graph could be converted with."""
    if unknown := ", ".join(sorted(asked.keys() - _OPTIONS)):
        raise ValueError(f'backend "escort" has no option {unknown}; it takes {", ".join(sorted(_OPTIONS))}')
    on_plan = asked.get("on_plan")
    if on_plan is not None and not callable(on_plan):
        raise TypeError(f"on_plan is a function of a plan, such as plans.append, got {on_plan!r}")
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
    on_gpu = any(isinstance(x, Tensor) and x.is_cuda for x in example_inputs)
    for place, node in enumerate(placeholders):
        is_number = _is_number(node) and node.users and place not in sizes
        if is_number or (on_gpu and _is_boxed(node) and not _is_of_module(node)):
            return f"its input {node.name} is a number that changes, and conversion fixes numbers; pass it as a tensor"
    for name, arguments in operations:
        uses_batch = name == "norm" and arguments.get("running_mean") is None
        if arguments.get("training") is True and not uses_batch:
            return "it is in training mode; call model.eval()"
    if any(_writes_statistics(node) for node in graph.graph.nodes):
        return "it is in training mode; call model.eval()"
    return None


def _writes_statistics(node: fx.Node) -> bool:
    """Whether a node is an instance norm that notes the statistics of its input."""
    if node.target is not F.instance_norm:
        return False
    arguments = dict(zip(_INSTANCE_NORM, node.args, strict=False)) | node.kwargs
    return arguments.get("running_mean") is not None and arguments.get("use_input_stats", True) is True


def _operation(node: fx.Node) -> tuple[str, dict[str, Any]]:
    """What a node does and its arguments by name, as far as conversion knows it."""
    if node.op not in ("call_function", "call_method"):
        return "", {}
    name, names = OPERATIONS.get(node.target, ("", ()))
    return name, dict(zip(names, node.args, strict=False)) | node.kwargs


class _Converted:
    """A graph of Dynamo's, converted for the weights that it is called with, and anew whenever those changed.

    Dynamo calls one graph with the weights of several modules where these are alike, as the blocks of a loop are.

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
        self._numbers = [i for i, node in enumerate(placeholders) if _is_boxed(node) and _is_of_module(node)]
        self._sizes = _sizes(placeholders)
        self._unused = [i for i, node in enumerate(placeholders) if _is_number(node) and not node.users]  # as strides
        left = {*self._names, *self._sizes, *self._numbers, *self._unused}
        self._inputs = [place for place in range(len(placeholders)) if place not in left]
        self._frozen: dict[tuple[int, ...], _Frozen] = {}  # by the identities of the weights
        self._conversions = 0
        self._is_left = False  # as it is
        self._turn = threading.Lock()

    def __call__(self, *args: Any) -> Any:
        if self._is_left:
            return self.graph(*args)
        weights = [args[place] for place in self._names]
        numbers = [args[place].item() for place in self._numbers]
        frozen = self._frozen.get(tuple(map(id, weights)))
        if frozen is None or not frozen.holds(weights, numbers):
            frozen = self._convert(args, weights, numbers)
        if frozen is None or frozen.network is None:
            return self.graph(*args)
        outputs = frozen.network(*[args[place] for place in self._inputs])
        if not frozen.returned:
            return outputs
        computed = iter(outputs)
        count = len(outputs) + len(frozen.returned)
        return tuple(frozen.returned[i] if i in frozen.returned else next(computed) for i in range(count))

    def _convert(self, args: Sequence[Any], weights: list[Tensor], numbers: list[float]) -> _Frozen | None:
        key = tuple(map(id, weights))
        with self._turn:
            frozen = self._frozen.get(key)
            if frozen is not None and frozen.holds(weights, numbers):  # by another thread
                return frozen
            self._frozen = {key: each for key, each in self._frozen.items() if each.is_alive()}
            changes = self._conversions - len(self._frozen.keys() - {key})
            if changes == _MOST_CHANGES:
                self._is_left, self._frozen = True, {}
                _warn(f"its weights changed {changes} times; compile the model once they stay", stacklevel=4)
                return None
            if changes:
                _log.warning("weights of a compiled graph changed: it is converted anew")
            self._conversions += 1
            self._frozen[key] = frozen = self._converted(args, weights, numbers)
            return frozen

    def _converted(self, args: Sequence[Any], weights: list[Tensor], numbers: list[float]) -> _Frozen:
        try:
            model, returned = self._with_weights(weights, numbers)
            network = convert(model, tuple(args[place] for place in self._inputs), **self.asked)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of whatever the graph calls
            _warn(str(error), stacklevel=5)
            return _Frozen(weights, numbers)
        plan = network.plan
        _log.info("converted a graph of %d layers: %s", len(plan.layers), plan.reason or f"{plan.speedup:.2f}x as fast")
        if self._on_plan is not None:
            self._on_plan(plan)
        return _Frozen(weights, numbers, network, returned)

    def _with_weights(self, weights: list[Tensor], numbers: list[float]) -> tuple[fx.GraphModule, dict[int, Tensor]]:
        """The graph with weights as tensors of its own, the modules' numbers as numbers, and sizes read off the inputs
        that have them.

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
                put(root, name, weight)
                placeholders[place].replace_all_uses_with(graph.get_attr(name))
            for place, (holder, axis) in self._sizes.items():
                size = graph.call_method("size", (placeholders[holder], axis))
                placeholders[place].replace_all_uses_with(size)
        for place, number in zip(self._numbers, numbers, strict=True):
            for taken_out in [*placeholders[place].users]:
                taken_out.replace_all_uses_with(number)
                graph.erase_node(taken_out)
        for place in {*self._names, *self._sizes, *self._numbers, *self._unused}:
            graph.erase_node(placeholders[place])
        device = weights[0].device if weights else torch.device("cpu")
        rewriting = Rewriting(root, Request(device, "fp32"))  # which asks for nothing here
        (output,) = rewriting.graph.find_nodes(op="output")
        with torch.inference_mode(False):
            returned = {i: rewriting.value(x) for i, x in enumerate(output.args[0]) if x in rewriting.constants}
        output.args = (tuple(x for i, x in enumerate(output.args[0]) if i not in returned),)
        return rewriting.finished(), returned


class _Frozen:
    """Weights as they were when a graph was converted, and what came of it.

    It does not keep them alive. Tensors of inference mode count no versions. Norms in training write to their
    statistics without counting that, so that vectors which are no parameters are compared number by number.

    Args:
        numbers: of the modules, such as the epsilon of a batch norm, which are part of what was converted, too.
        network: None where the graph runs as it is.
        returned: outputs of the graph that depend on weights alone, by their place.
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        numbers: list[float],
        network: ConvertedModel | None = None,
        returned: Mapping[int, Tensor] | None = None,
    ) -> None:
        self.network, self.returned = network, returned or {}
        self._numbers = numbers
        self._weights = [*map(weakref.ref, weights)]
        self._counted = [i for i, x in enumerate(weights) if not x.is_inference()]
        self._kept = [x for x in self.returned.values() if not x.is_inference()]
        is_statistic = [network is not None and x.ndim == 1 and not isinstance(x, nn.Parameter) for x in weights]
        self._vectors = [i for i, is_one in enumerate(is_statistic) if is_one]
        self._joined_then = self._joined(weights)
        self._state = self._now(weights)

    def is_alive(self) -> bool:
        return all(weight() is not None for weight in self._weights)

    def holds(self, weights: Sequence[Tensor], numbers: list[float]) -> bool:
        """Whether they are the same tensors and numbers, and nothing was written to them since.

        On a GPU that waits for the statistics of norms to be compared, for which a stream that is captured cannot.
        """
        same = all(weight() is x for weight, x in zip(self._weights, weights, strict=True))
        if not same or numbers != self._numbers or self._now(weights) != self._state:
            return False
        before = self._joined_then
        if not self._vectors or (before.is_cuda and torch.cuda.is_current_stream_capturing()):
            return True
        return torch.equal(*(x.view(torch.uint8) for x in (before, self._joined(weights))))  # NaN is NaN

    def _joined(self, weights: Sequence[Tensor]) -> Tensor:
        return torch.cat([weights[i].detach() for i in self._vectors]) if self._vectors else torch.empty(0)

    def _now(self, weights: Sequence[Tensor]) -> tuple[list[int], ...]:
        versions = [weights[i]._version for i in self._counted]
        return versions, [x._version for x in self._kept], [*map(Tensor.data_ptr, weights)]


def _warn(reason: str, stacklevel: int) -> None:
    message = f'a graph of torch.compile(..., backend="escort") runs as it is: {reason}'
    warnings.warn(message, stacklevel=stacklevel)


def _name(node: fx.Node, taken: Any) -> str:
    """What the model calls a weight, or the graph where two models call one so."""
    path = _PATH.findall(_source(node))
    name = ".".join(path)
    around = any(other == name or other.startswith(f"{name}.") or name.startswith(f"{other}.") for other in taken)
    return node.name if not path or around else name


def _source(node: fx.Node) -> str:
    """Where Dynamo found an input, as it writes that."""
    source = getattr(node.meta.get("grapharg"), "source", None)
    text = getattr(source, "name", "")
    return text() if callable(text) else text


def _is_number(node: fx.Node) -> bool:
    """Whether an input is a number that changes, such as a size."""
    return isinstance(node.meta.get("example_value"), torch.SymInt | torch.SymFloat)


def _is_boxed(node: fx.Node) -> bool:
    """Whether an input is a number that Dynamo hands over as a tensor on the CPU, which the graph takes it out of."""
    users = [user.op == "call_method" and user.target == "item" for user in node.users]
    return bool(getattr(node.meta.get("grapharg"), "pass_arg_as_tensor", False)) and all(users)


def _is_of_module(node: fx.Node) -> bool:
    """Whether an input is an attribute of a module, as opposed to an argument of the call."""
    return "._modules[" in _source(node) or _source(node).startswith("L['self'].")


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
