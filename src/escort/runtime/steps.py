"""What a program is made of: inputs and steps."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from escort.runtime.templates import slots_in

#: The default of an input that has none.
REQUIRED: Any = inspect.Parameter.empty


@dataclass(frozen=True)
class Input:
    """An input of a program.

    Attributes:
        name: by which it can be given; behind ``*`` or ``**`` it takes all that is left.
        default: its value where it is not given.
        like: shape and type of the example's tensor, where that is known.
        fixed: the only value that it may have, where it is no tensor: the program was made for that one.
    """

    name: str
    default: Any = REQUIRED
    like: tuple[torch.Size, torch.dtype] | None = None
    fixed: Any = REQUIRED

    def checked(self, value: Any) -> Any:
        """The value, if the input may have it. Raises ValueError otherwise."""
        is_tensor = isinstance(value, torch.Tensor)
        is_as_it_was = self.fixed is REQUIRED or (not is_tensor and _is_same(value, self.fixed))
        if is_tensor if self.like is not None else is_as_it_was:
            return value
        was = "a tensor" if self.like is not None else repr(self.fixed)
        now = "a tensor" if is_tensor else repr(value)
        raise ValueError(
            f"{self.name} was {was} when the model was converted, and is {now} now; pass it as it was, or convert "
            f"the model with the {self.name} that it shall have"
        )

    def no_tensor(self, value: Any) -> str | None:
        """Why a value is none that the input may have, where that is a tensor; else None."""
        if self.like is None or isinstance(value, torch.Tensor):
            return None
        shape, dtype = self.like
        return (
            f"the network's input {self.name} is a tensor, such as {dtype} of shape {tuple(shape)}, got "
            f"{type(value).__name__}; pass torch.as_tensor of an array, or what the original takes"
        )


def _is_same(a: Any, b: Any) -> bool:
    return bool(a == b or (a != a and b != b))  # NaN is not equal to itself


@dataclass(frozen=True)
class Method:
    """The method of that name of whatever it is called on."""

    name: str

    def __call__(self, receiver: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(receiver, self.name)(*args, **kwargs)


def spellings(method: str) -> tuple[Any, ...]:
    """A method of tensors as a graph calls it, and as a saved program does."""
    return Method(method), getattr(torch.Tensor, method)


@dataclass(frozen=True)
class Step:
    """One step of a program. Its result is the value behind those of the inputs and of all earlier steps.

    Attributes:
        kind: whether it calls a layer, calls a function or reads a tensor.
        target: the path of the layer or tensor, or the function.
        args, kwargs: templates of its arguments.
    """

    kind: Literal["layer", "call", "tensor"]
    target: Any
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        arguments = [repr(value) for value in self.args]
        arguments += [f"{name}={value!r}" for name, value in self.kwargs.items()]
        named = self.target if isinstance(self.target, str) else getattr(self.target, "__name__", str(self.target))
        return f"{named}({', '.join(arguments)})" if self.kind != "tensor" else f"tensor {named}"

    def __reduce__(self) -> Any:
        """For pickle, which cannot write torch's exported operators down."""
        if not isinstance(self.target, torch._ops.OpOverload):
            return Step, (self.kind, self.target, self.args, self.kwargs)
        packet, _, overload = str(self.target).rpartition(".")
        return _exported_step, (packet.split("."), overload, self.args, self.kwargs)


def _exported_step(packet: Sequence[str], overload: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Step:
    namespace, name = packet
    return Step("call", getattr(getattr(getattr(torch.ops, namespace), name), overload), args, kwargs)


@dataclass(frozen=True)
class Listing:
    """What a program does. Inputs and results of steps are values, counted from 0: first the inputs, then the steps.

    Attributes:
        inputs: what it takes.
        steps: what it does, in order.
        output: the template of what it returns.

    Raises:
        ValueError: where a step reads a value that is not there yet.
    """

    inputs: tuple[Input, ...]
    steps: tuple[Step, ...]
    output: Any

    def __post_init__(self) -> None:
        for number, step in enumerate(self.steps, len(self.inputs)):
            _check_slots((step.args, step.kwargs), number)
        _check_slots(self.output, len(self.inputs) + len(self.steps))

    def __str__(self) -> str:
        lines = [f"%{number} = {given.name}" for number, given in enumerate(self.inputs)]
        lines += [f"%{number} = {step}" for number, step in enumerate(self.steps, len(self.inputs))]
        return "\n".join((*lines, f"return {self.output!r}"))

    def last_reads(self) -> list[tuple[int, ...]]:
        """For each step the values that nothing behind it reads."""
        read = {slot.number for slot in slots_in(self.output)}
        released: list[tuple[int, ...]] = []
        for number in reversed(range(len(self.inputs), len(self.inputs) + len(self.steps))):
            step = self.steps[number - len(self.inputs)]
            touched = {number, *(slot.number for slot in slots_in((step.args, step.kwargs)))}
            released.append(tuple(sorted(touched - read)))
            read |= touched
        return released[::-1]


def _check_slots(template: Any, limit: int) -> None:
    for slot in slots_in(template):
        if not 0 <= slot.number < limit:
            raise ValueError(f"value {slot.number} is read where there are {limit}")
