"""The search for configs: a space, and a model of the machine that ranks it.

A step is one weight tile times the pixels of its tap. A sparse wgmma of N pixels reads 64 N + 2048 bytes of shared memory in
N / 2 clocks of the tensor cores, at 128 bytes a clock: shared memory bounds it, and for small N the least time that any
step takes. In TF32 the same bytes are half as many channels, and the clocks are the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from escort.cuda.gpu import Gpu
from escort.filter import SparseFilter
from escort.methods.cuda.sparse_tc.packing import OrderedFilter, order_filter
from escort.methods.cuda.sparse_tc.tiling import (
    BLOCK_BYTES,
    ELEMENTS,
    PIXEL_BYTES,
    SparseTcConfig,
    TapGroup,
    Tiling,
    UnfitError,
)
from escort.problem import MemoryFormat, Problem

_PIXELS = (48, 64, 96, 112, 128, 192, 256)  # of products whose tiles are not rows
_SAMPLES = (2, 3, 4, 6, 8)  # of a tile of several
_LEAST_USED = 0.5  # of a tile's channels
_ALIKE = 2  # configs that differ in their clusters only

# The model, in clocks of a multiprocessor, fitted to 1731 timings in fp16 and TF32 on an H200, most of them in
# benchmarks/results/h200: median error 4 %, 90th percentile 12 %, the same on layers that the fit had not seen.
_CLOCK_MHZ = 1750.0
_LAUNCH_US = 3.1
_SHARED_BYTES = 128.0  # a clock
_PRODUCT_BYTES = 1024  # of the filter that an instruction waits for: half of them
_L2_BYTES = 75.0  # a clock that reach a multiprocessor when all of them read
_LEAST_STEP = 390.0  # from one step to the next: barriers, metadata, and the start of the products
_REMAINDER = 0.78  # products of the remainder, of the time of others
_WAIT = {1: 1.0, 2: 1.0, 4: 1.1, 8: 1.4}  # blocks of a cluster wait for one another
_TILE = 1000.0  # around the steps of a tile
_STORED, _STORED_ONE_BY_ONE, _FLOATS_STORED = 36.0, 6.5, 31.0  # bytes of outputs a clock; in NCHW, but for floats
_BOXES_STORED = 500.0  # the same in channels_last
_MEMORY_BYTES = 4.4e6  # a us
_BESIDE = 0.28  # of what takes less time, computing or memory, that the other does not hide
_ARRANGE_US, _ARRANGE_BYTES = 3.6, 3.3e6  # of the kernel that lays out x; a us


class Remainder(NamedTuple):
    """How much work the remainder of a filter is.

    Attributes:
        tiles: its weight tiles as a share of the others, by channels of a tile.
        halves: the halves of these that are multiplied, as a share of all, by channels of a warpgroup.
    """

    tiles: dict[int, float]
    halves: dict[int, float]

    @classmethod
    def of(cls, ordered: OrderedFilter) -> Remainder:
        k_block = ordered.k_block
        return cls(
            {rows: ordered.remainder_share(rows, k_block) for rows in (64, 128, 256)},
            {rows: ordered.remainder_share(rows, k_block // 2) for rows in (64, 128)},
        )


def search(
    problem: Problem, sparse_filter: SparseFilter, gpu: Gpu, most: int, memory_format: MemoryFormat
) -> list[SparseTcConfig]:
    """The configs of least predicted time, of some variety."""
    remainder = Remainder.of(order_filter(sparse_filter, memory_format, ELEMENTS[problem.precision]))
    tilings = sorted(candidates(problem, gpu, memory_format), key=lambda tiling: predict_us(tiling, remainder, gpu))
    chosen: list[SparseTcConfig] = []
    for tiling in tilings:
        alike = [other for other in chosen if replace(other, cluster=tiling.config.cluster) == tiling.config]
        if len(chosen) < most and len(alike) < _ALIKE:
            chosen.append(tiling.config)
    return chosen


def candidates(problem: Problem, gpu: Gpu, memory_format: MemoryFormat) -> Iterator[Tiling]:
    """Every config that fits, of tiles that are not mostly empty."""
    for across, m_blocks in ((2, 1), (2, 2), (1, 1), (1, 2)):
        if across * m_blocks > 1 and problem.out_channels < _LEAST_USED * 64 * across * m_blocks:
            continue
        for tap_group, pixels, rows, samples in _tiles(problem, across, m_blocks):
            for cluster in _WAIT:
                config = SparseTcConfig(tap_group, pixels, across, m_blocks, rows, samples, cluster, memory_format)
                try:
                    tiling = Tiling.of(problem, config, gpu.shared_bytes)
                except UnfitError:
                    break
                if cluster == 1 or tiling.tiles(max(problem.batch, 1)) >= cluster:
                    yield tiling


def _tiles(p: Problem, across: int, m_blocks: int) -> Iterator[tuple[TapGroup, int, int, int]]:
    """(tap group, pixels of a warpgroup, rows, samples)."""
    pointwise = p.kernel_size == p.stride == (1, 1) and not any(p.padding)
    yield from (("flat" if pointwise else "im2col", pixels, 0, 1) for pixels in _PIXELS)
    down = (p.kernel_size[0] - 1) * p.dilation[0]
    # The least rows for so many tiles; and several samples, which have all their rows.
    rows = {-(-p.out_height // tiles) for tiles in range(1, p.out_height + 1)}
    shapes = [(rows, 1) for rows in sorted(rows)] + [(p.out_height, samples) for samples in _SAMPLES]
    pitches: tuple[tuple[TapGroup, int, int], ...] = (
        ("columns", -(-p.out_width // 8) * 8, p.out_height + down),
        ("halo", p.width + max(p.padding[2:]), p.height + max(p.padding[:2])),
    )
    for tap_group, pitch, tall in pitches:
        for tile_rows, samples in shapes:
            outputs = ((samples - 1) * tall + tile_rows - 1) * pitch + p.out_width
            pixels = -(-outputs * across // 16) * 8
            if p.kernel_size != (1, 1) and pixels * m_blocks <= 256:
                yield tap_group, pixels, tile_rows, samples


def predict_us(tiling: Tiling, remainder: Remainder, gpu: Gpu) -> float:
    """What bounds a step, times the steps that a multiprocessor computes in turn; and memory.

    Args:
        remainder: of the filter, in the order of the memory format.
    """
    p, config, element = tiling.problem, tiling.config, tiling.element
    rounds = -(-tiling.tile_groups(max(p.batch, 1)) * tiling.channel_tiles // gpu.clusters(config.cluster))
    tile_bytes = config.tile_channels // 64 * BLOCK_BYTES
    load_bytes = tiling.load[1] * tiling.load[2] * tiling.load[3] * PIXEL_BYTES / len(tiling.tap_groups[0])
    products = 4 * config.m_blocks * (config.pixels * 64 + _PRODUCT_BYTES)
    remainder_tiles, remainder_halves = remainder.tiles[config.tile_channels], remainder.halves[64 * config.m_blocks]
    tile = _step(products + tile_bytes + load_bytes, tile_bytes / config.cluster + load_bytes)
    if remainder_tiles:
        remainder_products = _REMAINDER * products * remainder_halves / remainder_tiles
        tile += remainder_tiles * _step(remainder_products + tile_bytes, tile_bytes / config.cluster)
    tile *= len(tiling.tap_groups) * len(tiling.tap_groups[0]) * _WAIT[config.cluster]
    tile += _TILE + config.tile_pixels * config.tile_channels * element.bytes / _stored(tiling)
    pixels, out_pixels = p.height * p.width, p.out_height * p.out_width
    read = min(pixels, out_pixels * math.prod(p.kernel_size))  # a stride passes over some
    in_bytes, out_bytes = (p.batch * channels * element.bytes for channels in (tiling.channels, p.out_channels))
    compute, memory = rounds * tile / _CLOCK_MHZ, (in_bytes * read + out_bytes * out_pixels) / _MEMORY_BYTES
    arrange = 0.0 if config.takes_channels_last else _ARRANGE_US + 2 * in_bytes * pixels / _ARRANGE_BYTES
    return _LAUNCH_US + arrange + max(compute, memory) + _BESIDE * min(compute, memory)


def _step(shared_bytes: float, copied_bytes: float) -> float:
    return max(shared_bytes / _SHARED_BYTES, copied_bytes / _L2_BYTES, _LEAST_STEP)


def _stored(tiling: Tiling) -> float:
    """Bytes of outputs a clock."""
    if tiling.element.bytes == 4:
        return _FLOATS_STORED
    if tiling.config.takes_channels_last:
        return _BOXES_STORED
    return _STORED_ONE_BY_ONE if tiling.defines["VECTOR"] == 1 else _STORED
