"""Zeros around an input, as many as its size asks for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn


class SamePad(nn.Module):
    """Adds the zeros that TensorFlow's "same" padding adds in front of a convolution.

    The convolution of the padded input has ``ceil(size / stride)`` positions along each axis. An odd zero is added at
    the end.

    Args:
        kernel_size, stride, dilation: of the convolution, one number per axis.
    """

    def __init__(self, kernel_size: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> None:
        super().__init__()
        self.kernel_size, self.stride, self.dilation = tuple(kernel_size), tuple(stride), tuple(dilation)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (N, C, *sizes); the result has larger sizes."""
        axes = zip(x.shape[2:], self.kernel_size, self.stride, self.dilation, strict=True)
        totals = [same_zeros(*axis) for axis in axes]
        return F.pad(x, [zeros for total in reversed(totals) for zeros in (total // 2, total - total // 2)])

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel_size}, stride={self.stride}, dilation={self.dilation}"


def same_zeros(size: int, kernel_size: int, stride: int, dilation: int) -> int:
    """How many zeros "same" padding adds along an axis of `size`, which may be a symbol."""
    reach = (kernel_size - 1) * dilation
    total = reach - (size - 1) % stride
    return total if reach + 1 >= stride else torch.sym_max(total, 0)
