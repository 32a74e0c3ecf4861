"""SparseFilter: lossless, validated, and stretched to the place that each tap reads."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch
from hypothesis import given
from hypothesis import strategies as st

from escort.filter import Geometry, SparseFilter, _compressed
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


@every_case
def test_what_is_compressed_on_a_gpu_is_the_same(case: Case) -> None:
    weight = case.tensors()[1]
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for lying in (weight.to(dtype), weight.to(dtype, memory_format=torch.channels_last)):
            expected = SparseFilter.from_dense(lying, case.problem.groups)
            if (found := _compressed(lying)) is None:
                assert expected.nnz > weight.numel() / 4
                continue
            for array, same in zip(found, (expected.indptr, expected.columns, expected.values), strict=True):
                assert array.dtype == same.dtype and np.array_equal(array, same)


@pytest.mark.gpu
@pytest.mark.parametrize("density", [0.0, 0.1, 0.9])
def test_a_filter_on_a_gpu_is_compressed_there(density: float) -> None:
    weight = torch.randn(64, 32, 3, 3) * (torch.rand(64, 32, 3, 3) < density)
    for dtype in (torch.float32, torch.float16):
        expected, found = (SparseFilter.from_dense(weight.to(device, dtype)) for device in ("cpu", "cuda"))
        assert found.shape == expected.shape
        for name in ("indptr", "columns", "values"):
            assert np.array_equal(getattr(found, name), getattr(expected, name))
    with pytest.raises(ValueError, match="NaN or infinity"):
        SparseFilter.from_dense(torch.tensor([float("nan"), 0.0, 0.0, 0.0, 0.0]).reshape(1, 5, 1, 1).cuda())
    with pytest.raises(ValueError, match="got .2, 3."):
        SparseFilter.from_dense(torch.ones(2, 3).cuda())


def test_the_arrays_are_those_of_the_format() -> None:
    sparse_filter = _filter()
    assert sparse_filter.indptr.tolist() == [0, 1, 3]
    assert sparse_filter.columns.tolist() == [5, 0, 4]
    assert sparse_filter.values.tolist() == [5.0, -1.0, 2.0]
    assert [t.tolist() for t in sparse_filter.taps] == [[1, 0, 1], [0, 0, 0], [2, 0, 1]]
    assert sparse_filter.out_channels.tolist() == [0, 1, 1]


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
    read = phases.flatten()[torch.from_numpy(sparse_filter.offsets).long() + row * columns + column]
    c, r, s = (torch.from_numpy(t).long() for t in sparse_filter.taps)
    assert torch.equal(read, padded[c, row * stride[0] + r * dilation[0], column * stride[1] + s * dilation[1]])


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
