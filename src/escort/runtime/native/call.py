"""A step while it is lowered: its result as torch made it, and the instructions that will make it natively."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from escort.kernels import _cpu
from escort.runtime.native.placement import Joined
from escort.runtime.native.values import Instruction, Operand, Sizes, Storage, Value, collapsed, operand

Step = TypeVar("Step", bound="Call")


class NotNativeError(Exception):
    """A step cannot run natively; the text says what it does instead of what it should."""


@dataclass
class Draft:
    """What native steps have become so far.

    Attributes:
        constants: the tensors that are no values of the program: parameters of layers, and numbers.
        joins: of the instructions, those that only copy a part into what it is joined to.
        joined: what was joined along the channels before, by its parts; shared by all drafts of a segment.
    """

    instructions: list[Instruction] = field(default_factory=list)
    joins: list[Joined] = field(default_factory=list)
    constants: list[torch.Tensor] = field(default_factory=list)
    joined: dict[tuple[Value, ...], Value] = field(default_factory=dict)

    def add(self, other: Draft) -> None:
        """Puts another one behind it, whose joins are numbered from its own first instruction."""
        shift = len(self.instructions)
        self.joins += [join._replace(number=join.number + shift) for join in other.joins]
        self.instructions += other.instructions
        self.constants += other.constants


class Call:
    """One step that is lowered.

    Args:
        shape: of its result.
        target: what it writes to in place, and returns.

    Attributes:
        result_shape: the same.
        draft: what it has become.
    """

    def __init__(self, shape: Sizes, target: Value | None = None, draft: Draft | None = None) -> None:
        self.result_shape, self._target = shape, target
        self.draft = Draft() if draft is None else draft

    def tensor(self, value: Any, ndim: int | None = None) -> Value:
        """An argument as a value: it is one, or a number."""
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            value = self.parameter(torch.tensor(float(value), dtype=torch.float32, device="cpu"))
        if not isinstance(value, Value):
            raise NotNativeError(f"computes with a {type(value).__name__}")
        if ndim is not None and len(value.shape) != ndim:
            raise NotNativeError(f"computes with a tensor of {len(value.shape)} axes")
        return value

    def parameter(self, tensor: torch.Tensor | None) -> Value | None:
        """A tensor that is no value of the program."""
        if tensor is None:
            return None
        if tensor.dtype is not torch.float32 or tensor.device.type != "cpu" or not tensor.is_contiguous():
            raise NotNativeError(f"computes with {tensor.dtype} on {tensor.device}")
        self.draft.constants.append(tensor.detach())
        return Value.new(tuple(tensor.shape), self.draft.constants[-1])

    def samples(self, value: Value, samples: int) -> Operand:
        """A value as contiguous samples; it is copied where it is not."""
        size = math.prod(value.shape) // samples
        return operand(value, samples, size) or self.samples(self.contiguous(value), samples)

    def contiguous(self, value: Value, *, copy: bool = False) -> Value:
        """A value whose numbers lie as they are counted, by a copy where they do not."""
        if value.is_contiguous and not copy:
            return value
        shape, strides = value.shape, value.strides
        if len(shape) < 2:
            shape, strides = (1, *(shape or (1,))), (0, *(strides or (1,)))
        if min(strides) < 0:
            raise NotNativeError("reads backwards")
        result = Value.new(value.shape)
        size = math.prod(shape[1:])
        self._copy(Value(value.storage, value.offset, shape, strides), Operand(result.storage, 0, size))
        return result

    def make(self, op: _cpu.Op, samples: int, *inputs: Operand | None) -> Value:
        """The result, by an operation that writes all of it."""
        result = Value.new(self.result_shape) if self._target is None else self._target
        if result.shape != self.result_shape:
            raise NotNativeError("writes to a tensor of another shape")
        if self._target is not None:
            if not isinstance(op, _cpu.Elementwise):
                raise NotNativeError("writes in place what cannot be")
            self._forget_joined(self._target.storage)
        if op.output_size * samples != math.prod(result.shape):
            raise ValueError(f"an operation gives {samples} x {op.output_size} numbers for {result.shape}")
        self._append(op, samples, inputs, operand(result, samples, op.output_size))
        return result

    def aside(self: Step, shape: Sizes) -> Step:
        """The same step, while it computes something of a shape on the way to its result."""
        return type(self)(shape, None, self.draft)

    def join(self, parts: list[Value], axis: int = 1) -> Value:
        """The result, made of parts along an axis; where that is behind the samples, parts may lie in it at once."""
        result = Value.new(self.result_shape)
        rows, size = math.prod(self.result_shape[:axis]), math.prod(self.result_shape[axis:])
        if axis == 1:
            parts = self._with_joined(parts, result)
        offset = 0
        for part in parts:
            floats = math.prod(part.shape) // rows
            if axis == 1 and part.is_whole:
                self.draft.joins.append(Joined(part.storage, result.storage, offset, len(self.draft.instructions)))
            target = Operand(result.storage, offset, size)
            if axis == 1 and operand(part, rows, floats) is None and min(part.strides) >= 0:
                self._copy(part, target)
            else:
                self._append(_cpu.Copy((floats,), (1,)), rows, (self.samples(part, rows),), target)
            offset += floats
        return result

    def _with_joined(self, parts: list[Value], result: Value) -> list[Value]:
        """The parts, whose first ones may have been joined before: where features grow, each is then written once."""
        known = max((key for key in self.draft.joined if key == tuple(parts[: len(key)])), key=len, default=())
        rest = parts[len(known) :]
        first = [self.draft.joined[known]] if known else []
        self.draft.joined[tuple(parts)] = result
        return first + rest

    def _forget_joined(self, written: Storage) -> None:
        """What was joined is not what its parts are any more, where one of both is written to."""
        for parts, whole in list(self.draft.joined.items()):
            if any(value.storage is written for value in (*parts, whole)):
                del self.draft.joined[parts]

    def _copy(self, value: Value, target: Operand) -> None:
        """Copies the samples of a value, which has axes besides theirs, one by one."""
        source = Operand(value.storage, value.offset, value.strides[0])
        shape, (strides,) = collapsed(value.shape[1:], [value.strides[1:]])
        self._append(_cpu.Copy(shape, strides), value.shape[0], (source,), target)

    def _append(self, op: _cpu.Op, samples: int, inputs: tuple[Operand | None, ...], output: Operand | None) -> None:
        if output is None:
            raise NotNativeError("writes to a tensor whose samples are not contiguous")
        self.draft.instructions.append(Instruction(op, samples, inputs, output))
