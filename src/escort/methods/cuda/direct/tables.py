"""A filter laid out for the direct kernel: which warp computes what, and the nonzeros in the order of their use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from escort.filter import Geometry, IntArray, SparseFilter
from escort.methods.cuda.direct.layout import HALF_REACH, DirectConfig, Layout, Positions, grouping
from escort.methods.dealing import deal
from escort.problem import Problem

#: Where a segment begins: its first record, in units of 16 bytes, and its first channel within the group.
SEGMENT = np.dtype([("record", "<i4"), ("channel", "<i4")])
#: A word that says how many nonzeros a cell has, and where they start in the segment, in units.
HEADER = np.dtype([("count", "<u2"), ("start", "<u2")])
#: A nonzero of float32 and of 16-bit storage; its offset in a stage is in bytes.
NONZERO = np.dtype([("offset", "<u4"), ("weight", "<f4")])
HALF_NONZERO = np.dtype([("weight", "<u2"), ("offset", "<u2")])

_UNIT = 16  # bytes
_Longs = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Tables:
    """A filter in the order in which the kernel walks it.

    A group is what a block computes: output channels of one or several groups of the convolution whose input channels
    lie side by side. A segment is what a stage holds of a group's nonzeros. A cell is what a warp does of one output
    channel in one stage; its nonzeros start at a whole unit.

    Attributes:
        records: (units, 4) int32, the segments one after the other. A segment begins with a HEADER per cell, by input
            channel warp, output channel warp and output channel; the cells' nonzeros follow in the same order, each a
            NONZERO or, for 16-bit storage, a HALF_NONZERO.
        segments: (groups, chunks + 1) SEGMENT; the last of a group is where its last segment ends.
        channel_of: (groups, out_channel_warps, out_channels) int32, output channels, -1 where there is none.
        first_channels: (groups,) int32, the first input channel of each.
        chunks: how many a group's input channels are cut into. The first are small: consumers begin the sooner.
        record_bytes: the room that the largest segment takes, and what the kernel reads ahead.
    """

    records: IntArray
    segments: NDArray[Any]
    channel_of: IntArray
    first_channels: IntArray
    chunks: int
    record_bytes: int


def lay_out(problem: Problem, sparse_filter: SparseFilter, config: DirectConfig) -> Tables:
    """Lays a filter out for a config. Raises ValueError where a weight does not fit the storage type."""
    layout = Layout.of(problem, config.tile)
    channel_of, first_channels = _groups(problem, sparse_filter, config)
    _, merged = grouping(problem, config.block_channels)
    starts = _chunk_starts(sparse_filter.shape[1] * merged, config)
    cells = _Cells.of(problem, sparse_filter, config, channel_of, starts)
    segments = _Segments.of(cells, 2 if layout.samples_per_word == 1 else 4)

    words = np.zeros(int(segments.begin[-1]) * _UNIT // 4, dtype=np.uint32)
    header = segments.begin[:-1, None] * (_UNIT // HEADER.itemsize) + np.arange(cells.count.shape[1])
    words.view(HEADER)["count"][header] = cells.count
    words.view(HEADER)["start"][header] = segments.start
    _write_nonzeros(words, problem, sparse_filter, layout, cells, segments)

    groups, chunks = len(channel_of), len(starts) - 1
    bounds = np.empty((groups, chunks + 1), dtype=SEGMENT)
    bounds["record"] = segments.begin[np.arange(groups)[:, None] * chunks + np.arange(chunks + 1)]
    bounds["channel"] = np.minimum(starts, problem.in_channels - first_channels[:, None])
    return Tables(
        words.view(np.int32).reshape(-1, 4),
        bounds,
        channel_of.reshape(groups, config.out_channel_warps, config.out_channels).astype(np.int32),
        first_channels.astype(np.int32),
        chunks,
        int(np.diff(segments.begin).max(initial=1)) * _UNIT + 32,
    )


def _groups(problem: Problem, sparse_filter: SparseFilter, config: DirectConfig) -> tuple[_Longs, _Longs]:
    """The output channels of each group, (groups, channels of a block), and the first input channel of each."""
    group_channels, merged = grouping(problem, config.block_channels)
    merged_channels = group_channels * merged
    nnz = np.diff(sparse_filter.indptr)
    channels: list[_Longs] = []
    first_channels: list[int] = []
    for start in range(0, problem.out_channels, merged_channels):
        dealt = _places(nnz[start : start + merged_channels], config)
        channels += [np.where(group >= 0, group + start, -1) for group in dealt]
        first_channels += [start // group_channels * sparse_filter.shape[1]] * len(dealt)
    return np.stack(channels), np.array(first_channels)


def _places(nnz: IntArray, config: DirectConfig) -> list[_Longs]:
    """Deals output channels to groups of warps: an array of places per group, -1 where a place stays empty."""
    groups = -(-len(nnz) // config.block_channels)
    warps = groups * config.out_channel_warps
    if config.balanced:
        channels_of = deal(nnz, warps, config.out_channels)
    else:
        starts = range(0, warps * config.out_channels, config.out_channels)
        channels_of = [list(range(len(nnz))[start : start + config.out_channels]) for start in starts]
    places = np.full((warps, config.out_channels), -1, dtype=np.int64)
    for warp, channels in enumerate(channels_of):
        places[warp, : len(channels)] = channels
    return list(places.reshape(groups, -1))


def _chunk_starts(channels: int, config: DirectConfig) -> IntArray:
    """Where the chunks of a group's input channels begin, and the end of the last."""
    block = config.channel_block
    sizes = []
    if channels > 2 * block:
        warps = config.in_channel_warps
        sizes = [-(-block // part // warps) * warps for part in (4, 2)]
    rest = channels - sum(sizes)
    count = -(-rest // block)
    even = np.diff(np.arange(count + 1) * rest // count)
    return np.concatenate(([0], np.cumsum(np.concatenate((sizes, even))))).astype(np.int32)


@dataclass(frozen=True, eq=False)
class _Cells:
    """The cells of all segments, in the order of their headers.

    Attributes:
        of_nonzero: (nnz,) the cell of each of the filter's nonzeros, counted through all segments.
        channel: (nnz,) its input channel within the stage.
        count: (segments, cells of a segment) nonzeros of each cell.
    """

    of_nonzero: _Longs
    channel: _Longs
    count: _Longs

    @classmethod
    def of(
        cls,
        problem: Problem,
        sparse_filter: SparseFilter,
        config: DirectConfig,
        channel_of: _Longs,
        starts: IntArray,
    ) -> _Cells:
        group_channels, merged = grouping(problem, config.block_channels)
        place_of = np.empty(problem.out_channels, dtype=np.int64)  # of an output channel among all places
        used = channel_of.ravel() >= 0
        place_of[channel_of.ravel()[used]] = np.flatnonzero(used)

        out_channel = sparse_filter.out_channels.astype(np.int64)
        channel = sparse_filter.taps[0] + out_channel // group_channels % merged * sparse_filter.shape[1]
        chunk = np.searchsorted(starts, channel, side="right") - 1
        channel = channel - starts[chunk]
        warps = config.in_channel_warps
        warp = channel // -(-np.diff(starts) // warps)[chunk]
        group, place = np.divmod(place_of[out_channel], config.block_channels)
        chunks = len(starts) - 1
        cell = ((group * chunks + chunk) * warps + warp) * config.block_channels + place
        shape = len(channel_of) * chunks, warps * config.block_channels
        count = np.bincount(cell, minlength=shape[0] * shape[1]).reshape(shape)
        if count.max(initial=0) > 0xFFFF:
            raise ValueError("more than 65535 nonzeros of an output channel in one stage; use a smaller channel_block")
        return cls(cell, channel, count)


@dataclass(frozen=True, eq=False)
class _Segments:
    """Where everything lies, in units.

    Attributes:
        begin: (segments + 1,) where each segment begins, and the end of the last.
        start: (segments, cells of a segment) where the nonzeros of each cell start in their segment.
    """

    begin: _Longs
    start: _Longs

    @classmethod
    def of(cls, cells: _Cells, nonzeros_per_unit: int) -> _Segments:
        units = -(-cells.count // nonzeros_per_unit)
        headers = -(-cells.count.shape[1] * HEADER.itemsize // _UNIT)
        start = headers + np.cumsum(units, axis=1) - units
        if start.max(initial=0) > 0xFFFF:
            raise ValueError("a stage's nonzeros exceed 1 MiB; use a smaller channel_block")
        return cls(np.concatenate(([0], np.cumsum(headers + units.sum(axis=1)))), start)


def _write_nonzeros(
    words: NDArray[np.uint32],
    problem: Problem,
    sparse_filter: SparseFilter,
    layout: Layout,
    cells: _Cells,
    segments: _Segments,
) -> None:
    """Writes the nonzeros, of each cell in the order of the filter."""
    half = layout.samples_per_word == 2
    pitch = Positions(problem).pitch
    geometry = Geometry(layout.channel_words, pitch, layout.phase_words, problem.stride, problem.dilation)
    order = np.argsort(cells.of_nonzero, kind="stable")
    _, r, s = sparse_filter.taps
    offset = geometry.offset(cells.channel.astype(np.int32), r, s)[order]
    if half and offset.max(initial=0) * 4 >= HALF_REACH:
        raise ValueError("a stage's input exceeds 64 KiB, which is what 16 bits address; use a smaller channel_block")
    value = sparse_filter.values[order]

    nonzeros = words.view(HALF_NONZERO if half else NONZERO)
    cell = cells.of_nonzero[order]
    first = np.cumsum(cells.count).reshape(cells.count.shape) - cells.count  # nonzeros of the cells before
    begin = (segments.begin[:-1, None] + segments.start) * (_UNIT // nonzeros.itemsize)
    place = begin.ravel()[cell] + np.arange(sparse_filter.nnz) - first.ravel()[cell]
    nonzeros["offset"][place] = offset * 4
    nonzeros["weight"][place] = _bits(value, problem.precision) if half else value


def _bits(values: NDArray[np.float32], precision: str) -> NDArray[np.uint16]:
    """The values as fp16 or bf16, bit by bit. Raises ValueError where one does not fit."""
    rounded = torch.from_numpy(values).to(torch.float16 if precision == "fp16" else torch.bfloat16)
    if not torch.isfinite(rounded).all():
        raise ValueError(f"a weight of {np.abs(values).max():.3g} does not fit {precision}; use bf16 or fp32")
    return rounded.view(torch.int16).numpy().view(np.uint16)
