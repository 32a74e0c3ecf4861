"""A model of the machine: how long a config takes.

A step is one weight tile times the pixels of its tap. A sparse wgmma of N pixels reads 64 N + 2048 bytes of shared
memory in N / 2 clocks of the tensor cores, at 128 bytes a clock: shared memory bounds it, and for small N the least
time that any step takes. In TF32 the same bytes are half as many channels, and the clocks are the same.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from escort.cuda.gpu import Gpu
from escort.methods import activation
from escort.methods.cuda.sparse_tc.config import M_BLOCK_BYTES, PIXEL_BYTES
from escort.methods.cuda.sparse_tc.orders import OrderedFilter
from escort.methods.cuda.sparse_tc.tiling import Tiling

# The model, in clocks of a multiprocessor, fitted to timings on an H200: what channels_last in 16 bits needs to 223 of
# 2026-11-30, in docs/notes/sparse_tc.md (median error 5 %, 90th percentile 13 %); stores in NCHW and the kernel that
# arranges x to 1731 of kernels before.
_CLOCK_MHZ = 1750.0
_LAUNCH_US = 1.65
_SHARED_BYTES = 128.0  # a clock
_PRODUCT_BYTES = 1024  # of the filter that an instruction waits for: half of them
_L2_BYTES = 75.0  # a clock that reach a multiprocessor when all of them read
#: From one step to the next, by the bytes of an element: its warp's own instructions and what these wait for. In TF32
#: nearly every remainder tile has both halves, of which each is an instruction.
_LEAST_STEP = {2: 270.0, 4: 315.0}
_REMAINDER = 1.0  # products of the remainder, of the time of others
_WAIT = {1: 1.0, 2: 1.0, 4: 1.1, 8: 1.4}  # of a cluster's blocks for one another, as a factor
_TILE = 500.0  # around the steps of a tile
_ADD_UP = 930.0  # the sums of warpgroups that take turns
_SHARE, _SHARED_SUMS = 700.0, 12.0  # of blocks that share a tile: their waits; bytes a clock of others' sums
_STORED, _STORED_ONE_BY_ONE, _FLOATS_STORED = 36.0, 6.5, 31.0  # bytes of outputs a clock; in NCHW, but for floats
_BOXES_STORED = 500.0  # the same in channels_last
_MEMORY_BYTES = 4.4e6  # a us
_BESIDE = 0.7  # of what takes less time, computing or memory, that the other does not hide
_ARRANGE_US, _ARRANGE_BYTES = 3.6, 3.3e6  # of the kernel that arranges x; a us

#: Sizes of clusters that the model knows.
CLUSTERS = tuple(_WAIT)


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
            {channels: ordered.remainder_share(channels, k_block) for channels in (64, 128, 256)},
            {channels: ordered.remainder_share(channels, k_block // 2) for channels in (64, 128)},
        )


def predict_us(tiling: Tiling, remainder: Remainder, gpu: Gpu) -> float:
    """The time of computing and of memory. Computing: what bounds a step, times the steps of a multiprocessor.

    Args:
        remainder: of the filter, in the order of the memory format.
    """
    p, config, element = tiling.problem, tiling.config, tiling.element
    rounds = -(-tiling.tile_groups(max(p.batch, 1)) * tiling.channel_tiles // gpu.clusters(config.thread_blocks))
    tile_bytes = config.tile_channels // 64 * M_BLOCK_BYTES
    load_bytes = tiling.load[1] * tiling.load[2] * tiling.load[3] * PIXEL_BYTES / len(tiling.tap_groups[0])
    at_once = 1 if config.by_turns else 2  # warpgroups that multiply in a step; those of another step run beside it
    products = 2 * at_once * config.m_blocks * (config.pixels * 64 + _PRODUCT_BYTES)
    remainder_tiles, remainder_halves = remainder.tiles[config.tile_channels], remainder.halves[64 * config.m_blocks]
    least = _LEAST_STEP[element.bytes] * at_once / 2
    steps = _step(products + tile_bytes + load_bytes, tile_bytes / config.cluster + load_bytes, least)
    if remainder_tiles:
        remainder_products = _REMAINDER * products * remainder_halves / remainder_tiles
        steps += remainder_tiles * _step(remainder_products + tile_bytes, tile_bytes / config.cluster, least)
    count = _tap_groups(tiling) * len(tiling.tap_groups[0])
    steps *= count * _WAIT[config.cluster]
    outputs = config.tile_pixels * config.tile_channels
    share = 1.0 if config.split == 1 else 8 * math.ceil(config.pixels / 8 / config.split) / config.pixels
    store = _TILE + outputs * share * (element.bytes / _stored(tiling) + activation.clocks(p))
    if config.split > 1:
        store += _SHARE + outputs * (1 - share) * 4 / _SHARED_SUMS
    if config.by_turns:  # one stores while the other multiplies, but for the last tile
        tile = max(steps, count * (1 + remainder_tiles) * least + store / 2) + _ADD_UP
        work = rounds * tile + store
    else:
        work = rounds * (steps + store)
    pixels, out_pixels = p.height * p.width, p.out_height * p.out_width
    read = min(pixels, out_pixels * math.prod(p.kernel_size))  # a stride passes over some
    in_bytes, out_bytes = (p.batch * channels * element.bytes for channels in (tiling.channels, p.out_channels))
    compute, memory = work / _CLOCK_MHZ, (in_bytes * read + out_bytes * out_pixels) / _MEMORY_BYTES
    arrange = 0.0 if config.takes_channels_last else _ARRANGE_US + 2 * in_bytes * pixels / _ARRANGE_BYTES
    return _LAUNCH_US + arrange + max(compute, memory) + _BESIDE * min(compute, memory)


def _tap_groups(tiling: Tiling) -> int:
    """Those of a thread block, as if both warpgroups had as many as the one with more."""
    config, groups = tiling.config, len(tiling.tap_groups)
    return 2 * math.ceil(math.ceil(groups / config.split) / 2) if config.by_turns else groups


def _step(shared_bytes: float, copied_bytes: float, least: float) -> float:
    return max(shared_bytes / _SHARED_BYTES, copied_bytes / _L2_BYTES, least)


def _stored(tiling: Tiling) -> float:
    """Bytes of outputs a clock."""
    if tiling.element.bytes == 4:
        return _FLOATS_STORED
    if tiling.config.takes_channels_last:
        return _BOXES_STORED
    return _STORED_ONE_BY_ONE if tiling.vector == 1 else _STORED
