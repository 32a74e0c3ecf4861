"""What the methods share that go through torch's operators: padding, im2col and CSR matrices."""

from __future__ import annotations

import math
import warnings

import torch
import torch.nn.functional as F

from escort.filter import SparseFilter
from escort.problem import Problem


def symmetric_padding(problem: Problem, x: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
    """x and the zeros (rows, columns) still to be added on both sides of it.

    Torch's operators pad both sides alike: where the problem does not, x comes back padded and nothing is left to add.
    """
    top, bottom, left, right = problem.padding
    if top == bottom and left == right:
        return x, (top, left)
    return F.pad(x, (left, right, top, bottom)), (0, 0)


def is_linear(problem: Problem) -> bool:
    """Whether a problem is a matrix product as it stands: pointwise, of one pixel, without groups."""
    sizes = problem.height, problem.width, *problem.kernel_size, problem.groups, problem.out_height, problem.out_width
    return set(sizes) == {1} and not any(problem.padding)


def unfold(problem: Problem, x: torch.Tensor, *, by_sample: bool = False) -> torch.Tensor:
    """im2col: every input patch as a column.

    Torch unfolds a batch on a GPU by one kernel per sample. Here one kernel unfolds them all, since the channels of all
    samples make the columns that the channels of one large sample would. A pointwise convolution needs no kernel.

    Args:
        x: (N, C, H, W), N positive.
        by_sample: leave the batch to torch, and unfold a pointwise convolution too.

    Returns:
        (N, groups, C / groups * R * S, positions)
    """
    samples, channels, height, width = x.shape
    shape = samples, problem.groups, channels // problem.groups * math.prod(problem.kernel_size)
    pointwise = problem.kernel_size == problem.stride == (1, 1) and not any(problem.padding)
    if pointwise and not by_sample:
        return x.reshape(*shape, height * width)
    x, padding = symmetric_padding(problem, x)
    if not by_sample:
        x = x.reshape(1, samples * channels, *x.shape[2:])
    columns = F.unfold(x, problem.kernel_size, problem.dilation, padding, problem.stride)
    return columns.view(*shape, problem.out_height * problem.out_width)


def csr_matrices(
    sparse_filter: SparseFilter, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> list[torch.Tensor]:
    """The filter as torch CSR tensors of shape (K / groups, C / groups * R * S), one per group."""
    channels = sparse_filter.shape[0] // sparse_filter.groups
    width = math.prod(sparse_filter.shape[1:])
    matrices = []
    for group in range(sparse_filter.groups):
        indptr = torch.from_numpy(sparse_filter.indptr[group * channels : (group + 1) * channels + 1])
        first, end = int(indptr[0]), int(indptr[-1])
        columns, values = (torch.from_numpy(a[first:end]) for a in (sparse_filter.columns, sparse_filter.values))
        with warnings.catch_warnings():  # torch calls its CSR tensors beta
            warnings.simplefilter("ignore", UserWarning)
            parts = (indptr - first).to(device), columns.to(device), values.to(device, dtype)
            matrices.append(torch.sparse_csr_tensor(*parts, (channels, width)))
    return matrices
