"""A filter in the order in which the direct kernel walks it: by job, block of input channels and output channel."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from escort.filter import IntArray, SparseFilter
from escort.methods.cpu.direct.layout import Layout, Records, records

# The structs of kernels/cpu/direct.hpp, which says what the fields mean.
NONZERO = np.dtype([("offset", "i4"), ("value", "f4")])
OUT_CHANNEL = np.dtype([("channel", "i4"), ("slot", "i4"), ("first_nonzero", "i4"), ("bias", "f4"), ("slope", "f4")])
BLOCK = np.dtype([(name, "i4") for name in ("first_channel", "end_channel", "first_record", "end_record")])

_Numbers = NDArray[np.int64]

#: From how many output channels a job on, on average, it has consecutive ones.
_MANY = 32


@dataclass(frozen=True, eq=False)
class Schedule:
    """The tables of a filter.

    Attributes:
        nonzeros: records of NONZERO.
        out_channels: records of OUT_CHANNEL, one more than there are.
        blocks: records of BLOCK, as many for each job.
        parts: jobs of a group.
        blocks_of_part: of a job.
        partial_sums: output channels whose sums a job keeps from block to block; none where there is one block.
    """

    nonzeros: Records
    out_channels: Records
    blocks: Records
    parts: int
    blocks_of_part: int
    partial_sums: int

    @classmethod
    def of(
        cls,
        sparse_filter: SparseFilter,
        layout: Layout,
        bias: torch.Tensor | None,
        channel_block: int,
        parts: int,
        slope: torch.Tensor | None = None,
    ) -> Schedule:
        """Sorts a filter into the tables of the kernel.

        Args:
            bias: (K,) or None.
            channel_block: input channels of a block.
            parts: jobs among which the output channels of a group are dealt.
            slope: of the activation where it has one, (K,).
        """
        parts = min(parts, sparse_filter.shape[0] // sparse_filter.groups)
        job, slot = _deal(sparse_filter, parts)
        block_of = sparse_filter.taps[0] // channel_block
        cells = _cells(sparse_filter, job, block_of, -(-sparse_filter.shape[1] // channel_block))
        first_nonzero = np.cumsum(cells.nnz) - cells.nnz

        out_channels = records(OUT_CHANNEL, len(cells.channel) + 1)
        out_channels["first_nonzero"] = np.append(first_nonzero, sparse_filter.nnz)
        out_channels["channel"][:-1] = cells.channel
        out_channels["slot"][:-1] = slot[cells.channel]
        for name, values in (("bias", bias), ("slope", slope)):
            if values is not None:
                out_channels[name][:-1] = values.detach().numpy().astype(np.float32)[cells.channel]

        channel, row, column = sparse_filter.taps
        in_block = (channel - block_of * channel_block) * np.int64(layout.channel_stride)
        in_block += layout.tap_offsets[row, column]
        source = np.arange(sparse_filter.nnz) + np.repeat(cells.source - first_nonzero, cells.nnz)
        nonzeros = records(NONZERO, sparse_filter.nnz, offset=in_block[source], value=sparse_filter.values[source])

        block_count = -(-sparse_filter.shape[1] // channel_block)
        partial_sums = 0 if block_count == 1 else int(slot.max()) + 1
        blocks = _blocks(sparse_filter, cells, channel_block, parts)
        return cls(nonzeros, out_channels, blocks, parts, block_count, partial_sums)


@dataclass(frozen=True, eq=False)
class _Cells:
    """The parts of output channels within one block of input channels, in the kernel's order; each (cells,).

    Attributes:
        channel: the output channel.
        job: that computes it.
        block: of input channels.
        nnz: how many nonzeros it has.
        source: which of the filter's nonzeros is its first.
    """

    channel: _Numbers
    job: _Numbers
    block: _Numbers
    nnz: _Numbers
    source: _Numbers


def _deal(sparse_filter: SparseFilter, parts: int) -> tuple[_Numbers, _Numbers]:
    """Deals the output channels of each group to so many jobs.

    A job has consecutive channels where it has many. A thread then finds the residual of its job in its own cache, as
    it computed about the same channels of it. Few are dealt by falling nnz, in rounds that turn at the last job, so
    that all jobs weigh the same.

    Returns:
        Of each output channel, (K,): its job, counted over all groups, and its slot in the job.
    """
    out_channels, groups = sparse_filter.shape[0], sparse_filter.groups
    nnz = np.diff(sparse_filter.indptr).reshape(groups, -1)
    if parts * _MANY <= nnz.shape[1]:
        weight = nnz + 4  # what a channel without nonzeros takes, about
        end = np.cumsum(weight, axis=1)
        part = np.minimum((2 * end - weight) * parts // (2 * end[:, -1:]), parts - 1)
    else:
        rank = np.argsort(np.argsort(-nnz, axis=1, kind="stable"), axis=1, kind="stable")
        dealt, seat = np.divmod(rank, parts)
        part = np.where(dealt % 2 == 0, seat, parts - 1 - seat)
    job = (np.arange(groups)[:, None] * parts + part).ravel()
    sizes = np.bincount(job, minlength=groups * parts)
    slot = np.empty(out_channels, dtype=np.int64)
    slot[np.argsort(job, kind="stable")] = np.arange(out_channels) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return job, slot


def _cells(sparse_filter: SparseFilter, job: _Numbers, block_of: IntArray, block_count: int) -> _Cells:
    """The cells that the kernel visits: all with nonzeros, and of each output channel the first and the last.

    The first block starts the sums and the last one ends them. Within a block nnz rises: neighbours leave the inner
    loop after as many rounds as the one before, which the branch predictor learns.

    Args:
        job: (K,) of each output channel.
        block_of: (nnz,) the block of each nonzero's input channel.
    """
    out_channels = sparse_filter.shape[0]
    cell_of = sparse_filter.out_channels.astype(np.int64) * block_count + block_of
    nnz = np.bincount(cell_of, minlength=out_channels * block_count)
    source = np.cumsum(nnz) - nnz  # columns ascend, so a cell's nonzeros lie side by side
    channel, block = np.divmod(np.arange(out_channels * block_count), block_count)
    kept = np.flatnonzero((nnz > 0) | (block == 0) | (block == block_count - 1))
    kept = kept[np.lexsort((nnz[kept], block[kept], job[channel[kept]]))]
    return _Cells(channel[kept], job[channel[kept]], block[kept], nnz[kept], source[kept])


def _blocks(sparse_filter: SparseFilter, cells: _Cells, channel_block: int, parts: int) -> Records:
    """All blocks of input channels of each job, those without a cell as well."""
    group_channels = sparse_filter.shape[1]
    count = -(-group_channels // channel_block)
    group, block = np.divmod(np.arange(sparse_filter.groups * parts * count), parts * count)
    block %= count
    edges = np.searchsorted(cells.job * count + cells.block, np.arange(len(block) + 1))
    first_of_group = group * group_channels
    return records(
        BLOCK,
        len(block),
        first_channel=first_of_group + block * channel_block,
        end_channel=first_of_group + np.minimum((block + 1) * channel_block, group_channels),
        first_record=edges[:-1],
        end_record=edges[1:],
    )
