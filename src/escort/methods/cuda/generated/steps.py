"""What a generated kernel does, step by step: a filter as loads and multiply-adds.

A kernel that keeps its weights in memory reads a word of the input per multiply-add, which caps it at a quarter of a
GPU's arithmetic. Here a thread holds the sums of many output channels, reads a word once per tap and uses it for all of
them. The index of a sum must be known when the code is made, so the code is made for the filter.

    kernel_steps = KernelSteps.of(problem, sparse_filter, config)
    text = codegen.text(kernel_steps, bias)

Both are pure functions of their arguments.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from operator import itemgetter

import numpy as np
from numpy.typing import NDArray

from escort.filter import SparseFilter
from escort.methods.cuda.generated.config import GeneratedConfig
from escort.methods.cuda.generated.staging import Stage, ring_bytes, shared_bytes
from escort.methods.cuda.generated.words import Words, computed, copies_as_it_is
from escort.methods.dealing import deal
from escort.problem import Problem


@dataclass(frozen=True)
class Load:
    """``x[to] = stage[word + offset]``, offset in words from the stage's first channel."""

    to: int
    offset: int


@dataclass(frozen=True)
class Join:
    """``x[to]`` = the second element of ``x[low]`` and the first of ``x[high]``: a word at an odd distance."""

    to: int
    low: int
    high: int


@dataclass(frozen=True)
class MultiplyAdd:
    """``sum[to] += x[source] * weight``; the sums of a channel are as far apart as the part has channels."""

    to: int
    source: int
    weight: float


Step = Load | Join | MultiplyAdd


@dataclass(frozen=True)
class Chunk:
    """Input channels of one stage, counted over the whole input, and the steps that use them."""

    channels: range
    steps: tuple[Step, ...]

    @property
    def registers(self) -> int:
        """Words of x that the steps name."""
        return sum(isinstance(step, (Load, Join)) for step in self.steps)


@dataclass(frozen=True)
class Part:
    """The code of some output channels.

    Attributes:
        channels: the output channels. A sum is named by its channel's place among them.
        slices: the chunks of each slice of the input channels; one slice has all of them unless they are split.
    """

    channels: tuple[int, ...]
    slices: tuple[tuple[Chunk, ...], ...]


@dataclass(frozen=True)
class KernelSteps:
    """What a generated kernel does. `of` makes it."""

    problem: Problem
    config: GeneratedConfig
    words: Words
    parts: tuple[Part, ...]

    @classmethod
    def of(cls, problem: Problem, sparse_filter: SparseFilter, config: GeneratedConfig) -> KernelSteps:
        """The steps for a filter.

        Raises:
            ValueError: where the config does not fit the problem.
        """
        problem = computed(problem)
        if config.split > 1 and config.multicast > 1:
            raise ValueError(f"{config}: the blocks of a cluster share either a tile or the output channels")
        if not config.arranged and not copies_as_it_is(problem, config.copy):
            raise ValueError(f"{config} needs an arranged input for stride {problem.stride} and width {problem.width}")
        words = Words.of(problem, copy=config.copy, arranged=config.arranged)
        build = _Builder(problem, sparse_filter, config, words)
        count, nnz = problem.out_channels // problem.groups, np.diff(sparse_filter.indptr)
        parts = [
            build.part(group, [group * count + channel for channel in channels])
            for group in range(problem.groups)
            for channels in _deal(nnz[group * count : (group + 1) * count], config.out_channels)
        ]
        return cls(problem, config, words, tuple(parts))

    @cached_property
    def stage(self) -> Stage[int]:
        """How a tile of the input lies in shared memory."""
        return Stage(self.words, self.config.tile, self.config.channel_block)

    @property
    def ring_bytes(self) -> int:
        """Shared memory of the ring of stages."""
        return int(ring_bytes(self.stage, self.config.stages, self.config.split, self.most_channels))

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block."""
        return int(shared_bytes(self.stage, self.config.stages, self.config.split, self.most_channels))

    @property
    def most_channels(self) -> int:
        """Output channels of the largest part."""
        return max(len(part.channels) for part in self.parts)

    @property
    def chunks(self) -> Iterator[Chunk]:
        """The chunks of all parts and slices."""
        return (chunk for part in self.parts for chunks in part.slices for chunk in chunks)

    @property
    def step_count(self) -> int:
        """Steps of all parts and slices."""
        return sum(len(chunk.steps) for chunk in self.chunks)

    def tiles(self, samples: int) -> int:
        """Tiles of so many samples."""
        return -(-self.words.count(samples) // self.config.tile)

    def arranged_words(self, samples: int) -> int:
        """Words of a channel of the arranged input: whole tiles, and what taps reach behind the last."""
        return self.tiles(samples) * self.config.tile + self.stage.channel_words - self.config.tile


def slice_channels(problem: Problem, split: int) -> int:
    """Input channels of a slice, the last of which may have fewer."""
    return -(-(problem.in_channels // problem.groups) // split)


def _deal(nnz: NDArray[np.int32], most: int) -> list[list[int]]:
    """Deals output channels to parts of at most so many channels and about as many nonzeros each."""
    count = -(-len(nnz) // most)
    return [sorted(part) for part in deal(nnz, count, -(-len(nnz) // count))]


class _Builder:
    """Makes the parts of a kernel: slice by slice, chunk by chunk, channel by channel, tap by tap."""

    def __init__(self, problem: Problem, sparse_filter: SparseFilter, config: GeneratedConfig, words: Words) -> None:
        self._problem, self._filter, self._config = problem, sparse_filter, config
        self._stage = Stage(words, config.tile, config.channel_block)
        self._in_channels = problem.in_channels // problem.groups
        self._slice_channels = slice_channels(problem, config.split)
        height, width = problem.kernel_size
        reads = np.array([[words.tap(r, s) for s in range(width)] for r in range(height)])
        channel, r, s = (of_nonzero.astype(np.int64) for of_nonzero in sparse_filter.taps)
        # Of each nonzero: its slice, and the plane in there and the element that it reads.
        self._slice, channel = channel // self._slice_channels, channel % self._slice_channels
        self._plane, self._element = channel * len(words.phases) + reads[r, s, 0], reads[r, s, 1]

    def part(self, group: int, channels: Sequence[int]) -> Part:
        """The code of some output channels of a group."""
        slices = (self._chunks(group, channels, index) for index in range(self._config.split))
        return Part(tuple(channels), tuple(slices))

    def _chunks(self, group: int, channels: Sequence[int], slice_index: int) -> tuple[Chunk, ...]:
        """The chunks of a slice, in whole rounds of the ring: a chunk always meets the same stage.

        The last chunks may be empty.
        """
        block, stages = self._config.channel_block, self._config.stages
        count = -(-self._slice_channels // (block * stages)) * stages
        codes = [_ChunkCode(self._stage) for _ in range(count)]
        nonzeros, per_sum = self._nonzeros(channels, slice_index)
        planes = block * len(self._stage.input.phases)
        done = [0] * len(channels)
        for (plane, element), same in groupby(nonzeros, key=itemgetter(0, 1)):
            code = codes[plane // planes]
            source = code.read(plane % planes, element)
            for _, _, place, weight in same:
                code.steps.append(MultiplyAdd(done[place] // per_sum[place] * len(channels) + place, source, weight))
                done[place] += 1
        first = slice_index * self._slice_channels
        bounds = [min(first + min(i * block, self._slice_channels), self._in_channels) for i in range(count + 1)]
        bounds = [group * self._in_channels + bound for bound in bounds]
        return tuple(Chunk(range(bounds[i], bounds[i + 1]), tuple(code.steps)) for i, code in enumerate(codes))

    def _nonzeros(
        self, channels: Sequence[int], slice_index: int
    ) -> tuple[Iterator[tuple[int, int, int, float]], NDArray[np.int64]]:
        """The nonzeros of some output channels in a slice, and how many of each channel go to one of its sums.

        A nonzero is (the plane and the element that it reads, its channel's place, its weight). They are sorted so.
        """
        indptr = self._filter.indptr
        spans = [np.arange(indptr[channel], indptr[channel + 1]) for channel in channels]
        nonzero, place = np.concatenate(spans), np.repeat(np.arange(len(channels)), list(map(len, spans)))
        inside = self._slice[nonzero] == slice_index
        nonzero, place = nonzero[inside], place[inside]
        plane, element = self._plane[nonzero], self._element[nonzero]
        weight = self._filter.values[nonzero].astype(np.float64)
        order = np.lexsort((place, element, plane))
        columns = (column[order].tolist() for column in (plane, element, place, weight))
        return zip(*columns, strict=True), -(-np.bincount(place, minlength=len(channels)) // self._config.sums)


@dataclass
class _ChunkCode:
    """The steps of a chunk while they are made. Words of a plane are loaded once."""

    stage: Stage[int]
    steps: list[Step] = field(default_factory=list)
    registers: int = 0
    plane: int = -1
    loaded: dict[int, int] = field(default_factory=dict)  # registers of the plane's words, by offset

    def read(self, plane: int, element: int) -> int:
        """The register with the word that begins at an element of a plane, counted from the chunk's first plane."""
        if plane != self.plane:
            self.plane, self.loaded = plane, {}
        word, odd = divmod(element, self.stage.input.columns)
        offset = plane * self.stage.channel_words + word
        low = self._load(offset)
        if not odd:
            return low
        high = self._load(offset + 1)
        self.steps.append(Join(self._register(), low, high))
        return self.registers - 1

    def _load(self, offset: int) -> int:
        if offset not in self.loaded:
            self.loaded[offset] = self._register()
            self.steps.append(Load(self.loaded[offset], offset))
        return self.loaded[offset]

    def _register(self) -> int:
        self.registers += 1
        return self.registers - 1
