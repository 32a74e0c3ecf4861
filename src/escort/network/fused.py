"""Which convolutions can be replaced by a :class:`escort.layers.FusedConv2d`."""

from __future__ import annotations

from typing import Any

from torch import nn

from escort.layers import FusedConv2d as FusedConv2d
from escort.network.conv_types import overrides, own_type
from escort.runtime.stand_in import has_hooks


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
