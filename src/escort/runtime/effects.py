"""What a step of a program does to memory, by the name of what it calls: whether it writes, and whether it views."""

from __future__ import annotations

from typing import Any, Protocol

from torch import nn

from escort.runtime.saved.operations import named
from escort.runtime.steps import Step

# What may give back its argument, or a view of it, among the operations that files may hold.
_VIEWS = frozenset(
    """
    T mT _to_copy alias bfloat16 bool broadcast_to channel_shuffle chunk contiguous detach double einsum expand
    expand_as flatten float getitem half int lift_fresh_copy long meshgrid movedim moveaxis narrow pad permute
    pixel_shuffle pixel_unshuffle pos ravel reshape reshape_as select slice split split_with_sizes squeeze swapaxes
    swapdims t to transpose type_as unbind unflatten unfold unsqueeze view view_as
    """.split()
)
_VIEWING_LAYERS = (
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout, nn.Identity),
    *(nn.Flatten, nn.Unflatten, nn.ChannelShuffle, nn.PixelShuffle, nn.PixelUnshuffle),
)
# What writes to its first argument besides those whose names say so, and what has an option to.
_WRITING = frozenset("iadd iand ifloordiv imod imul ior ipow isub itruediv ixor".split())
_NOT_WRITING = frozenset("and_ not_ or_".split())
_INPLACE = frozenset("celu elu hardsigmoid hardswish hardtanh leaky_relu mish relu relu6 selu silu threshold".split())


class Layers(Protocol):
    """The layers that steps call, by their paths: a network, or what remembers those of one."""

    def get_submodule(self, target: str) -> nn.Module: ...


def writes(network: Layers, step: Step) -> bool:
    """Whether a step writes to its first argument."""
    if step.kind == "layer":
        return bool(getattr(network.get_submodule(step.target), "inplace", False))
    if step.kind == "tensor":
        return False
    name = name_of(step)
    if name in _WRITING or (name.endswith("_") and name not in _NOT_WRITING):
        return True
    return name in _INPLACE and (step.kwargs.get("inplace") is True or True in step.args[1:])


def is_view(network: Layers, step: Step) -> bool:
    if step.kind == "layer":
        layer = network.get_submodule(step.target)
        return isinstance(layer, _VIEWING_LAYERS) or bool(getattr(layer, "aliases", False))
    return name_of(step) in _VIEWS


def name_of(step: Step) -> str:
    """The name of what a step calls, whichever of torch's modules it is called from. Raises ValueError for others."""
    parts = named(step)[0].split(".")
    return parts[3] if parts[:3] == ["torch", "ops", "aten"] else parts[-1]


def given(step: Step, position: int, name: str, default: Any) -> Any:
    return step.args[position] if len(step.args) > position else step.kwargs.get(name, default)
