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

from collections.abc import Hashable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from escort.filter import FloatArray, IntArray
from escort.methods.cuda.sparse_tc.config import M_BLOCK_BYTES, PIXEL_BYTES, Element
from escort.methods.cuda.sparse_tc.orders import OrderedFilter
from escort.methods.cuda.sparse_tc.tiling import Tiling

_LAST_OF_GROUP = 1 << 31
_BEHIND = 2  # zeros behind the steps, which are read, too
_ROW_BYTES, _CHUNK_BYTES = 64, 16  # of the values of an output channel
_GROUPS = 16  # of neighbours, of an output channel
Bits = NDArray[np.unsignedinteger[Any]]  # of elements as they are stored


@dataclass(frozen=True, eq=False)
class Packed:
    """What the kernel reads of a filter.

    Attributes:
        weight_tiles: (weight tiles, bytes) uint8.
        first: (tiles of channels * tap groups + 1,) the first weight tile of each tap group.
        steps: (weight tiles + 2,) uint32, one per weight tile, and zeros: bits 0-15 where its tap begins in the
            group's pixels, in units of 16 bytes; from bit 16 two bits for each warpgroup across, which halves of the
            block's channels it has for it; bit 31: it is the last of its tap group.
        out_order: which output channel stands at each place of all tiles; -1: none.
        taps: (weight tiles,) the tap of each, in the order of all tap groups.
    """

    weight_tiles: NDArray[np.uint8]
    first: IntArray
    steps: NDArray[np.uint32]
    out_order: IntArray
    taps: IntArray

    def placed(self, tiling: Tiling) -> Packed:
        """The same for another tiling of the same `tiles_key`, whose taps may begin at other pixels."""
        starts = np.pad(_starts(tiling)[self.taps], (0, _BEHIND))
        return replace(self, steps=self.steps & ~np.uint32(0xFFFF) | starts)


def pack(ordered: OrderedFilter, tiling: Tiling) -> Packed:
    """The filter for a tiling. Raises ValueError where the precision does not hold a weight."""
    nonzeros = _Nonzeros.of(ordered, tiling)
    numbers, first, steps, taps = _choose(nonzeros, tiling)
    out_order = np.full(tiling.channel_tiles * tiling.config.tile_channels, -1, dtype=np.int32)
    out_order[: len(ordered.out_order)] = ordered.out_order
    return Packed(_weight_tiles(nonzeros, numbers, len(taps), tiling), first, steps, out_order, taps)


def tiles_key(tiling: Tiling) -> Hashable:
    """What the weight tiles of a filter depend on. Tilings for several input sizes may have the same."""
    config = tiling.config
    order = tuple(tuple(tap[:3] for tap in tap_group) for tap_group in tiling.tap_groups)
    return tiling.problem.precision, config.tile_channels, config.across, tuple(tiling.first_groups), order


class _Nonzeros(NamedTuple):
    """The nonzeros of a filter, all (nnz,), and where they belong.

    Attributes:
        bits: the values as they are stored.
        tile, row: the tile of output channels, and the channel's place in it.
        tap, column: the tap in the order of all tap groups, and the input channel's place in its block.
        part: 0 for the structured part of the split, 1 for the remainder.
    """

    bits: Bits
    tile: IntArray
    row: IntArray
    tap: IntArray
    column: IntArray
    part: IntArray

    @classmethod
    def of(cls, ordered: OrderedFilter, tiling: Tiling) -> _Nonzeros:
        parts = ordered.split.structured, ordered.split.remainder
        out_place, in_place, tap = map(np.concatenate, zip(*map(ordered.places, parts), strict=True))
        tile, row = np.divmod(out_place, np.int32(tiling.config.tile_channels))
        k_block, column = np.divmod(in_place, np.int32(ordered.k_block))
        kernel_rows, kernel_columns = tiling.problem.kernel_size
        order = [
            (tap.k_block * kernel_rows + tap.row) * kernel_columns + tap.column
            for tap_group in tiling.tap_groups
            for tap in tap_group
        ]
        tap = np.argsort(order).astype(np.int32)[k_block * np.int32(kernel_rows * kernel_columns) + tap]
        part = np.repeat(np.arange(2, dtype=np.int32), [part.nnz for part in parts])
        bits = _stored(np.concatenate([part.values for part in parts]), tiling)
        kept = bits != 0  # some are rounded to zero
        return cls(*(array[kept] for array in (bits, tile, row, tap, column, part)))


def _starts(tiling: Tiling) -> NDArray[np.uint32]:
    """(taps,) where each begins in its group's pixels, in units of 16 bytes."""
    starts = [tap.start * PIXEL_BYTES // 16 for tap_group in tiling.tap_groups for tap in tap_group]
    return np.array(starts, np.uint32)


def _choose(nonzeros: _Nonzeros, tiling: Tiling) -> tuple[IntArray, IntArray, NDArray[np.uint32], IntArray]:
    """The weight tiles that are kept: (tiles, taps, parts) their numbers, else -1; and Packed's first, steps, taps."""
    across, group_taps, starts = tiling.config.across, len(tiling.tap_groups[0]), _starts(tiling)
    holds = np.zeros((tiling.channel_tiles, len(starts), 2, across, 2), dtype=np.uint32)  # of halves of the channels
    warpgroup = nonzeros.row // np.int32(tiling.config.tile_channels // across)
    half = nonzeros.column // np.int32(tiling.element.k_block // 2)
    holds[nonzeros.tile, nonzeros.tap, nonzeros.part, warpgroup, half] = 1
    holds[:, np.multiply(tiling.first_groups, group_taps), 0] = 1  # the first products overwrite sums
    halves = holds.reshape(*holds.shape[:3], -1) @ (1 << np.arange(2 * across, dtype=np.uint32))

    kept = halves != 0
    kept[:, ::group_taps, 0] = True  # each group is used, if only to be passed over
    tile, tap, _ = np.nonzero(kept)
    numbers = np.where(kept, np.cumsum(kept).reshape(kept.shape) - 1, -1).astype(np.int32)
    steps = np.pad(starts[tap] | halves[kept] << np.uint32(16), (0, _BEHIND))
    tap_group = tile * len(tiling.tap_groups) + tap // group_taps
    first = np.searchsorted(tap_group, np.arange(tiling.channel_tiles * len(tiling.tap_groups) + 1)).astype(np.int32)
    steps[first[1:] - 1] |= np.uint32(_LAST_OF_GROUP)
    return numbers, first, steps, tap.astype(np.int32)


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


def _weight_tiles(nonzeros: _Nonzeros, numbers: IntArray, count: int, tiling: Tiling) -> NDArray[np.uint8]:
    """(weight tiles, bytes), as many as have numbers."""
    element, rows = tiling.element, tiling.config.tile_channels
    number = numbers[nonzeros.tile, nonzeros.tap, nonzeros.part].astype(np.int64)
    group, neighbour = np.divmod(nonzeros.column, np.int32(element.of))
    group_of_all = (number * rows + nonzeros.row) * _GROUPS + group
    patterns = np.zeros(count * rows * _GROUPS, dtype=np.uint8)
    np.add.at(patterns, group_of_all, (1 << neighbour).astype(np.uint8))

    positions, places = _positions(element)
    tiles = np.zeros((count, rows // 64 * M_BLOCK_BYTES), dtype=np.uint8)
    chunk = _CHUNK_BYTES // element.bytes
    place = group * np.int32(element.kept) + places[patterns[group_of_all], neighbour]
    place ^= (nonzeros.row >> 1 & 3) * np.int32(chunk)  # the swizzle
    place += nonzeros.row * np.int32(_ROW_BYTES // element.bytes)
    tiles.view(nonzeros.bits.dtype)[number, place] = nonzeros.bits
    metadata = _metadata(positions[patterns].reshape(count, rows // 64, 64, _GROUPS))
    tiles.view(np.uint32)[:, rows * _ROW_BYTES // 4 :] = metadata.reshape(count, -1)
    return tiles


@lru_cache
def _positions(element: Element) -> tuple[NDArray[np.uint32], IntArray]:
    """What a group keeps whose nonzeros are the bits of a number: 4 bits with the positions, and each one's place.

    Returns:
        (numbers,) and (numbers, neighbours); a group with room keeps zeros, too, the first ones.
    """
    neighbour = np.arange(element.of)
    is_zero = np.arange(1 << element.of)[:, None] >> neighbour & 1 == 0
    kept = np.sort(np.argsort(is_zero, axis=-1, kind="stable")[:, : element.kept], axis=-1)
    words = 2 // element.kept  # of 16 bits, of a value
    halves = (kept[..., None] * words + np.arange(words)).reshape(-1, 2)
    places = (kept[:, None] < neighbour[:, None]).sum(axis=-1, dtype=np.int32)
    return (halves[:, 0] | halves[:, 1] << 2).astype(np.uint32), places


def _metadata(nibbles: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """The words of 128 threads, (..., 128), of the positions of (weight tiles, blocks, 64, groups)."""
    fours = nibbles.reshape(*nibbles.shape[:-1], 4, 4) << np.arange(0, 16, 4, dtype=np.uint32)
    halfwords = fours.sum(axis=-1, dtype=np.uint32)
    thread = np.arange(128)
    row, quarter = thread // 32 * 16 + thread % 32 // 4, thread % 4
    words: NDArray[np.uint32] = halfwords[:, :, row, quarter] | halfwords[:, :, row + 8, quarter] << np.uint32(16)
    return words
