"""What a file says of a network besides its tensors, and why a network cannot be saved."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from escort.layers import MaxPool2d, SparseConv2d
from escort.runtime.program import Program, tensor_at
from escort.runtime.saved.builders import SPARSE, describe_layer
from escort.runtime.saved.errors import naming
from escort.runtime.saved.limits import MAX_STEPS
from escort.runtime.saved.notation import build_program, check_path, describe_program
from escort.runtime.saved.rehearsal import rehearse
from escort.runtime.steps import Listing

#: The types of tensors that a file holds.
DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.bool),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64),
)


@dataclass(frozen=True)
class Description:
    """A network without its tensors.

    Attributes:
        programs: their listings, by path; the whole network's path is the empty text.
        layers: the layers of programs, and those outside of programs that stand in the place of a model's own, by path.
    """

    programs: dict[str, Any]
    layers: dict[str, Any]


def programs_in(network: nn.Module) -> dict[str, Program]:
    """The programs of a network by path, and those that its graphs would make. None lies within another."""
    programs: dict[str, Program] = {}
    for name, module in network.named_modules():
        is_inside = any(name.startswith(joined(path, "")) for path in programs)
        if isinstance(module, Program | fx.GraphModule) and not is_inside:
            programs[name] = module if isinstance(module, Program) else Program.of(module)
    return programs


def layers_in(network: nn.Module) -> dict[str, nn.Module]:
    """The layers of a network that a file describes, by path."""
    programs = programs_in(network)
    layers: dict[str, nn.Module] = {}
    for path, program in programs.items():
        for step in program.listing.steps:
            if step.kind == "layer":
                layers[joined(path, step.target)] = program.get_submodule(step.target)
    inside = tuple(joined(path, "") for path in programs)
    for name, module in network.named_modules():
        if isinstance(module, SparseConv2d | MaxPool2d) and not name.startswith(inside):
            layers[name] = module
    return layers


def joined(path: str, name: str) -> str:
    """The path of what has a name in the program of a path."""
    return f"{path}.{name}" if path else name


def describe(network: nn.Module) -> Description:
    """Raises ValueError or TypeError naming the layer, step or tensor that cannot be saved, and the remedy."""
    programs = {}
    for path, program in programs_in(network).items():
        with _naming(path):
            programs[path] = describe_program(program)
    layers = {}
    for name, layer in layers_in(network).items():
        with naming(f"layer {name}"):
            check_path(name)
            layers[name] = {"type": SPARSE} if isinstance(layer, SparseConv2d) else describe_layer(layer)
    if len(layers) > MAX_STEPS:
        raise ValueError(f"a network of {len(layers)} layers cannot be saved: {MAX_STEPS} are the limit")
    check_apart(layers)
    return Description(programs, layers)


def check_apart(layers: dict[str, Any]) -> None:
    """Raises ValueError where a layer lies within another."""
    for name in layers:
        parts = name.split(".")
        for outer in (".".join(parts[:i]) for i in range(1, len(parts))):
            if outer in layers:
                raise ValueError(f"layer {name} lies within the layer {outer}, which cannot be saved; call one of them")


def unsavable(network: nn.Module, device: torch.device) -> str | None:
    """Why a network cannot be saved, or None. Nothing is planned or run for it.

    Args:
        network: converted or not, a graph or not.
        device: where it runs.
    """
    try:
        description = describe(network)
        for path, program in programs_in(network).items():
            with _naming(path):
                for name, tensor in tensors_in(program).items():
                    check_tensor(name, tensor)
                rehearse(build_program(description.programs[path], _those_of(program)), device)
    except (ValueError, TypeError) as error:
        return str(error)
    return None


def _those_of(program: Program) -> Callable[[Listing], dict[str, Any]]:
    def owned(listing: Listing) -> dict[str, Any]:
        layers = {step.target: program.get_submodule(step.target) for step in listing.steps if step.kind == "layer"}
        return layers | tensors_read(program)

    return owned


def tensors_read(program: Program) -> dict[str, Any]:
    """The tensors that steps of a program read, by path."""
    return {step.target: tensor_at(program, step.target) for step in program.listing.steps if step.kind == "tensor"}


def tensors_in(program: Program) -> dict[str, Any]:
    """The tensors of a program by path: those of its layers, and those that its steps read."""
    return {**program.state_dict(keep_vars=True), **tensors_read(program)}


def check_tensor(name: str, tensor: Any) -> None:
    """Raises TypeError or ValueError for a tensor that no file holds."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}, not a tensor; make it a buffer of the model")
    if tensor.layout is not torch.strided or tensor.dtype not in DTYPES or tensor.is_meta:
        raise TypeError(
            f"{name} is a {tensor.dtype} tensor of layout {tensor.layout} on {tensor.device}; make it dense"
        )
    if not torch.isfinite(tensor).all():
        raise ValueError(f"{name} holds NaN or infinity")


def _naming(path: str) -> AbstractContextManager[None]:
    """Lets what goes wrong in a part of a model name the part."""
    return naming(f"part {path}") if path else nullcontext()
