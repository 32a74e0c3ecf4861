"""Filters as sparse_tc.cuh reads them: weight tiles of values and metadata, and the list of what multiplies what.

A weight tile is one tap of a block of input channels (128 bytes of a pixel) for the output channels of a tile, in blocks of
64 of them. A row has 16 groups of neighbouring channels and keeps half of each, at most two of four 16-bit weights or
one of two in TF32: 64 bytes in 64-byte swizzle, which puts the 16-byte chunk j of row i at j ^ (i >> 1 & 3). Behind the
blocks' values comes their metadata (PTX ISA, "Sparse wgmma"): 4 bits per group, the position of the first kept value in
the low two and that of the second, which is greater, in the high two; a TF32 value counts as two, the halves of it. The
word of thread t of a warpgroup, with warp w = t / 32, g = t % 32 / 4 and q = t % 4, belongs to the four groups from 4 q
on: bits 0-15 for row 16 w + g, bits 16-31 for row 16 w + g + 8. Selector 0 takes the words of q = 0 and 1, selector 1
those of q = 2 and 3, so that a register serves both halves of the channels.

A filter is the sum of two of such a pattern (split.py): the second holds what is left over, and only those of its
weight tiles are kept that are not empty. The orders of channels and rows see to it that few are not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray

from escort.filter import FloatArray, IntArray, SparseFilter
from escort.methods.cuda.sparse_tc.orders import spread_channels
from escort.methods.cuda.sparse_tc.split import Split, split
from escort.methods.cuda.sparse_tc.tiling import BLOCK_BYTES, PIXEL_BYTES, Element, SparseTcConfig, Tiling
from escort.problem import MemoryFormat

_LEAST_SPARSITY = 0.65  # in denser filters every weight tile has something left over in any order
_LAST_OF_GROUP = 1 << 31
Bits = NDArray[np.unsignedinteger[Any]]  # of elements as they are stored


@dataclass(frozen=True, eq=False)
class OrderedFilter:
    """A filter's split, with an order of its input and of its output channels.

    Attributes:
        k_block: input channels of a weight tile.
        in_order: which input channel stands at each place, a whole number of blocks; -1: none.
        out_order: which output channel stands at each place.
    """

    split: Split
    k_block: int
    in_order: IntArray
    out_order: IntArray

    def places(self, part: SparseFilter) -> tuple[IntArray, IntArray, IntArray]:
        """(row's place, channel's place, tap) of each nonzero of a part of the split."""
        c, tap = np.divmod(part.columns, np.int32(part.shape[2] * part.shape[3]))
        return np.argsort(self.out_order).astype(np.int32)[part.rows], _inverse(self.in_order)[c], tap

    def remainder_share(self, rows: int, channels: int) -> float:
        """The share of all pieces of a tap, so many rows by so many channels, in which the remainder has weights."""
        row, place, tap = self.places(self.split.remainder)
        _, _, r, s = self.split.remainder.shape
        shape = -(-len(self.out_order) // rows), len(self.in_order) // channels, r * s
        where = np.ravel_multi_index((row // rows, place // channels, tap), shape)
        return len(np.unique(where)) / math.prod(shape)


_known: WeakKeyDictionary[SparseFilter, dict[tuple[MemoryFormat, int], OrderedFilter]] = WeakKeyDictionary()


def order_filter(sparse_filter: SparseFilter, memory_format: MemoryFormat, element: Element) -> OrderedFilter:
    """Places for a memory format of x: where x is laid out anyway those that leave little over, else everyone's own."""
    known, key = _known.setdefault(sparse_filter, {}), (memory_format, element.bytes)
    if key not in known:
        known[key] = (
            _as_it_is(sparse_filter, element) if memory_format == "channels_last" else _gathered(sparse_filter, element)
        )
    return known[key]


def _as_it_is(sparse_filter: SparseFilter, element: Element) -> OrderedFilter:
    whole = _whole_blocks(sparse_filter, element.k_block)
    rows, channels = (np.arange(size, dtype=np.int32) for size in whole.shape[:2])
    channels[sparse_filter.shape[1] :] = -1
    return OrderedFilter(split(whole, element.kept, element.of), element.k_block, channels, rows)


def _gathered(sparse_filter: SparseFilter, element: Element) -> OrderedFilter:
    """What is left over, made small by the order of the channels, in as few weight tiles as sorting gets it."""
    natural, whole = _as_it_is(sparse_filter, element), _whole_blocks(sparse_filter, element.k_block)
    if natural.split.remainder.nnz == 0 or sparse_filter.sparsity < _LEAST_SPARSITY:
        return natural
    parts = split(whole, element.kept, element.of, spread_channels(whole, element.kept, element.of))
    left = replace(natural, split=parts, in_order=parts.channels)
    row, _, _ = left.places(parts.remainder)
    rows = np.argsort(-np.bincount(row, minlength=len(natural.out_order)), kind="stable").astype(np.int32)
    return replace(
        left,
        in_order=np.where(parts.channels < sparse_filter.shape[1], parts.channels, -1).astype(np.int32),
        out_order=rows,
    )


def _whole_blocks(sparse_filter: SparseFilter, k_block: int) -> SparseFilter:
    """With further channels, which have no weights."""
    k, c, r, s = sparse_filter.shape
    return replace(sparse_filter, shape=(k, -(-c // k_block) * k_block, r, s))


def _inverse(channels: IntArray) -> IntArray:
    """The place of each channel."""
    there = np.flatnonzero(channels >= 0)
    places = np.full(len(channels), -1, dtype=np.int32)
    places[channels[there]] = there
    return places


@dataclass(frozen=True, eq=False)
class Packed:
    """What the kernel reads of a filter.

    Attributes:
        weight_tiles: (weight tiles, bytes) uint8.
        first: (tiles of channels * tap groups + 1,) the first weight tile of each tap group.
        steps: (weight tiles + 1,) uint32, one per tile: bits 0-15 where its tap begins in the group, in units of 16 bytes;
            from bit 16 two bits for each warpgroup across: which halves of the block's channels it has for it; bit 31:
            it is the last of its tap group.
        out_order: which output channel stands at each place of all tiles; -1: none.
    """

    weight_tiles: NDArray[np.uint8]
    first: IntArray
    steps: NDArray[np.uint32]
    out_order: IntArray


def pack(ordered: OrderedFilter, tiling: Tiling) -> Packed:
    """The filter for a tiling. Raises ValueError where the precision does not hold a weight."""
    config, p = tiling.config, tiling.problem
    parts = [_tiles(ordered, part, tiling) for part in (ordered.split.structured, ordered.split.remainder)]
    halves = [_halves(bits, config) for bits in parts]
    all_halves = np.uint32(sum(3 << 2 * across for across in range(config.across)))
    listed: list[tuple[int, int, int]] = []  # (part, tile, tap) of each weight tile
    first, steps = [0], []
    for tile in range(tiling.channel_tiles):
        for number, tap_group in enumerate(tiling.tap_groups):
            for tap in tap_group:
                at = (tap.k_block * p.kernel_size[0] + tap.row) * p.kernel_size[1] + tap.column
                for part in (0, 1):
                    there = halves[part][tile, at]
                    if number == 0 and len(listed) == first[-1]:
                        there = all_halves  # a tile's first products overwrite the sums
                    if there or len(listed) == first[-1]:  # each group is used, if only to be passed over
                        listed.append((part, tile, at))
                        steps.append(tap.start * PIXEL_BYTES // 16 | int(there) << 16)
            steps[-1] |= _LAST_OF_GROUP
            first.append(len(listed))
    which = np.array(listed)
    weight_tiles = np.empty((len(listed), config.tile_channels // 64 * BLOCK_BYTES), dtype=np.uint8)
    for part, bits in enumerate(parts):
        mine = which[:, 0] == part
        if mine.any():
            weight_tiles[mine] = _weight_tiles(bits[which[mine, 1], which[mine, 2]], tiling.element)
    out_order = np.full(tiling.channel_tiles * config.tile_channels, -1, dtype=np.int32)
    out_order[: len(ordered.out_order)] = ordered.out_order
    return Packed(weight_tiles, np.array(first, np.int32), np.array([*steps, 0], np.uint32), out_order)


def _tiles(ordered: OrderedFilter, part: SparseFilter, tiling: Tiling) -> Bits:
    """(tiles, taps of blocks of channels, rows, channels) of a part of the split, as stored."""
    stored, k_block = _stored(part.values, tiling), ordered.k_block
    row, place, tap = ordered.places(part)
    rows, taps = tiling.config.tile_channels, part.shape[2] * part.shape[3]
    bits = np.zeros((tiling.channel_tiles, len(ordered.in_order) // k_block * taps, rows, k_block), stored.dtype)
    bits[row // rows, place // k_block * taps + tap, row % rows, place % k_block] = stored
    return bits


def _stored(values: FloatArray, tiling: Tiling) -> Bits:
    """Rounded to the nearest. Raises ValueError where the precision does not hold a weight."""
    dtype, bits = tiling.problem.precision, values.view(np.uint32)
    if dtype == "tf32":  # the upper 19 bits
        bits = bits + np.uint32(0xFFF) + (bits >> 13 & 1) & ~np.uint32(0x1FFF)
        finite = np.isfinite(bits.view(np.float32))
    else:
        stored = torch.from_numpy(values).to(tiling.problem.storage)
        bits, finite = stored.view(torch.int16).numpy().view(np.uint16), stored.isfinite().numpy()
    if not finite.all():
        largest, instead = float(np.abs(values).max()), ", or choose bf16" if dtype == "fp16" else ""
        raise ValueError(f"a weight of {largest:g} is too large for {dtype}; scale the filter{instead}")
    return bits


def _halves(bits: Bits, config: SparseTcConfig) -> NDArray[np.uint32]:
    """(tiles, taps) two bits for each warpgroup across: which halves of its rows' channels are not empty."""
    there = (bits != 0).reshape(*bits.shape[:2], config.across, -1, 2, bits.shape[-1] // 2).any(axis=(3, 5))
    weights = 1 << np.arange(2 * config.across, dtype=np.uint32)
    return (there.reshape(*bits.shape[:2], -1) * weights).sum(axis=-1, dtype=np.uint32)


def _weight_tiles(bits: Bits, element: Element) -> NDArray[np.uint8]:
    """(weight tiles, bytes) of (weight tiles, rows, channels)."""
    groups = bits.reshape(len(bits), -1, 64, element.k_block // element.of, element.of)
    kept = np.argsort(groups == 0, axis=-1, kind="stable")[..., : element.kept]  # values first, filled up with zeros
    positions = np.sort(kept, axis=-1)
    values = np.take_along_axis(groups, positions, axis=-1)
    words = 2 // element.kept  # of 16 bits, of a value
    halves = (positions[..., None] * words + np.arange(words)).reshape(*positions.shape[:-1], 2)
    nibbles = (halves[..., 0] | halves[..., 1] << 2).astype(np.uint32)
    parts = _swizzled(values.reshape(*groups.shape[:3], -1)), _metadata(nibbles)
    return np.concatenate([np.ascontiguousarray(part).view(np.uint8).reshape(len(bits), -1) for part in parts], axis=1)


def _swizzled(values: Bits) -> Bits:
    chunks = values.reshape(*values.shape[:-1], 4, -1)
    chunk = np.arange(4) ^ (np.arange(64)[:, None] >> 1 & 3)  # its own inverse
    return chunks[:, :, np.arange(64)[:, None], chunk]


def _metadata(nibbles: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """The words of 128 threads, of (weight tiles, blocks, 64 rows, 16)."""
    fours = nibbles.reshape(*nibbles.shape[:-1], 4, 4) << np.arange(0, 16, 4, dtype=np.uint32)
    halfwords = fours.sum(axis=-1, dtype=np.uint32)
    thread = np.arange(128)
    row, sixteen = thread // 32 * 16 + thread % 32 // 4, thread % 4
    words: NDArray[np.uint32] = halfwords[:, :, row, sixteen] | halfwords[:, :, row + 8, sixteen] << np.uint32(16)
    return words
