"""A filter as the exact sum of two: one whose pattern sparse tensor cores take, and the remainder."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from escort.filter import IntArray, SparseFilter


@dataclass(frozen=True, eq=False)
class Split:
    """A filter as the sum of two: one of so regular a pattern that tensor cores can take it, and the remainder.

    Attributes:
        structured: at most `kept` of each `of` neighbouring channels of a tap are nonzero, as in 2:4 sparsity.
        remainder: the other nonzeros.
        channels: (C / groups,) which channel stands at each place where neighbours are counted.
    """

    structured: SparseFilter
    remainder: SparseFilter
    kept: int
    of: int
    channels: IntArray

    @property
    def share(self) -> float:
        """The remainder's share of the nonzeros, 0..1."""
        return self.remainder.nnz / max(self.remainder.nnz + self.structured.nnz, 1)


def split(sparse_filter: SparseFilter, kept: int = 2, of: int = 4, channels: IntArray | None = None) -> Split:
    """Splits a filter exactly: each group of neighbours keeps its largest weights, and the remainder has the rest.

    Args:
        kept, of: 2 of 4 for 16-bit types, 1 of 2 for TF32.
        channels: an order of the channels of a group, the same for all taps; by default their own.

    Raises:
        ValueError: unless ``0 < kept <= of`` and `channels` is a permutation.
    """
    width = sparse_filter.shape[1]
    channels = np.arange(width, dtype=np.int32) if channels is None else channels
    if not 0 < kept <= of:
        raise ValueError(f"a group of {of} cannot keep {kept} weights")
    if not np.array_equal(np.sort(channels), np.arange(width)):
        raise ValueError(f"channels must be an order of 0..{width - 1}")
    channel, site = channels_and_sites(sparse_filter)
    place = np.empty(width, dtype=np.int64)
    place[channels] = np.arange(width)
    group = site * -(-width // of) + place[channel] // of
    exceeds = np.flatnonzero(np.bincount(group)[group] > kept)  # the others keep all that they have
    order = exceeds[np.lexsort((place[channel[exceeds]], -np.abs(sparse_filter.values[exceeds]), group[exceeds]))]
    first = np.flatnonzero(np.diff(group[order], prepend=-1))
    rank = np.zeros(sparse_filter.nnz, dtype=np.int64)
    rank[order] = np.arange(len(order)) - np.repeat(first, np.diff(first, append=len(order)))
    return Split(_part(sparse_filter, rank < kept), _part(sparse_filter, rank >= kept), kept, of, channels)


def channels_and_sites(sparse_filter: SparseFilter) -> tuple[IntArray, NDArray[np.int64]]:
    """The input channel and the site of each nonzero; sites number the taps of all output channels."""
    taps = sparse_filter.shape[2] * sparse_filter.shape[3]
    channel, tap = np.divmod(sparse_filter.columns, np.int32(taps))
    return channel, sparse_filter.out_channels.astype(np.int64) * taps + tap


def _part(sparse_filter: SparseFilter, mask: NDArray[np.bool_]) -> SparseFilter:
    """The nonzeros of a filter that a mask takes."""
    indptr = np.concatenate(([0], np.cumsum(mask)))[sparse_filter.indptr].astype(np.int32)
    return SparseFilter(
        sparse_filter.shape, sparse_filter.groups, indptr, sparse_filter.columns[mask], sparse_filter.values[mask]
    )
