"""What conversion runs inside of: its device, the precision of torch's own operators, errors that say where."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from escort.methods.precision import float32_convolutions
from escort.problem import Precision


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Makes a GPU the current one, so that streams, graphs and memory are its own."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def dense_in(precision: Precision, device: torch.device) -> AbstractContextManager[Any]:
    """Lets torch's own convolutions on a GPU compute in that precision, whatever the process's setting."""
    return float32_convolutions(precision) if device.type == "cuda" else nullcontext()


def tf32_is_allowed() -> bool:
    """Whether torch's own convolutions may use TF32."""
    cudnn = torch.backends.cudnn
    return cudnn.conv.fp32_precision == "tf32" if hasattr(cudnn, "conv") else cudnn.allow_tf32


@contextmanager
def running_out(what: str) -> Iterator[None]:
    """Says what ran out of device memory, and lets go of the tensors that a traceback would keep alive."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        message = f"{what}: {str(error).partition('. GPU')[0]}; pass an example of a smaller batch"
        raise torch.OutOfMemoryError(message) from error.with_traceback(None)


@contextmanager
def naming(layer: str) -> Iterator[None]:
    """Says which layer a ValueError is about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"layer {layer}: {error}") from error
