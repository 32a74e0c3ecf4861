"""Hints for who pruned a model and converts one that is dense: masks that nothing applies, filters without zeros."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Collection

from torch import Tensor, nn

from escort.filter import SparseFilter

_log = logging.getLogger(__name__)
#: Layers whose forward computes with their weight as it is.
_PLAIN = (nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.Linear)


def check_masks(model: nn.Module) -> None:
    """Warns of layers that hold a mask and compute with weights that it would zero.

    Args:
        model: a plain copy, in which all that applies itself has been applied.
    """
    found = [(name, mask) for name, layer in model.named_modules() if (mask := _forgotten(layer)) is not None]
    if found:
        name, mask = found[0]
        layer = f"layer {name}" if name else "the model"
        more = f", and so are those of {len(found) - 1} more layers" if len(found) > 1 else ""
        warnings.warn(
            f"{layer}: its {mask} is not applied to its weight, which stays dense{more}; multiply the weight by it "
            "before you convert",
            stacklevel=4,  # whoever calls convert
        )


def check_zeros(filters: Collection[SparseFilter]) -> None:
    """Says where there is not a zero in the filters of a whole model."""
    if filters and all(each.sparsity == 0.0 for each in filters):
        _log.warning(
            "no filter of this model has a zero in it, and what is not pruned gains little: prune it, or, if you did, "
            "apply its masks and check that the weights were loaded (load_state_dict(..., strict=False) leaves "
            "weight_orig and weight_mask out)"
        )


def _forgotten(layer: nn.Module) -> str | None:
    """The name of a layer's mask that has zeros where its weight has none."""
    if type(layer) not in _PLAIN:
        return None
    weight = layer.weight
    tensors = {**layer._buffers, **layer._parameters, **vars(layer)}
    masks = {name: x for name, x in tensors.items() if "mask" in name and isinstance(x, Tensor)}
    masks = {name: mask for name, mask in masks.items() if mask.shape == weight.shape}
    return next((name for name, mask in masks.items() if bool(((mask == 0) & (weight != 0)).any())), None)
