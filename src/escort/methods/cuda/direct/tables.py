"""A filter laid out for the direct kernel, and the kernel's parameters."""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from escort.filter import Geometry, IntArray, SparseFilter
from escort.methods.cuda.direct.layout import (
    HALF_REACH,
    SLOT_CLASSES,
    STORAGE,
    DirectConfig,
    Layout,
    Positions,
    grouping,
)
from escort.problem import Problem


def defines(config: DirectConfig, layout: Layout, dtype: str) -> dict[str, int]:
    """The macros that a config is compiled with; kernels/cuda/direct.cu says what each means."""
    return {
        "STORAGE": STORAGE[dtype],
        "PACKED": int(config.packed),
        "PAIRED": int(layout.paired),
        "ODD": int(layout.odd),
        "WORDS": config.words,
        "ROWS": config.rows,
        "SLOTS": next(slots for slots in SLOT_CLASSES if slots >= layout.slots),
        "THREADS": config.threads,
        "BLOCKS": config.blocks,
    }


def scalars(problem: Problem, layout: Layout, tables: Tables, config: DirectConfig) -> tuple[int, ...]:
    """The kernel's last parameters, the same in every launch."""
    positions = Positions(problem)
    return (
        problem.in_channels,
        problem.height,
        problem.width,
        problem.out_channels,
        problem.out_height,
        problem.out_width,
        positions.pitch,
        *_divisor(positions.pitch),
        positions.image_rows,
        *_divisor(positions.image_rows),
        *_divisor(problem.width),
        *_divisor(-(-problem.height * problem.width // 2)),
        problem.padding[0],
        problem.padding[2],
        *problem.stride,
        positions.phases,
        layout.phase_words,
        layout.channel_words,
        layout.slots,
        tables.chunks,
        config.channel_block,
        config.stages,
        config.position_warps,
        config.row_warps,
        config.channel_warps,
        config.producers,
        tables.entry_bytes,
        problem.epilogue.activation_number,
    )


def _divisor(divisor: int) -> tuple[int, int]:
    """(magic, shift) for division by multiplication, magic as the int32 of the same bits; see direct.cu."""
    shift = (divisor - 1).bit_length()
    magic = -(-(1 << (31 + shift)) // divisor)
    return magic - (magic >> 31 << 32), shift


@dataclass(frozen=True, eq=False)
class Tables:
    """A filter in the order in which the kernel walks it.

    A group is what a block computes: output channels of one or several groups of the convolution whose input channels
    lie side by side. A segment is what a stage holds of a group's nonzeros.

    Attributes:
        entries: int32, the segments one after the other in units of 16 bytes. A segment begins with a header word per
            row: where its nonzeros start, in units, << 16 | how many there are. A nonzero is (offset in bytes, float32
            bits) for fp32 and (offset in bytes << 16 | 16-bit value) for 16-bit storage; rows start at whole units.
        segments: (groups, chunks + 1, 2) where each segment begins, in units, and its first channel within the group;
            the last of a group is where its last one ends.
        rows: (groups, row_warps, rows) output channels, -1 where there is none.
        first_channels: (groups,) the first input channel of each.
        chunks: stages that a group takes. The first ones are small, so that the first nonzeros need not wait long.
        entry_bytes: room for the largest segment, and for what the kernel reads ahead.
    """

    entries: IntArray
    segments: IntArray
    rows: IntArray
    first_channels: IntArray
    chunks: int
    entry_bytes: int


def pack(problem: Problem, sparse_filter: SparseFilter, config: DirectConfig) -> Tables:
    """Lays a filter out for a config. Raises ValueError where a weight does not fit the storage type."""
    positions, layout = Positions(problem), Layout.of(problem, config.tile)
    half = layout.images_per_word == 2
    per_group = config.row_warps * config.rows
    group_rows, merged = grouping(problem, per_group)
    super_rows, super_channels = group_rows * merged, sparse_filter.shape[1] * merged
    nnz = np.diff(sparse_filter.indptr)
    groups: list[NDArray[np.int64]] = []
    first_channels: list[int] = []
    for start in range(0, problem.out_channels, super_rows):
        dealt = _deal(nnz[start : start + super_rows], config)
        groups += [np.where(rows >= 0, rows + start, -1) for rows in dealt]
        first_channels += [start // group_rows * sparse_filter.shape[1]] * len(dealt)
    rows = np.stack(groups)
    slot_of = np.empty(problem.out_channels, dtype=np.int64)  # place of a row among all (group, warp, row)
    flat = rows.ravel()
    slot_of[flat[flat >= 0]] = np.flatnonzero(flat >= 0)

    # A cell is what a warp does of one row in one stage; cells lie in the order (group, chunk, channel warp, slot).
    geometry = Geometry(layout.channel_words, positions.pitch, layout.phase_words, problem.stride, problem.dilation)
    starts = _chunk_starts(super_channels, config)
    chunks, warps = len(starts) - 1, config.channel_warps
    row, (channel, r, s) = sparse_filter.rows.astype(np.int64), sparse_filter.taps
    channel = channel + row // group_rows % merged * sparse_filter.shape[1]
    chunk = np.searchsorted(starts, channel, side="right") - 1
    channel = channel - starts[chunk]
    channel_warp = channel // -(-np.diff(starts) // warps)[chunk]
    group, slot = np.divmod(slot_of[row], per_group)
    cell = ((group * chunks + chunk) * warps + channel_warp) * per_group + slot
    cells_per_segment = warps * per_group
    segments = len(rows) * chunks
    order = np.argsort(cell, kind="stable")
    count = np.bincount(cell, minlength=segments * cells_per_segment)
    if count.max(initial=0) > 0xFFFF:
        raise ValueError("more than 65535 nonzeros of an output channel in one stage; use a smaller channel_block")
    nonzeros_per_unit = 4 if half else 2
    units = (-(-count // nonzeros_per_unit)).reshape(segments, cells_per_segment)
    header_units = -(-cells_per_segment // 4)
    start_in_segment = header_units + np.cumsum(units, axis=1) - units
    if start_in_segment.max(initial=0) > 0xFFFF:
        raise ValueError("a stage's nonzeros exceed 1 MiB; use a smaller channel_block")
    segment_units = header_units + units.sum(axis=1)
    segment_start = np.concatenate(([0], np.cumsum(segment_units)))
    entries = np.zeros((int(segment_start[-1]), 4), dtype=np.uint32)
    words = entries.reshape(-1)
    header = segment_start[:-1, None] * 4 + np.arange(cells_per_segment)
    words[header.ravel()] = (start_in_segment.astype(np.uint32) << 16 | count.reshape(units.shape)).ravel()

    offset = geometry.offset(channel.astype(np.int32), r, s)[order]
    if half and offset.max(initial=0) * 4 >= HALF_REACH:
        raise ValueError("a stage's input exceeds 64 KiB, which is what 16 bits address; use a smaller channel_block")
    value = sparse_filter.values[order]
    sorted_cell = cell[order]
    first = np.cumsum(count) - count
    at = (segment_start[:-1, None] + start_in_segment).reshape(-1)[sorted_cell] * 4
    place = np.arange(sparse_filter.nnz) - first[sorted_cell]
    if half:
        words[at + place] = offset.astype(np.uint32) << 18 | _bits(value, problem.precision)
    else:
        words[at + 2 * place] = offset.astype(np.uint32) * 4
        words[at + 2 * place + 1] = value.view(np.uint32)
    bounds = np.empty((len(rows), chunks + 1, 2), dtype=np.int32)
    bounds[:, :, 0] = segment_start[np.arange(len(rows))[:, None] * chunks + np.arange(chunks + 1)]
    bounds[:, :, 1] = np.minimum(starts, problem.in_channels - np.array(first_channels)[:, None])
    return Tables(
        entries.view(np.int32),
        bounds,
        rows.reshape(len(rows), config.row_warps, config.rows).astype(np.int32),
        np.array(first_channels, dtype=np.int32),
        chunks,
        int(segment_units.max(initial=1)) * 16 + 32,
    )


def _chunk_starts(channels: int, config: DirectConfig) -> IntArray:
    """Where the chunks of a group's input channels begin, and the end of the last."""
    block = config.channel_block
    sizes = []
    if channels > 2 * block:
        sizes = [-(-block // part // config.channel_warps) * config.channel_warps for part in (4, 2)]
    rest = channels - sum(sizes)
    count = -(-rest // block)
    even = np.diff(np.arange(count + 1) * rest // count)
    return np.concatenate(([0], np.cumsum(np.concatenate((sizes, even))))).astype(np.int32)


def _deal(nnz: IntArray, config: DirectConfig) -> list[NDArray[np.int64]]:
    """Deals rows to groups of warps: one array of row_warps * rows places per group, -1 where a place stays empty."""
    groups = -(-len(nnz) // (config.row_warps * config.rows))
    warps = groups * config.row_warps
    hands: list[list[int]] = [[] for _ in range(warps)]
    if config.balanced:
        loads = [(0, warp) for warp in range(warps)]
        for row in np.argsort(-nnz, kind="stable").tolist():  # the heaviest row to the least loaded warp with room
            load, warp = heapq.heappop(loads)
            hands[warp].append(row)
            if len(hands[warp]) < config.rows:
                heapq.heappush(loads, (load + int(nnz[row]), warp))
    else:
        for row in range(len(nnz)):
            hands[row // config.rows].append(row)
    filled = np.full((warps, config.rows), -1, dtype=np.int64)
    for warp, hand in enumerate(hands):
        filled[warp, : len(hand)] = hand
    return list(filled.reshape(groups, -1))


def _bits(values: NDArray[np.float32], dtype: str) -> NDArray[np.uint32]:
    rounded = torch.from_numpy(values).to(torch.float16 if dtype == "fp16" else torch.bfloat16)
    if not torch.isfinite(rounded).all():
        raise ValueError(f"a weight of {np.abs(values).max():.3g} does not fit {dtype}; use bf16 or fp32")
    return rounded.view(torch.int16).numpy().astype(np.uint16).astype(np.uint32)
