"""Orders of a filter's channels in which its remainder is small, and takes few weight tiles."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch.nn import functional

from escort.filter import IntArray, SparseFilter
from escort.kernels import _cpu
from escort.methods.cuda.sparse_tc.config import Element
from escort.methods.cuda.sparse_tc.split import Split, split
from escort.problem import MemoryFormat

_BLOCK = 64  # output channels that a warpgroup multiplies at the least
_CELL_COST = 5  # of a half of a weight tile with a remainder, for the search of orders: as much as so many sites
_LEAST_SPARSITY = 0.65  # in denser filters every weight tile has a remainder in any order


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
    """The remainder in few halves of weight tiles, by the order of the input channels, or by both orders.

    Output channels in an order of their own gather what the input channels spread over them, where these made it as
    small as they can. Which of the two leaves less depends on the filter.
    """
    natural, whole = _keep_order(sparse_filter, element), _whole_blocks(sparse_filter, element.k_block)
    if natural.split.remainder.nnz == 0 or sparse_filter.sparsity < _LEAST_SPARSITY:
        return natural
    few_cells, small = (
        split(whole, element.kept, element.of, spread_channels(whole, element.kept, element.of, cell_cost))
        for cell_cost in (_CELL_COST, 0)
    )
    nonzeros = np.bincount(small.remainder.out_channels, minlength=len(natural.out_order))
    by_nonzeros = np.argsort(-nonzeros, kind="stable").astype(np.int32)
    ordered = [
        replace(
            natural,
            split=parts,
            in_order=np.where(parts.channels < sparse_filter.shape[1], parts.channels, -1).astype(np.int32),
            out_order=out_order,
        )
        for parts, out_order in ((few_cells, natural.out_order), (small, by_nonzeros))
    ]
    return min(ordered, key=lambda one: one.remainder_share(_BLOCK, element.k_block // 2))


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
    """One order, (C,) int64, of the input channels of weights (K, C, R, S) that read the same tensor.

    Their own order stays where it leaves no remainder, as in networks that were pruned to 2:4. Filters that have a
    remainder in any order have no say.
    """
    own = torch.arange(weights[0].shape[1], device=weights[0].device)
    sparsities = [1.0 - int(weight.count_nonzero()) / weight.numel() for weight in weights]
    able = [weight for weight, sparsity in zip(weights, sparsities, strict=True) if sparsity >= 1.0 - kept / of]
    if not able or split(_of_taps(able), kept, of).remainder.nnz == 0:
        return own
    gaining = [weight for weight, sparsity in zip(weights, sparsities, strict=True) if sparsity >= _LEAST_SPARSITY]
    return torch.from_numpy(spread_channels(_of_taps(gaining), kept, of)).long().to(own.device) if gaining else own


def _of_taps(weights: Sequence[torch.Tensor]) -> SparseFilter:
    """Weights (K, C, R, S) as one pointwise filter: an output channel for each tap, whole blocks for each tap."""
    taps = [functional.pad(weight.permute(2, 3, 1, 0), (0, -len(weight) % _BLOCK)) for weight in weights]
    return SparseFilter.from_dense(torch.cat([tap.transpose(2, 3).flatten(0, 2) for tap in taps])[:, :, None, None])


def spread_channels(sparse_filter: SparseFilter, kept: int = 2, of: int = 4, cell_cost: int = _CELL_COST) -> IntArray:
    """An order of the channels for :func:`split` with a small remainder, which is in few halves of weight tiles.

    kernels/cpu/spread_channels.hpp says how it is found.
    """
    outputs, width, *kernel_size = sparse_filter.shape
    channel, tap = np.divmod(sparse_filter.columns, np.int32(math.prod(kernel_size)))
    of_tap = -(-outputs // _BLOCK) * _BLOCK
    site = tap * np.int32(of_tap) + sparse_filter.out_channels.astype(np.int32)
    sites = of_tap * math.prod(kernel_size)
    return np.array(_cpu.spread_channels(site, channel, sites, width, kept, of, cell_cost), dtype=np.int32)
