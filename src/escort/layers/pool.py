"""Max pooling by kernels of our own: an operator of torch, for torch.compile and torch.export, and its module."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import nn

from escort.cuda import kernel
from escort.cuda.binary import Binary
from escort.cuda.compiler import Variant
from escort.cuda.memory import allocator
from escort.cuda.params import STORAGE, pack
from escort.kernels import _cpu
from escort.layers.observed import PLAIN, is_observed, is_profiled
from escort.layers.runners import check_not_capturing
from escort.methods.base import aligned
from escort.problem import TORCH_MEMORY_FORMAT, torch_name

_log = logging.getLogger(__name__)
Pair = tuple[int, ...]  # of two
Window = tuple[Pair, Pair, Pair, Pair]  # kernel_size, stride, padding and dilation

#: The types that max_pool2d takes on a GPU, in the order of the kernel's numbers for them.
POOLED_ON_GPU = (torch.float32, torch.float16, torch.bfloat16)
_THREADS, _MOST_VECTORS, _MOST_LAUNCHES = 256, 2**31 - 256, 1024

torch.library.define(
    "escort::max_pool2d",
    "(Tensor x, SymInt[2] kernel_size, SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, bool ceil_mode) "
    "-> Tensor",
)


def _max_pool2d_on_cpu(
    x: torch.Tensor, kernel_size: Pair, stride: Pair, padding: Pair, dilation: Pair, ceil_mode: bool
) -> torch.Tensor:
    _check_pool(x.shape, x.dtype, (torch.float32,), (kernel_size, stride, padding, dilation))
    x = x.contiguous()
    y = _empty_result(x, kernel_size, stride, padding, dilation, ceil_mode)
    window = kernel_size, stride, padding, dilation
    pool = _cpu.MaxPool2d(x.shape[1], x.shape[2:], y.shape[2:], window)
    pool.run(x.data_ptr(), y.data_ptr(), x.shape[0], torch.get_num_threads())
    return y


def _max_pool2d_on_gpu(
    x: torch.Tensor, kernel_size: Pair, stride: Pair, padding: Pair, dilation: Pair, ceil_mode: bool
) -> torch.Tensor:
    window = tuple(kernel_size), tuple(stride), tuple(padding), tuple(dilation)
    return _pooling(x.shape, x.dtype, x.device, _in_channels_last(x), window, ceil_mode)(x)


torch.library.impl("escort::max_pool2d", "CPU", _max_pool2d_on_cpu)
torch.library.impl("escort::max_pool2d", "CUDA", _max_pool2d_on_gpu)


@dataclass(frozen=True)
class Params:
    """The kernel's parameters that are the same in every launch: the fields of its struct, in their order."""

    down: int
    right: int
    top: int
    left: int
    dilation_down: int
    dilation_right: int


@lru_cache(_MOST_LAUNCHES)
def _pooling(
    shape: torch.Size,
    dtype: torch.dtype,
    device: torch.device,
    is_channels_last: bool,
    window: Window,
    ceil_mode: bool,
) -> Callable[[torch.Tensor], torch.Tensor]:
    """What pools tensors of a shape on a GPU: all that a call need not work out itself."""
    _check_pool(shape, dtype, POOLED_ON_GPU, window)
    memory_format = TORCH_MEMORY_FORMAT["channels_last" if is_channels_last else "contiguous"]
    size = pooled_size(shape, *window, ceil_mode)
    result = torch.empty((*shape[:2], *size), dtype=dtype, device="meta", memory_format=memory_format)
    out_shape, strides, allocate = tuple(result.shape), result.stride(), allocator(dtype, device)
    pitch = shape[1] if is_channels_last else 1
    vector = _vector(pitch, dtype)
    vectors, alignment = result.numel() // vector, vector * dtype.itemsize
    if vectors > _MOST_VECTORS:  # torch's has no such limit
        return lambda x: F.max_pool2d(x.contiguous(memory_format=memory_format), *window, ceil_mode)
    try:
        launch, grid = _pool_launch(device, dtype, vector, window), (-(-vectors // _THREADS), 1, 1)
    except ImportError as error:  # there is no compiler, and other kernels than this one are carried
        _log.warning("max pooling of %s on %s is run by torch: %s", tuple(shape), device, error)
        return lambda x: F.max_pool2d(x.contiguous(memory_format=memory_format), *window, ceil_mode)
    sizes = vectors, pitch, *shape[2:], *size

    def run(x: torch.Tensor) -> torch.Tensor:
        y = allocate(out_shape, strides)
        launch(grid, aligned(x.contiguous(memory_format=memory_format), alignment), y, *sizes)
        return y

    return run


def _vector(pitch: int, dtype: torch.dtype) -> int:
    """How many elements are accessed at once, where so many channels lie side by side."""
    return math.gcd(pitch, 16 // dtype.itemsize)


@lru_cache(_MOST_LAUNCHES)
def _pool_launch(device: torch.device, dtype: torch.dtype, vector: int, window: Window) -> Callable[..., None]:
    """The launch of kernels/cuda/max_pool.cu, compiled for a kernel_size and for accesses of `vector` elements."""
    check_not_capturing(device)
    params = pack(Params(*itertools.chain(*window[1:])))
    compiled = _pool_kernel(device, dtype, vector, window)
    return compiled.bind(_THREADS, 0, (torch.Tensor, torch.Tensor, *[int] * 6, params), overlap=True)


def _pool_kernel(device: torch.device, dtype: torch.dtype, vector: int, window: Window) -> kernel.Kernel:
    variant = pooling_kernel(dtype, vector, window[0])
    return kernel.kernel(variant.source, variant.defines, device)


def pooling_kernel(dtype: torch.dtype, vector: int, kernel_size: Pair) -> Variant:
    """The kernel that pools tensors of a type, so many elements at once, in windows of so many rows and columns."""
    rows, columns = kernel_size
    macros = {"STORAGE": STORAGE[dtype], "VECTOR": vector, "ROWS": rows, "COLUMNS": columns}
    return Variant("max_pool.cu", macros)


@torch.compiler.assume_constant_result
def pools(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether max_pool2d takes tensors of a type on a device.

    A GPU may be too old, or what compiles for it not installed.
    """
    if device.type != "cuda":
        return device.type == "cpu" and dtype is torch.float32
    return dtype in POOLED_ON_GPU and _has_kernels(device)


def _has_kernels(device: torch.device) -> bool:
    """Whether kernels can be had for a GPU. What once could stays so; what could not may come with a saved network."""
    if device not in _served and kernel.unavailable(device) is None:
        _served.add(device)
    return device in _served


_served: set[torch.device] = set()


def _in_channels_last(x: torch.Tensor) -> bool:
    """Whether x is pooled in channels_last and the result lies so too; the CPU's kernel knows planes only."""
    return x.is_cuda and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def _check_pool(shape: torch.Size, dtype: torch.dtype, taken: Sequence[torch.dtype], window: Window) -> None:
    if len(shape) != 4 or dtype not in taken:
        names = " or ".join(map(torch_name, taken))
        raise ValueError(f"max_pool2d takes {names} (N, C, H, W), got {dtype} of shape {tuple(shape)}")
    kernel_size, stride, padding, dilation = window
    smallest = min(*kernel_size, *stride, *dilation)
    if smallest < 1 or any(not 0 <= 2 * p <= k for p, k in zip(padding, kernel_size, strict=True)):
        raise ValueError(
            f"max_pool2d takes positive sizes and padding of at most half the kernel, got kernel {kernel_size}, "
            f"stride {stride}, padding {padding}, dilation {dilation}"
        )


def pooled_size(
    shape: torch.Size, kernel_size: Pair, stride: Pair, padding: Pair, dilation: Pair, ceil_mode: bool
) -> list[int]:
    """Height and width of the result; sizes may be symbols."""
    size = []
    for i in (0, 1):
        reach = shape[2 + i] + 2 * padding[i] - dilation[i] * (kernel_size[i] - 1) - 1
        out = (reach + (stride[i] - 1 if ceil_mode else 0)) // stride[i] + 1
        # As in torch, a window that ceil_mode adds must start inside the map or its padding at the top or left.
        size.append(out - 1 if ceil_mode and (out - 1) * stride[i] >= shape[2 + i] + padding[i] else out)
    if min(size) < 1:
        raise ValueError(
            f"input {tuple(shape)} is smaller than the pooling window {kernel_size} with padding {padding}"
        )
    return size


@torch.library.register_fake("escort::max_pool2d")
def _empty_result(
    x: torch.Tensor, kernel_size: Pair, stride: Pair, padding: Pair, dilation: Pair, ceil_mode: bool
) -> torch.Tensor:
    """A tensor for the operator's result; sizes may be symbols."""
    size = pooled_size(x.shape, kernel_size, stride, padding, dilation, ceil_mode)
    memory_format = TORCH_MEMORY_FORMAT["channels_last" if _in_channels_last(x) else "contiguous"]
    return torch.empty((*x.shape[:2], *size), dtype=x.dtype, device=x.device, memory_format=memory_format)


max_pool2d: Callable[..., torch.Tensor] = torch.ops.escort.max_pool2d.default


class MaxPool2d(nn.MaxPool2d):
    """torch's max pooling, with kernels of our own for (N, C, H, W).

    They serve where torch's are slow: on the CPU in float32, where torch does not vectorise, and on GPUs, where torch
    writes the positions of the largest elements besides, eight bytes for each.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.ndim != 4 or not pools(x.device, x.dtype):
            return super().forward(x)
        window = self._window
        if is_observed() or is_profiled() or type(x) not in PLAIN or x.requires_grad or x.is_neg():
            return max_pool2d(x, *window, self.ceil_mode)
        return (_max_pool2d_on_gpu if x.is_cuda else _max_pool2d_on_cpu)(x, *window, self.ceil_mode)

    def binaries(self, x: torch.Tensor) -> tuple[Binary, ...]:
        """Those of the kernels that pool x on a GPU, none where torch's do."""
        if not x.is_cuda or x.ndim != 4 or not pools(x.device, x.dtype):
            return ()
        vector = _vector(x.shape[1] if _in_channels_last(x) else 1, x.dtype)
        return (_pool_kernel(x.device, x.dtype, vector, self._window).binary,)

    @property
    def _window(self) -> Window:
        return pair(self.kernel_size), pair(self.stride), pair(self.padding), pair(self.dilation)


def pair(value: int | tuple[int, ...]) -> tuple[int, int]:
    """A size given as one number or two."""
    return (value, value) if isinstance(value, int) else (value[0], value[1])
