"""Filters as sparse_tc.cuh reads them: weight tiles of values and metadata, and the list of what multiplies what.

A weight tile is one tap of a block of input channels (128 bytes of a pixel) for a tile's output channels, in blocks of
64 of them. An output channel has 16 groups of neighbouring input channels and keeps half of each, at most two of four
16-bit weights or one of two in TF32: a row of 64 bytes in 64-byte swizzle, which puts the 16-byte chunk j of row i at
j ^ (i >> 1 & 3). Behind the blocks' values comes their metadata (PTX ISA, "Sparse wgmma"): 4 bits per group, the
position of the first kept value in the low two and that of the second, which is greater, in the high two; a TF32 value
counts as two, the halves of it. The word of thread t of a warpgroup, with warp w = t / 32, g = t % 32 / 4 and
q = t % 4, belongs to the four groups from 4 q on: bits 0-15 for row 16 w + g, bits 16-31 for row 16 w + g + 8. Selector
0 takes the words of q = 0 and 1, selector 1 those of q = 2 and 3, so that a register serves both halves of the
channels.

A filter is the sum of two of such a pattern (split.py). Of the second, the remainder, empty weight tiles are left out;
the orders of channels (orders.py) make most of them empty.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from escort.filter import FloatArray, IntArray, SparseFilter
from escort.methods.cuda.sparse_tc.config import PIXEL_BYTES, Element, SparseTcConfig
from escort.methods.cuda.sparse_tc.orders import OrderedFilter
from escort.methods.cuda.sparse_tc.tiling import Tap, Tiling

_LAST_OF_GROUP = 1 << 31
_CHOSEN = np.dtype([("part", "i4"), ("tile", "i4"), ("tap", "i4")])  # where a weight tile comes from
Bits = NDArray[np.unsignedinteger[Any]]  # of elements as they are stored


@dataclass(frozen=True, eq=False)
class Packed:
    """What the kernel reads of a filter.

    Attributes:
        weight_tiles: (weight tiles, bytes) uint8.
        first: (tiles of channels * tap groups + 1,) the first weight tile of each tap group.
        steps: (weight tiles + 1,) uint32, one per weight tile, and a zero: bits 0-15 where its tap begins in the
            group's pixels, in units of 16 bytes; from bit 16 two bits for each warpgroup across, which halves of the
            block's channels it has for it; bit 31: it is the last of its tap group.
        out_order: which output channel stands at each place of all tiles; -1: none.
    """

    weight_tiles: NDArray[np.uint8]
    first: IntArray
    steps: NDArray[np.uint32]
    out_order: IntArray


def pack(ordered: OrderedFilter, tiling: Tiling) -> Packed:
    """The filter for a tiling. Raises ValueError where the precision does not hold a weight."""
    parts = [_dense_tiles(ordered, part, tiling) for part in (ordered.split.structured, ordered.split.remainder)]
    chosen, first, steps = _choose([_halves(bits, tiling.config) for bits in parts], tiling)
    out_order = np.full(tiling.channel_tiles * tiling.config.tile_channels, -1, dtype=np.int32)
    out_order[: len(ordered.out_order)] = ordered.out_order
    return Packed(_weight_tiles(parts, chosen, tiling.element), first, steps, out_order)


def _choose(halves: list[NDArray[np.uint32]], tiling: Tiling) -> tuple[NDArray[np.void], IntArray, NDArray[np.uint32]]:
    """The weight tiles that are kept, each tap group's first one, and what the kernel does with each.

    Args:
        halves: of both parts, (tiles, taps): which halves of the input channels are not empty.
    """
    chosen: list[tuple[int, int, int]] = []
    first, steps = [0], []
    all_halves = sum(3 << 2 * across for across in range(tiling.config.across))
    for tile in range(tiling.channel_tiles):
        for number, tap_group in enumerate(tiling.tap_groups):
            for tap in tap_group:
                place = _number(tap, tiling)
                for part in (0, 1):
                    present = int(halves[part][tile, place])
                    opens_group = len(chosen) == first[-1]
                    if opens_group and number == 0:
                        present = all_halves  # a tile's first products overwrite the sums
                    if present or opens_group:  # each group is used, if only to be passed over
                        chosen.append((part, tile, place))
                        steps.append(tap.start * PIXEL_BYTES // 16 | present << 16)
            steps[-1] |= _LAST_OF_GROUP
            first.append(len(chosen))
    return np.array(chosen, _CHOSEN), np.array(first, np.int32), np.array([*steps, 0], np.uint32)


def _number(tap: Tap, tiling: Tiling) -> int:
    """The number of a tap among those of all blocks of input channels."""
    kernel_rows, kernel_columns = tiling.problem.kernel_size
    return (tap.k_block * kernel_rows + tap.row) * kernel_columns + tap.column


def _dense_tiles(ordered: OrderedFilter, part: SparseFilter, tiling: Tiling) -> Bits:
    """(tiles, taps of blocks of channels, output channels, input channels) of a part of the split, as stored."""
    stored, k_block, m_tile = _stored(part.values, tiling), ordered.k_block, tiling.config.tile_channels
    out_place, in_place, tap = ordered.places(part)
    taps = part.shape[2] * part.shape[3]
    bits = np.zeros((tiling.channel_tiles, len(ordered.in_order) // k_block * taps, m_tile, k_block), stored.dtype)
    bits[out_place // m_tile, in_place // k_block * taps + tap, out_place % m_tile, in_place % k_block] = stored
    return bits


def _stored(values: FloatArray, tiling: Tiling) -> Bits:
    """Values as they are stored, rounded to the nearest. Raises ValueError where the precision does not hold one."""
    precision, bits = tiling.problem.precision, values.view(np.uint32)
    if precision == "tf32":  # the upper 19 bits
        bits = bits + np.uint32(0xFFF) + (bits >> 13 & 1) & ~np.uint32(0x1FFF)
        finite = np.isfinite(bits.view(np.float32))
    else:
        stored = torch.from_numpy(values).to(tiling.problem.storage)
        bits, finite = stored.view(torch.int16).numpy().view(np.uint16), stored.isfinite().numpy()
    if not finite.all():
        largest, remedy = float(np.abs(values).max()), ", or choose bf16" if precision == "fp16" else ""
        raise ValueError(f"a weight of {largest:g} is too large for {precision}; scale the filter{remedy}")
    return bits


def _halves(bits: Bits, config: SparseTcConfig) -> NDArray[np.uint32]:
    """(tiles, taps) two bits for each warpgroup across: which halves of the input channels are not empty for it."""
    present = (bits != 0).reshape(*bits.shape[:2], config.across, -1, 2, bits.shape[-1] // 2).any(axis=(3, 5))
    weights = 1 << np.arange(2 * config.across, dtype=np.uint32)
    return (present.reshape(*bits.shape[:2], -1) * weights).sum(axis=-1, dtype=np.uint32)


def _weight_tiles(parts: list[Bits], chosen: NDArray[np.void], element: Element) -> NDArray[np.uint8]:
    """(weight tiles, bytes) of dense tiles of both parts."""
    m_blocks, stored = parts[0].shape[2] // 64, parts[0].dtype
    tile = np.dtype(
        [("values", stored, (m_blocks, 64, 4, 16 // stored.itemsize)), ("metadata", np.uint32, (m_blocks, 128))]
    )
    tiles = np.empty(len(chosen), tile)
    for number, bits in enumerate(parts):
        of_part = chosen["part"] == number
        if of_part.any():
            dense = bits[chosen["tile"][of_part], chosen["tap"][of_part]]
            values, nibbles = _compressed(dense.reshape(len(dense), m_blocks, 64, -1, element.of), element)
            tiles["values"][of_part], tiles["metadata"][of_part] = _swizzled(values), _metadata(nibbles)
    return tiles.view(np.uint8).reshape(len(chosen), tile.itemsize)


def _compressed(groups: Bits, element: Element) -> tuple[Bits, NDArray[np.uint32]]:
    """The values that each group keeps, and their positions, 4 bits per group.

    Args:
        groups: (weight tiles, blocks, 64, groups, neighbours)

    Returns:
        (weight tiles, blocks, 64, kept values) and (weight tiles, blocks, 64, groups).
    """
    kept = np.argsort(groups == 0, axis=-1, kind="stable")[..., : element.kept]  # values first, filled up with zeros
    positions = np.sort(kept, axis=-1)
    values = np.take_along_axis(groups, positions, axis=-1)
    words = 2 // element.kept  # of 16 bits, of a value
    halves = (positions[..., None] * words + np.arange(words)).reshape(*positions.shape[:-1], 2)
    return values.reshape(*groups.shape[:3], -1), (halves[..., 0] | halves[..., 1] << 2).astype(np.uint32)


def _swizzled(values: Bits) -> Bits:
    """Rows of 64 bytes as four chunks each, (..., 64, 4, elements), in 64-byte swizzle."""
    chunks = values.reshape(*values.shape[:-1], 4, -1)
    chunk = np.arange(4) ^ (np.arange(64)[:, None] >> 1 & 3)  # its own inverse
    return chunks[:, :, np.arange(64)[:, None], chunk]


def _metadata(nibbles: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """The words of 128 threads, (..., 128), of the positions of (weight tiles, blocks, 64, groups)."""
    fours = nibbles.reshape(*nibbles.shape[:-1], 4, 4) << np.arange(0, 16, 4, dtype=np.uint32)
    halfwords = fours.sum(axis=-1, dtype=np.uint32)
    thread = np.arange(128)
    row, quarter = thread // 32 * 16 + thread % 32 // 4, thread % 4
    words: NDArray[np.uint32] = halfwords[:, :, row, quarter] | halfwords[:, :, row + 8, quarter] << np.uint32(16)
    return words
