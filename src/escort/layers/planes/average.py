"""Average pooling, of windows and of whole planes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from escort.cuda.compiler import Variant
from escort.cuda.kernel import NATIVE_CAPABILITY
from escort.cuda.params import pack
from escort.layers.planes.base import MOST, THREADS, OnPlanes, Planes, Work
from escort.layers.pool import pair, pooled_size

_MOST_LOG_PARTS = 6  # of a block, which then still reads 64 bytes of a pixel in channels_last
_MOST_CLUSTER = 8
_LANES = 32
_RESIDENT = 1024, 512  # threads of a multiprocessor, below which more share a window, and blocks as well
_LEAST_SHARE = 8  # pixels of a window that a thread has before blocks share it


@dataclass(frozen=True)
class Params:
    """The kernel's parameters: the fields of its struct, in their order.

    Attributes:
        vectors: of y.
        pitch: elements from pixel to pixel: the channels in channels_last, 1 in NCHW.
        height, width, out_height, out_width: of x and y.
        is_adaptive: whether windows are as even shares of the map as there are outputs; else they have a size.
        rows, columns, down, right, top, left: their size, stride and padding.
        counts_padding: whether the padding counts in the average.
        divisor: what the sum is divided by; 0 for what the window counts.
        log_parts: how many threads of a block share a window, as a power of two.
        cluster: how many blocks do.
    """

    vectors: int
    pitch: int
    height: int
    width: int
    out_height: int
    out_width: int
    is_adaptive: bool
    rows: int
    columns: int
    down: int = 1
    right: int = 1
    top: int = 0
    left: int = 0
    counts_padding: bool = False
    divisor: int = 0
    log_parts: int = 0
    cluster: int = 1


class AvgPool2d(OnPlanes, nn.AvgPool2d):
    """torch's, on a GPU by kernels/cuda/average_pool.cu."""

    def settings(self) -> tuple[Any, ...]:
        window = pair(self.kernel_size), pair(self.stride), pair(self.padding)
        return *window, self.ceil_mode, self.count_include_pad, self.divisor_override

    @staticmethod
    def work(settings: tuple[Any, ...], x: Planes, *others: Planes) -> Work | None:
        kernel_size, stride, padding, ceil_mode, counts_padding, divisor = settings
        if min(*kernel_size, *stride) < 1 or any(
            not 0 <= 2 * p <= k for p, k in zip(padding, kernel_size, strict=True)
        ):
            return None  # torch says what is wrong
        try:
            size = pooled_size(torch.Size(x.shape), kernel_size, stride, padding, (1, 1), ceil_mode)
        except ValueError:
            return None
        params = _params(x, (size[0], size[1]), kernel_size)
        (down, right), (top, left), divisor = stride, padding, divisor or 0
        params = replace(params, is_adaptive=False, down=down, right=right, top=top, left=left, divisor=divisor)
        return _work(x, replace(params, counts_padding=bool(counts_padding)))


class AdaptiveAvgPool2d(OnPlanes, nn.AdaptiveAvgPool2d):
    """torch's, on a GPU by kernels/cuda/average_pool.cu."""

    def settings(self) -> tuple[Any, ...]:
        size = self.output_size
        return (size, size) if size is None or isinstance(size, int) else tuple(size)

    @staticmethod
    def work(settings: tuple[Any, ...], x: Planes, *others: Planes) -> Work | None:
        size = [own if wanted is None else wanted for wanted, own in zip(settings, x.shape[2:], strict=True)]
        if min(size) < 1 or any((out + 1) * own > MOST for out, own in zip(size, x.shape[2:], strict=True)):
            return None
        windows = [-(-own // out) + (own % out != 0) for out, own in zip(size, x.shape[2:], strict=True)]
        return _work(x, _params(x, (size[0], size[1]), (windows[0], windows[1])))


def _params(x: Planes, out_size: tuple[int, int], window: tuple[int, int]) -> Params:
    """Those of adaptive pooling, by windows of this size at most."""
    samples, channels, height, width = x.shape
    vectors = samples * channels * out_size[0] * out_size[1] // _vector(x)
    return Params(vectors, channels if x.is_last else 1, height, width, *out_size, True, *window)


def _vector(x: Planes) -> int:
    return x.vector(x.shape[1]) if x.is_last else 1


def _work(x: Planes, params: Params) -> Work | None:
    """The launch, once it is settled how many threads share a window."""
    if params.vectors > MOST:
        return None
    area, gpu = min(params.rows, params.height) * min(params.columns, params.width), x.gpu
    log_parts, cluster = 0, 1
    while log_parts < _MOST_LOG_PARTS and 4 << log_parts <= area:
        is_enough = params.vectors << log_parts >= gpu.multiprocessors * _RESIDENT[0]
        # In NCHW neighbouring threads read neighbouring pixels of a large window.
        if is_enough and (x.is_last or area < 2 * _LANES or 1 << log_parts >= _LANES):
            break
        log_parts += 1
    while (
        gpu.capability >= NATIVE_CAPABILITY
        and cluster < _MOST_CLUSTER
        and (params.vectors << log_parts) * cluster < gpu.multiprocessors * _RESIDENT[1]
        and area // (2 * cluster << log_parts) >= _LEAST_SHARE
    ):
        cluster *= 2
    params = replace(params, log_parts=log_parts, cluster=cluster)
    grid = -(-params.vectors // (THREADS >> log_parts)) * cluster, 1, 1
    out_shape = *x.shape[:2], params.out_height, params.out_width
    variant = average_kernel(x.dtype, _vector(x))
    return Work(variant, ((grid, (pack(params),)),), out_shape, _vector(x) * x.dtype.itemsize, cluster=cluster)


def average_kernel(dtype: torch.dtype, vector: int) -> Variant:
    """The kernel that averages elements of a type, so many channels at once."""
    return Variant("average_pool.cu", Planes.macros(dtype, vector))
