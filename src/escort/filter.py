"""Compressed filters: a CSR row per output channel, whose columns can be stretched into offsets in a padded input.

The format follows the Escoin paper (arXiv 1802.10280, section 3). A nonzero at (c, r, s) of output channel k reads the
input at a constant distance from the output position. So the inner loop of a direct convolution is
``y[k, p] += value * x[p + offset]``, without index arithmetic and without a bounds check.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

IntArray = NDArray[np.int32]
FloatArray = NDArray[np.float32]
_MOST_ON_DEVICE = 0.25  # nonzeros of a filter's weights: each takes 8 bytes while they are looked for


@dataclass(frozen=True)
class Geometry:
    """How a padded input lies in memory, in elements; the offsets of a :class:`SparseFilter` belong to one geometry.

    A strided convolution reads its input split into ``stride[0] * stride[1]`` phases. Phase (i, j) holds the rows
    i, i + stride[0], ... and the columns j, j + stride[1], ... Within a phase neighbouring outputs read neighbouring
    inputs, so one constant offset per nonzero serves every output position. Without stride there is one phase.
    """

    channel_stride: int
    row_pitch: int
    phase_stride: int = 0
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)

    def offset(self, c: IntArray, r: IntArray, s: IntArray) -> IntArray:
        """The distance from an output position to the input that tap (c, r, s) reads.

        Raises:
            ValueError: if a distance does not fit 32 bits.
        """
        row, row_phase = np.divmod(r * self.dilation[0], self.stride[0])
        column, column_phase = np.divmod(s * self.dilation[1], self.stride[1])
        phase = row_phase * self.stride[1] + column_phase
        offset = c * np.int64(self.channel_stride) + phase * self.phase_stride + row * self.row_pitch + column
        if offset.size and offset.max() > np.iinfo(np.int32).max:
            raise ValueError(f"an offset of {offset.max()} elements does not fit 32 bits; use a smaller input")
        return offset.astype(np.int32)


@dataclass(frozen=True, eq=False)
class SparseFilter:
    """A convolution filter of shape (K, C / groups, R, S) that stores its nonzeros only.

    The filter is one CSR matrix per group, one below the other. Row k holds output channel k, columns ascend within a
    row, and input channels are counted within their group.

    Attributes:
        indptr: (K + 1,) int32, row k's nonzeros are ``indptr[k]:indptr[k + 1]``.
        columns: (nnz,) int32, ``(c * R + r) * S + s``.
        values: (nnz,) float32.
        geometry: the padded input to which this filter was stretched, or None.
        offsets: (nnz,) int32 offsets into that input, or None.

    Raises:
        ValueError: unless the arrays describe a filter of that shape. Arrays that are accepted are safe to index with.
    """

    shape: tuple[int, int, int, int]
    groups: int
    indptr: IntArray
    columns: IntArray
    values: FloatArray
    geometry: Geometry | None = field(default=None)
    offsets: IntArray | None = field(default=None)

    def __post_init__(self) -> None:
        if len(self.shape) != 4 or min(self.shape) < 1 or self.groups < 1 or self.shape[0] % self.groups:
            raise ValueError(f"a filter has shape (K, C / groups, R, S), got {self.shape} in {self.groups} groups")
        rows, width = self.shape[0], int(np.prod(self.shape[1:], dtype=object))
        if width > np.iinfo(np.int32).max:
            raise ValueError(f"a filter row of {width} weights does not fit 32-bit columns")
        for name, dtype in (("indptr", np.int32), ("columns", np.int32), ("values", np.float32)):
            array = getattr(self, name)
            if array.ndim != 1 or array.dtype != dtype:
                raise ValueError(f"{name} is a vector of {np.dtype(dtype)}, got {array.dtype} of shape {array.shape}")
        nnz = len(self.values)
        if len(self.indptr) != rows + 1 or self.indptr[0] != 0 or self.indptr[-1] != nnz or len(self.columns) != nnz:
            raise ValueError(f"indptr must run from 0 to nnz={nnz} over {rows} rows and columns must have nnz entries")
        if np.any(np.diff(self.indptr) < 0):
            raise ValueError("indptr must not descend")
        if nnz:
            if self.columns.min() < 0 or self.columns.max() >= width:
                raise ValueError(
                    f"columns must lie in 0..{width - 1}, found {self.columns.min()}..{self.columns.max()}"
                )
            ascends = np.diff(self.columns) > 0
            starts = self.indptr[1:-1]
            ascends[starts[(starts > 0) & (starts < nnz)] - 1] = True
            if not ascends.all():
                raise ValueError("columns must ascend within each row")
            if not np.isfinite(self.values).all():
                raise ValueError("weights must be finite, found NaN or infinity")

    @classmethod
    def from_dense(cls, weight: torch.Tensor | NDArray[Any], groups: int = 1) -> SparseFilter:
        """Compresses a dense (K, C / groups, R, S) filter; exact zeros are dropped.

        Raises:
            ValueError: if it has another rank, or holds NaN or infinity.
        """
        if len(weight.shape) != 4:
            raise ValueError(f"a filter has shape (K, C / groups, R, S), got {tuple(weight.shape)}")
        if isinstance(weight, torch.Tensor) and weight.is_cuda and (arrays := _compressed(weight)) is not None:
            k, c, r, s = weight.shape
            return cls((k, c, r, s), groups, *arrays)
        dense = weight.detach().cpu().float().numpy() if isinstance(weight, torch.Tensor) else np.asarray(weight)
        matrix = np.ascontiguousarray(dense, dtype=np.float32).reshape(dense.shape[0], -1)
        present = matrix != 0.0  # numpy finds what is true several times as fast as what is not zero
        counts, places = np.count_nonzero(present, axis=1), np.flatnonzero(present)
        indptr = np.concatenate(([0], np.cumsum(counts)))
        columns = places - np.repeat(np.arange(len(matrix)) * matrix.shape[1], counts)
        return cls(dense.shape, groups, indptr.astype(np.int32), columns.astype(np.int32), matrix.ravel()[places])

    @classmethod
    def from_csr(cls, matrix: Any, shape: tuple[int, int, int, int], groups: int = 1) -> SparseFilter:
        """Takes over a scipy CSR matrix or a torch CSR tensor of shape (K, C / groups * R * S).

        Raises:
            ValueError: if it has another shape, is no CSR tensor, or holds NaN or infinity.
        """
        if isinstance(matrix, torch.Tensor):
            if matrix.layout != torch.sparse_csr:
                raise ValueError(f"expected a torch CSR tensor, got layout {matrix.layout}")
            parts = (matrix.crow_indices(), matrix.col_indices(), matrix.values())
            indptr, columns, values = (part.detach().cpu().numpy() for part in parts)
        else:
            matrix = matrix.tocsr(copy=True)
            matrix.sum_duplicates()
            indptr, columns, values = matrix.indptr, matrix.indices, matrix.data
        if tuple(matrix.shape) != (shape[0], int(np.prod(shape[1:]))):
            raise ValueError(
                f"a filter of shape {shape} is a matrix of {shape[0]}x{np.prod(shape[1:])}, got {matrix.shape}"
            )
        return cls(shape, groups, indptr.astype(np.int32), columns.astype(np.int32), values.astype(np.float32))

    def to_dense(self) -> torch.Tensor:
        """The dense (K, C / groups, R, S) float32 filter."""
        matrix = np.zeros((self.shape[0], int(np.prod(self.shape[1:]))), dtype=np.float32)
        matrix[self.out_channels, self.columns] = self.values
        return torch.from_numpy(matrix.reshape(self.shape))

    def stretch(self, geometry: Geometry) -> SparseFilter:
        """The same filter with offsets into a padded input of this geometry."""
        return replace(self, geometry=geometry, offsets=geometry.offset(*self.taps))

    @property
    def nnz(self) -> int:
        return len(self.values)

    @property
    def sparsity(self) -> float:
        """The share of weights that are zero, 0..1."""
        return 1.0 - self.nnz / float(np.prod(self.shape))

    @property
    def out_channels(self) -> IntArray:
        """(nnz,) the output channel of each nonzero."""
        return np.repeat(np.arange(self.shape[0], dtype=np.int32), np.diff(self.indptr))

    @property
    def taps(self) -> tuple[IntArray, IntArray, IntArray]:
        """(c, r, s) of each nonzero, each (nnz,); c is counted within its group."""
        rest, s = np.divmod(self.columns, np.int32(self.shape[3]))
        c, r = np.divmod(rest, np.int32(self.shape[2]))
        return c, r, s

    def __repr__(self) -> str:
        return f"SparseFilter(shape={self.shape}, groups={self.groups}, nnz={self.nnz}, sparsity={self.sparsity:.1%})"


def _compressed(weight: torch.Tensor) -> tuple[IntArray, IntArray, FloatArray] | None:
    """indptr, columns and values of a dense filter, found where it lies, so that its zeros need not leave a GPU.

    None where most of it is nonzeros: finding them would take more memory there than the filter does.
    """
    matrix = weight.detach().flatten(1)
    counts = (matrix != 0).sum(1).cpu().numpy()
    if counts.sum() > _MOST_ON_DEVICE * matrix.numel():
        return None
    places = matrix.flatten().nonzero().squeeze(1)
    columns, values = places % matrix.shape[1], matrix.flatten()[places]
    indptr = np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
    return indptr, columns.int().cpu().numpy(), values.float().cpu().numpy()
