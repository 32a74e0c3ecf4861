"""Method `depthwise` on CUDA: our dense kernel for convolutions whose output channels read one input channel each.

Memory bounds these, whatever the filter's zeros: kernels/cuda/depthwise.cu reads x about once and writes y once, in
channels_last with 16 bytes of a pixel's channels at a time, and takes NCHW too.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from escort.cuda.compiler import Variant
from escort.cuda.gpu import Gpu
from escort.cuda.kernel import kernel, unavailable
from escort.cuda.params import STORAGE, Divisor, pack
from escort.filter import SparseFilter
from escort.methods import activation
from escort.methods.base import Method, Prepared
from escort.methods.runner import runner
from escort.methods.sharing import weights_by_tap
from escort.problem import Problem

_SOURCE = "depthwise.cu"
_THREADS, _LOG_THREADS = 128, 7  # of a block
_STRIPS = 4, 2, 1
_MOST_COLUMNS = 11  # of a filter, whose weights of a row lie in registers
_MOST = 2**31 - 1
_RESIDENT = 512  # threads of a multiprocessor that hide what memory takes
# Fitted to 15 layers on an H200 in channels_last (docs/notes/planes.md).
_LEAST_US, _BYTES_PER_US, _CLOCK_MHZ = 1.9, 2.5e6, 1755.0
_PRODUCTS_PER_CLOCK, _CLOCKS = 43.0, 0.27  # of a multiprocessor; of it for an output besides
_AT_ONCE, _ROW_US = 3, 1.3  # rows of a filter whose inputs are loaded together; a further one waits for its own
_MOST_TILE_VECTORS = 8  # a cache line
_SECTOR_BYTES = 32  # that caches move at least


@dataclass(frozen=True)
class DepthwiseConfig:
    """The knob of the depthwise kernel.

    Attributes:
        strip: neighbouring outputs of a row that a thread computes.
    """

    strip: int


class DepthwiseCuda(Method):
    """Any kernel size up to eleven columns, stride, dilation, padding and channel multiplier; sums are in fp32."""

    name = "depthwise"
    device_type = "cuda"
    config_type = DepthwiseConfig

    def unsupported(self, problem: Problem) -> str | None:
        if problem.groups != problem.in_channels:
            return f"each output channel reads {problem.in_channels // problem.groups} input channels, not one"
        if problem.kernel_size[1] > _MOST_COLUMNS:
            return f"a filter has at most {_MOST_COLUMNS} columns, whose weights lie in registers"
        if max(math.prod(problem.input_shape[1:]), math.prod(problem.output_shape[1:])) > _MOST // 2:
            return "a sample has more elements than 32 bits number; use a smaller input"
        return unavailable(torch.device(problem.device))

    def configs(self, problem: Problem, sparse_filter: SparseFilter) -> Sequence[DepthwiseConfig]:
        if _vector(problem) == 1 or problem.dilation[1] > 1:
            return (DepthwiseConfig(1),)
        # Wide strips load less, narrow ones give a small layer more threads.
        threads = math.prod(problem.output_shape) // _vector(problem)
        needed = Gpu.of(problem.device).multiprocessors * _RESIDENT
        enough = [strip for strip in _STRIPS if threads // strip >= needed]
        return tuple(map(DepthwiseConfig, (*enough, *(strip for strip in _STRIPS[::-1] if strip not in enough))))

    def kernels(self, problem: Problem, config: DepthwiseConfig) -> Sequence[Variant]:
        macros: dict[str, int | str] = {
            "STORAGE": STORAGE[problem.storage],
            "VECTOR": _vector(problem),
            "ROWS": problem.kernel_size[0],
            "COLUMNS": problem.kernel_size[1],
            "WIDTH": config.strip,
            "RIGHT": problem.stride[1] if config.strip > 1 else 1,
        }
        return (Variant(_SOURCE, macros | activation.macros(problem.epilogue)),)

    def predict_us(
        self, problem: Problem, sparse_filter: SparseFilter, gpu: Gpu, config: DepthwiseConfig | None = None
    ) -> float:
        """What memory takes, or computing where a filter is large."""
        outputs = math.prod(problem.output_shape)
        elements = math.prod(problem.input_shape) + outputs * (2 if problem.epilogue.residual else 1)
        memory_us = elements * problem.storage.itemsize / _BYTES_PER_US
        clocks = math.prod(problem.kernel_size) / _PRODUCTS_PER_CLOCK + _CLOCKS + activation.clocks(problem)
        waiting_us = _LEAST_US + _ROW_US * max(problem.kernel_size[0] - _AT_ONCE, 0)
        return waiting_us + max(memory_us, outputs * clocks / (gpu.multiprocessors * _CLOCK_MHZ))

    def prepare(
        self,
        problem: Problem,
        sparse_filter: SparseFilter,
        bias: torch.Tensor | None,
        config: DepthwiseConfig,
        slope: torch.Tensor | None = None,
    ) -> Prepared:
        if config.strip > 1 and problem.dilation[1] > 1:
            raise ValueError("a strip of several outputs has no dilated columns; use a strip of 1")
        device, tile = torch.device(problem.device), Tile.of(problem, config)
        (variant,) = self.kernels(problem, config)
        compiled = kernel(variant.source, variant.defines, device)
        fixed = (
            weights_by_tap(problem, sparse_filter),
            activation.per_channel(problem, bias, slope),
            pack(Params.of(problem, tile)),
        )
        launch = compiled.bind(_THREADS, 0, (*[torch.Tensor] * 3, *fixed), overlap=True)
        torch.cuda.current_stream(device).synchronize()  # other streams may read the tables
        run = runner(
            *(problem, launch, lambda samples: ((samples * tile.blocks, 1, 1),)),
            most_samples=_MOST // max(tile.blocks, 1),
            alignment=_vector(problem) * problem.storage.itemsize,
        )
        return Prepared(run, binaries=(compiled.binary,))


def _vector(problem: Problem) -> int:
    """How many neighbouring channels a thread computes."""
    if problem.memory_format == "contiguous" or problem.out_channels > problem.in_channels:
        return 1
    return math.gcd(problem.out_channels, 16 // problem.storage.itemsize)


@dataclass(frozen=True)
class Tile:
    """What a block computes: vectors of channels, strips and rows, powers of two whose product is its threads.

    Attributes:
        sizes: of the tile.
        counts: tiles along the vectors, strips and rows of a sample.
    """

    sizes: tuple[int, int, int]
    counts: tuple[int, int, int]

    @classmethod
    def of(cls, problem: Problem, config: DepthwiseConfig) -> Tile:
        """The tile with the least to load and compute, where each input is loaded once for a tile."""
        is_last = problem.memory_format == "channels_last"
        vectors = problem.out_channels // _vector(problem)
        whole = vectors, -(-problem.out_width // config.strip), problem.out_height

        def cost(sizes: tuple[int, int, int]) -> float:
            tiles = math.prod(-(-length // size) for length, size in zip(whole, sizes, strict=True))
            rows, columns = (
                (outputs - 1) * stride + (taps - 1) * dilation + 1
                for outputs, stride, taps, dilation in zip(
                    (sizes[2], sizes[1] * config.strip),
                    *(problem.stride, problem.kernel_size, problem.dilation),
                    strict=True,
                )
            )
            if is_last:
                sectors = columns * max(sizes[0] * 16 / _SECTOR_BYTES, 1)
            else:
                sectors = (columns * problem.storage.itemsize // _SECTOR_BYTES + 2) * sizes[0]
            return tiles * (rows * sectors + _THREADS * config.strip / 2)

        powers = [2**log for log in range(_LOG_THREADS + 1)]
        most_vectors = min(_MOST_TILE_VECTORS, 2 * vectors - 1)
        tiles = [
            (a, b, _THREADS // (a * b))
            for a, b in itertools.product(powers, powers)
            if a * b <= _THREADS and a <= most_vectors
        ]
        sizes = min(tiles, key=cost)
        counts = tuple(-(-length // size) for length, size in zip(whole, sizes, strict=True))
        return cls(sizes, (counts[0], counts[1], counts[2]))

    @property
    def blocks(self) -> int:
        """Those of a sample."""
        return math.prod(self.counts)


@dataclass(frozen=True)
class Params:
    """The kernel's parameters that are the same in every launch: the fields of its struct, in their order.

    Attributes:
        channels: of y.
        multiplier: how many of them read a channel of x.
        in_sample, in_channel, in_pixel: elements of x from one of these to the next.
        out_sample, out_channel, out_pixel: the same of y.
        height, width, out_height, out_width: of x and y.
        stride_down, stride_right, top, left, dilation_down, dilation_right: of the convolution.
        log_vectors, log_strips: of a tile's sizes.
        vector_tiles, strip_tiles, row_tiles: of a sample.
        by_vector_tiles, by_strip_tiles, by_row_tiles: divide by these.
        bound: 0 none, 1 ReLU, 2 ReLU6.
    """

    channels: int
    multiplier: int
    in_sample: int
    in_channel: int
    in_pixel: int
    out_sample: int
    out_channel: int
    out_pixel: int
    height: int
    width: int
    out_height: int
    out_width: int
    stride_down: int
    stride_right: int
    top: int
    left: int
    dilation_down: int
    dilation_right: int
    log_vectors: int
    log_strips: int
    vector_tiles: int
    strip_tiles: int
    row_tiles: int
    by_vector_tiles: Divisor
    by_strip_tiles: Divisor
    by_row_tiles: Divisor
    bound: int

    @classmethod
    def of(cls, problem: Problem, tile: Tile) -> Params:
        is_last = problem.memory_format == "channels_last"
        return cls(
            channels=problem.out_channels,
            multiplier=problem.out_channels // problem.in_channels,
            in_sample=math.prod(problem.input_shape[1:]),
            in_channel=1 if is_last else problem.height * problem.width,
            in_pixel=problem.in_channels if is_last else 1,
            out_sample=math.prod(problem.output_shape[1:]),
            out_channel=1 if is_last else problem.out_height * problem.out_width,
            out_pixel=problem.out_channels if is_last else 1,
            height=problem.height,
            width=problem.width,
            out_height=problem.out_height,
            out_width=problem.out_width,
            stride_down=problem.stride[0],
            stride_right=problem.stride[1],
            top=problem.padding[0],
            left=problem.padding[2],
            dilation_down=problem.dilation[0],
            dilation_right=problem.dilation[1],
            log_vectors=tile.sizes[0].bit_length() - 1,
            log_strips=tile.sizes[1].bit_length() - 1,
            vector_tiles=tile.counts[0],
            strip_tiles=tile.counts[1],
            row_tiles=tile.counts[2],
            by_vector_tiles=Divisor.of(tile.counts[0]),
            by_strip_tiles=Divisor.of(tile.counts[1]),
            by_row_tiles=Divisor.of(tile.counts[2]),
            bound=activation.bound(problem.epilogue),
        )
