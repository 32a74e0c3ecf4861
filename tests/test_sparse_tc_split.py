"""The exact split of a filter for sparse tensor cores, and orders of its channels with a small remainder."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from escort.filter import SparseFilter
from escort.kernels import _cpu
from escort.methods.cuda.sparse_tc.orders import common_order, spread_channels
from escort.methods.cuda.sparse_tc.split import split


def random_filter(seed: int, density: float, channels: int = 10, groups: int = 1) -> SparseFilter:
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((6, channels, 2, 3)) * (rng.random((6, channels, 2, 3)) < density)
    return SparseFilter.from_dense(weight, groups)


@given(st.integers(0, 1000), st.floats(0.0, 1.0), st.sampled_from([(2, 4), (1, 2), (4, 4)]), st.booleans())
def test_a_split_is_exact_and_keeps_the_largest(
    seed: int, density: float, shape: tuple[int, int], spread: bool
) -> None:
    sparse_filter, (kept, of) = random_filter(seed, density), shape
    parts = split(sparse_filter, kept, of, spread_channels(sparse_filter, kept, of) if spread else None)
    structured, remainder = parts.structured.to_dense(), parts.remainder.to_dense()
    assert torch.equal(structured + remainder, sparse_filter.to_dense()) and not (structured * remainder).any()
    assert parts.share == pytest.approx(parts.remainder.nnz / max(sparse_filter.nnz, 1))
    for first in range(0, 10, of):
        near = torch.from_numpy(parts.channels[first : first + of]).long()
        kept_here, left = structured[:, near].abs(), remainder[:, near].abs()
        assert (kept_here != 0).sum(dim=1).max() <= kept
        least = torch.where(kept_here > 0, kept_here, torch.inf).amin(dim=1)
        assert (left.amax(dim=1) <= least).all(), "a smaller weight was kept"
        assert (((left != 0).sum(dim=1) == 0) | ((kept_here != 0).sum(dim=1) == kept)).all(), "there was room left"


def test_a_filter_of_that_pattern_leaves_nothing() -> None:
    weight = torch.randn(8, 16, 3, 3)
    weight.view(8, 4, 4, 3, 3)[:, :, :2] = 0.0
    parts = split(SparseFilter.from_dense(weight, groups=2))
    assert parts.remainder.nnz == 0 and parts.share == 0.0
    assert torch.equal(parts.structured.to_dense(), weight) and parts.structured.groups == 2


def test_spread_channels_leave_less() -> None:
    """Where neighbours are dense together, and where all are alike."""
    rng = np.random.default_rng(0)
    uneven = (rng.random((64, 64, 3, 3)) < np.repeat([0.4, 0.02, 0.02, 0.02], 16)[:, None, None]).astype(float)
    even = (rng.random((64, 64, 3, 3)) < 0.1).astype(float)
    for weight, most in ((uneven, 0.2), (even, 0.6)):
        sparse_filter = SparseFilter.from_dense(weight)
        order = spread_channels(sparse_filter)
        assert sorted(order.tolist()) == list(range(64))
        assert split(sparse_filter, channels=order).share <= most * split(sparse_filter).share


def cost(weight: np.ndarray, order: np.ndarray, cell_cost: int, kept: int, of: int) -> int:
    """Of an order of a filter's channels: its sites with a remainder, and the halves of weight tiles that have any."""
    nonzeros = np.pad(weight[:, order] != 0, ((0, -len(weight) % 64), (0, -len(order) % (8 * of)), (0, 0), (0, 0)))
    k, c, r, s = nonzeros.shape
    exceeds = nonzeros.reshape(k // 64, 64, c // (8 * of), 8, of, r, s).sum(axis=4) > kept
    return int(exceeds.sum() + cell_cost * exceeds.any(axis=(1, 3)).sum())


@pytest.mark.parametrize(("kept", "of", "density"), [(2, 4, 0.2), (1, 2, 0.1)])
@pytest.mark.parametrize("cell_cost", [0, 5])
def test_no_swap_of_two_channels_costs_less(cell_cost: int, kept: int, of: int, density: float) -> None:
    weight = (np.random.default_rng(0).random((72, 42, 2, 2)) < density).astype(float)
    order = spread_channels(SparseFilter.from_dense(weight), kept, of, cell_cost)
    least = cost(weight, order, cell_cost, kept, of)
    assert 0 < least < 0.8 * cost(weight, np.arange(42), cell_cost, kept, of)
    for a, b in itertools.combinations(range(42), 2):
        swapped = order.copy()
        swapped[[a, b]] = order[[b, a]]
        assert cost(weight, swapped, cell_cost, kept, of) >= least


def test_a_remainder_is_gathered() -> None:
    """In fewer halves of weight tiles than where it is made as small as can be, of nonzeros as pruning leaves them."""
    rng = np.random.default_rng(0)
    spread = rng.lognormal(sigma=0.5, size=(128, 1, 1, 1)) * rng.lognormal(sigma=0.5, size=(1, 128, 1, 1))
    importance = spread * rng.random((128, 128, 3, 3))
    sparse_filter = SparseFilter.from_dense(np.where(importance > np.quantile(importance, 0.9), 1.0, 0.0))
    weight = sparse_filter.to_dense().numpy()
    gathered, small = (
        cost(weight, spread_channels(sparse_filter, cell_cost=of_cell), 1000, 2, 4) // 1000 for of_cell in (5, 0)
    )
    assert 0 < gathered < 0.9 * small


@pytest.mark.parametrize(
    ("kept", "of", "channels", "message"),
    [(5, 4, None, "cannot keep 5"), (0, 4, None, "cannot keep 0"), (2, 4, [0] * 10, "an order of 0..9")],
)
def test_a_split_that_is_none_is_refused(kept: int, of: int, channels: list[int] | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        split(random_filter(0, 0.5), kept, of, None if channels is None else np.array(channels, dtype=np.int32))


@pytest.mark.parametrize(
    ("sites", "channels", "kept", "of", "message"),
    [
        ([0, 6], [0, 1], 2, 4, "within the filter"),
        ([0, -1], [0, 1], 2, 4, "within the filter"),
        ([0, 1], [0, 10], 2, 4, "within the filter"),
        ([0, 1], [0], 2, 4, "within the filter"),
        ([0, 1], [0, 1], 0, 4, "a group keeps some"),
        ([0, 1], [0, 1], 5, 4, "a group keeps some"),
        ([0, 1], [0, 1], 2, 256, "a group keeps some"),
    ],
)
def test_what_is_no_filter_has_no_order(
    sites: list[int], channels: list[int], kept: int, of: int, message: str
) -> None:
    arrays = (np.array(numbers, dtype=np.int32) for numbers in (sites, channels))
    with pytest.raises(ValueError, match=message):
        _cpu.spread_channels(*arrays, 6, 10, kept, of, 5)


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 130])
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_any_number_of_channels_has_an_order_the_same_each_time(channels: int, density: float) -> None:
    sparse_filter = random_filter(1, density, channels)
    order = spread_channels(sparse_filter)
    assert sorted(order.tolist()) == list(range(channels))
    assert np.array_equal(spread_channels(sparse_filter), order)


def test_filters_that_gain_by_no_order_have_no_say() -> None:
    generator = torch.Generator().manual_seed(3)
    dense = torch.randn(32, 64, 1, 1, generator=generator)
    sparse = dense * (torch.rand(dense.shape, generator=generator) < 0.15)
    own = torch.arange(64)
    assert torch.equal(common_order([dense], 2, 4), own)
    order = common_order([sparse, dense], 2, 4)
    assert torch.equal(order, common_order([sparse], 2, 4)) and not torch.equal(order, own)
    groups = dense.unflatten(1, (-1, 4))
    of_four = torch.zeros_like(groups).scatter_(2, groups.abs().topk(2, 2).indices, 1.0).flatten(1, 2) * dense
    assert torch.equal(common_order([of_four, of_four], 2, 4), own)
    assert torch.equal(common_order([of_four, dense], 2, 4), own)
