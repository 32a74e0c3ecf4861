"""Where the storages of a native program lie: concatenated ones in their result, the others in one arena."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence, Set
from typing import NamedTuple

from escort.runtime.native.values import Instruction, Operand, Storage

_ALIGNMENT = 16  # floats: a cache line


class Joined(NamedTuple):
    """A copy of all of a storage into a part of each sample of another, by the instruction of that number."""

    part: Storage
    whole: Storage
    offset: int
    number: int


class _Use(NamedTuple):
    """An operand of the instruction of that number, which reads or writes so many floats of so many samples."""

    number: int
    operand: Operand
    size: int
    samples: int
    is_output: bool


class Placement:
    """The places of all storages that instructions fill.

    Args:
        joins: copies that need not be made where the part can lie in the whole from the start.
        kept: the storages that are still read when all instructions have run; they are no part of the arena.
        chunk: for how many samples the arena is to have room, where samples do not depend on each other; None for all.

    Attributes:
        instructions: those that are left.
        samples, chunk: how many samples there are that do not depend on each other, and how many the arena has room
            for; both are 1 where it has room for all of them.
        offsets: of each storage in the arena, in floats.
        arena_size: in floats.
    """

    def __init__(
        self, instructions: Sequence[Instruction], joins: Sequence[Joined], kept: Set[Storage], chunk: int | None = None
    ) -> None:
        self._homes: dict[Storage, tuple[Storage, int]] = {}
        self._inside: dict[Storage, list[Storage]] = {}
        self._uses: dict[Storage, list[_Use]] = {}
        for number, each in enumerate(instructions):
            for operand, size in _operands(each):
                use = _Use(number, operand, size, each.samples, operand is each.output)
                self._uses.setdefault(operand.storage, []).append(use)
        copies, dropped = {join.number for join in joins}, set[int]()
        for join in joins:
            if join.part not in kept and self._fits(join, copies):
                self._homes[join.part] = join.whole, join.offset
                self._inside.setdefault(join.whole, []).append(join.part)
                dropped.add(join.number)
        self.instructions = [each for number, each in enumerate(instructions) if number not in dropped]
        self.samples = 1 if chunk is None else self._samples_apart()
        self.chunk = 1 if chunk is None else min(chunk, self.samples)
        lifetimes = self._lifetimes(kept)
        self.offsets: dict[Storage, int] = {}
        self.arena_size = 0
        for storage in sorted(lifetimes, key=lambda storage: -self._size(storage)):
            self._place(storage, lifetimes)

    def _fits(self, join: Joined, copies: Set[int]) -> bool:
        """Whether a part can lie in the whole: nothing writes to either behind the copy, and its samples stay whole."""
        part, whole = join.part, join.whole
        if part.source is not None or part in self._homes or part.samples != whole.samples:
            return False
        if self.root(whole)[0] is part:
            return False
        for use in (*self._uses_in(part), *self._uses_in(whole)):
            if use.is_output and use.number > join.number and use.number not in copies:
                return False
        return part.samples == 1 or all(self._is_by_sample(use, part) for use in self._uses_in(part))

    def _uses_in(self, storage: Storage) -> Iterator[_Use]:
        """Those of a storage and of all that lie in it."""
        yield from self._uses.get(storage, ())
        for inner in self._inside.get(storage, ()):
            yield from self._uses_in(inner)

    def _is_by_sample(self, use: _Use, part: Storage) -> bool:
        """Whether a use of what lies in a part takes some of each of its samples."""
        operand = use.operand
        is_within = self._shift(operand.storage, part) + operand.offset + use.size <= part.sample
        return is_within and use.samples == part.samples and operand.stride == operand.storage.sample

    def _shift(self, storage: Storage, outer: Storage) -> int:
        shift = 0
        while storage is not outer:
            storage, offset = self._homes[storage]
            shift += offset
        return shift

    def root(self, storage: Storage) -> tuple[Storage, int]:
        """The storage in which another lies, and where its first sample begins."""
        shift = 0
        while storage in self._homes:
            storage, offset = self._homes[storage]
            shift += offset
        return storage, shift

    def place(self, operand: Operand) -> Operand:
        """An operand in the storage where it lies in the end."""
        storage, shift = self.root(operand.storage)
        is_moved = storage is not operand.storage and storage.samples > 1
        return Operand(storage, shift + operand.offset, storage.sample if is_moved else operand.stride)

    def _samples_apart(self) -> int:
        """How many samples do not depend on each other: 1, or as many as the instructions of fewest samples have."""
        samples = min((each.samples for each in self.instructions), default=1)
        return samples if all(self._keeps_apart(each, samples) for each in self.instructions) else 1

    def _keeps_apart(self, each: Instruction, samples: int) -> bool:
        """Whether an instruction makes each of so many equal shares of its result of the same shares of storages.

        What comes from outside is read as it lies, since nothing writes to it.
        """
        of_share, rest = divmod(each.samples, samples)
        for operand, size in _operands(each):
            storage, offset, stride = self.place(operand)
            if storage.source is not None:
                continue
            share = storage.samples * storage.sample / samples
            if of_share * stride != share or offset + (of_share - 1) * stride + size > share:
                return False
        return rest == 0

    def _size(self, storage: Storage) -> int:
        """The floats that a storage takes in the arena."""
        share = storage.samples * storage.sample // self.samples
        return -(-share * self.chunk // _ALIGNMENT) * _ALIGNMENT

    def _lifetimes(self, kept: Set[Storage]) -> dict[Storage, tuple[int, int]]:
        """The first and the last instruction that uses each storage of the arena."""
        lifetimes: dict[Storage, tuple[int, int]] = {}
        for number, each in enumerate(self.instructions):
            for operand, _ in _operands(each):
                storage, _ = self.root(operand.storage)
                if storage.source is None and storage not in kept:
                    lifetimes[storage] = lifetimes.get(storage, (number, number))[0], number
        return lifetimes

    def _place(self, storage: Storage, lifetimes: dict[Storage, tuple[int, int]]) -> None:
        """Puts a storage into the first gap of the arena that is free for all of its lifetime."""
        first, last = lifetimes[storage]
        taken = sorted(
            (offset, offset + self._size(other))
            for other, offset in self.offsets.items()
            if lifetimes[other][0] <= last and first <= lifetimes[other][1]
        )
        offset = 0
        for begin, end in taken:
            if begin - offset >= self._size(storage):
                break
            offset = max(offset, end)
        self.offsets[storage] = offset
        self.arena_size = max(self.arena_size, offset + self._size(storage))


def _operands(instruction: Instruction) -> list[tuple[Operand, int]]:
    """The operands of an instruction, and how many floats of a sample each has."""
    op = instruction.op
    pairs = zip(instruction.inputs, op.input_sizes, strict=True)
    inputs = [(operand, size) for operand, size in pairs if operand is not None]
    return list(itertools.chain(inputs, [(instruction.output, op.output_size)]))
