"""The network that is being made: what is computed of constants is computed at once, all else becomes a step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate

from escort.integrations.onnx.errors import NotSupportedError
from escort.integrations.onnx.limits import MAX_BYTES, MAX_CONSTANT, MAX_NUMBERS
from escort.integrations.onnx.names import Paths, identifier, module_path, tensor_path
from escort.integrations.onnx.tensors import is_narrow, to_torch
from escort.integrations.onnx.values import Sizes, Value, Whole
from escort.integrations.placing import put

if TYPE_CHECKING:
    from onnx import TensorProto

#: What stands for sizes that a file leaves open: two samples counts and two sizes of maps, which many numbers divide.
OPEN_SAMPLES, OPEN_SIZES = (8, 24), (256, 384)


class Builder:
    """Makes a graph of torch.fx, with modules and tensors, in the order of its calls.

    Each call is also run on tensors without memory, so that shapes are known, and what torch refuses is found here.

    Attributes:
        root: what has the modules and tensors.
        graph: the steps.
        current: the name of the file that the next steps are called like.
        names: those of constants in the file, by ``id``.
        narrow: constants whose type in the file is of a few bits, by ``id``.
    """

    def __init__(self) -> None:
        self.root = nn.Module()
        self.graph = fx.Graph()
        self.current = ""
        self.names: dict[int, str] = {}
        self.narrow: set[int] = set()
        self._paths = Paths({*dir(fx.GraphModule), "graph", "code", "meta", "training"})
        self._constants: dict[int, tuple[Tensor, Value]] = {}
        self._modules: dict[Any, tuple[str, nn.Module, Any]] = {}
        self._sizes: dict[tuple[fx.Node, int], Value] = {}
        self._computed_bytes = 0
        self._kept: list[Tensor] = []  # so that no other tensor gets the id of a named one

    def input(self, name: str, shape: tuple[int | None, ...], dtype: torch.dtype) -> Value:
        """An argument of the network; None in its shape is a size that the file leaves open."""
        free = ((OPEN_SAMPLES if axis == 0 else OPEN_SIZES) for axis in range(len(shape)))
        both = [open_sizes if size is None else (size, size) for size, open_sizes in zip(shape, free, strict=True)]
        examples = tuple(_empty([pair[i] for pair in both], dtype) for i in range(2))
        node = self.graph.placeholder(identifier(name))
        node.meta["onnx_input"] = (name, shape, dtype)
        return Value(node, examples)

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What a function of torch makes of operands: of constants a constant, of others a step's result.

        Raises:
            NotSupportedError: where the result is larger than any network's, or torch refuses the operands.
        """
        if not _has_value((args, kwargs)):
            return self._computed(function, args, kwargs)
        args, kwargs = self._settled(args), self._settled(kwargs)
        examples = self._run(function, args, kwargs)
        node = self.graph.create_node(
            "call_function", function, _nodes(args), _nodes(kwargs), name=identifier(self.current)
        )
        return Value(node, examples)

    def method(self, name: str, x: Value, *args: Any) -> Any:
        """What a method of a tensor of the graph returns."""
        args = self._settled(args)
        examples = self._run(lambda x, *rest: getattr(x, name)(*rest), (x, *args), {})
        return Value(
            self.graph.create_node("call_method", name, _nodes((x, *args)), name=identifier(self.current)), examples
        )

    def module(
        self,
        make: Callable[[], nn.Module],
        state: Mapping[str, Tensor],
        x: Value,
        like: tuple[str | None, str, str, str],
    ) -> Value:
        """What a module makes of x. A module of the same tensors and settings is called again.

        Args:
            make: makes the module.
            state: its tensors.
            like: what it is called after, as :func:`names.module_path` takes it.
        """
        with torch.device("meta"):
            module = make().eval()
        if state:  # of the file's types, which examples are to meet
            module.load_state_dict({name: tensor.to("meta") for name, tensor in state.items()}, assign=True)
        settings = str(module), tuple(sorted((name, id(tensor)) for name, tensor in state.items()))
        examples = self._run(module, (x,), {})
        if not state or settings not in self._modules:
            path = self._paths.take(module_path(*like))
            if state:
                module.load_state_dict({name: x.contiguous() for name, x in state.items()}, assign=True)
            self._modules[settings] = path, module, state  # which keeps the tensors, and so their ids
            put(self.root, path, module)
        path = self._modules[settings][0]
        node = self.graph.create_node("call_module", path, (x.node,), name=identifier(self.current))
        return Value(node, examples)

    def tensor(self, x: Tensor) -> Value:
        """A constant as a result of the graph: a buffer of the network."""
        if id(x) not in self._constants:
            path = self._paths.take(tensor_path(self.names.get(id(x), self.current)))
            put(self.root, path, x.contiguous())
            node = self.graph.get_attr(path)
            self._constants[id(x)] = x, Value(node, (x.to("meta"),) * 2)
        return self._constants[id(x)][1]

    def size(self, x: Value, axis: int) -> Whole:
        """A size of a result: a number where it is known."""
        axis %= max(x.ndim, 1)
        known = x.shape[axis]
        if known is not None:
            return known
        if (x.node, axis) not in self._sizes:
            self._sizes[x.node, axis] = self.method("size", x, axis)
        return self._sizes[x.node, axis]

    def _computed(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """The result of a function of constants, whose size is known before it takes memory."""
        try:
            outlined = function(*_to_meta(args), **_to_meta(kwargs))
            for tensor in _tensors(outlined):
                self._computed_bytes += tensor.numel() * tensor.itemsize
                if tensor.numel() > MAX_CONSTANT or self._computed_bytes > MAX_BYTES:
                    raise NotSupportedError(f"its constant of shape {tuple(tensor.shape)} is larger than any network's")
            result = function(*args, **kwargs)
        except NotSupportedError:
            raise
        except Exception as error:
            raise NotSupportedError(f"torch cannot compute it: {_said(error)}") from error
        largest = max(_tensors((args, kwargs)), key=lambda x: x.numel() * (id(x) in self.names), default=None)
        if isinstance(result, Tensor) and largest is not None and id(largest) in self.names:
            self.keep(result, self.names[id(largest)])
        return result

    def _settled(self, args: Any) -> Any:
        """Arguments with the constants among them as buffers."""
        return _mapped(args, lambda x: self.tensor(x) if isinstance(x, Tensor) else x)

    def _run(self, function: Callable[..., Any], args: Any, kwargs: Any) -> tuple[Any, ...]:
        """The results at both examples."""
        results = []
        for i in range(2):
            try:
                results.append(function(*_at(args, i), **_at(kwargs, i)))
            except Exception as error:
                raise NotSupportedError(f"torch refuses its inputs: {_said(error)}") from error
            for tensor in _tensors(results[-1]):
                if tensor.numel() > MAX_NUMBERS:
                    raise NotSupportedError(f"its result of shape {tuple(tensor.shape)} is larger than any network's")
        return tuple(results)

    def take(self, tensor: TensorProto) -> Tensor:
        """A constant of the file. Raises NotSupportedError where torch has no such type."""
        constant = to_torch(tensor)
        if is_narrow(tensor):
            self.narrow.add(id(constant))
        self.keep(constant, tensor.name or self.current)
        return constant

    def keep(self, x: Tensor, name: str) -> None:
        """Notes the name of a constant in the file."""
        self.names.setdefault(id(x), name)
        self._kept.append(x)


def _empty(shape: list[int], dtype: torch.dtype) -> Tensor:
    if math.prod(shape) > MAX_NUMBERS:
        raise NotSupportedError(f"an input of shape {shape} is larger than any network's")
    return torch.empty(shape, dtype=dtype, device="meta")


def _mapped(args: Any, function: Callable[[Any], Any]) -> Any:
    """Arguments with a function of each in them, inside of lists, tuples, dicts and slices."""
    return map_aggregate(args, function)


def _has_value(args: Any) -> bool:
    found: list[Any] = []
    _mapped(args, found.append)
    return any(isinstance(x, Value | Sizes) for x in found)


def _tensors(args: Any) -> list[Tensor]:
    found: list[Any] = []
    _mapped(args, found.append)
    return [x for x in found if isinstance(x, Tensor)]


def _nodes(args: Any) -> Any:
    return _mapped(args, lambda x: x.node if isinstance(x, Value) else x)


def _at(args: Any, i: int) -> Any:
    """Arguments at an example."""
    return _mapped(args, lambda x: x.examples[i] if isinstance(x, Value) else x)


def _to_meta(args: Any) -> Any:
    return _mapped(args, lambda x: x.to("meta") if isinstance(x, Tensor) else x)


def _said(error: Exception) -> str:
    """The first line of what torch says, which then tells of its own code."""
    return f"{type(error).__name__}: {error}".partition("\n")[0][:300]
