"""A node of a file, as the functions that map operators see it."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from escort.integrations.onnx.attributes import check_unread
from escort.integrations.onnx.builder import Builder
from escort.integrations.onnx.errors import NotSupportedError
from escort.integrations.onnx.values import Operand, Sizes, Value, Whole

if TYPE_CHECKING:
    from onnx import NodeProto

_DEFAULT: Any = object()


class Node:
    """One node: its attributes, what its inputs stand for, and the builder that its results come of.

    Attributes:
        op: its operator.
        name: its name in the file, "" where it has none.
        outputs: the names of its results, "" for those that nobody wants.
        version: the opset of the file.
        rounding: whether what is quantized between layers is rounded, as the file says.
        notices: what the user is told once, by kind, and how often it happened.
    """

    def __init__(
        self,
        proto: NodeProto,
        inputs: list[Operand | None],
        builder: Builder,
        context: Context,
    ) -> None:
        from onnx import helper

        self.op, self.name = proto.op_type, proto.name
        self.outputs = tuple(proto.output)
        self.builder, self.context = builder, context
        self.version = context.version
        self._input_names = tuple(proto.input)
        self._inputs = inputs
        self._scope = _scope(proto)
        self._attributes: dict[str, Any] = {a.name: helper.get_attribute_value(a) for a in proto.attribute}
        self._read: set[str] = set()  # of the attributes
        if len(self._attributes) < len(proto.attribute):
            raise NotSupportedError("it has two attributes of one name; export it anew")

    @property
    def arity(self) -> int:
        """How many inputs it is given, left-out ones among them."""
        return len(self._inputs)

    def has(self, index: int) -> bool:
        return index < len(self._inputs) and self._inputs[index] is not None

    def __getitem__(self, index: int) -> Operand:
        operand = self._inputs[index] if index < len(self._inputs) else None
        if operand is None:
            raise NotSupportedError(f"it lacks its input number {index + 1}; export it anew")
        return operand

    def input(self, index: int) -> Tensor | Value:
        """An input that is a tensor, or a number that comes of sizes."""
        operand = self[index]
        if isinstance(operand, Sizes):
            if operand.array.size == 1:
                return operand.array.item()
            raise NotSupportedError(
                "it computes with sizes of the input as a tensor; export the network with inputs of fixed sizes"
            )
        return operand

    @property
    def x(self) -> Tensor | Value:
        """The first input."""
        return self.input(0)

    def variable(self, index: int = 0) -> Value:
        """An input as a result of the graph, even if it is a constant."""
        operand = self.input(index)
        return self.builder.tensor(operand) if isinstance(operand, Tensor) else operand

    def constant(self, index: int, what: str) -> Tensor:
        """An input that must be constant."""
        operand = self[index]
        if not isinstance(operand, Tensor):
            raise NotSupportedError(
                f"its {what} must be constant, and not computed of the network's input; export the network with inputs "
                "of fixed sizes, and with constant folding"
            )
        return operand

    def is_constant(self, index: int) -> bool:
        return self.has(index) and isinstance(self._inputs[index], Tensor)

    def number(self, index: int, what: str) -> Any:
        """An input that is one constant number."""
        tensor = self.constant(index, what)
        if tensor.numel() != 1:
            raise NotSupportedError(f"its {what} is of shape {tuple(tensor.shape)}, and must be one number")
        return tensor.item()

    def wholes(self, index: int, what: str) -> list[Whole]:
        """An input that is a list of whole numbers, which may depend on the input's sizes."""
        operand = self[index]
        if isinstance(operand, Sizes):
            return [each if isinstance(each, Value) else int(each) for each in operand.array.reshape(-1).tolist()]
        return [int(each) for each in self.constant(index, what).reshape(-1).tolist()]

    def attribute_or_input(self, name: str, index: int) -> list[int] | None:
        """Whole numbers that older opsets have as an attribute, newer ones as an input; None where there are none."""
        self._read.add(name)
        if name in self._attributes:
            return [int(each) for each in self._attributes[name]]
        if not self.has(index):
            return None
        return [int(each) for each in self.constant(index, f"input {name}").reshape(-1).tolist()]

    def get(self, name: str, default: Any = _DEFAULT) -> Any:
        """An attribute: a number, a list of numbers, or a tensor."""
        self._read.add(name)
        if name not in self._attributes:
            if default is _DEFAULT:
                raise NotSupportedError(f"it lacks its attribute {name}; export it anew")
            return default
        value = self._attributes[name]
        return self.builder.take(value) if hasattr(value, "data_type") else value

    def text(self, name: str, default: str, known: str) -> str:
        """An attribute that is one of a few words."""
        self._read.add(name)
        value = self._attributes.get(name, default.encode())
        text = value.decode("ascii", "replace") if isinstance(value, bytes) else str(value)
        if text not in known.split():
            raise NotSupportedError(f"its {name} is {text[:50]!r}, and must be one of {', '.join(known.split())}")
        return text

    def check_unread(self) -> None:
        """Raises NotSupportedError for an attribute that was not read, and that asks for something."""
        check_unread(self.op, self.version, self._attributes, self._read)

    def wants(self, index: int) -> bool:
        """Whether anybody reads a result."""
        return index < len(self.outputs) and self.outputs[index] in self.context.read

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """See :meth:`Builder.call`."""
        return self.builder.call(function, *args, **kwargs)

    def parts(self, whole: Any, count: int) -> tuple[Any, ...]:
        """The tensors of a result that is several."""
        return tuple(self.call(operator.getitem, whole, index) for index in range(count))

    def module(self, make: Callable[[], nn.Module], state: Mapping[str, Tensor], x: Value) -> Value:
        """What a module makes of x; it is named after its weight, or after this node."""
        weight = self.builder.names.get(id(state["weight"])) if "weight" in state else None
        return self.builder.module(make, state, x, (weight, self.name or self.outputs[0], self.op, self._scope))

    def derived(self, x: Tensor, source: Tensor) -> Tensor:
        """A constant that is called like the one that it was made of."""
        if id(source) in self.builder.names and x is not source:
            self.builder.keep(x, self.builder.names[id(source)])
        return x

    def axis(self, axis: int, ndim: int) -> int:
        """An axis counted from the front."""
        if not -ndim <= axis < max(ndim, 1):
            raise NotSupportedError(f"its axis {axis} is beyond {ndim} dimensions; export it anew")
        return axis % max(ndim, 1)

    def shape(self, x: Tensor | Value) -> tuple[int | None, ...]:
        """The sizes of an operand, None for open ones."""
        return tuple(x.shape)

    def sizes(self, x: Tensor | Value) -> list[Whole]:
        """The sizes of an operand, open ones as results of the graph."""
        if isinstance(x, Tensor):
            return list(x.shape)
        return [self.builder.size(x, axis) for axis in range(x.ndim)]

    def known(self, size: int | None, what: str) -> int:
        """A size that must be known."""
        if size is None:
            raise NotSupportedError(
                f"its {what} depend on a size that the file leaves open; export the network with that size fixed"
            )
        return size

    def notice(self, kind: str) -> None:
        """Counts something that the user shall be told."""
        self.context.notices[kind] = self.context.notices.get(kind, 0) + 1


def _scope(proto: NodeProto) -> str:
    """The path of the module that torch.onnx says a node is of: a list of scopes, the last of them the function's."""
    scopes = next((each.value for each in proto.metadata_props if each.key == "pkg.torch.onnx.name_scopes"), "")
    paths = re.findall(r"'([\w.]*)'", scopes)
    return paths[-2] if len(paths) > 1 else ""


class Context:
    """What all nodes of a file share.

    Attributes:
        version: the opset.
        read: the names that some node reads, or the file returns.
        rounding: whether what is quantized between layers is rounded as the file says.
        notices: what to tell the user, and how often it happened.
        unrounded: results before they became integers, by the node of the integers.
    """

    def __init__(self, version: int, read: frozenset[str], rounding: bool) -> None:
        self.version, self.read, self.rounding = version, read, rounding
        self.notices: dict[str, int] = {}
        self.unrounded: dict[Any, Value] = {}


def is_floating(x: Tensor | Value) -> bool:
    """Whether an operand is of a floating-point type."""
    return x.dtype.is_floating_point if isinstance(x, Tensor | Value) else isinstance(x, float)
