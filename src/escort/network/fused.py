"""Which convolutions can be replaced by a :class:`escort.layers.FusedConv2d`."""

from __future__ import annotations

from torch import nn

from escort.layers import FusedConv2d as FusedConv2d


def unsupported(conv: nn.Module) -> str | None:
    """Why this convolution cannot be replaced by a :class:`FusedConv2d`, or None."""
    if not isinstance(conv, nn.Conv2d):
        return f"{type(conv).__name__} is not a 2-d convolution"
    if type(conv).forward is not nn.Conv2d.forward or type(conv)._conv_forward is not nn.Conv2d._conv_forward:
        return f"{type(conv).__name__} computes something else than nn.Conv2d"
    if conv.padding_mode != "zeros":
        return f"padding_mode {conv.padding_mode!r} is not zeros"
    if conv._forward_hooks or conv._forward_pre_hooks:
        return "it has forward hooks, which would not run; remove them before converting"
    return None
