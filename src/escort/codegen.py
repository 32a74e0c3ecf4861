"""Weights as code: a filter as a CUDA kernel in which every nonzero is one multiply-add with the weight inside.

A kernel that keeps its weights in memory reads a word of the input per multiply-add, which caps it at a quarter of a
GPU's arithmetic. Here a thread holds the sums of many output channels, reads a word once per tap and uses it for all of
them: the index of a sum must be known when the code is made, so the code is made for the filter.

    program = Program.of(problem, filter, config)    what the kernel does, step by step
    text = program.text(bias)                        CUDA C++ around kernels/generated.cuh, the steps as inline PTX
    y = program.run(x)                               the same in numpy, for tests

All are pure functions of their arguments.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from escort.problem import Problem
from escort.sparse import IntArray, StretchedCSR

LANES = 32
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class GeneratedConfig:
    """The knobs of generated kernels.

    Attributes:
        rows: output channels per piece of the code. A block runs a piece for a tile of ``32 * consumers`` words, a
            thread per word.
        consumers: warps that run the code.
        producers: warps that copy the input.
        channel_block: input channels per stage.
        copy: words per copy, 1, 2 or 4; 0 copies all words of a channel at once, of an arranged input, or image by
            image where a pointwise convolution needs no other arrangement.
        stages: of the ring in shared memory.
        blocks: per multiprocessor that registers must leave room for.
        entries: places in the cycle of chunks at which tiles begin, so that multiprocessors that share an instruction
            cache bring in different parts of the code for each other.
        sums: 16-bit storage: sums per output channel, each of a share of the products, which are added up in float32
            in the end.
        arranged: a kernel of its own (kernels/arrange.cu) lays out the input as words before, padding included. Words
            of 16-bit storage then hold two images, so that no tap lies between words.
        split: blocks of a cluster that share a tile and its rows, each for a part of the input channels; in the end
            each adds up all parts of some rows.
        together: blocks of a cluster that run the same rows for neighbouring tiles. Its multiprocessors share an
            instruction cache, through which the code then comes once for all of them.
        peers: blocks of a cluster that run different rows for the same tile; each copies a part of the channels into
            the stages of all. Of split, together and peers two are 1 at least.
        scouts: warps that only jump through the code, ahead of the consumers, so that it is in the instruction caches
            when they come.
    """

    rows: int
    consumers: int
    producers: int
    channel_block: int
    copy: int = 1
    stages: int = 3
    blocks: int = 1
    entries: int = 1
    sums: int = 1
    arranged: bool = False
    split: int = 1
    together: int = 1
    peers: int = 1
    scouts: int = 0

    @property
    def threads(self) -> int:
        return (self.consumers + self.producers + self.scouts) * LANES

    @property
    def tile(self) -> int:
        """Words of a tile."""
        return self.consumers * LANES

    @property
    def cluster(self) -> int:
        """Blocks of a cluster."""
        return self.split * self.together * self.peers


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
    """The sequence of words that tiles are cut from: all images' rows, in a pitch that leaves room for the padding.

    A word is one position; for 16-bit storage two neighbouring columns of a row, or a position of two images. A strided
    convolution has a plane of words for each phase, the input's rows and columns at a distance of the stride: between
    planes it has stride 1.

    Attributes:
        columns, images: of a word; one of them is 1.
        pitch: words from row to row, a multiple of what is copied at once.
        image_rows: rows from image to image, or from pair to pair.
        top, left: rows above and columns in front of the first of the input in a plane, the latter so many that a row
            begins with a whole copy.
        phases: first row and column of each plane; one plane holds all where the stride is 1.
    """

    problem: Problem
    columns: int
    images: int
    pitch: int
    image_rows: int
    top: int
    left: int
    phases: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, problem: Problem, config: GeneratedConfig) -> Words:
        elements, copy = elements_per_word(problem), 1 if config.arranged else max(config.copy, 1)
        columns, images = (1, elements) if config.arranged else (elements, 1)
        step = copy * columns
        ahead = [
            [divmod(at, stride) for at in taps] for taps, stride in zip(_taps(problem), problem.stride, strict=True)
        ]
        top, left = (max(-min(places)[0], 0) for places in ahead)
        left = -(-left // step) * step
        # A row's padding behind it is the next row's in front of it, and so for images.
        rows, width = (
            max(outputs, outputs + max(places)[0], min(-(-inputs // stride), outputs + max(places)[0]) + before)
            for outputs, inputs, stride, places, before in zip(
                problem.output_shape[2:], problem.input_shape[2:], problem.stride, ahead, (top, left), strict=True
            )
        )
        phases = sorted({(row, column) for _, row in ahead[0] for _, column in ahead[1]})
        return cls(problem, columns, images, -(-width // step) * copy, rows, top, left, tuple(phases))

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
        kernel = self.problem.kernel
        last = max(self.tap(r, s)[1] for r in range(kernel[0]) for s in range(kernel[1]))
        return -(-last // self.columns)

    def count(self, images: int) -> int:
        """Words of so many images, up to the last output."""
        p = self.problem
        unused = (self.image_rows - p.out_height) * self.pitch + self.pitch - -(-p.out_width // self.columns)
        return -(-images // self.images) * self.image_rows * self.pitch - unused if images else 0

    def positions(self, words: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """(image, row, column) of the first elements of words."""
        line = words // self.pitch
        return line // self.image_rows * self.images, line % self.image_rows, words % self.pitch * self.columns


@dataclass(frozen=True)
class Program:
    """What a generated kernel does. `of` makes it."""

    problem: Problem
    config: GeneratedConfig
    words: Words
    pieces: tuple[Piece, ...]

    @classmethod
    def of(cls, problem: Problem, filter: StretchedCSR, config: GeneratedConfig) -> Program:
        """The program for a filter."""
        problem = computed(problem)
        if sorted((config.split, config.together, config.peers))[1] > 1:
            raise ValueError(f"{config}: the blocks of a cluster share one thing only")
        hands = -(-problem.out_channels // problem.groups // config.rows)
        if config.peers > 1 and (config.copy or hands % config.peers):
            raise ValueError(f"{config}: peers copy whole channels, and each has one of a group's {hands} pieces")
        whole = problem.width % elements_per_word(problem) == 0 and (config.copy or copies_planes(problem))
        if not config.arranged and (not whole or problem.stride != (1, 1)):
            raise ValueError(f"{config} needs an arranged input for stride {problem.stride} and width {problem.width}")
        words = Words.of(problem, config)
        rows, nnz, taps = problem.out_channels // problem.groups, np.diff(filter.indptr), filter.taps
        pieces = [
            _piece(problem, filter, taps, config, words, group, part, [group * rows + row for row in hand])
            for group in range(problem.groups)
            for hand in _deal(nnz[group * rows : (group + 1) * rows], config.rows)
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

    def arranged_words(self, images: int) -> int:
        """Words of a channel of the arranged input."""
        return self.tiles(images) * self.config.tile + self.channel_words - self.config.tile

    @property
    def steps(self) -> int:
        return sum(len(chunk.steps) for piece in self.pieces for chunk in piece.chunks)

    def tiles(self, images: int) -> int:
        return -(-self.words.count(images) // self.config.tile)

    def text(self, bias: NDArray[np.float32] | None = None) -> str:
        """The kernel `generated(x, y, residual, images, tiles)`, for a grid of any number of blocks.

        Args:
            bias: (K,), becomes part of the code.
        """
        return "\n".join(_text(self, bias)) + "\n"

    def run(self, x: Floats) -> Floats:
        """The convolution of x (N, C, H, W), in float64 and without epilogue; for tests.

        A pointwise convolution comes as (N, K, 1, out_height * out_width).
        """
        p, w, images = self.problem, self.words, len(x)
        x = x.reshape(images, *p.input_shape[1:])
        y = np.full((images, p.out_channels, p.out_height, p.out_width), np.nan)
        for tile in range(self.tiles(images)):
            first = tile * self.config.tile
            for begin in range(0, len(self.pieces), self.config.split):
                parts = self.pieces[begin : begin + self.config.split]
                sums = np.zeros((self.config.sums * len(parts[0].rows), self.config.tile, w.columns * w.images))
                for chunk in (chunk for part in parts for chunk in part.chunks):
                    self._run_chunk(chunk, self._stage(x, chunk, first), sums)
                image, row, column = w.positions(first + np.arange(self.config.tile))
                for element in range(w.columns * w.images):
                    n, c = image + element % w.images, column + element % w.columns
                    inside = (row < p.out_height) & (n < images) & (c < p.out_width)
                    at = n[inside], row[inside], c[inside]
                    for place, channel in enumerate(parts[0].rows):
                        y[at[0], channel, at[1], at[2]] = sums[place :: len(parts[0].rows)].sum(0)[inside, element]
        return y

    def _stage(self, x: Floats, chunk: Chunk, first_word: int) -> Floats:
        p, w = self.problem, self.words
        planes = len(w.phases)
        stage = np.full((self.config.channel_block * planes, self.channel_words, w.columns * w.images), np.nan)
        image, line, column = w.positions(first_word + np.arange(self.config.tile + w.reach))
        for plane, (below, behind) in enumerate(w.phases):
            row = (line - w.top) * p.stride[0] + below
            for element in range(w.columns * w.images):
                n, c = image + element % w.images, (column - w.left + element % w.columns) * p.stride[1] + behind
                inside = (row >= 0) & (row < p.height) & (c >= 0) & (c < p.width) & (n < len(x))
                for place, channel in enumerate(chunk.channels):
                    values = np.zeros(len(inside))
                    values[inside] = x[n[inside], channel, row[inside], c[inside]]
                    stage[place * planes + plane, : len(inside), element] = values
        return stage.reshape(-1, w.columns * w.images)

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
    """The problem that programs compute: that of fp32 for TF32, and of one long row for a pointwise convolution."""
    if problem.dtype == "tf32":
        problem = replace(problem, dtype="fp32")
    if problem.kernel == problem.stride == (1, 1) and not any(problem.padding):
        problem = replace(problem, height=1, width=problem.height * problem.width)
    return problem


def copies_planes(problem: Problem) -> bool:
    """Whether bulk copies can bring the input as it is: no padding, and planes of whole copies."""
    pointwise = problem.kernel == problem.stride == (1, 1) and not any(problem.padding)
    return pointwise and problem.height * problem.width * problem.torch_dtype.itemsize % 16 == 0


def _taps(problem: Problem) -> tuple[list[int], list[int]]:
    """Where the taps of the output at row and column 0 read, in rows and in columns."""
    (rows, columns), (down, right), padding = problem.kernel, problem.dilation, problem.padding
    return [r * down - padding[0] for r in range(rows)], [s * right - padding[2] for s in range(columns)]


def elements_per_word(problem: Problem) -> int:
    return 1 if problem.dtype in ("fp32", "tf32") else 2


def channel_words(words: Words, config: GeneratedConfig) -> int:
    """Words that a stage holds of a plane of a channel, whole copies."""
    return -(-(config.tile + words.reach) // 4) * 4


def stage_words(words: Words, config: GeneratedConfig) -> int:
    return config.channel_block * len(words.phases) * channel_words(words, config)


def shared_bytes(words: Words, config: GeneratedConfig, rows: Any) -> Any:
    """Of a program with so many rows per piece, as generated.cuh lays it out; for fields that are arrays too."""
    barriers = config.stages * 16
    if config.split == 1:
        return _ring_bytes(words, config, rows) + barriers
    share = -(-rows // config.split)
    return _ring_bytes(words, config, rows) + barriers + 16 + (config.split - 1) * share * config.tile * 4


def _ring_bytes(words: Words, config: GeneratedConfig, rows: Any) -> Any:
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
    filter: StretchedCSR,
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
    span = [np.arange(filter.indptr[row], filter.indptr[row + 1]) for row in rows]
    entry = np.concatenate(span)
    place = np.repeat(np.arange(len(rows)), [len(part) for part in span])
    each, channels = part_channels(problem, config), problem.in_channels // problem.groups
    mine = taps[0][entry] // each == part
    entry, place = entry[mine], place[mine]
    channel, r, s = (of_tap[entry].astype(np.int64) for of_tap in taps)
    channel -= part * each
    read = np.array([[words.tap(i, j) for j in range(problem.kernel[1])] for i in range(problem.kernel[0])])
    plane, element = channel * len(words.phases) + read[r, s, 0], read[r, s, 1]
    order = np.lexsort((place, element, plane))
    nonzeros = zip(
        *(a[order].tolist() for a in (plane, element, place, filter.values[entry].astype(np.float64))), strict=True
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


def _text(program: Program, bias: NDArray[np.float32] | None) -> Iterator[str]:
    p, c, w = program.problem, program.config, program.words
    products = sum(isinstance(s, MultiplyAdd) for q in program.pieces for chunk in q.chunks for s in chunk.steps)
    yield f"// {p}"
    yield f"// {c}"
    yield f"// {len(program.pieces)} pieces of code, {products} multiply-adds among {program.steps} steps"
    planes = len(w.phases)  # the kernel takes them for channels
    macros = {
        **_layout_macros(program),
        "ARRANGED": int(c.arranged),
        "BULK": int(c.copy == 0),
        "CONSUMERS": c.consumers,
        "PRODUCERS": c.producers,
        "SCOUTS": c.scouts,
        "THREADS": c.threads,
        "BLOCKS": c.blocks,
        "PIECES": program.hands,
        "PIECES_PER_GROUP": program.hands // p.groups,
        "SPLIT": c.split,
        "TOGETHER": c.together,
        "PEERS": c.peers,
        "CHUNKS": len(program.pieces[0].chunks),
        "CHANNEL_BLOCK": c.channel_block * planes,
        "STAGES": c.stages,
        "ENTRIES": c.entries,
        "COPY": max(c.copy, 1),
        "GROUP_CHANNELS": p.in_channels // p.groups * planes,
        "PART_CHANNELS": part_channels(p, c) * planes,
        "OUT_CHANNELS": p.out_channels,
        "OUT_HEIGHT": p.out_height,
        "OUT_WIDTH": p.out_width,
        "CHANNEL_WORDS": program.channel_words,
        "STAGE_BYTES": stage_words(w, c) * 4,
        "TILE_WORDS": c.tile,
        "STAGE_WORDS": c.tile + w.reach,
    }
    if c.split > 1:
        macros |= {
            "ROWS": program.rows,
            "RING_BYTES": _ring_bytes(w, c, program.rows),
            "RESIDUAL": int(p.epilogue.residual),
            "ACTIVATION": ["none", "relu", "relu6"].index(p.epilogue.activation),
        }
    yield from (f"#define {name} {value}" for name, value in macros.items())
    if c.split > 1:
        yield from _tables(program, bias)
    yield '#include "generated.cuh"'
    yield ""
    yield "GENERATED {"
    yield "  BEGIN"
    for i, piece in enumerate(program.pieces):
        yield f"  case {i}:"
        yield "    asm volatile("
        yield from (f'        "{line}\\n"' for line in _code(program, piece, bias))
        yield "        OPERANDS);"
        yield "    break;"
    yield "  END"
    yield "}"


def arrange_defines(program: Program, threads: int) -> dict[str, int | str]:
    """The macros of kernels/arrange.cu."""
    p, phases = program.problem, program.words.phases
    return {
        **_layout_macros(program),
        "THREADS": threads,
        "STRIDE_DOWN": p.stride[0],
        "STRIDE_RIGHT": p.stride[1],
        "PLANES": len(phases),
        "FIRST_ROWS": ",".join(str(row) for row, _ in phases),
        "FIRST_COLUMNS": ",".join(str(column) for _, column in phases),
    }


def _layout_macros(program: Program) -> dict[str, int]:
    p, w = program.problem, program.words
    return {
        "STORAGE": int(w.columns * w.images == 2),
        "COLUMNS": w.columns,
        "IMAGES": w.images,
        "CHANNELS": p.in_channels,
        "HEIGHT": p.height,
        "WIDTH": p.width,
        "PITCH": w.pitch,
        "IMAGE_ROWS": w.image_rows,
        "TOP": w.top,
        "LEFT": w.left,
    }


def _tables(program: Program, bias: NDArray[np.float32] | None) -> Iterator[str]:
    """Which output channel each row of a piece is, -1 for none, and the bias of each output channel."""
    p, split = program.problem, program.config.split
    share = -(-program.rows // split)
    channels = [list(piece.rows) for piece in program.pieces[::split]]
    padded = [channel for rows in channels for channel in rows + [-1] * (share * split - len(rows))]
    yield f"__constant__ int CHANNEL_OF[] = {{{', '.join(map(str, padded))}}};"
    values = np.zeros(p.out_channels, np.float32) if bias is None else bias
    yield f"__constant__ float BIAS[] = {{{', '.join(f'{float(value).hex()}f' for value in values)}}};"


#: The operands of a piece of code, see generated.cuh.
_PARITY, _WORDS, _FULL, _INSIDE, _FIRST_CHUNK, _RESIDUAL, _Y, _SCOUT = (f"%{i}" for i in range(8))
_LOOK = 32  # steps at least from one place that scouts touch to the next


def _code(program: Program, piece: Piece, bias: NDArray[np.float32] | None) -> Iterator[str]:
    """What a consumer does of a piece, as PTX: s are sums, x words of the input.

    Scouts take the chunks in turn. They jump from one place of a chunk to the next, and wait for stages and leave them
    as consumers do, so that they are ahead by the ring's stages at most.
    """
    c, fp32, rows = program.config, _is_fp32(program), len(piece.rows)
    if c.split > 1:
        bias = None  # it is added when the parts are
    words = max(1, *(chunk.registers for chunk in piece.chunks))
    kind = "f32" if fp32 else "b32"
    yield f"{{ .reg .{kind} s<{c.sums * rows}>; .reg .{kind} x<{words}>; .reg .f32 u; .reg .f32 v; .reg .f32 w;"
    yield ".reg .b16 h; .reg .b16 g; .reg .pred a; .reg .pred b; .reg .pred p; .reg .b32 t; .reg .b32 left;"
    yield ".reg .b64 d; .reg .b64 e; .reg .pred first;"
    yield "mov.u32 t, %%laneid; setp.eq.u32 first, t, 0;"
    if c.peers > 1:  # each of the first lanes arrives at the barriers of one of them
        yield f".reg .pred peers; .reg .b32 peer; setp.lt.u32 peers, t, {c.peers};"
        yield f"@peers mapa.shared::cluster.u32 peer, {_FULL}, t;"
    if c.scouts:
        # A vote tells the assembler that all lanes agree, and so do the jumps.
        yield f".reg .pred scout; setp.ge.s32 scout, {_SCOUT}, 0; vote.sync.any.pred scout, scout, 0xffffffff;"
        for mine in range(c.scouts):
            yield f".reg .pred other{mine}; setp.ne.and.s32 other{mine}, {_SCOUT}, {mine}, scout;"
            yield f"vote.sync.any.pred other{mine}, other{mine}, 0xffffffff;"
    for place in range(c.sums * rows):
        start = 0.0 if bias is None or not fp32 or place >= rows else bias[piece.rows[place]]
        yield f"mov.{kind} s{place}, {_f32(start) if fp32 else 0};"
    count = len(piece.chunks)
    if c.entries > 1:
        yield f"mov.b32 left, {count};"
        for entry in sorted({e * (count // c.stages) // c.entries * c.stages for e in range(1, c.entries)} - {0}):
            yield f"setp.eq.u32 p, {_FIRST_CHUNK}, {entry}; @p bra CHUNK{entry};"
    for i, chunk in enumerate(piece.chunks):
        stage = i % c.stages
        at = stage * stage_words(program.words, c)
        yield f'CHUNK{i}: mbarrier." WAIT ".parity.shared.b64 p, [{_FULL}+{stage * 8}], {_PARITY}; @!p bra CHUNK{i};'
        places = _places(program, chunk) if c.scouts else []
        jumps = dict(zip(places, [*(f"LOOK{i}_{place}" for place in places[1:]), f"SEEN{i}"], strict=False))
        if c.scouts > 1:
            yield f"@other{i % c.scouts} bra.uni SEEN{i};"
        for number, step in enumerate(chunk.steps):
            if number in jumps:
                yield f"LOOK{i}_{number}: @scout bra.uni {jumps[number]};"
            yield _instruction(step, at, fp32)
        if c.scouts:
            yield f"SEEN{i}:"
        yield "bar.warp.sync 0xffffffff;"
        empty = (c.stages + stage) * 8
        if c.peers > 1:
            yield f"@peers mbarrier.arrive.release.cluster.shared::cluster.b64 _, [peer+{empty}];"
        else:
            yield f"@first mbarrier.arrive.shared.b64 d, [{_FULL}+{empty}];"
        if stage == c.stages - 1:
            yield f"xor.b32 {_PARITY}, {_PARITY}, 1;"
            if c.entries > 1:
                yield f"sub.u32 left, left, {c.stages}; setp.eq.u32 p, left, 0; @p bra END;"
    if c.entries > 1:
        yield "bra CHUNK0;"
        yield "END:"
    if c.scouts:
        yield "@scout bra.uni DONE;"
    yield from _hand_over(program, piece) if c.split > 1 else _epilogue(program, piece, bias)
    if c.scouts:
        yield "DONE:"
    yield "}"


def _places(program: Program, chunk: Chunk) -> list[int]:
    """The steps of a chunk in front of which scouts may jump: no word of the input is held there.

    Words that were held would have to be kept in registers from the beginning, as far as the assembler knows.
    """
    places: list[int] = []
    last = None
    for number, step in enumerate(chunk.steps):
        if isinstance(step, Load):
            plane = step.offset // program.channel_words
            if plane != last and (not places or number >= places[-1] + _LOOK):
                places.append(number)
            last = plane
    return places


def _instruction(step: Step, stage: int, fp32: bool) -> str:
    match step:
        case Load(to, offset):
            return f"ld.shared.{'f32' if fp32 else 'b32'} x{to}, [{_WORDS}+{(stage + offset) * 4}];"
        case Join(to, low, high):
            return f"prmt.b32 x{to}, x{low}, x{high}, 0x5432;"
        case MultiplyAdd(place, source, weight):
            if fp32:
                return f"fma.rn.f32 s{place}, x{source}, {_f32(weight)}, s{place};"
            return f"mov.b32 t, {_half2(weight)}; fma.rn.f16x2 s{place}, x{source}, t, s{place};"


def _halves(row: int, rows: int, sums: int) -> Iterator[str]:
    """Both elements of a row's 16-bit sums, added up, as u and v."""
    yield f"mov.b32 {{h, g}}, s{row}; cvt.f32.f16 u, h; cvt.f32.f16 v, g;"
    for place in range(row + rows, sums * rows, rows):
        yield f"mov.b32 {{h, g}}, s{place}; cvt.f32.f16 w, h; add.f32 u, u, w; cvt.f32.f16 w, g; add.f32 v, v, w;"


def _hand_over(program: Program, piece: Piece) -> Iterator[str]:
    """Writes the sums to shared memory, where the ring was."""
    c, fp32 = program.config, _is_fp32(program)
    yield f"bar.sync 1, {c.tile};"
    for row in range(len(piece.rows)):
        if c.sums > 1:
            yield from _halves(row, len(piece.rows), c.sums)
            yield f"cvt.rn.f16x2.f32 s{row}, v, u;"
        yield f"st.shared.{'f32' if fp32 else 'b32'} [{_WORDS}+{row * c.tile * 4}], s{row};"


def _epilogue(program: Program, piece: Piece, bias: NDArray[np.float32] | None) -> Iterator[str]:
    p, c, w, fp32 = program.problem, program.config, program.words, _is_fp32(program)
    size, plane = (4 if fp32 else 2), p.out_height * p.out_width
    yield f"and.b32 t, {_INSIDE}, 1; setp.ne.u32 a, t, 0; and.b32 t, {_INSIDE}, 2; setp.ne.u32 b, t, 0;"
    yield f"add.u64 d, {_Y}, {_RESIDUAL};"
    # Where the second element of a word goes, and where its residual is.
    second, second_residual, step = _Y, "d", 2
    if w.images > 1:
        second, second_residual, step = "e", "r", 0
        yield f".reg .b64 r; add.u64 e, {_Y}, {p.out_channels * plane * size}; add.u64 r, e, {_RESIDUAL};"
    whole = w.columns == 2 and p.out_width % 2 == 0  # both elements of a word are outputs, or none is
    # 16-bit sums end as they are where nothing is added that 16 bits do not hold: the results are the same.
    held = bias is None or np.array_equal(bias[list(piece.rows)].astype(np.float16), bias[list(piece.rows)])
    short = not fp32 and c.sums == 1 and held and not p.epilogue.residual
    for row, channel in enumerate(piece.rows):
        at = channel * plane * size
        if fp32:
            if p.epilogue.residual:
                yield f"mov.f32 w, 0f00000000; @a ld.global.f32 w, [d+{at}]; add.f32 s{row}, s{row}, w;"
            yield from _activate(p, "f32", f"s{row}")
            yield f"@a st.global.f32 [{_Y}+{at}], s{row};"
            continue
        if short:
            if bias is not None:
                yield f"mov.b32 t, {_half2(bias[channel])}; add.rn.f16x2 s{row}, s{row}, t;"
            yield from _activate(p, "f16x2", f"s{row}")
        else:
            yield from _halves(row, len(piece.rows), c.sums)
            if bias is not None:
                yield f"add.f32 u, u, {_f32(bias[channel])}; add.f32 v, v, {_f32(bias[channel])};"
            if p.epilogue.residual:
                yield "mov.b16 h, 0; mov.b16 g, 0;"
                yield f"@a ld.global.b16 h, [d+{at}]; @b ld.global.b16 g, [{second_residual}+{at + step}];"
                yield "cvt.f32.f16 w, h; add.f32 u, u, w; cvt.f32.f16 w, g; add.f32 v, v, w;"
            yield from _activate(p, "f32", "u")
            yield from _activate(p, "f32", "v")
            yield f"cvt.rn.f16x2.f32 s{row}, v, u;"
        if whole:
            yield f"@a st.global.b32 [{_Y}+{at}], s{row};"
        else:
            yield f"mov.b32 {{h, g}}, s{row};"
            yield f"@a st.global.b16 [{_Y}+{at}], h; @b st.global.b16 [{second}+{at + step}], g;"


def _activate(problem: Problem, kind: str, value: str) -> Iterator[str]:
    """The activation of a float, or of both halves of a word."""
    zero, six = (_f32(0.0), _f32(6.0)) if kind == "f32" else (_half2(0.0), _half2(6.0))
    steps = {"none": (), "relu": (("max", zero),), "relu6": (("max", zero), ("min", six))}
    for step, bound in steps[problem.epilogue.activation]:
        yield f"mov.b32 t, {bound}; {step}.NaN.{kind} {value}, {value}, t;"


def _is_fp32(program: Program) -> bool:
    return elements_per_word(program.problem) == 1


def _f32(value: float) -> str:
    return f"0f{np.float32(value).view(np.uint32):08X}"


def _half2(value: float) -> str:
    """A weight in both halves of a word; raises ValueError where it does not fit."""
    with np.errstate(over="ignore"):
        half = np.float16(value)
    if not np.isfinite(half):
        raise ValueError(f"a weight of {value:.3g} does not fit fp16; use fp32")
    return "0x" + f"{int(half.view(np.uint16)):04X}" * 2
