"""What a file says of a network besides its tensors, and why a network cannot be saved."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from escort.layers import LAUNCHING, SparseConv2d
from escort.runtime.program import Program, tensor_at
from escort.runtime.saved.builders import OWN, SPARSE, check_hooks, describe_layer, is_own
from escort.runtime.saved.errors import naming
from escort.runtime.saved.limits import MAX_STEPS
from escort.runtime.saved.notation import build_program, check_path, describe_program
from escort.runtime.saved.places import Places, joined
from escort.runtime.saved.rehearsal import rehearse

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
    """The programs of a network by path, and those that its graphs would make."""
    return {path: module for path, module in _parts(network) if isinstance(module, Program)}


def layers_in(network: nn.Module) -> dict[str, nn.Module]:
    """The layers of a network that a file describes, by path."""
    return {path: module for path, module in _parts(network) if not isinstance(module, Program)}


def _parts(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Programs, the layers that they call, and those layers that stand in the place of a model's own, each once."""
    seen: set[nn.Module] = set()

    def parts(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
        if module in seen:
            return
        seen.add(module)
        if isinstance(module, Program | fx.GraphModule):
            program = module if isinstance(module, Program) else Program.of(module)
            yield path, program
            for target in dict.fromkeys(step.target for step in program.listing.steps if step.kind == "layer"):
                layer = program.get_submodule(target)
                yield joined(path, target), layer
                if is_own(layer):
                    yield from inside(layer, joined(path, target))
        elif isinstance(module, (SparseConv2d, *LAUNCHING)):
            yield path, module
        else:
            yield from inside(module, path)

    def inside(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
        for name, inner in module.named_children():
            yield from parts(inner, joined(path, name))

    return parts(network, "")


def describe(network: nn.Module) -> Description:
    """Raises ValueError or TypeError naming the layer, step or tensor that cannot be saved, and the remedy."""
    programs = {}
    for path, program in programs_in(network).items():
        with _naming(path):
            programs[path] = describe_program(program)
    modules, layers = layers_in(network), {}
    for name, module in network.named_modules():
        with naming(f"layer {name}") if name else nullcontext():
            check_hooks(module)
    for name, layer in modules.items():
        with naming(f"layer {name}"):
            check_path(name)
            layers[name] = _describe(layer)
    if len(layers) > MAX_STEPS:
        raise ValueError(f"a network of {len(layers)} layers cannot be saved: {MAX_STEPS} are the limit")
    Places(programs, modules).check()
    return Description(programs, layers)


def _describe(layer: nn.Module) -> dict[str, Any]:
    if isinstance(layer, SparseConv2d):
        return {"type": SPARSE}
    return dict(OWN) if is_own(layer) else describe_layer(layer)


def unsavable(network: nn.Module, device: torch.device, planned: Iterable[str] = ()) -> str | None:
    """Why a network cannot be saved, or None. Nothing is planned or run for it.

    Args:
        network: converted or not, a graph or not.
        device: where it runs.
        planned: the layers that will be converted, which a file describes then.
    """
    try:
        for name in planned:
            with naming(f"layer {name}"):
                check_path(name)
        description = describe(network)
        if not isinstance(network, Program | fx.GraphModule):  # whose file holds all tensors, those of no program too
            for name, tensor in network.state_dict(keep_vars=True).items():
                check_tensor(name, tensor)
        programs = programs_in(network)
        places = Places(programs, layers_in(network))
        for path, program in programs.items():
            with _naming(path):
                for name, tensor in tensors_in(program).items():
                    check_tensor(name, tensor)
                read = {joined(path, name): tensor for name, tensor in tensors_read(program).items()}
                rehearse(build_program(description.programs[path], places.owned(path, read.__getitem__)), device)
    except (ValueError, TypeError) as error:
        return str(error)
    return None


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
        raise ValueError(f"{name} holds NaN or infinity; use a finite number, such as torch.finfo(dtype).min")


def _naming(path: str) -> AbstractContextManager[None]:
    """Lets what goes wrong in a part of a model name the part."""
    return naming(f"part {path}") if path else nullcontext()
