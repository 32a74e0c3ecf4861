"""A convolution and what runs behind it, in plain torch: the unit that conversion replaces."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from escort.filter import SparseFilter
from escort.problem import Activation


class FusedConv2d(nn.Module):
    """``activation(conv(pad(x)) + residual)`` in plain torch.

    Attributes:
        conv: the convolution with any batch norm folded in; its tensors belong to this module alone.
        activation: what runs last.
        residual: whether `forward` takes a second operand.
        zeros: (top, bottom, left, right) around x, beside the convolution's own padding.
        unfolded: the filter that the convolution had, where it has been changed since then; else None.
    """

    unfolded: SparseFilter | None = None

    def __init__(
        self,
        conv: nn.Conv2d,
        activation: Activation = "none",
        residual: bool = False,
        zeros: tuple[int, int, int, int] = (0, 0, 0, 0),
    ) -> None:
        super().__init__()
        self.conv = conv
        self.activation: Activation = activation
        self.residual = residual
        self.zeros = zeros

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x: (N, C, H, W), residual and result: (N, K, out_height, out_width)."""
        top, bottom, left, right = self.zeros
        y: Tensor = self.conv(F.pad(x, (left, right, top, bottom)) if any(self.zeros) else x)
        if residual is not None:
            y = y + residual
        if self.activation == "none":
            return y
        return F.relu(y) if self.activation == "relu" else F.relu6(y)

    def remember_weight(self) -> None:
        """Notes the filter as it is, unless an older one is known."""
        if self.unfolded is None:
            self.unfolded = SparseFilter.from_dense(self.conv.weight, self.conv.groups)

    def extra_repr(self) -> str:
        text = f"activation={self.activation}, residual={self.residual}"
        return text + (f", zeros={self.zeros}" if any(self.zeros) else "")
