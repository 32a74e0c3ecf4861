"""Orders of a filter's channels in which its remainder is small, and takes few weight tiles."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray

from escort.filter import IntArray, SparseFilter
from escort.methods.cuda.sparse_tc.config import Element
from escort.methods.cuda.sparse_tc.split import Split, channels_and_sites, split
from escort.problem import MemoryFormat

_LEAST_SPARSITY = 0.65  # in denser filters every weight tile has a remainder in any order
_MOST_SWEEPS = 4  # over all channels; most of what swaps gain comes with the first


@dataclass(frozen=True, eq=False)
class OrderedFilter:
    """A filter's split, with an order of its input and of its output channels.

    Attributes:
        split: of the filter with its input channels made up to whole blocks.
        k_block: input channels of a weight tile.
        in_order: which input channel stands at each place, a whole number of blocks; -1: none.
        out_order: which output channel stands at each place.
    """

    split: Split
    k_block: int
    in_order: IntArray
    out_order: IntArray

    def places(self, part: SparseFilter) -> tuple[IntArray, IntArray, IntArray]:
        """(place of the output channel, place of the input channel, tap) of each nonzero of a part of the split."""
        channel, tap = np.divmod(part.columns, np.int32(part.shape[2] * part.shape[3]))
        return np.argsort(self.out_order).astype(np.int32)[part.out_channels], _places(self.in_order)[channel], tap

    def remainder_share(self, out_channels: int, in_channels: int) -> float:
        """The share of weight tiles, or parts of them, of so many channels in which the remainder has weights, 0..1."""
        out_place, in_place, tap = self.places(self.split.remainder)
        taps = math.prod(self.split.remainder.shape[2:])
        shape = -(-len(self.out_order) // out_channels), len(self.in_order) // in_channels, taps
        tiles = np.ravel_multi_index((out_place // out_channels, in_place // in_channels, tap), shape)
        return len(np.unique(tiles)) / math.prod(shape)


_remembered: WeakKeyDictionary[SparseFilter, dict[tuple[MemoryFormat, int], OrderedFilter]] = WeakKeyDictionary()


def order_filter(sparse_filter: SparseFilter, memory_format: MemoryFormat, element: Element) -> OrderedFilter:
    """A filter's channels in the order that suits a memory format of x, remembered as long as the filter lives.

    Where x is arranged anyway the order makes the remainder small; in channels_last all channels keep their places.
    """
    orders, key = _remembered.setdefault(sparse_filter, {}), (memory_format, element.bytes)
    if key not in orders:
        order = _keep_order if memory_format == "channels_last" else _gather_remainder
        orders[key] = order(sparse_filter, element)
    return orders[key]


def _keep_order(sparse_filter: SparseFilter, element: Element) -> OrderedFilter:
    """Every channel in its own place."""
    whole = _whole_blocks(sparse_filter, element.k_block)
    out_order, in_order = (np.arange(size, dtype=np.int32) for size in whole.shape[:2])
    in_order[sparse_filter.shape[1] :] = -1
    return OrderedFilter(split(whole, element.kept, element.of), element.k_block, in_order, out_order)


def _gather_remainder(sparse_filter: SparseFilter, element: Element) -> OrderedFilter:
    """The remainder made small by the order of the input channels, and gathered in few weight tiles by both orders."""
    natural, whole = _keep_order(sparse_filter, element), _whole_blocks(sparse_filter, element.k_block)
    if natural.split.remainder.nnz == 0 or sparse_filter.sparsity < _LEAST_SPARSITY:
        return natural
    parts = split(whole, element.kept, element.of, spread_channels(whole, element.kept, element.of))
    nonzeros = np.bincount(parts.remainder.out_channels, minlength=len(natural.out_order))
    return replace(
        natural,
        split=parts,
        in_order=np.where(parts.channels < sparse_filter.shape[1], parts.channels, -1).astype(np.int32),
        out_order=np.argsort(-nonzeros, kind="stable").astype(np.int32),
    )


def _whole_blocks(sparse_filter: SparseFilter, k_block: int) -> SparseFilter:
    """A filter with further input channels, which have no weights, up to whole blocks."""
    k, c, r, s = sparse_filter.shape
    return replace(sparse_filter, shape=(k, -(-c // k_block) * k_block, r, s))


def _places(order: IntArray) -> IntArray:
    """The place of each channel in an order."""
    taken = np.flatnonzero(order >= 0)
    places = np.full(len(order), -1, dtype=np.int32)
    places[order[taken]] = taken
    return places


def common_order(weights: Sequence[torch.Tensor], kept: int, of: int) -> torch.Tensor:
    """One order, (C,) int64, of the input channels of weights (K, C, R, S) that read the same tensor."""
    taps = torch.cat([weight.permute(0, 2, 3, 1).flatten(0, 2) for weight in weights])
    order = spread_channels(SparseFilter.from_dense(taps[:, :, None, None]), kept, of)
    return torch.from_numpy(order).long().to(taps.device)


def spread_channels(sparse_filter: SparseFilter, kept: int = 2, of: int = 4) -> IntArray:
    """An order of the channels for :func:`split` with a small remainder, most of it in the last channels.

    Channels are placed one by one, those with most nonzeros first, each in the group where fewest of its nonzeros
    exceed what the group keeps. Then two channels of different groups swap places as long as fewer exceed afterwards.
    Groups are sorted by how many exceed in them; the last one, which may be smaller than the others, stays last.
    """
    groups = _Groups(sparse_filter, kept, of)
    groups.place_all()
    groups.swap()
    return groups.order()


class _Groups:
    """Groups of neighbouring channels while they are being made. A site is a tap of an output channel.

    Attributes:
        nonzero: (sites, channels) 1 where there is a nonzero.
        sites_of: the sites of each channel's nonzeros.
        group_of: (channels,)
        counts: (sites, groups) nonzeros of a group's channels.
        kept: how many of a group's channels may be nonzero at a site.
        room: (groups,) channels that a group still takes.
    """

    def __init__(self, sparse_filter: SparseFilter, kept: int, of: int) -> None:
        outputs, width, *kernel_size = sparse_filter.shape
        sites = outputs * kernel_size[0] * kernel_size[1]
        channel, site = channels_and_sites(sparse_filter)
        self.kept, self.width, self.of = kept, width, of
        self.nonzero = np.zeros((sites, width), dtype=np.int8)
        self.nonzero[site, channel] = 1
        ends = np.cumsum(np.bincount(channel, minlength=width))[:-1]
        self.sites_of: list[NDArray[np.int64]] = np.split(site[np.argsort(channel, kind="stable")], ends)
        self.room = np.full(-(-width // of), of)
        self.room[-1] -= len(self.room) * of - width
        self.group_of = np.zeros(width, dtype=np.int64)
        self.counts = np.zeros((sites, len(self.room)), dtype=np.int8)

    def place_all(self) -> None:
        """Puts each channel, those with most nonzeros first, where fewest of its nonzeros exceed what is kept."""
        load = np.zeros(len(self.room), dtype=np.int64)
        for channel in sorted(range(self.width), key=lambda channel: -len(self.sites_of[channel])):
            sites = self.sites_of[channel]
            exceeding = (self.counts[sites] >= self.kept).sum(axis=0)
            group = min(np.flatnonzero(self.room), key=lambda group: (exceeding[group], load[group]))
            self.group_of[channel] = group
            self.room[group] -= 1
            self.counts[sites, group] += 1
            load[group] += len(sites)

    def swap(self) -> None:
        """Swaps two channels of different groups as long as fewer nonzeros exceed what is kept afterwards."""
        relief = np.array([self._relief(channel) for channel in range(self.width)])
        for _ in range(_MOST_SWEEPS):
            swaps = 0
            for channel in np.flatnonzero(relief > 0).tolist():
                gain = relief[channel] + relief - self._cost_of_swaps(channel)
                gain[self.group_of == self.group_of[channel]] = 0
                other = int(gain.argmax())
                if gain[other] <= 0:
                    continue
                changed = self._swap_two(channel, other)
                relief[changed] = [self._relief(member) for member in changed]
                swaps += 1
            if not swaps:
                break

    def order(self) -> IntArray:
        """(channels,) the channels, group by group."""
        excess = np.maximum(self.counts - self.kept, 0).sum(axis=0, dtype=np.int64)
        if self.width % self.of:
            excess[-1] = np.iinfo(np.int64).max
        place_of = np.argsort(np.argsort(excess, kind="stable"))
        return np.argsort(place_of[self.group_of], kind="stable").astype(np.int32)

    def _relief(self, channel: int) -> int:
        """How many fewer nonzeros exceed in a channel's group without it."""
        return int((self.counts[self.sites_of[channel], self.group_of[channel]] > self.kept).sum())

    def _cost_of_swaps(self, channel: int) -> NDArray[np.int32]:
        """(channels,) how many exceed, of this channel's and of the other's, when each stands in the other's place."""
        group, sites = self.group_of[channel], self.sites_of[channel]
        full = np.flatnonzero(self.counts[:, group] - self.nonzero[:, channel] >= self.kept)
        of_others: NDArray[np.int32] = self.nonzero[full].sum(axis=0, dtype=np.int32)
        others_full = self.counts[sites].take(self.group_of, axis=1) - self.nonzero[sites] >= self.kept
        return of_others + others_full.sum(axis=0, dtype=np.int32)

    def _swap_two(self, channel: int, other: int) -> list[int]:
        """Swaps two channels, and returns all channels of their groups."""
        group, other_group = self.group_of[[channel, other]].tolist()
        for moved, source, target in ((channel, group, other_group), (other, other_group, group)):
            self.counts[self.sites_of[moved], source] -= 1
            self.counts[self.sites_of[moved], target] += 1
            self.group_of[moved] = target
        return np.flatnonzero((self.group_of == group) | (self.group_of == other_group)).tolist()
