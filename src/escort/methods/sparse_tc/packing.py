"""Filters as kernels/sparse_tc.cuh reads them: images of values and metadata, and the list of what multiplies what.

An image is one tap of 64 input channels for the output channels of a tile, in blocks of 64 of them. A row keeps 32
values of its 64, at most two of each four: 64 bytes in 64-byte swizzle, which puts the 16-byte chunk j of row i at
j ^ (i >> 1 & 3). Behind the blocks' values comes their metadata (PTX ISA, "Sparse wgmma", m64nNk32 with .f16): 4 bits
per four channels, the position of the first kept value in the low two and that of the second, which is greater, in the
high two. The word of thread t of a warpgroup, with warp w = t / 32, g = t % 32 / 4 and q = t % 4, belongs to channels
32 (q / 2) + 16 (q % 2) and the 15 after them: bits 0-15 for row 16 w + g, bits 16-31 for row 16 w + g + 8. Selector 0
takes the words of q = 0 and 1, selector 1 those of q = 2 and 3, so that a register serves both halves of the channels.

A filter is the sum of two of at most two of four (`sparse.split`): the second holds what is left over, and only those
of its images are kept that are not empty. The orders of channels and rows see to it that few are not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray

from escort.methods.sparse_tc.tiling import K_BLOCK, PIXEL_BYTES, Layout, SparseTcConfig, Tiling
from escort.sparse import IntArray, Split, StretchedCSR, split, spread_channels

_OF = 4  # of which two are kept
_LEAST_SPARSITY = 0.65  # in denser filters every image has something left over in any order
_LAST_OF_FILL = 1 << 31
Bits = NDArray[np.uint16]


@dataclass(frozen=True, eq=False)
class Ordered:
    """A filter's split, with places for its channels and rows.

    Attributes:
        channels: which input channel stands at each place, a whole number of blocks of 64; -1: none.
        rows: which output channel stands at each place.
    """

    split: Split
    channels: IntArray
    rows: IntArray

    def places(self, part: StretchedCSR) -> tuple[IntArray, IntArray, IntArray]:
        """(row's place, channel's place, tap) of each nonzero of a part of the split."""
        c, tap = np.divmod(part.columns, np.int32(part.shape[2] * part.shape[3]))
        return np.argsort(self.rows).astype(np.int32)[part.rows], _inverse(self.channels)[c], tap

    def extra_images(self, tile_channels: int) -> float:
        """Images of what is left over, as a share of the others."""
        row, place, tap = self.places(self.split.residual)
        _, _, r, s = self.split.residual.shape
        shape = -(-len(self.rows) // tile_channels), len(self.channels) // K_BLOCK, r * s
        where = np.ravel_multi_index((row // tile_channels, place // K_BLOCK, tap), shape)
        return len(np.unique(where)) / math.prod(shape)


_known: WeakKeyDictionary[StretchedCSR, dict[Layout, Ordered]] = WeakKeyDictionary()


def ordered(filter: StretchedCSR, layout: Layout) -> Ordered:
    """Places for a layout of x: where x is laid out anyway those that leave little over, else everyone's own."""
    known = _known.setdefault(filter, {})
    if layout not in known:
        known[layout] = _as_it_is(filter) if layout == "channels_last" else _gathered(filter)
    return known[layout]


def _as_it_is(filter: StretchedCSR) -> Ordered:
    whole = _whole_blocks(filter)
    rows, channels = (np.arange(size, dtype=np.int32) for size in whole.shape[:2])
    channels[filter.shape[1] :] = -1
    return Ordered(split(whole), channels, rows)


def _gathered(filter: StretchedCSR) -> Ordered:
    """What is left over, made small by the order of the channels, in as few images as sorting gets it."""
    natural, whole = _as_it_is(filter), _whole_blocks(filter)
    if natural.split.residual.nnz == 0 or filter.sparsity < _LEAST_SPARSITY:
        return natural
    parts = split(whole, channels=spread_channels(whole))
    left = Ordered(parts, parts.channels, natural.rows)
    row, _, _ = left.places(parts.residual)
    rows = np.argsort(-np.bincount(row, minlength=len(natural.rows)), kind="stable").astype(np.int32)
    return Ordered(parts, np.where(parts.channels < filter.shape[1], parts.channels, -1).astype(np.int32), rows)


def _whole_blocks(filter: StretchedCSR) -> StretchedCSR:
    """With further channels, which have no weights."""
    k, c, r, s = filter.shape
    return replace(filter, shape=(k, -(-c // K_BLOCK) * K_BLOCK, r, s))


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
        images: (images, bytes) uint8.
        first: (tiles of channels * fills + 1,) the first image of each fill.
        steps: (images + 1,) uint32, one per image: bits 0-15 where its tap begins in the fill, in units of 16 bytes;
            from bit 16 two bits for each warpgroup across: which halves of the 64 channels it has for it; bit 31: it is
            the fill's last.
        row_channel: the output channel of each row of all tiles, -1: none.
    """

    images: NDArray[np.uint8]
    first: IntArray
    steps: NDArray[np.uint32]
    row_channel: IntArray


def pack(ordered: Ordered, tiling: Tiling) -> Packed:
    """The filter for a tiling. Raises ValueError where the precision does not hold a weight."""
    config, p = tiling.config, tiling.problem
    parts = [_tiles(ordered, part, tiling) for part in (ordered.split.structured, ordered.split.residual)]
    halves = [_halves(bits, config) for bits in parts]
    all_halves = np.uint32(sum(3 << 2 * across for across in range(config.across)))
    listed: list[tuple[int, int, int]] = []  # (part, tile, tap) of each image
    first, steps = [0], []
    for tile in range(tiling.channel_tiles):
        for number, fill in enumerate(tiling.fills):
            for tap in fill:
                at = (tap.block * p.kernel[0] + tap.row) * p.kernel[1] + tap.column
                for part in (0, 1):
                    there = halves[part][tile, at]
                    if number == 0 and len(listed) == first[-1]:
                        there = all_halves  # a tile's first products overwrite the sums
                    if there or len(listed) == first[-1]:  # each fill is used, if only to be passed over
                        listed.append((part, tile, at))
                        steps.append(tap.start * PIXEL_BYTES // 16 | int(there) << 16)
            steps[-1] |= _LAST_OF_FILL
            first.append(len(listed))
    which = np.array(listed)
    images = np.empty((len(listed), config.tile_channels // 64 * (64 * K_BLOCK + 512)), dtype=np.uint8)
    for part, bits in enumerate(parts):
        mine = which[:, 0] == part
        if mine.any():
            images[mine] = _images(bits[which[mine, 1], which[mine, 2]])
    row_channel = np.full(tiling.channel_tiles * config.tile_channels, -1, dtype=np.int32)
    row_channel[: len(ordered.rows)] = ordered.rows
    return Packed(images, np.array(first, np.int32), np.array([*steps, 0], np.uint32), row_channel)


def _tiles(ordered: Ordered, part: StretchedCSR, tiling: Tiling) -> Bits:
    """(tiles, taps of blocks of channels, rows, 64) of a part of the split, as stored."""
    dtype = tiling.problem.torch_dtype
    stored = torch.from_numpy(part.values).to(dtype)
    if not bool(stored.isfinite().all()):
        largest = float(np.abs(part.values).max())
        raise ValueError(
            f"a weight of {largest:g} is too large for {tiling.problem.dtype}; scale the filter, or choose bf16"
        )
    row, place, tap = ordered.places(part)
    rows, taps = tiling.config.tile_channels, part.shape[2] * part.shape[3]
    bits = np.zeros((tiling.channel_tiles, len(ordered.channels) // K_BLOCK * taps, rows, K_BLOCK), dtype=np.uint16)
    where = row // rows, place // K_BLOCK * taps + tap, row % rows, place % K_BLOCK
    bits[where] = stored.view(torch.int16).numpy().view(np.uint16)
    return bits


def _halves(bits: Bits, config: SparseTcConfig) -> NDArray[np.uint32]:
    """(tiles, taps) two bits for each warpgroup across: which halves of its rows' channels are not empty."""
    there = (bits != 0).reshape(*bits.shape[:2], config.across, -1, 2, K_BLOCK // 2).any(axis=(3, 5))
    weights = 1 << np.arange(2 * config.across, dtype=np.uint32)
    return (there.reshape(*bits.shape[:2], -1) * weights).sum(axis=-1, dtype=np.uint32)


def _images(bits: Bits) -> NDArray[np.uint8]:
    """(images, bytes) of (images, rows, 64)."""
    groups = bits.reshape(len(bits), -1, 64, K_BLOCK // _OF, _OF)
    kept = np.argsort(groups == 0, axis=-1, kind="stable")[..., :2]  # values first, filled up with zeros
    positions = np.sort(kept, axis=-1)
    values = np.take_along_axis(groups, positions, axis=-1)
    nibbles = (positions[..., 0] | positions[..., 1] << 2).astype(np.uint32)
    parts = _swizzled(values.reshape(*groups.shape[:3], -1)), _metadata(nibbles)
    return np.concatenate([np.ascontiguousarray(part).view(np.uint8).reshape(len(bits), -1) for part in parts], axis=1)


def _swizzled(values: Bits) -> Bits:
    chunks = values.reshape(*values.shape[:-1], 4, 8)
    chunk = np.arange(4) ^ (np.arange(64)[:, None] >> 1 & 3)  # its own inverse
    return chunks[:, :, np.arange(64)[:, None], chunk]


def _metadata(nibbles: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """The words of 128 threads, of (images, blocks, 64 rows, 16)."""
    fours = nibbles.reshape(*nibbles.shape[:-1], 4, 4) << np.arange(0, 16, 4, dtype=np.uint32)
    halfwords = fours.sum(axis=-1, dtype=np.uint32)
    thread = np.arange(128)
    row, sixteen = thread // 32 * 16 + thread % 32 // 4, thread % 4
    words: NDArray[np.uint32] = halfwords[:, :, row, sixteen] | halfwords[:, :, row + 8, sixteen] << np.uint32(16)
    return words
