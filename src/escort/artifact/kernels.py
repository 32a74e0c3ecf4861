"""The compiled kernels of a network in a file beside its own, for machines without a compiler.

Kernels are code that reads and writes a GPU's memory, and nothing can tell what they do there. So the file is read only
where a caller asks for it, and only the one that was saved with the network.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from escort.artifact.container import parse, parse_list
from escort.artifact.errors import ArtifactError, blaming
from escort.cuda import kernel
from escort.cuda.binary import Binary
from escort.cuda.compiler import dotted
from escort.layers import LAUNCHING, SparseConv2d
from escort.network.context import on_device
from escort.network.model import ConvertedModel
from escort.network.tracing.state import State
from escort.planner.cores import on_all_cores
from escort.runtime.saved.limits import MAX_HEADER_BYTES

FORMAT, VERSION = "escort-kernels", 1

_MOST_BYTES = 1 << 30
_MOST_KERNELS = 1 << 14
_REMEDY = "save the model with kernels=True again, by this version"
_log = logging.getLogger(__name__)


def beside(path: Path) -> Path:
    """The file of the kernels of the network in a file."""
    return path.with_name(f"{path.name}.kernels")


def digest(data: bytes) -> str:
    """What a network's file says of its kernels' file."""
    return hashlib.sha256(data).hexdigest()


def used_by(model: ConvertedModel, device: torch.device) -> list[Binary]:
    """The binaries of all kernels that a network on a GPU runs the input sizes of its plan by.

    Which ones run between convolutions is seen in a call, on random inputs. Where the inputs are packed nobody can make
    some, and those are left out.

    Raises:
        ValueError, RuntimeError: naming the layer that cannot be laid out.
    """
    layers = [module for module in model.network.modules() if isinstance(module, SparseConv2d)]
    found: list[Binary] = []
    on_all_cores([lambda layer=layer: found.extend(layer.binaries()) for layer in layers])  # type: ignore[misc]
    return [*{binary.key: binary for binary in (*found, *_between(model, device))}.values()]


def _between(model: ConvertedModel, device: torch.device) -> list[Binary]:
    network, example = model.network, model.plan.example(device)
    layers = [module for module in network.modules() if isinstance(module, LAUNCHING)]
    if not layers:
        return []
    if example is None:
        _log.warning("the kernels between convolutions are not saved: the network's inputs are packed")
        return []
    found: list[Binary] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert isinstance(module, LAUNCHING)
        found.extend(module.binaries(*args, *kwargs.values()))

    state = State(network)
    hooks = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layers]
    try:
        with torch.inference_mode(), on_device(device):
            example.run(network)
    finally:
        for hook in hooks:
            hook.remove()
        state.restore(network)
    return found


def pack(binaries: Iterable[Binary]) -> bytes:
    """The bytes of a file that holds these binaries. The same ones give the same bytes."""
    by_key = {binary.key: binary for binary in sorted(binaries, key=lambda binary: binary.key)}
    content = {
        "format": FORMAT,
        "version": VERSION,
        "kernels": [binary.describe() for binary in by_key.values()],
    }
    codes = {key: torch.frombuffer(bytearray(binary.cubin), dtype=torch.uint8) for key, binary in by_key.items()}
    # One text alone: safetensors writes several in random order.
    return safetensors.torch.save(codes, {"kernels": json.dumps(content, separators=(",", ":"), allow_nan=False)})


def read(path: Path, expected: str) -> list[Binary]:
    """The binaries in a file that :func:`pack` made.

    Args:
        expected: its digest.

    Raises:
        ArtifactError: naming the file, what is wrong and the remedy.
        OSError: where it cannot be read.
    """
    data = _read(path)
    if digest(data) != expected:
        raise ArtifactError(
            f"{path}: it is not the file of kernels that was saved with the network (its SHA-256 differs); copy both "
            "files anew, or save the model with kernels=True again"
        )
    with blaming(path, _REMEDY):
        if len(data) > _MOST_BYTES:
            raise ValueError(f"it has more than {_MOST_BYTES:,} bytes")
        size = int.from_bytes(data[:8], "little")
        if size > min(MAX_HEADER_BYTES, len(data) - 8):
            raise ValueError(f"its header of {size} bytes exceeds the limit of {MAX_HEADER_BYTES}, or the file")
        text = parse(data[8 : 8 + size].decode())["__metadata__"]["kernels"]
        descriptions = parse_list(text, "kernels", (FORMAT, VERSION), _MOST_KERNELS, "escort.save")
        codes = safetensors.torch.load(data)
        if sorted(codes) != sorted(str(description["key"]) for description in descriptions):
            raise ValueError("it does not hold the code of each kernel that it describes, once")
        return [Binary.of(description, _code(codes[description["key"]])) for description in descriptions]


def _code(tensor: torch.Tensor) -> bytes:
    if tensor.dtype is not torch.uint8 or tensor.ndim != 1:
        raise ValueError(f"code is a row of bytes, got {tensor.dtype} of shape {tuple(tensor.shape)}")
    return tensor.numpy().tobytes()


def _read(path: Path) -> bytes:
    """The content of a file, which a link may lead to; of what is none, such as a pipe, nothing is read."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # opening a pipe would wait for a writer
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError(f"{path} is not a file; name one that escort.save wrote beside the network's")
        with open(handle, "rb", closefd=False) as file:
            return file.read(_MOST_BYTES + 1)
    finally:
        os.close(handle)


def check_fit(path: Path, binaries: Sequence[Binary], device: torch.device) -> None:
    """Raises ArtifactError where a GPU or its driver cannot run the binaries of a file."""
    remedy = "load the network without kernels, or save it with kernels=True on a GPU like this one"
    arch, driver = kernel.arch(device), kernel.driver_version()
    if others := sorted({binary.arch for binary in binaries if binary.arch.rstrip("af") != arch}):
        raise ArtifactError(f"{path}: its kernels are for {', '.join(others)}, and {device} is {arch}; {remedy}")
    newest = max((binary.cuda for binary in binaries), default=(0, 0))
    if newest[0] > driver[0]:
        raise ArtifactError(
            f"{path}: its kernels are of CUDA {dotted(newest)}, and the driver supports CUDA {dotted(driver)}; update "
            "the driver, or load the network without kernels"
        )
