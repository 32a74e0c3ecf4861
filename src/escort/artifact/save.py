"""A converted model into one file: its program, compressed filters, other weights and plan, and no code."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from escort.arguments import path_of
from escort.artifact import kernels as carried
from escort.artifact.build import own_paths
from escort.artifact.container import pack
from escort.artifact.files import replace_file
from escort.layers import SparseConv2d
from escort.network.model import ConvertedModel
from escort.planner.machine import Machine
from escort.prune import listing
from escort.runtime import Program
from escort.runtime.saved.description import Description, describe, layers_in, programs_in, tensors_read, unsavable
from escort.runtime.saved.errors import naming
from escort.runtime.saved.places import Places, joined

FORMAT, VERSION = "escort", 3
_log = logging.getLogger(__name__)


def save(model: ConvertedModel, path: str | os.PathLike[str], *, kernels: bool = False) -> None:
    """Writes a converted model to one file: its program, compressed filters, other weights and plan, and no code.

    An older file of that name is replaced once the new one is complete, and stays if anything fails; a link stays a
    link, and the file's mode stays what it was. Where modules of the model could not be traced, the file does not hold
    their code, a warning in the log names them, and :func:`load` takes a new model besides. Whether a model
    can be saved is known before it is converted: its plan's `not_saved` says why not.

    Args:
        kernels: whether to write a second file beside it, `path` with `.kernels` behind: the compiled kernels that the
            network runs the input sizes of its plan by, for this type of GPU. With them, :func:`load` needs no
            compiler there.

    Raises:
        ValueError, TypeError: naming the layer that cannot be saved and the remedy.
        OSError: naming the path that cannot be written and the remedy.
    """
    if not isinstance(model, ConvertedModel):
        raise TypeError(f"save takes what escort.convert returned, got {type(model).__name__}; convert the model first")
    if reason := unsavable(model.network, _device(model)):
        raise ValueError(reason)
    description = describe(model.network)
    _check_as_planned(model)
    path, compiled = path_of(path, "model.escort"), _pack_kernels(model) if kernels else None
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "escort": Machine.here().escort,
        "architecture": _json({"layers": description.layers, "programs": description.programs}),
        # The error of a candidate that failed may be infinite, which JSON cannot say.
        "plan": _json(json.loads(json.dumps(model.plan.to_json()), parse_constant=lambda constant: None)),
    }
    if compiled is not None:
        metadata["kernels"] = carried.digest(compiled)
    data = pack(metadata, _tensors(model.network))
    if compiled is not None:
        _write(carried.beside(path), compiled)
    _write(path, data)
    _log.info("saved %s, %d bytes", path, len(data))
    if missing := _not_held(model.network, description):
        _log.warning(
            "%s does not hold the whole program, as %s could not be traced: load it into a new model of that class, by "
            "escort.load(path, model) or by --model on the command line",
            *(path, missing),
        )


def _not_held(network: nn.Module, description: Description) -> str:
    """What the file has no code of; empty where it holds all."""
    if "" not in description.programs:
        return f"the model, a {type(network).__name__},"
    own = [f"{path} ({type(network.get_submodule(path)).__name__})" for path in own_paths(description.layers)]
    return f"layer{'s' if len(own) > 1 else ''} {listing(own)}" if own else ""


def _pack_kernels(model: ConvertedModel) -> bytes:
    device = _device(model)
    if device.type != "cuda":
        raise ValueError("kernels are saved of networks on a GPU, this one is on the CPU; leave out kernels")
    return carried.pack(carried.used_by(model, device))


def _device(model: ConvertedModel) -> torch.device:
    tensors = (*model.network.parameters(), *model.network.buffers())
    return tensors[0].device if tensors else torch.device(model.plan.device)


def _check_as_planned(model: ConvertedModel) -> None:
    """Raises ValueError naming a layer that is no longer what its plan is for."""
    for name, layer in layers_in(model.network).items():
        if isinstance(layer, SparseConv2d):
            with naming(f"layer {name}"):
                planned = model.plan.layers[name].problem
                computed = layer.problem(planned.batch, planned.height, planned.width)
                if replace(computed, device=planned.device) != planned:
                    raise ValueError("it was changed after it was planned; convert the model again")


def _tensors(network: nn.Module) -> dict[str, Any]:
    """The tensors of the file by qualified name; a sparse convolution's filter is its weight."""
    state: dict[str, Any] = network.state_dict()
    layers, programs = layers_in(network), programs_in(network)
    if isinstance(network, Program):  # only what its steps refer to
        state = {key: value for key, value in state.items() if key.startswith(tuple(f"{name}." for name in layers))}
    again = Places(programs, layers).again(network, "")
    state = {key: value for key, value in state.items() if not key.startswith(again)}
    for path, program in programs.items():
        state |= {joined(path, name): tensor for name, tensor in tensors_read(program).items()}
    for name, layer in layers.items():
        if isinstance(layer, SparseConv2d):
            for buffer in ("values", "columns", "indptr"):
                del state[f"{name}.{buffer}"]
            state[f"{name}.weight"] = layer.filter
    return state


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def _write(path: Path, data: bytes) -> None:
    try:
        replace_file(path, lambda unfinished: unfinished.write_bytes(data))
    except OSError as error:
        remedy = f"name a file in a folder that exists and takes {len(data):,} bytes"
        raise type(error)(error.errno, f"cannot save: {error.strerror or error}; {remedy}", str(path)) from error
