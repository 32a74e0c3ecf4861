"""Steps in a row that run natively: one call of the kernels' library for all of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from escort.kernels import _cpu
from escort.layers.observed import PLAIN
from escort.runtime.loop import BoundStep, run_steps
from escort.runtime.native.batching import Batching
from escort.runtime.native.call import Draft
from escort.runtime.native.placement import Placement
from escort.runtime.native.values import Operand, Sizes, Storage, Value
from escort.runtime.templates import leaves, mapped


@dataclass(frozen=True)
class Like:
    """What a tensor from outside must be like, for which a segment was made."""

    shape: torch.Size
    strides: Sizes
    dtype: torch.dtype

    @classmethod
    def of(cls, x: Tensor) -> Like:
        return cls(x.shape, x.stride(), x.dtype)

    def fits(self, x: Any) -> bool:
        return (
            is_plain(x) and x.shape == self.shape and x.stride() == self.strides and x.dtype is self.dtype
        )  # in that order: only a tensor has a shape


def is_plain(x: Any) -> bool:
    """Whether it is a tensor in the CPU's memory and nothing else, through which no gradient passes now."""
    if type(x) not in PLAIN or not x.is_cpu or x.layout is not torch.strided or x.is_neg():
        return False
    return not (x.requires_grad and torch.is_grad_enabled())


@dataclass(frozen=True)
class _Escape:
    """A tensor that is read behind the segment: all of a base, or a view of it.

    Attributes:
        base: a value of the program by number, or, from -1 downwards, a tensor that the segment made.
        view: shape, strides and offset; None for all of it.
    """

    base: int
    view: tuple[Sizes, Sizes, int] | None


class Segment:
    """Native steps in a row.

    Args:
        steps: what they are, to run them one by one where a tensor from outside is not as it was.
        draft: what they have become.
        outside: what is read from outside, by number, and what it must be like.
        results: what is read behind the segment, by number: values, plain values, and containers of them.
        reads: those of the steps that read tensors of the program, which run before all others.
        batching: how the samples of a batch go through it.

    Attributes:
        instructions: how many it has.
        arena_size: the floats of memory that a chunk takes, beside what comes from outside and goes there.
        chunks: in how many chunks a batch goes through it.
    """

    def __init__(
        self,
        steps: Sequence[BoundStep],
        draft: Draft,
        outside: Mapping[int, Like],
        results: Mapping[int, Any],
        reads: Sequence[BoundStep],
        batching: Batching,
    ) -> None:
        self.steps, self._reads = steps, reads
        self._outside = tuple(outside.items())
        self.constants = draft.constants
        escaping = [leaf for leaf in leaves(list(results.values())) if isinstance(leaf, Value)]
        made = {value.storage: value.shape for value in escaping if value.storage.source is None}
        made |= {value.storage: value.shape for value in escaping if value.storage in made and value.is_whole}
        self._made_shapes = [
            shape if math.prod(shape) == storage.samples * storage.sample else (storage.samples * storage.sample,)
            for storage, shape in made.items()
        ]
        self._numbers = [number for number in outside]
        self._addresses = [tensor.data_ptr() for tensor in self.constants]
        self._compile(draft, list(made), batching)
        self._results = [
            (number, mapped(result, lambda leaf: self._escape(leaf, list(made)))) for number, result in results.items()
        ]
        # What was made before and is read here for the last time; what is internal never gets a place.
        self._released = tuple({i for step in steps for i in step[-1]} - results.keys())

    def _compile(self, draft: Draft, made: list[Storage], batching: Batching) -> None:
        placement = Placement(draft.instructions, draft.joins, set(made), batching.samples)
        buffers: dict[Any, int] = {number: i for i, number in enumerate(self._numbers)}
        buffers |= {id(tensor): len(buffers) + i for i, tensor in enumerate(self.constants)}
        buffers |= {id(storage): len(buffers) + i for i, storage in enumerate(made)}
        arena = len(buffers)

        def place(operand: Operand | None) -> tuple[int, int, int]:
            if operand is None:
                return -1, 0, 0
            storage, offset, stride = placement.place(operand)
            if storage in placement.offsets:
                return arena, placement.offsets[storage] + offset, stride
            source = storage.source
            key = source if isinstance(source, int) else id(storage if source is None else source)
            return buffers[key], offset, stride

        instructions = [
            (each.op, each.samples, [place(x) for x in each.inputs], place(each.output))
            for each in placement.instructions
        ]
        self.instructions = len(instructions)
        self.arena_size = placement.arena_size
        self.chunks = -(-placement.samples // placement.chunk)
        self._take_chunks = batching.favor == "throughput"
        self._program = _cpu.NativeProgram(
            instructions, arena, placement.arena_size, placement.samples, placement.chunk
        )

    def _escape(self, leaf: Any, made: list[Storage]) -> Any:
        if not isinstance(leaf, Value):
            return leaf
        source = leaf.storage.source
        if source is None:
            base = -1 - made.index(leaf.storage)
            if leaf.is_whole and leaf.shape == self._made_shapes[-1 - base]:
                return _Escape(base, None)
        else:
            assert isinstance(source, int)
            base = source
        return _Escape(base, (leaf.shape, leaf.strides, leaf.offset))

    def run(self, values: list[Any]) -> bool:
        """Writes the results to the values, and lets go of those that nothing reads any more.

        Returns:
            False where a tensor from outside is not as it was, and nothing has been done.
        """
        if self._reads:
            run_steps(self._reads, values)
        for number, like in self._outside:
            if not like.fits(values[number]):
                return False
        made = [torch.empty(shape, dtype=torch.float32, device="cpu") for shape in self._made_shapes]
        addresses = [values[number].data_ptr() for number in self._numbers]
        addresses += self._addresses
        addresses += [tensor.data_ptr() for tensor in made]
        self._program.run(addresses, torch.get_num_threads(), self._take_chunks)
        for number, result in self._results:
            values[number] = (
                _tensor(result, made, values)
                if type(result) is _Escape
                else mapped(result, lambda leaf: _tensor(leaf, made, values))
            )
        for i in self._released:
            values[i] = None
        return True


def _tensor(leaf: Any, made: list[Tensor], values: list[Any]) -> Any:
    if type(leaf) is not _Escape:
        return leaf
    base = made[-1 - leaf.base] if leaf.base < 0 else values[leaf.base]
    if leaf.view is None:
        return base
    shape, strides, offset = leaf.view
    return base.as_strided(shape, strides, base.storage_offset() + offset)
