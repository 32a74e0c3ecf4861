"""What a convolution module computes, found out by running it if its forward is its own, and what replaces it."""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd

from escort.layers import SamePad
from escort.reference import ERROR_BOUND, compare
from escort.runtime.stand_in import has_hooks, is_patched

#: Like torch's own class of convolution, or like it on an input padded as TensorFlow's "same" says.
Behaviour = Literal["plain", "same"]

_TYPES = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)


def own_type(module: nn.Module | None) -> type[Any]:
    """Torch's own class of a convolution, which may be a subclass of it; the type of anything else."""
    return next((cls for cls in _TYPES if isinstance(module, cls)), type(module))


def overrides(conv: nn.Module) -> bool:
    """Whether the class of a convolution computes by code of its own."""
    cls, own = type(conv), own_type(conv)
    names = ("forward", "_conv_forward", "_output_padding")
    return any(getattr(cls, name, None) is not getattr(own, name, None) for name in names)


def unsupported(conv: nn.Module) -> str | None:
    """Why this convolution cannot be replaced by a :class:`FusedConv2d`, or None."""
    if not isinstance(conv, nn.modules.conv._ConvNd):
        return f"{type(conv).__name__} is no convolution"
    reason = _other_than_plain(conv)
    if is_patched(conv):
        return f"code of its own is called instead of the forward of {type(conv).__name__}"
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


def remade(conv: Any, padding: Any = None, padding_mode: str = "zeros") -> Any:
    """A convolution of torch's own class with the weights and the geometry of `conv`, but for its padding."""
    transposed = {"output_padding": conv.output_padding} if conv.transposed else {}
    made = own_type(conv)(
        *(conv.in_channels, conv.out_channels, tuple(conv.kernel_size), tuple(conv.stride)),
        padding=conv.padding if padding is None else padding,
        dilation=tuple(conv.dilation),
        groups=conv.groups,
        padding_mode=padding_mode,
        device="meta",
        **transposed,
    )
    made.weight, made.bias = conv.weight, conv.bias
    return made.eval()


def is_leaf(module: nn.Module) -> bool:
    """Whether tracing shall call a module as it is: a convolution with a forward of its own that is understood by what
    it computes, or that cannot be traced.
    """
    if not isinstance(module, _ConvNd) or not overrides(module):
        return False
    if behaviour(module) is not None:
        return True
    try:
        fx.symbolic_trace(copy.deepcopy(module))
    except Exception:  # a module's forward may raise anything
        return True
    return False


def behaviour(conv: nn.Module) -> Behaviour | None:
    """What a convolution with a forward of its own computes, or None where it computes something else.

    Copies of it run on random inputs of several sizes, with its own weights and with random ones.
    """
    assert isinstance(conv, _ConvNd)
    tested = _on_cpu(conv)
    randomised = copy.deepcopy(tested)
    _randomise(randomised)
    candidates: tuple[Behaviour, ...] = ("plain", "same")
    for candidate in candidates:
        if all(_computes(copy.deepcopy(one), candidate) for one in (randomised, tested)):
            return candidate
    return None


def standardises(conv: nn.Module) -> bool:
    """Whether what a convolution computes does not depend on how large its weights are."""
    once = _on_cpu(conv)
    _randomise(once)
    times_16 = copy.deepcopy(once)
    with torch.no_grad():
        times_16.weight.mul_(16.0)
        x = _inputs(conv)[0]
        try:
            first, second = once(x), times_16(x)
        except Exception:  # a module's forward may raise anything
            return False
        return bool(first.any()) and torch.allclose(first, second, rtol=1e-3)


def _computes(conv: Any, candidate: Behaviour) -> bool:
    """Whether a copy of a convolution computes what a candidate for its behaviour does."""
    expected: nn.Module
    if candidate == "plain":
        expected = remade(conv, padding_mode=conv.padding_mode)
    elif conv.transposed:
        return False
    else:
        expected = nn.Sequential(SamePad(conv.kernel_size, conv.stride, conv.dilation), remade(conv, padding=0))
    try:
        with torch.no_grad():
            return all(_agree(conv(x), expected(x)) for x in _inputs(conv))
    except Exception:  # a module's forward may raise anything
        return False


def _agree(a: Any, b: Tensor) -> bool:
    return isinstance(a, Tensor) and a.shape == b.shape and compare(a, b) < ERROR_BOUND["fp32"]


def _inputs(conv: Any) -> list[Tensor]:
    """Random inputs of sizes that leave every remainder modulo a small stride, one of them of large numbers."""
    spans = [(size - 1) * step + 1 for size, step in zip(conv.kernel_size, conv.dilation, strict=True)]
    generator = torch.Generator().manual_seed(0)
    inputs = []
    for added, scale in ((0, 1.0), (1, 1.0), (2, 100.0), (3, 1.0)):
        sizes = [span + (added + 2 * axis) % 5 for axis, span in enumerate(spans)]
        shape = 2, conv.in_channels, *sizes
        inputs.append(scale * torch.randn(shape, generator=generator))
    return inputs


def _on_cpu(conv: nn.Module) -> Any:
    copied = copy.deepcopy(conv).cpu().float().eval()
    copied._forward_hooks.clear()
    copied._forward_pre_hooks.clear()
    return copied


def _randomise(conv: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in (conv.weight, conv.bias):
            if isinstance(tensor, Tensor):
                tensor.copy_(torch.randn(tensor.shape, dtype=tensor.dtype, generator=generator))
