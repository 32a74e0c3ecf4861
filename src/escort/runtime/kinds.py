"""What tells calls apart that need graphs of their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from escort.methods.precision import float32_settings
from escort.runtime.replay import Call

_PLAIN = frozenset((torch.Tensor, nn.Parameter))
_SCALARS = frozenset((bool, int, float, str, type(None)))
_is_grad_enabled = torch.is_grad_enabled

Kind = tuple[Any, ...]


def settings() -> Kind:
    """Torch's settings that say what a call computes."""
    return float32_settings(), torch.get_default_dtype()


def kind_of(call: Call, device: int, *, pads: bool) -> Kind | str:
    """What a graph on a device is made for, or why there is none for such a call.

    Args:
        pads: whether a call of one tensor is to be padded, which is then noted in it.
    """
    parts: list[Any] = [*settings(), *call.named]
    for x in (*call.inputs, *call.named.values()):
        if type(x) in _PLAIN:
            if x.get_device() != device or x.layout is not torch.strided:
                return "an input is on another device, or sparse"
            if x.requires_grad and _is_grad_enabled():
                return "an input needs a gradient"
            if pads and len(call.tensors) == 1 and _can_be_padded(x):
                call.samples = 1 << (len(x) - 1).bit_length()
                parts += x.dtype, "padded", call.samples, x.shape[1:], x.is_contiguous()
            else:
                parts += x.dtype, x.shape, x.stride()
        elif type(x) in _SCALARS:
            parts += type(x), x
        else:
            return "an input is neither a tensor nor a number"
    if not call.tensors:
        return "no input is a tensor"
    return tuple(parts)


def like(x: torch.Tensor, stream: int) -> Kind:
    """What tells the calls of a network on one tensor apart, besides what :func:`settings` and :func:`is_plain` say."""
    return stream, x.get_device(), x.dtype, x.shape, x.stride()


def is_plain(x: torch.Tensor) -> bool:
    """Whether a tensor's bytes are its numbers, and no gradient of it is wanted."""
    return not (x.is_neg() or x.is_conj() or (x.requires_grad and _is_grad_enabled()))


def _can_be_padded(x: torch.Tensor) -> bool:
    if not x.ndim or not len(x):
        return False
    return x.is_contiguous() or (x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last))
