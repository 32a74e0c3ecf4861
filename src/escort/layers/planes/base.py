"""How layers that stand between convolutions reach kernels of our own on a GPU.

A layer is a subclass of torch's that says which launch computes it. Whatever observes or transforms operators, and
whatever the kernels do not take, sees and gets torch's own.
"""

from __future__ import annotations

import logging
import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from escort.cuda import kernel
from escort.cuda.binary import Binary
from escort.cuda.compiler import Variant
from escort.cuda.gpu import Gpu
from escort.cuda.launch import Grid
from escort.cuda.memory import allocator
from escort.cuda.params import STORAGE
from escort.layers.observed import PLAIN, is_observed
from escort.layers.pool import pools
from escort.layers.runners import check_not_capturing
from escort.methods.base import aligned
from escort.problem import TORCH_MEMORY_FORMAT

_log = logging.getLogger(__name__)
THREADS = 256  # of a block
#: What 32 bits number, and how many blocks a grid has along its second axis.
MOST, MOST_ACROSS = 2**31 - THREADS, 65535
_MOST_LAUNCHES = 1024


@dataclass(frozen=True)
class Planes:
    """A tensor (N, C, H, W) on a GPU, without its memory.

    Attributes:
        is_last: whether it lies in channels_last; else in NCHW.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    is_last: bool

    @classmethod
    def of(cls, x: torch.Tensor) -> Planes:
        is_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        return cls(tuple(x.shape), x.dtype, x.device, is_last)

    @property
    def torch_memory_format(self) -> torch.memory_format:
        return TORCH_MEMORY_FORMAT["channels_last" if self.is_last else "contiguous"]

    @property
    def gpu(self) -> Gpu:
        return Gpu.of(str(self.device))

    def vector(self, neighbours: int, most_bytes: int = 16) -> int:
        """How many elements are accessed at once, where so many neighbours lie side by side and are aligned alike."""
        return math.gcd(neighbours, most_bytes // self.dtype.itemsize)

    @staticmethod
    def macros(dtype: torch.dtype, vector: int) -> dict[str, int | str]:
        """Those that every kernel has."""
        return {"STORAGE": STORAGE[dtype], "VECTOR": vector}


@dataclass(frozen=True)
class Work:
    """What a layer launches for its inputs.

    Attributes:
        variant: the kernel, whose first parameters are inputs and the result.
        launches: the grid of each launch, and its further arguments, of the same types in all.
        out_shape: of the result. Where it has the first input's dimensions it lies as that does.
        alignment: bytes of which the inputs' addresses must be multiples.
        inputs: how many inputs each launch takes, one after the other; null pointers stand for those that are missing.
        tables: how many of the layer's own tensors each launch takes behind the result.
        cluster: blocks of a cluster, of which the grids are multiples.
        shared_bytes: of dynamic shared memory of a block.
        threads: of a block.
    """

    variant: Variant
    launches: tuple[tuple[Grid, tuple[int | bytes | None, ...]], ...]
    out_shape: tuple[int, ...]
    alignment: int
    inputs: int = 1
    tables: int = 0
    cluster: int = 1
    shared_bytes: int = 0
    threads: int = THREADS


class OnPlanes(nn.Module):
    """A layer that a kernel of ours runs where it takes the inputs; in a class it stands before torch's layer."""

    @abstractmethod
    def settings(self) -> tuple[Any, ...]:
        """The numbers that the work depends on besides the inputs."""

    def tables(self) -> tuple[torch.Tensor, ...]:
        """The layer's own tensors that its kernel reads, of the inputs' type and on their device."""
        return ()

    def is_taken(self, x: torch.Tensor) -> bool:
        """Whether the kernel may read the layer's own tensors for such an input."""
        return all(
            (table.dtype, table.device) == (x.dtype, x.device)
            and table.is_contiguous()
            and not (table.requires_grad and torch.is_grad_enabled())
            for table in self.tables()
        )

    @staticmethod
    @abstractmethod
    def work(settings: Any, x: Planes, *others: Planes) -> Work | None:
        """What computes the layer for such inputs; None where torch does."""

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        if not is_observed() and all(map(_is_taken, inputs)) and self.is_taken(inputs[0]):
            run = _runner(self.work, self.settings(), *map(Planes.of, inputs))
            if run is not None:
                return run(inputs, self.tables())
        result: torch.Tensor = super().forward(*inputs)
        return result

    def binaries(self, *inputs: torch.Tensor) -> tuple[Binary, ...]:
        """Those of the kernels that run it on such inputs on a GPU, none where torch's do."""
        if not all(map(_is_taken, inputs)) or not self.is_taken(inputs[0]):
            return ()
        if (work := self.work(self.settings(), *map(Planes.of, inputs))) is None:
            return ()
        return (kernel.kernel(work.variant.source, work.variant.defines, inputs[0].device).binary,)


def _is_taken(x: torch.Tensor) -> bool:
    """Whether kernels may be handed a tensor's memory."""
    if type(x) not in PLAIN or not x.is_cuda or x.requires_grad or x.is_neg() or torch.is_autocast_enabled():
        return False
    return x.ndim == 4 and x.numel() > 0 and pools(x.device, x.dtype)


@lru_cache(_MOST_LAUNCHES)
def _runner(
    find_work: Callable[..., Work | None], settings: Any, x: Planes, *others: Planes
) -> Callable[[Sequence[torch.Tensor], Sequence[torch.Tensor]], torch.Tensor] | None:
    """What runs a layer of these settings on such inputs: all that a call need not work out. None where torch does."""
    work = find_work(settings, x, *others)
    if work is None or any((other.dtype, other.device) != (x.dtype, x.device) for other in others):
        return None
    check_not_capturing(x.device)
    try:
        compiled = kernel.kernel(work.variant.source, work.variant.defines, x.device)
    except ImportError as error:  # there is no compiler, and other kernels than this one are carried
        _log.warning("%s for %s on %s is run by torch: %s", find_work.__qualname__, x.shape, x.device, error)
        return None
    tensors = [torch.Tensor] * (work.inputs + 1 + work.tables)
    launches = [
        (compiled.bind(work.threads, work.shared_bytes, (*tensors, *args), overlap=True, cluster=work.cluster), grid)
        for grid, args in work.launches
    ]
    memory_format, alignment, taken = x.torch_memory_format, work.alignment, work.inputs
    out_shape = tuple(work.out_shape)
    out_format = memory_format if len(out_shape) == len(x.shape) else torch.contiguous_format
    strides = torch.empty(out_shape, device="meta", memory_format=out_format).stride()
    allocate = allocator(x.dtype, x.device)
    missing = [None] * (taken * len(launches) - 1 - len(others))

    def run(inputs: Sequence[torch.Tensor], tables: Sequence[torch.Tensor]) -> torch.Tensor:
        y = allocate(out_shape, strides)
        given = [*(aligned(each.contiguous(memory_format=memory_format), alignment) for each in inputs), *missing]
        for i, (launch, grid) in enumerate(launches):
            launch(grid, *given[i * taken : (i + 1) * taken], y, *tables)
        return y

    return run
