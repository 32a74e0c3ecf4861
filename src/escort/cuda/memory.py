"""Memory for results on a GPU, in the least time of the host."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

#: What code that torch.compile makes allocates by: torch's allocator without its dispatcher, on the current device.
_quick = getattr(torch._C._dynamo.guards, "_empty_strided_cuda", None)

#: Given a shape and strides, plain tuples both, a tensor whose values are to be written.
Allocate = Callable[[tuple[int, ...], tuple[int, ...]], torch.Tensor]


def allocator(dtype: torch.dtype, device: torch.device) -> Allocate:
    """What allocates tensors of a type on a device, whichever is the current one."""
    plain = partial(torch.empty_strided, dtype=dtype, device=device)
    current = getattr(torch._C, "_cuda_getDevice", None)  # a torch for CPUs alone lacks it
    if _quick is None or current is None or device.index is None or device.type != "cuda":
        return plain
    quick, index = _quick, device.index

    def allocate(shape: tuple[int, ...], strides: tuple[int, ...]) -> torch.Tensor:
        result: torch.Tensor = quick(shape, strides, dtype) if current() == index else plain(shape, strides)
        return result

    return allocate
