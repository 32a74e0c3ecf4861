"""A convolution and what runs behind it, in plain torch: the unit that conversion replaces."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from escort.filter import SparseFilter
from escort.network.conv_types import overrides, own_type
from escort.network.tracer import has_hooks
from escort.problem import Activation


class FusedConv2d(nn.Module):
    """``activation(conv(x) + residual)`` in plain torch.

    Attributes:
        conv: the convolution with any batch norm folded in; its tensors belong to this module alone.
        activation: what runs last.
        residual: whether `forward` takes a second operand.
        unfolded: the filter that the convolution had, where it has been changed since then; else None.
    """

    unfolded: SparseFilter | None = None

    def __init__(self, conv: nn.Conv2d, activation: Activation = "none", residual: bool = False) -> None:
        super().__init__()
        self.conv = conv
        self.activation: Activation = activation
        self.residual = residual

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x: (N, C, H, W), residual and result: (N, K, out_height, out_width)."""
        y: Tensor = self.conv(x)
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
        return f"activation={self.activation}, residual={self.residual}"


def unsupported(conv: nn.Module) -> str | None:
    """Why this convolution cannot be replaced by a :class:`FusedConv2d`, or None."""
    if not isinstance(conv, nn.modules.conv._ConvNd):
        return f"{type(conv).__name__} is no convolution"
    reason = _other_than_plain(conv)
    if reason is not None and has_hooks(conv):
        return f"{reason}, and it has forward hooks, which see it as it is; remove them before converting"
    return reason


def _other_than_plain(conv: Any) -> str | None:
    if overrides(conv):
        own = own_type(conv).__name__
        return (
            f"{type(conv).__name__} computes something else than nn.{own}; replace it by an nn.{own} with the weight "
            "in effect"
        )
    if reason := not_2d(len(conv.kernel_size), conv.transposed):
        return reason
    return None if conv.padding_mode == "zeros" else f"padding_mode {conv.padding_mode!r} is not zeros"


def not_2d(dimensions: int, transposed: bool) -> str | None:
    """Why a convolution of so many spatial dimensions cannot be replaced as it is, or None."""
    kind = f"a {'transposed ' if transposed else ''}{dimensions}-d convolution"
    if dimensions > 2:
        return f"{kind} is out of scope; it runs by torch, as it did"
    return None if (dimensions, transposed) == (2, False) else f"{kind} is not a 2-d one"
