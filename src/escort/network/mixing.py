"""Whether samples of a batch can be computed apart, so that a CUDA graph may run with more than a call has."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from escort.layers import FusedConv2d, Images, MaxPool2d, OnPlanes, SamePad, SparseConv2d
from escort.runtime import Program
from escort.runtime.stand_in import runs_more
from escort.runtime.steps import REQUIRED, Step, spellings

# Modules and functions that treat each sample for itself, whatever their arguments.
_MODULES = (
    SparseConv2d,
    FusedConv2d,
    Images,
    MaxPool2d,
    SamePad,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool2d,
    nn.AvgPool2d,
    nn.BatchNorm2d,
    nn.Conv2d,
    nn.Dropout,
    nn.GELU,
    nn.Hardsigmoid,
    nn.Hardswish,
    nn.Identity,
    nn.LeakyReLU,
    nn.Linear,
    nn.LocalResponseNorm,
    nn.MaxPool2d,
    nn.PReLU,
    nn.ReLU,
    nn.ReLU6,
    nn.SiLU,
    nn.Sigmoid,
    nn.Tanh,
    nn.Upsample,
)
_FUNCTIONS = {
    F.adaptive_avg_pool2d,
    F.avg_pool2d,
    F.dropout,
    F.gelu,
    F.hardsigmoid,
    F.hardswish,
    F.interpolate,
    F.leaky_relu,
    F.local_response_norm,
    F.max_pool2d,
    F.relu,
    F.relu6,
    F.sigmoid,
    F.silu,
    operator.add,
    operator.iadd,
    operator.mul,
    torch.add,
    torch.mul,
    torch.pixel_shuffle,
    torch.relu,
    torch.sigmoid,
    torch.tanh,
    *(spelling for name in ("relu", "sigmoid", "tanh", "to", "contiguous") for spelling in spellings(name)),
}
_FLATTENS = (torch.flatten, *spellings("flatten"))
_MEANS = (torch.mean, *spellings("mean"))
_SPLITS = (torch.split, torch.chunk, *spellings("split"), *spellings("chunk"))


def mixing(network: nn.Module) -> str | None:
    """Why the samples of a batch cannot be run apart from each other, or None where they can."""
    if not isinstance(network, Program):
        return "the network could not be traced"
    if sum(given.fixed is REQUIRED for given in network.listing.inputs) != 1:
        return "the network takes several inputs"
    for step in network.listing.steps:
        if not _keeps_apart(network, step):
            return f"{step} may mix samples"
    return None


def _keeps_apart(network: Program, step: Step) -> bool:
    # Operands other than activations and plain numbers could carry a batch of their own.
    if step.kind == "tensor":
        return False
    if step.kind == "layer":
        module = network.get_submodule(step.target)
        if runs_more(module) or (isinstance(module, nn.BatchNorm2d) and module.running_mean is None):
            return False  # hooks may do anything, and such a norm computes with the statistics of the batch
        known = isinstance(module, OnPlanes) or type(module) in _MODULES
        return known or (type(module) is nn.Flatten and module.start_dim == 1)
    if step.target in _FLATTENS:
        return _argument(step, 1, "start_dim", 0) >= 1
    if step.target is torch.unflatten:
        return _argument(step, 1, "dim", 0) == 1
    if step.target is torch.permute:
        return _argument(step, 1, "dims", (1,))[0] == 0
    if step.target in _SPLITS:
        return _argument(step, 2, "dim", 0) >= 1
    if step.target is operator.getitem:
        index = _argument(step, 1, "index", None)
        return _is_of_split(network, step) or (isinstance(index, tuple) and index[0] == slice(None))
    if step.target in (torch.cat, torch.concat):
        return _argument(step, 1, "dim", 0) >= 1
    if step.target in _MEANS:
        dims = _argument(step, 1, "dim", 0)
        return all(dim > 0 for dim in (dims if isinstance(dims, (tuple, list)) else (dims,)))
    return step.target in _FUNCTIONS


def _is_of_split(network: Program, step: Step) -> bool:
    """Whether a step picks from what a split returned."""
    source = step.args[0].number - len(network.listing.inputs)
    return source >= 0 and network.listing.steps[source].target in _SPLITS


def _argument(step: Step, position: int, name: str, default: Any) -> Any:
    return step.args[position] if len(step.args) > position else step.kwargs.get(name, default)
