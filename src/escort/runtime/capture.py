"""Which programs may be captured as CUDA graphs: those of which every step is known to do the same each time.

A replay runs no Python. What it computes may depend on the inputs' sizes, which a graph is made for, and on what lies
in memory, and on nothing else.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from escort.layers import SparseConv2d
from escort.runtime.effects import given, is_view, name_of, writes
from escort.runtime.program import Program, native_steps
from escort.runtime.saved.builders import LAYERS
from escort.runtime.stand_in import has_hooks, runs_more
from escort.runtime.steps import Step
from escort.runtime.templates import Slot, leaves, slots_in
from escort.runtime.watch import SWITCHED

#: They hold a state between calls, or look at their input to choose what to do.
_UNSURE_LAYERS = (nn.GRU, nn.LSTM, nn.RNN, nn.MultiheadAttention, nn.SyncBatchNorm)
_LAYERS = frozenset((*LAYERS.values(), SparseConv2d)) - frozenset(_UNSURE_LAYERS)
_FACTORIES = frozenset("arange full linspace ones scalar_tensor zeros".split())


def how_calls_run(network: nn.Module, *, is_on_gpu: bool) -> dict[str, Any]:
    """What a plan says of it: `not_captured` of calls on a GPU, `native_steps` and `not_native` of those on a CPU."""
    if is_on_gpu:
        return {"not_captured": not_capturable(network), "native_steps": 0, "not_native": {}}
    count, others = native_steps(network)
    return {"not_captured": None, "native_steps": count, "not_native": others}


def not_capturable(network: nn.Module) -> str | None:
    """Why calls of a network on a GPU cannot replay a CUDA graph; None where all that it does is known to be safe."""
    if not isinstance(network, Program):
        return "the model could not be traced as a whole"
    if has_hooks(network):
        return "the network has hooks"
    tensors = [*network.named_parameters(), *network.named_buffers()]
    device = tensors[0][1].device if tensors else torch.device("cuda")
    if elsewhere := next((name for name, tensor in tensors if tensor.device != device), None):
        return f"{elsewhere} is on another device than {tensors[0][0]}"
    reasons = (_unsafe(network, step, device) for step in network.listing.steps)
    return next(filter(None, reasons), None) or _written(network)


def _unsafe(network: Program, step: Step, device: torch.device) -> str | None:
    """Why a step is not known to do the same in each call."""
    if step.kind == "tensor":
        path, _, name = step.target.rpartition(".")
        owner = network.get_submodule(path)
        is_seen = name in owner._parameters or name in owner._buffers
        return None if is_seen else f"{step.target} is neither a parameter nor a buffer"
    if step.kind == "layer":
        layer = network.get_submodule(step.target)
        reason = next(filter(None, map(_unsafe_layer, layer.modules())), None)
        return None if reason is None else f"layer {step.target} {reason}"
    try:
        name = name_of(step)
    except ValueError:
        return f"what {step} does in a graph is not known"
    reason = _unsafe_call(name, step, device)
    return None if reason is None else f"{step} {reason}"


def _unsafe_layer(layer: nn.Module) -> str | None:
    if type(layer) not in _LAYERS:
        return f"is a {type(layer).__name__}, of which it is not known what it does in a graph"
    if runs_more(layer):
        return "runs code besides its own, such as a hook"
    if layer.training and isinstance(layer, SWITCHED):
        return "is in training mode"
    if isinstance(layer, nn.Embedding) and layer.max_norm is not None:
        return "writes to its weight"
    return None


def _unsafe_call(name: str, step: Step, device: torch.device) -> str | None:
    args, kwargs = step.args, step.kwargs
    values = [*leaves(args), *leaves(kwargs)]
    if "dropout" in name or (name == "scaled_dot_product_attention" and given(step, 4, "dropout_p", 0.0) != 0.0):
        return "draws random numbers"
    if name == "batch_norm" and given(step, 5, "training", True) is not False:
        return "may write to its statistics"
    if name == "instance_norm" and any(isinstance(value, Slot) for value in (*args[1:], *kwargs.values())):
        return "may write to its statistics"
    if name == "embedding" and given(step, 3, "max_norm", None) is not None:
        return "may write to its weight"
    if name == "cpu" or any(_is_elsewhere(value, device) for value in values):
        return "computes on another device"
    if name in _FACTORIES and kwargs.get("device") is None:
        return "makes a tensor on another device"
    if kwargs.get("non_blocking") or kwargs.get("pin_memory") or (name == "to" and True in values):
        return "may copy from another device"
    return None


def _is_elsewhere(value: Any, device: torch.device) -> bool:
    """Whether an argument names another device."""
    if isinstance(value, str) and value.startswith(("cpu", "cuda", "meta")):
        value = torch.device(value)
    return isinstance(value, torch.device) and (value.type != device.type or value.index not in (None, device.index))


def _written(network: Program) -> str | None:
    """Which step may write to an input of the network, or to a tensor that it holds, if one does."""
    lasting = [True] * len(network.listing.inputs)  # whether a value may share the memory of such a tensor
    for step in network.listing.steps:
        read = any(lasting[slot.number] for slot in slots_in((step.args, step.kwargs)))
        target = next(iter(slots_in((step.args, step.kwargs))), None)
        does_write = writes(network, step)
        if does_write and target is not None and lasting[target.number]:
            return f"{step} writes to an input or to what the network keeps"
        lasting.append(step.kind == "tensor" or (read and (does_write or is_view(network, step))))
    return None
