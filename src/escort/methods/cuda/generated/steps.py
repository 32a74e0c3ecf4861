"""What a generated kernel does, step by step: a filter as multiply-adds, and an interpreter of them in numpy.

A kernel that keeps its weights in memory reads a word of the input per multiply-add, which caps it at a quarter of a
GPU's arithmetic. Here a thread holds the sums of many output channels, reads a word once per tap and uses it for all of
them: the index of a sum must be known when the code is made, so the code is made for the filter.

    kernel_steps = KernelSteps.of(problem, sparse_filter, config)
    y = kernel_steps.run(x)                              the same as the kernel, in numpy, for tests
    text = codegen.text(kernel_steps, bias)              the kernel

All are pure functions of their arguments.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from escort.filter import IntArray, SparseFilter
from escort.problem import Problem

LANES = 32
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class GeneratedConfig:
    """The knobs of generated kernels.

    Attributes:
        out_channels: per piece of the code. A block runs a piece for a tile of ``32 * consumers`` words, a thread per
            word.
        consumers: warps that run the code.
        producers: warps that copy the input.
        channel_block: input channels per stage.
        copy: words per copy, 1, 2 or 4; 0 copies all words of a channel at once, of an arranged input.
        stages: of the ring in shared memory.
        occupancy: blocks per multiprocessor that registers must leave room for.
        start_points: places in the cycle of chunks at which tiles begin, so that multiprocessors that share an
            instruction cache bring in different parts of the code for each other.
        sums: 16-bit storage: sums per output channel, each of a share of the products, which are added up in float32
            in the end.
        arranged: a kernel of its own (generated_arrange.cu) lays out the input as words before, padding included. Words
            of 16-bit storage then hold two samples, so that no tap lies between words.
        split: blocks of a cluster that share a tile and its rows, each for a part of the input channels; in the end
            each adds up all parts of some rows.
        multicast: blocks of a cluster that run the same rows for neighbouring tiles. Its multiprocessors share an
            instruction cache, through which the code then comes once for all of them. One of split and multicast is 1.
        prefetch_warps: warps that only jump through the code, ahead of the consumers, so that it is in the instruction
            caches when they come.
    """

    out_channels: int
    consumers: int
    producers: int
    channel_block: int
    copy: int = 1
    stages: int = 3
    occupancy: int = 1
    start_points: int = 1
    sums: int = 1
    arranged: bool = False
    split: int = 1
    multicast: int = 1
    prefetch_warps: int = 0

    @property
    def threads(self) -> int:
        return (self.consumers + self.producers + self.prefetch_warps) * LANES

    @property
    def tile(self) -> int:
        """Words of a tile."""
        return self.consumers * LANES

    @property
    def cluster(self) -> int:
        """Blocks of a cluster."""
        return self.split * self.multicast


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
    """``sum[place] += x[source] * weight``; the sums of a row are as far apart as the piece has rows."""

    place: int
    source: int
    weight: float


Step = Load | Join | MultiplyAdd


@dataclass(frozen=True)
class Chunk:
    """Input channels that are staged together, counted over the whole input, and what is done with them."""

    channels: range
    steps: tuple[Step, ...]

    @property
    def registers(self) -> int:
        """Words of x that the steps name."""
        return sum(isinstance(step, (Load, Join)) for step in self.steps)


@dataclass(frozen=True)
class Piece:
    """The code of some output channels and a part of the input channels; a sum is named by its place among `rows`."""

    rows: tuple[int, ...]
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class Words:
    """The sequence of words that tiles are cut from: all samples' rows, in a pitch that leaves room for the padding.

    A word is one position; for 16-bit storage two neighbouring columns of a row, or a position of two samples. A
    strided convolution has a plane of words for each phase, the input's rows and columns at a distance of the stride:
    between planes it has stride 1.

    Attributes:
        columns, samples: of a word; one of them is 1.
        pitch: words from row to row, a multiple of what is copied at once.
        sample_rows: rows from sample to sample, or from pair to pair.
        top, left: rows above and columns in front of the first of the input in a plane, the latter so many that a row
            begins with a whole copy.
        phases: first row and column of each plane; one plane holds all where the stride is 1.
    """

    problem: Problem
    columns: int
    samples: int
    pitch: int
    sample_rows: int
    top: int
    left: int
    phases: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, problem: Problem, config: GeneratedConfig) -> Words:
        elements, copy = elements_per_word(problem), 1 if config.arranged else config.copy
        columns, samples = (1, elements) if config.arranged else (elements, 1)
        step = copy * columns
        ahead = [
            [divmod(at, stride) for at in taps] for taps, stride in zip(_taps(problem), problem.stride, strict=True)
        ]
        top, left = (max(-min(places)[0], 0) for places in ahead)
        left = -(-left // step) * step
        # A row's padding behind it is the next row's in front of it, and so for samples.
        rows, width = (
            max(outputs, outputs + max(places)[0], min(-(-inputs // stride), outputs + max(places)[0]) + before)
            for outputs, inputs, stride, places, before in zip(
                problem.output_shape[2:], problem.input_shape[2:], problem.stride, ahead, (top, left), strict=True
            )
        )
        phases = sorted({(row, column) for _, row in ahead[0] for _, column in ahead[1]})
        return cls(problem, columns, samples, -(-width // step) * copy, rows, top, left, tuple(phases))

    def tap(self, r: int, s: int) -> tuple[int, int]:
        """The plane that tap (r, s) reads, and there the distance in elements from a position."""
        rows, columns = _taps(self.problem)
        (down, row), (right, column) = (
            divmod(rows[r], self.problem.stride[0]),
            divmod(columns[s], self.problem.stride[1]),
        )
        return self.phases.index((row, column)), (down + self.top) * self.pitch * self.columns + right + self.left

    @cached_property
    def reach(self) -> int:
        """How many words behind a word its last tap reads."""
        kernel = self.problem.kernel_size
        last = max(self.tap(r, s)[1] for r in range(kernel[0]) for s in range(kernel[1]))
        return -(-last // self.columns)

    def count(self, samples: int) -> int:
        """Words of so many samples, up to the last output."""
        p = self.problem
        unused = (self.sample_rows - p.out_height) * self.pitch + self.pitch - -(-p.out_width // self.columns)
        return -(-samples // self.samples) * self.sample_rows * self.pitch - unused if samples else 0

    def positions(self, words: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """(sample, row, column) of the first elements of words."""
        line = words // self.pitch
        return line // self.sample_rows * self.samples, line % self.sample_rows, words % self.pitch * self.columns


@dataclass(frozen=True)
class KernelSteps:
    """What a generated kernel does. `of` makes it."""

    problem: Problem
    config: GeneratedConfig
    words: Words
    pieces: tuple[Piece, ...]

    @classmethod
    def of(cls, problem: Problem, sparse_filter: SparseFilter, config: GeneratedConfig) -> KernelSteps:
        """The steps for a filter."""
        problem = computed(problem)
        if config.split > 1 and config.multicast > 1:
            raise ValueError(f"{config}: the blocks of a cluster share either a tile or the rows")
        if not config.arranged and not copies_as_it_is(problem, config.copy):
            raise ValueError(f"{config} needs an arranged input for stride {problem.stride} and width {problem.width}")
        words = Words.of(problem, config)
        rows, nnz, taps = problem.out_channels // problem.groups, np.diff(sparse_filter.indptr), sparse_filter.taps
        pieces = [
            _piece(problem, sparse_filter, taps, config, words, group, part, [group * rows + row for row in hand])
            for group in range(problem.groups)
            for hand in _deal(nnz[group * rows : (group + 1) * rows], config.out_channels)
            for part in range(config.split)
        ]
        return cls(problem, config, words, tuple(pieces))

    @cached_property
    def channel_words(self) -> int:
        """Words that a stage holds of a channel."""
        return channel_words(self.words, self.config)

    @property
    def shared_bytes(self) -> int:
        """The ring with two barriers per stage, and what channels that are split need to add up their sums."""
        return int(shared_bytes(self.words, self.config, self.rows))

    @property
    def rows(self) -> int:
        """Output channels of the largest piece."""
        return max(len(piece.rows) for piece in self.pieces)

    @property
    def hands(self) -> int:
        """Into so many pieces the output channels are dealt."""
        return len(self.pieces) // self.config.split

    def arranged_words(self, samples: int) -> int:
        """Words of a channel of the arranged input."""
        return self.tiles(samples) * self.config.tile + self.channel_words - self.config.tile

    @property
    def steps(self) -> int:
        return sum(len(chunk.steps) for piece in self.pieces for chunk in piece.chunks)

    def tiles(self, samples: int) -> int:
        return -(-self.words.count(samples) // self.config.tile)

    def run(self, x: Floats) -> Floats:
        """The convolution of x (N, C, H, W), in float64 and without epilogue; for tests.

        A pointwise convolution comes as (N, K, 1, out_height * out_width).
        """
        p, w, samples = self.problem, self.words, len(x)
        x = x.reshape(samples, *p.input_shape[1:])
        y = np.full((samples, p.out_channels, p.out_height, p.out_width), np.nan)
        for tile in range(self.tiles(samples)):
            first = tile * self.config.tile
            for begin in range(0, len(self.pieces), self.config.split):
                parts = self.pieces[begin : begin + self.config.split]
                sums = np.zeros((self.config.sums * len(parts[0].rows), self.config.tile, w.columns * w.samples))
                for chunk in (chunk for part in parts for chunk in part.chunks):
                    self._run_chunk(chunk, self._stage(x, chunk, first), sums)
                sample, row, column = w.positions(first + np.arange(self.config.tile))
                for element in range(w.columns * w.samples):
                    n, c = sample + element % w.samples, column + element % w.columns
                    inside = (row < p.out_height) & (n < samples) & (c < p.out_width)
                    at = n[inside], row[inside], c[inside]
                    for place, channel in enumerate(parts[0].rows):
                        y[at[0], channel, at[1], at[2]] = sums[place :: len(parts[0].rows)].sum(0)[inside, element]
        return y

    def _stage(self, x: Floats, chunk: Chunk, first_word: int) -> Floats:
        p, w = self.problem, self.words
        planes = len(w.phases)
        stage = np.full((self.config.channel_block * planes, self.channel_words, w.columns * w.samples), np.nan)
        sample, line, column = w.positions(first_word + np.arange(self.config.tile + w.reach))
        for plane, (below, behind) in enumerate(w.phases):
            row = (line - w.top) * p.stride[0] + below
            for element in range(w.columns * w.samples):
                n, c = sample + element % w.samples, (column - w.left + element % w.columns) * p.stride[1] + behind
                inside = (row >= 0) & (row < p.height) & (c >= 0) & (c < p.width) & (n < len(x))
                for place, channel in enumerate(chunk.channels):
                    values = np.zeros(len(inside))
                    values[inside] = x[n[inside], channel, row[inside], c[inside]]
                    stage[place * planes + plane, : len(inside), element] = values
        return stage.reshape(-1, w.columns * w.samples)

    def _run_chunk(self, chunk: Chunk, stage: Floats, sums: Floats) -> None:
        word: dict[int, Floats] = {}
        for step in chunk.steps:
            match step:
                case Load(to, offset):
                    word[to] = stage[offset : offset + self.config.tile]
                case Join(to, low, high):
                    word[to] = np.stack((word[low][:, 1], word[high][:, 0]), axis=1)
                case MultiplyAdd(place, source, weight):
                    sums[place] += word[source] * weight


def computed(problem: Problem) -> Problem:
    """The problem that kernel steps compute: that of fp32 for TF32, and of one long row for a pointwise convolution."""
    if problem.precision == "tf32":
        problem = replace(problem, precision="fp32")
    if problem.kernel_size == problem.stride == (1, 1) and not any(problem.padding):
        problem = replace(problem, height=1, width=problem.height * problem.width)
    return problem


def copies_as_it_is(problem: Problem, copy: int) -> bool:
    """Whether copies of so many words can bring the input without a kernel that arranges it: rows are whole copies."""
    return copy > 0 and problem.stride == (1, 1) and problem.width % (copy * elements_per_word(problem)) == 0


def _taps(problem: Problem) -> tuple[list[int], list[int]]:
    """Where the taps of the output at row and column 0 read, in rows and in columns."""
    (rows, columns), (down, right), padding = problem.kernel_size, problem.dilation, problem.padding
    return [r * down - padding[0] for r in range(rows)], [s * right - padding[2] for s in range(columns)]


def elements_per_word(problem: Problem) -> int:
    return 1 if problem.precision in ("fp32", "tf32") else 2


def channel_words(words: Words, config: GeneratedConfig) -> int:
    """Words that a stage holds of a plane of a channel, whole copies."""
    return -(-(config.tile + words.reach) // 4) * 4


def stage_words(words: Words, config: GeneratedConfig) -> int:
    return config.channel_block * len(words.phases) * channel_words(words, config)


def shared_bytes(words: Words, config: GeneratedConfig, rows: Any) -> Any:
    """Of a kernel with so many rows per piece, as generated.cuh lays it out; for fields that are arrays too."""
    barriers = config.stages * 16
    if config.split == 1:
        return ring_bytes(words, config, rows) + barriers
    share = -(-rows // config.split)
    return ring_bytes(words, config, rows) + barriers + 16 + (config.split - 1) * share * config.tile * 4


def ring_bytes(words: Words, config: GeneratedConfig, rows: Any) -> Any:
    """The stages; where channels are split the sums take their place."""
    stages = config.stages * stage_words(words, config) * 4
    sums = -(-rows // config.split) * config.split * config.tile * 4
    return stages if config.split == 1 else np.maximum(stages, sums)


def part_channels(problem: Problem, config: GeneratedConfig) -> int:
    """Input channels of a part, the last of which may have fewer."""
    return -(-(problem.in_channels // problem.groups) // config.split)


def _deal(nnz: NDArray[np.int32], rows: int) -> list[list[int]]:
    """Deals rows to pieces of at most so many rows and about as many nonzeros each."""
    count = -(-len(nnz) // rows)
    room = -(-len(nnz) // count)
    hands: list[list[int]] = [[] for _ in range(count)]
    loads = [(0, hand) for hand in range(count)]
    for row in np.argsort(-nnz, kind="stable").tolist():  # the heaviest row to the lightest hand with room
        load, hand = heapq.heappop(loads)
        hands[hand].append(row)
        if len(hands[hand]) < room:
            heapq.heappush(loads, (load + int(nnz[row]), hand))
    return [sorted(hand) for hand in hands]


def _piece(
    problem: Problem,
    sparse_filter: SparseFilter,
    taps: tuple[IntArray, IntArray, IntArray],
    config: GeneratedConfig,
    words: Words,
    group: int,
    part: int,
    rows: list[int],
) -> Piece:
    """The code of some rows of a group and a part of its channels: chunk by chunk, channel by channel, tap by tap.

    Args:
        taps: of the filter, which takes a while to find them.
    """
    span = [np.arange(sparse_filter.indptr[row], sparse_filter.indptr[row + 1]) for row in rows]
    entry = np.concatenate(span)
    place = np.repeat(np.arange(len(rows)), [len(part) for part in span])
    each, channels = part_channels(problem, config), problem.in_channels // problem.groups
    mine = taps[0][entry] // each == part
    entry, place = entry[mine], place[mine]
    channel, r, s = (of_tap[entry].astype(np.int64) for of_tap in taps)
    channel -= part * each
    read = np.array([[words.tap(i, j) for j in range(problem.kernel_size[1])] for i in range(problem.kernel_size[0])])
    plane, element = channel * len(words.phases) + read[r, s, 0], read[r, s, 1]
    order = np.lexsort((place, element, plane))
    nonzeros = zip(
        *(a[order].tolist() for a in (plane, element, place, sparse_filter.values[entry].astype(np.float64))),
        strict=True,
    )
    block, planes, pitch = config.channel_block, config.channel_block * len(words.phases), channel_words(words, config)
    # Whole rounds of the ring: a chunk then always meets the same stage. The last chunks may be empty.
    used = -(-each // block)
    count = -(-used // config.stages) * config.stages
    steps: list[list[Step]] = [[] for _ in range(count)]
    held: dict[int, int] = {}  # words of the present plane, by offset
    registers = [0] * count
    share = -(-np.bincount(place, minlength=len(rows)) // config.sums)
    done = [0] * len(rows)
    last: tuple[int, int] | None = None
    source = 0
    for c, e, row, weight in nonzeros:
        chunk = c // planes
        code = steps[chunk]
        if (c, e) != last:
            if last is None or c != last[0]:
                held = {}
            last = c, e
            offset = c % planes * pitch + e // words.columns
            odd = e % words.columns
            for wanted in (offset, offset + 1)[: 1 + odd]:
                if wanted not in held:
                    held[wanted] = registers[chunk]
                    code.append(Load(registers[chunk], wanted))
                    registers[chunk] += 1
            source = held[offset]
            if odd:
                code.append(Join(registers[chunk], held[offset], held[offset + 1]))
                source = registers[chunk]
                registers[chunk] += 1
        code.append(MultiplyAdd(done[row] // share[row] * len(rows) + row, source, weight))
        done[row] += 1
    first = part * each
    bounds = [group * channels + min(first + min(i * block, each), channels) for i in range(count + 1)]
    chunks = [Chunk(range(bounds[i], bounds[i + 1]), tuple(code)) for i, code in enumerate(steps)]
    return Piece(tuple(rows), tuple(chunks))
