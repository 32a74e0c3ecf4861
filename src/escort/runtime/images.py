"""Images that a convolution normalises itself: two steps of a program on a GPU as one launch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from escort.layers import Images, SparseConv2d
from escort.layers.observed import is_profiled
from escort.runtime.steps import Listing
from escort.runtime.templates import Slot, slots_in

#: Where a layer is found in each call, as another may have taken its place: a table and a key.
Place = tuple[Any, Any]


def of_images(listing: Listing, layers: nn.Module) -> dict[int, int]:
    """The steps that are convolutions of images on a GPU: the number of each, and of the step that gives it the images.

    Nothing else reads these.
    """
    first = len(listing.inputs)
    readers: dict[int, int] = {}
    for template in (*((step.args, step.kwargs) for step in listing.steps), listing.output):
        for slot in slots_in(template):
            readers[slot.number] = readers.get(slot.number, 0) + 1
    found: dict[int, int] = {}
    for number, step in enumerate(listing.steps, first):
        if step.kind != "layer" or step.kwargs or len(step.args) != 1 or not isinstance(step.args[0], Slot):
            continue
        given = step.args[0].number
        source = listing.steps[given - first] if given >= first else None
        if source is None or source.kind != "layer" or source.kwargs or readers[given] > 1:
            continue
        conv, images = layers.get_submodule(step.target), layers.get_submodule(source.target)
        if isinstance(images, Images) and isinstance(conv, SparseConv2d) and conv.plan.problem.device_type == "cuda":
            found[number] = given
    return found


def pass_on(images: Tensor) -> Tensor:
    """What takes the place of the layer of images."""
    return images


class ConvOfImages:
    """What takes the place of the convolution: both layers, by one launch where nothing but a plain call sees them."""

    def __init__(self, images: Place, conv: Place) -> None:
        self._images, self._conv = images, conv

    def __call__(self, x: Tensor) -> Any:
        (layers, name), (convs, conv_name) = self._images, self._conv
        images, conv = layers[name], convs[conv_name]
        if (run := _runner(images, conv, x)) is not None:
            return run(x, images.factors)
        return conv(images(x))


def _runner(images: Any, conv: Any, x: Tensor) -> Any:
    """What computes both layers at once; None where it takes both, one after the other."""
    if type(images) is not Images or type(conv) is not SparseConv2d or _has_hooks(images) or _has_hooks(conv):
        return None
    if not isinstance(x, Tensor) or not images.is_taken(x) or is_profiled() or torch.is_autocast_enabled("cuda"):
        return None
    images.check(x)
    samples, *sizes = x.shape
    channels = sizes.pop(2 if images.channels_last else 0)
    if channels != conv.in_channels or images.frozen.dtype is not conv.plan.problem.storage:
        return None
    conv.follow()
    return conv.prepared((samples, channels, *sizes)).of_images(images.channels_last)


def _has_hooks(layer: nn.Module) -> bool:
    return bool(layer._forward_hooks or layer._forward_pre_hooks)
