"""Method `depthwise_tc` on CUDA: dense products on tensor cores for depthwise convolutions in channels_last.

Memory bounds these layers, and multiply-adds would take longer than it does: kernels/cuda/depthwise_tc.cu.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from escort.cuda.compiler import Variant
from escort.cuda.gpu import Gpu
from escort.cuda.kernel import kernel, unavailable
from escort.cuda.launch import Grid
from escort.cuda.params import STORAGE, Divisor, pack
from escort.filter import SparseFilter
from escort.methods import activation
from escort.methods.base import Method, Prepared
from escort.methods.runner import runner
from escort.methods.sharing import weights_by_tap
from escort.problem import MemoryFormat, Problem

_SOURCE = "depthwise_tc.cu"
_THREADS, _VECTORS, _VECTOR_BYTES = 128, 4, 16  # of a block; vectors of channels of a tile
_PIXELS, _QUAD = _THREADS // _VECTORS, 4  # that a block copies at once; that are transposed together
_QUAD_BYTES = _QUAD * _VECTORS * _VECTOR_BYTES + 16
_STACKS = 16  # that a warp computes at once
_MOST_WORDS = 28  # rows of a filter times the quads that a strip reads: the weights that a lane's registers hold
_MOST = 2**31 - 1
_MOST_STRIPS, _MOST_SAMPLES = 16, 4  # of a tile
_MOST_TILE_BYTES = 48 * 1024  # of shared memory: several blocks of a multiprocessor take turns with memory
_SHARED_BYTES, _BLOCK_BYTES = 228 * 1024, 1024  # of a multiprocessor; what the system takes of it for each block
_CONFIGS, _FEW = 5, 16  # that are worth timing; of which some are good
# Fitted to 118 times of 13 layers on an H200 (docs/notes/planes.md).
_LEAST_US, _BYTES_PER_US, _CLOCK_MHZ = 1.25, 4.3e6, 1755.0
_CLOCKS, _CLOCKS_ALONE = 1.64, 7.8  # of an instruction: of a multiprocessor's share of all blocks; of a block by itself


@dataclass(frozen=True)
class DepthwiseTcConfig:
    """The knobs of the kernel: what a block computes of a vector of channels.

    Attributes:
        down: neighbouring outputs of a column that a lane computes, a stack; their input rows are read once for all.
        rows: of outputs, a multiple of `down`.
        strips: of four neighbouring outputs of a row, in TF32 eight.
        samples: whose outputs these are.
    """

    down: int
    rows: int
    strips: int
    samples: int


class DepthwiseTc(Method):
    """Filters up to 7x7 without dilation, and 9x9 of 16 bits with stride 1; sums are in fp32.

    An infinity or NaN in x makes NaN of a few more outputs than those that read it, whose products have a zero for it:
    of six beside them in a row at most (in TF32 ten), in its channel and in 16 bits in the one that shares its word.
    """

    name = "depthwise_tc"
    device_type = "cuda"
    config_type = DepthwiseTcConfig

    def unsupported(self, problem: Problem) -> str | None:
        if problem.groups != problem.in_channels or problem.out_channels != problem.in_channels:
            return "each output channel must read an input channel of its own"
        if problem.precision == "fp32":
            return "tensor cores multiply in fp16, bf16 or TF32"
        if problem.memory_format != "channels_last":
            return "it reads and writes channels_last; plan it in that memory format"
        if problem.in_channels % _vector(problem):
            return f"the channels must be a multiple of {_vector(problem)}"
        if problem.dilation != (1, 1):
            return "its filters have no dilation"
        if problem.kernel_size[0] * _quads(problem) > _MOST_WORDS:
            return "the filter's weights do not fit registers"
        if max(math.prod(problem.input_shape[1:]), math.prod(problem.output_shape[1:])) > _MOST // 2:
            return "a sample has more elements than 32 bits number; use a smaller input"
        return unavailable(torch.device(problem.device))

    def configs(self, problem: Problem, sparse_filter: SparseFilter) -> Sequence[DepthwiseTcConfig]:
        return _configs(problem, Gpu.of(problem.device))

    def kernels(self, problem: Problem, config: DepthwiseTcConfig) -> Sequence[Variant]:
        macros: dict[str, int | str] = {
            "STORAGE": STORAGE[problem.storage],
            "ROWS": problem.kernel_size[0],
            "COLUMNS": problem.kernel_size[1],
            "STRIDE": problem.stride[0],
            "RIGHT": problem.stride[1],
            "DOWN": config.down,
            "RESIDUAL": int(problem.epilogue.residual),
            "OCCUPANCY": _occupancy(problem, config.down),
        }
        return (Variant(_SOURCE, macros | activation.macros(problem.epilogue)),)

    def input_format(self, config: DepthwiseTcConfig) -> MemoryFormat:
        return "channels_last"

    def predict_us(
        self, problem: Problem, sparse_filter: SparseFilter, gpu: Gpu, config: DepthwiseTcConfig | None = None
    ) -> float:
        """What memory takes and what computing does, which a block does one after the other."""
        config = config or _configs(problem, gpu)[0]
        outputs = math.prod(problem.output_shape)
        elements = math.prod(problem.input_shape) + outputs * (2 if problem.epilogue.residual else 1)
        memory_us = elements * problem.storage.itemsize / _BYTES_PER_US
        special_us = outputs * activation.clocks(problem) / (gpu.multiprocessors * _CLOCK_MHZ)
        return _LEAST_US + memory_us + max(special_us, Tile.of(problem, config).clocks(gpu) / _CLOCK_MHZ)

    def prepare(
        self,
        problem: Problem,
        sparse_filter: SparseFilter,
        bias: torch.Tensor | None,
        config: DepthwiseTcConfig,
        slope: torch.Tensor | None = None,
    ) -> Prepared:
        device, tile, samples_of_tile = torch.device(problem.device), Tile.of(problem, config), config.samples
        (variant,) = self.kernels(problem, config)
        compiled = kernel(variant.source, variant.defines, device)
        fixed = (
            weights_by_tap(problem, sparse_filter),
            activation.per_channel(problem, bias, slope),
            pack(Params.of(problem, tile)),
        )

        def cut(samples: int) -> tuple[Grid, int]:
            return (-(-samples // samples_of_tile) * tile.blocks, 1, 1), samples

        args, blocks = (*[torch.Tensor] * 3, *fixed, int), math.prod(cut(problem.batch)[0])
        launch = compiled.bind_spread(_THREADS, tile.shared_bytes, args, blocks=blocks)
        torch.cuda.current_stream(device).synchronize()  # other streams may read the tables

        most_samples = _MOST // max(tile.blocks, 1)
        run = runner(problem, launch, cut, most_samples=most_samples, alignment=_VECTOR_BYTES)
        return Prepared(run, binaries=(compiled.binary,))


def _vector(problem: Problem) -> int:
    """How many neighbouring channels a warp computes."""
    return _VECTOR_BYTES // problem.storage.itemsize


def _strip(problem: Problem) -> int:
    """The outputs of a strip: tensor cores multiply eight columns, of two channels where a word has two."""
    return 4 if problem.storage.itemsize == 2 else 8


def _quads(problem: Problem) -> int:
    """How many quads of inputs a strip reads."""
    return -(-((_strip(problem) - 1) * problem.stride[1] + problem.kernel_size[1]) // _QUAD)


def _occupancy(problem: Problem, down: int) -> int:
    """How many blocks of a multiprocessor registers leave room for: weights, sums, pixels and addresses of a lane."""
    registers = 4 * problem.kernel_size[0] * _quads(problem) + 16 * down + 40
    return 65536 // (_THREADS * registers)


@lru_cache(1024)
def _configs(problem: Problem, gpu: Gpu) -> tuple[DepthwiseTcConfig, ...]:
    """The tile that is predicted to take the least time, then the best of those that differ from it, then others."""
    tiles = sorted((Tile.of(problem, config) for config in _space(problem)), key=lambda tile: tile.clocks(gpu))
    first = tiles[0]
    best = [first]
    for differs in (
        lambda tile: 2 * tile.shared_bytes <= first.shared_bytes,
        lambda tile: tile.config.down != first.config.down,
        lambda tile: 4 * tile.shared_bytes <= first.shared_bytes,
    ):
        best += itertools.islice(filter(differs, tiles), 1)
    return tuple(dict.fromkeys(tile.config for tile in (*best, *tiles)))[:_CONFIGS]


def _space(problem: Problem) -> list[DepthwiseTcConfig]:
    """Tiles that fit: up to 16 down and across, and of a map that is too large for so few, multiples of that."""
    found, step, longest = list[DepthwiseTcConfig](), 1, max(problem.out_height, problem.out_width)
    while not found or (len(found) < _FEW and step < longest):  # a strip of a row fits at the latest
        found += _evenly(problem, step)
        step *= 2
    return found


def _evenly(problem: Problem, step: int) -> Iterator[DepthwiseTcConfig]:
    """Tiles that share out a sample's rows and strips evenly, or hold whole samples; their numbers go by a step."""
    strips = -(-problem.out_width // _strip(problem))
    row_counts, strip_counts = (
        sorted({min(count * step, length) for count in range(1, 17)}) for length in (problem.out_height, strips)
    )
    for down, row_tiles, strip_tiles in itertools.product((1, 2), row_counts, strip_counts):
        rows = -(-problem.out_height // row_tiles)
        rows, of_row = -(-rows // down) * down, -(-strips // strip_tiles)
        if of_row > _MOST_STRIPS:
            continue
        for samples in (1, 2, _MOST_SAMPLES) if row_tiles == strip_tiles == 1 else (1,):
            config = DepthwiseTcConfig(down, rows, of_row, samples)
            if samples <= max(problem.batch, 1) and Tile.of(problem, config).shared_bytes <= _MOST_TILE_BYTES:
                yield config


@dataclass(frozen=True)
class Tile:
    """What a block computes and holds in shared memory.

    Attributes:
        problem: whose outputs they are.
        config: how many.
        in_rows: of a sample's input.
        row_quads: four inputs each, of a row.
        counts: tiles along the vectors of channels, the strips and the rows of a sample.
        shared_bytes: of a block.
    """

    problem: Problem
    config: DepthwiseTcConfig
    in_rows: int
    row_quads: int
    counts: tuple[int, int, int]
    shared_bytes: int

    @classmethod
    def of(cls, problem: Problem, config: DepthwiseTcConfig) -> Tile:
        in_rows = (config.rows - 1) * problem.stride[0] + problem.kernel_size[0]
        strip, vector = _strip(problem), _vector(problem)
        row_quads = (config.strips - 1) * problem.stride[1] * strip // _QUAD + _quads(problem)
        whole = problem.out_channels // vector, -(-problem.out_width // strip), problem.out_height
        sizes = _VECTORS, config.strips, config.rows
        counts = tuple(-(-length // size) for length, size in zip(whole, sizes, strict=True))
        tables = 2 if problem.epilogue.activation in ("leaky_relu", "prelu") else 1  # slopes are one
        shared_bytes = 4 * _VECTORS * vector * tables + config.samples * in_rows * row_quads * _QUAD_BYTES
        return cls(problem, config, in_rows, row_quads, (counts[0], counts[1], counts[2]), shared_bytes)

    @property
    def blocks(self) -> int:
        """Those of as many samples as a tile has."""
        return math.prod(self.counts)

    def clocks(self, gpu: Gpu) -> float:
        """How long a GPU takes, but for its memory, by the instructions that the machine code has for each part."""
        rows, quads = self.problem.kernel_size[0], _quads(self.problem)
        down, samples = self.config.down, self.config.samples
        quads_of_strip = _strip(self.problem) // _QUAD
        in_quads, out_quads = self.in_rows * self.row_quads, self.config.rows * self.config.strips * quads_of_strip
        span, products = (down - 1) * self.problem.stride[0] + rows, 4 * -(-quads // 2)
        turns = -(-self.config.rows // down * self.config.strips // _STACKS)
        copied = 20 * -(-_QUAD * in_quads // _PIXELS) + 14 * -(-_QUAD * out_quads // _PIXELS)
        computed = turns * (50 + products * (span + 2 * down * rows) + 55 * down * quads_of_strip)
        transposed = 45 if self.problem.storage.itemsize == 2 else 79  # with the rounding of floats
        arranged = transposed * -(-samples * in_quads // 32)
        issued = 150 + 10 * rows * quads + samples * (copied + computed) + arranged
        blocks = self.blocks * -(-self.problem.batch // samples)
        resident = min(
            _occupancy(self.problem, down), (gpu.shared_bytes + _BLOCK_BYTES) // (self.shared_bytes + _BLOCK_BYTES)
        )
        waves = max(blocks / (gpu.multiprocessors * max(resident, 1)), 1.0)
        return issued * max(-(-blocks // gpu.multiprocessors) * _CLOCKS, waves * _CLOCKS_ALONE)


@dataclass(frozen=True)
class Rectangle:
    """Pixels that a block copies row by row, `_PIXELS` at once: the fields of the kernel's struct, in their order.

    Attributes:
        columns: of it.
        rows_on, columns_on: from a pixel to that which the same thread copies next.
    """

    columns: int
    rows_on: int
    columns_on: int

    @classmethod
    def of(cls, columns: int) -> Rectangle:
        return cls(columns, *divmod(_PIXELS, columns))


@dataclass(frozen=True)
class Params:
    """The kernel's parameters that are the same in every launch: the fields of its struct, in their order.

    Attributes:
        channels: of x and y.
        in_sample, out_sample: elements of x and y from one sample to the next.
        height, width, out_height, out_width: of x and y.
        top, left: of the padding.
        rows, strips, samples: of a tile.
        in_rows, read_columns, row_quads: of its input: rows; columns that outputs depend on, and all of them in quads.
        in_pixels, out_pixels: its input and its outputs.
        vector_tiles, strip_tiles, row_tiles: of a sample.
        by_vector_tiles, by_strip_tiles, by_row_tiles, by_strips: divide by these.
        bound: 0 none, 1 ReLU, 2 ReLU6.
    """

    channels: int
    in_sample: int
    out_sample: int
    height: int
    width: int
    out_height: int
    out_width: int
    top: int
    left: int
    rows: int
    strips: int
    samples: int
    in_rows: int
    read_columns: int
    row_quads: int
    in_pixels: Rectangle
    out_pixels: Rectangle
    vector_tiles: int
    strip_tiles: int
    row_tiles: int
    by_vector_tiles: Divisor
    by_strip_tiles: Divisor
    by_row_tiles: Divisor
    by_strips: Divisor
    bound: int

    @classmethod
    def of(cls, problem: Problem, tile: Tile) -> Params:
        config, counts, strip = tile.config, tile.counts, _strip(problem)
        return cls(
            channels=problem.out_channels,
            in_sample=math.prod(problem.input_shape[1:]),
            out_sample=math.prod(problem.output_shape[1:]),
            height=problem.height,
            width=problem.width,
            out_height=problem.out_height,
            out_width=problem.out_width,
            top=problem.padding[0],
            left=problem.padding[2],
            rows=config.rows,
            strips=config.strips,
            samples=config.samples,
            in_rows=tile.in_rows,
            read_columns=(config.strips * strip - 1) * problem.stride[1] + problem.kernel_size[1],
            row_quads=tile.row_quads,
            in_pixels=Rectangle.of(tile.row_quads * _QUAD),
            out_pixels=Rectangle.of(config.strips * strip),
            vector_tiles=counts[0],
            strip_tiles=counts[1],
            row_tiles=counts[2],
            by_vector_tiles=Divisor.of(counts[0]),
            by_strip_tiles=Divisor.of(counts[1]),
            by_row_tiles=Divisor.of(counts[2]),
            by_strips=Divisor.of(config.strips),
            bound=activation.bound(problem.epilogue),
        )
