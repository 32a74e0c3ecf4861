"""SparseFilter: lossless, validated, and stretched to the place that each tap reads."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch
from hypothesis import given
from hypothesis import strategies as st

from escort.filter import Geometry, SparseFilter, split, spread_channels
from tests.cases import Case, every_case


def _filter() -> SparseFilter:
    weight = torch.zeros(2, 2, 1, 3)
    weight[0, 1, 0, 2], weight[1, 0, 0, 0], weight[1, 1, 0, 1] = 5.0, -1.0, 2.0
    return SparseFilter.from_dense(weight)


@every_case
def test_dense_and_back(case: Case) -> None:
    weight = case.tensors()[1]
    sparse_filter = SparseFilter.from_dense(weight, case.problem.groups)
    assert torch.equal(sparse_filter.to_dense(), weight)
    assert sparse_filter.nnz == int((weight != 0).sum())
    assert sparse_filter.sparsity == pytest.approx(1 - sparse_filter.nnz / weight.numel())


def test_the_arrays_are_those_of_the_format() -> None:
    sparse_filter = _filter()
    assert sparse_filter.indptr.tolist() == [0, 1, 3]
    assert sparse_filter.columns.tolist() == [5, 0, 4]
    assert sparse_filter.values.tolist() == [5.0, -1.0, 2.0]
    assert [t.tolist() for t in sparse_filter.taps] == [[1, 0, 1], [0, 0, 0], [2, 0, 1]]
    assert sparse_filter.rows.tolist() == [0, 1, 1]


def test_scipy_and_torch_matrices_are_adopted() -> None:
    sparse_filter = _filter()
    matrix = sparse_filter.to_dense().reshape(2, 6)
    by_scipy = SparseFilter.from_csr(scipy.sparse.csr_matrix(matrix.numpy()), sparse_filter.shape)
    by_torch = SparseFilter.from_csr(matrix.to_sparse_csr(), sparse_filter.shape)
    for other in (by_scipy, by_torch):
        assert torch.equal(other.to_dense(), sparse_filter.to_dense())
    unsorted = scipy.sparse.csr_matrix((np.array([1.0, 2.0, 3.0]), np.array([4, 0, 4]), np.array([0, 3, 3])), (2, 6))
    assert SparseFilter.from_csr(unsorted, sparse_filter.shape).values.tolist() == [2.0, 4.0]
    with pytest.raises(ValueError, match="matrix of 2x6"):
        SparseFilter.from_csr(scipy.sparse.csr_matrix((2, 5)), sparse_filter.shape)
    with pytest.raises(ValueError, match="CSR tensor"):
        SparseFilter.from_csr(matrix, sparse_filter.shape)


@given(
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    dilation=st.tuples(st.integers(1, 3), st.integers(1, 3)),
)
def test_offsets_find_the_input_of_every_tap(stride: tuple[int, int], dilation: tuple[int, int]) -> None:
    """Splits a padded plane into its phases by slicing, and reads it through the offsets."""
    height, width = 24, 21
    padded = torch.arange(2 * height * width).reshape(2, height, width)
    rows, columns = -(-height // stride[0]), -(-width // stride[1])
    phases = torch.zeros(2, *stride, rows, columns, dtype=torch.long)
    for i in range(stride[0]):
        for j in range(stride[1]):
            part = padded[:, i :: stride[0], j :: stride[1]]
            phases[:, i, j, : part.shape[1], : part.shape[2]] = part
    geometry = Geometry(phases[0].numel(), columns, rows * columns, stride, dilation)
    sparse_filter = SparseFilter.from_dense(torch.ones(1, 2, 3, 3)).stretch(geometry)
    assert sparse_filter.geometry == geometry
    assert sparse_filter.offsets is not None
    row, column = 2, 1  # an output position
    found = phases.flatten()[torch.from_numpy(sparse_filter.offsets).long() + row * columns + column]
    c, r, s = (torch.from_numpy(t).long() for t in sparse_filter.taps)
    assert torch.equal(found, padded[c, row * stride[0] + r * dilation[0], column * stride[1] + s * dilation[1]])


def test_restretching_needs_no_dense_weights() -> None:
    sparse_filter = _filter()
    small, large = Geometry(10, 5), Geometry(1000, 50)
    assert sparse_filter.stretch(small).stretch(large).offsets.tolist() == [1002, 0, 1001]  # type: ignore[union-attr]


def test_an_offset_beyond_32_bits_is_refused() -> None:
    with pytest.raises(ValueError, match="does not fit 32 bits"):
        _filter().stretch(Geometry(2**31, 5))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"indptr": [0, 1]}, "indptr must run"),
        ({"indptr": [1, 1, 3]}, "indptr must run"),
        ({"indptr": [0, 4, 3]}, "must not descend"),
        ({"indptr": [0, 1, 2]}, "indptr must run"),
        ({"columns": [5, 0]}, "nnz entries"),
        ({"columns": [6, 0, 4]}, "columns must lie in 0..5"),
        ({"columns": [-1, 0, 4]}, "columns must lie in 0..5"),
        ({"columns": [5, 4, 0]}, "ascend"),
        ({"columns": [5, 4, 4]}, "ascend"),
        ({"values": [1.0, float("nan"), 2.0]}, "finite"),
        ({"values": [1.0, float("inf"), 2.0]}, "finite"),
        ({"shape": (2, 0, 1, 3)}, "a filter has shape"),
        ({"shape": (2, 2, 1)}, "a filter has shape"),
        ({"shape": (2, 2**20, 2**20, 3)}, "32-bit columns"),
        ({"groups": 3}, "a filter has shape"),
    ],
)
def test_what_is_not_a_filter_is_refused(change: dict[str, Any], says: str) -> None:
    good: dict[str, Any] = {
        "shape": (2, 2, 1, 3),
        "groups": 1,
        "indptr": [0, 1, 3],
        "columns": [5, 0, 4],
        "values": [5, -1, 2],
    }
    fields = {**good, **change}
    for name, dtype in (("indptr", np.int32), ("columns", np.int32), ("values", np.float32)):
        fields[name] = np.array(fields[name], dtype=dtype)
    with pytest.raises(ValueError, match=says):
        SparseFilter(**fields)


def test_arrays_of_another_type_are_refused() -> None:
    sparse_filter = _filter()
    with pytest.raises(ValueError, match="columns is a vector of int32"):
        SparseFilter(
            sparse_filter.shape, 1, sparse_filter.indptr, sparse_filter.columns.astype(np.int64), sparse_filter.values
        )  # type: ignore[arg-type]


def test_nan_in_dense_weights_is_refused() -> None:
    with pytest.raises(ValueError, match="finite"):
        SparseFilter.from_dense(torch.full((1, 1, 1, 1), float("nan")))


# --- a part for tensor cores, and the rest


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
    structured, residual = parts.structured.to_dense(), parts.residual.to_dense()
    assert torch.equal(structured + residual, sparse_filter.to_dense()) and not (structured * residual).any()
    assert parts.share == pytest.approx(parts.residual.nnz / max(sparse_filter.nnz, 1))
    for first in range(0, 10, of):
        near = torch.from_numpy(parts.channels[first : first + of]).long()
        mine, left = structured[:, near].abs(), residual[:, near].abs()
        assert (mine != 0).sum(dim=1).max() <= kept
        least = torch.where(mine > 0, mine, torch.inf).amin(dim=1)
        assert (left.amax(dim=1) <= least).all(), "a smaller weight was kept"
        assert (((left != 0).sum(dim=1) == 0) | ((mine != 0).sum(dim=1) == kept)).all(), "there was room left"


def test_a_filter_of_that_pattern_leaves_nothing() -> None:
    weight = torch.randn(8, 16, 3, 3)
    weight.view(8, 4, 4, 3, 3)[:, :, :2] = 0.0
    parts = split(SparseFilter.from_dense(weight, groups=2))
    assert parts.residual.nnz == 0 and parts.share == 0.0
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


def test_no_swap_of_two_channels_leaves_less() -> None:
    weight = (np.random.default_rng(0).random((24, 16, 2, 2)) < 0.2).astype(float)
    sparse_filter = SparseFilter.from_dense(weight)
    order = spread_channels(sparse_filter)
    least = split(sparse_filter, channels=order).residual.nnz
    assert 0 < least < split(sparse_filter).residual.nnz
    for a, b in itertools.combinations(range(16), 2):
        swapped = order.copy()
        swapped[[a, b]] = order[[b, a]]
        assert split(sparse_filter, channels=swapped).residual.nnz >= least


@pytest.mark.parametrize(
    ("kept", "of", "channels", "message"),
    [(5, 4, None, "cannot keep 5"), (0, 4, None, "cannot keep 0"), (2, 4, [0] * 10, "an order of 0..9")],
)
def test_a_split_that_is_none_is_refused(kept: int, of: int, channels: list[int] | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        split(random_filter(0, 0.5), kept, of, None if channels is None else np.array(channels, dtype=np.int32))
