"""Average pooling, of windows and of whole planes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from escort.cuda.compiler import Variant
from escort.cuda.kernel import NATIVE_CAPABILITY
from escort.cuda.params import Divisor, pack
from escort.layers.observed import PLAIN, is_observed
from escort.layers.planes.base import MOST, THREADS, OnPlanes, Planes, Work
from escort.layers.pool import pair, pooled_size

_MOST_LOG_PARTS = 6  # of a block, which then still reads 64 bytes of a pixel in channels_last
_MOST_LOG_CLUSTER = 3
_LANES = 32
_RESIDENT = 1024, 512  # threads of a multiprocessor, below which more share a window, and blocks as well
_MOST_AT_ONCE = 9  # pixels of a window whose loads are issued together
_LOG_WARPS = 3  # of a block that averages whole planes
_MEAN_VECTORS, _MEAN_WARPS = 4, 24  # of a warp; of a multiprocessor, below which more share a plane
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
        log_cluster: how many blocks do, as a power of two.
        by_pixel, by_out_width, by_out_height: divide by the vectors of a pixel and by these.
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
    down: int
    right: int
    top: int
    left: int
    counts_padding: bool
    divisor: int
    log_parts: int
    log_cluster: int
    by_pixel: Divisor
    by_out_width: Divisor
    by_out_height: Divisor


@dataclass(frozen=True)
class MeanParams:
    """Those of the kernel for whole planes in channels_last: the fields of its struct, in their order.

    Attributes:
        channels: of x and y.
        pixels: of a plane.
        groups: of four vectors of channels, in all samples.
        sample_groups: those of a sample.
        log_warps: how many warps of a block share a group's pixels, as a power of two.
        log_cluster: how many blocks do, as a power of two.
        share: of the sum that is the mean.
        by_sample: divides by `sample_groups`.
    """

    channels: int
    pixels: int
    groups: int
    sample_groups: int
    log_warps: int
    log_cluster: int
    share: float
    by_sample: Divisor


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
        (down, right), (top, left), divisor = stride, padding, divisor or 0
        if x.is_last and kernel_size == x.shape[2:] and padding == (0, 0):
            return _mean(x, divisor)
        params = _params(x, (size[0], size[1]), kernel_size)
        params = replace(params, is_adaptive=False, down=down, right=right, top=top, left=left, divisor=divisor)
        return _work(x, replace(params, counts_padding=bool(counts_padding)))


class AdaptiveAvgPool2d(OnPlanes, nn.AdaptiveAvgPool2d):
    """torch's, on a GPU by kernels/cuda/average_pool.cu.

    Attributes:
        aliases: whether x itself is returned where it has the pooled size: then nothing else may read it.
    """

    def __init__(self, output_size: int | tuple[int | None, int | None] | None, aliases: bool = False) -> None:
        super().__init__(output_size)
        self.aliases = aliases

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # type: ignore[override]  # noqa: A002
        if self.aliases and input.ndim == 4 and not is_observed() and type(input) in PLAIN:
            sizes = zip(self.settings(), input.shape[2:], strict=True)
            if all(wanted in (None, own) for wanted, own in sizes):
                return input
        result: torch.Tensor = super().forward(input)
        return result

    def settings(self) -> tuple[Any, ...]:
        size = self.output_size
        return (size, size) if size is None or isinstance(size, int) else tuple(size)

    @staticmethod
    def work(settings: tuple[Any, ...], x: Planes, *others: Planes) -> Work | None:
        size = [own if wanted is None else wanted for wanted, own in zip(settings, x.shape[2:], strict=True)]
        if min(size) < 1 or any((out + 1) * own > MOST for out, own in zip(size, x.shape[2:], strict=True)):
            return None
        if x.is_last and size == [1, 1]:
            return _mean(x, 0)
        windows = [-(-own // out) + (own % out != 0) for out, own in zip(size, x.shape[2:], strict=True)]
        return _work(x, _params(x, (size[0], size[1]), (windows[0], windows[1])))


def _params(x: Planes, out_size: tuple[int, int], window: tuple[int, int]) -> Params:
    """Those of adaptive pooling, by windows of this size at most."""
    samples, channels, height, width = x.shape
    vectors, pitch = samples * channels * out_size[0] * out_size[1] // _vector(x), channels if x.is_last else 1
    return Params(
        *(vectors, pitch, height, width, *out_size, True, *window),
        *(1, 1, 0, 0, False, 0, 0, 0),
        *map(Divisor.of, (pitch // _vector(x), out_size[1], out_size[0])),
    )


def _vector(x: Planes) -> int:
    return x.vector(x.shape[1]) if x.is_last else 1


def _work(x: Planes, params: Params) -> Work | None:
    """The launch, once it is settled how many threads share a window."""
    if params.vectors > MOST:
        return None
    area, gpu = min(params.rows, params.height) * min(params.columns, params.width), x.gpu
    log_parts, log_cluster = 0, 0
    while log_parts < _MOST_LOG_PARTS and 4 << log_parts <= area:
        is_enough = params.vectors << log_parts >= gpu.multiprocessors * _RESIDENT[0]
        # In NCHW neighbouring threads read neighbouring pixels of a large window.
        if is_enough and (x.is_last or area < 2 * _LANES or 1 << log_parts >= _LANES):
            break
        log_parts += 1
    while (
        gpu.capability >= NATIVE_CAPABILITY
        and log_cluster < _MOST_LOG_CLUSTER
        and params.vectors << log_parts + log_cluster < gpu.multiprocessors * _RESIDENT[1]
        and area >> 1 + log_cluster + log_parts >= _LEAST_SHARE
    ):
        log_cluster += 1
    params = replace(params, log_parts=log_parts, log_cluster=log_cluster)
    grid = -(-params.vectors // (THREADS >> log_parts)) << log_cluster, 1, 1
    out_shape = *x.shape[:2], params.out_height, params.out_width
    is_small = not (params.is_adaptive or log_parts or log_cluster) and params.rows * params.columns <= _MOST_AT_ONCE
    variant = average_kernel(x.dtype, _vector(x), (params.rows, params.columns) if is_small else (0, 0))
    return Work(variant, ((grid, (pack(params),)),), out_shape, _vector(x) * x.dtype.itemsize, cluster=1 << log_cluster)


def _mean(x: Planes, divisor: int) -> Work | None:
    """The launch for whole planes in channels_last; `divisor` is 0 for their size."""
    samples, channels, height, width = x.shape
    pixels, gpu, sample_groups = height * width, x.gpu, -(-channels // (_MEAN_VECTORS * _vector(x)))
    groups, step = samples * sample_groups, _LANES // _MEAN_VECTORS
    if groups > MOST or pixels > MOST // 2:
        return None
    wanted, log_warps, log_cluster = gpu.multiprocessors * _MEAN_WARPS, 0, 0
    while log_warps < _LOG_WARPS and groups << log_warps < wanted and pixels > 2 * step << log_warps:
        log_warps += 1
    while (
        gpu.capability >= NATIVE_CAPABILITY
        and log_cluster < _MOST_LOG_CLUSTER
        and groups << log_warps + log_cluster < wanted
        and pixels >= _LEAST_SHARE * step << log_warps + log_cluster
    ):
        log_cluster += 1
    share = 1.0 / (divisor or pixels)
    params = MeanParams(
        channels, pixels, groups, sample_groups, log_warps, log_cluster, share, Divisor.of(sample_groups)
    )
    grid = -(-groups // (1 << _LOG_WARPS - log_warps)) << log_cluster, 1, 1
    variant, out_shape = mean_kernel(x.dtype, _vector(x)), (samples, channels, 1, 1)
    alignment = _vector(x) * x.dtype.itemsize
    return Work(variant, ((grid, (pack(params),)),), out_shape, alignment, cluster=1 << log_cluster)


def mean_kernel(dtype: torch.dtype, vector: int) -> Variant:
    """The kernel for whole planes in channels_last, so many channels at once."""
    return Variant("mean.cu", Planes.macros(dtype, vector))


def average_kernel(dtype: torch.dtype, vector: int, window: tuple[int, int]) -> Variant:
    """The kernel that averages elements of a type, so many channels at once, in small windows or (0, 0) in any."""
    return Variant("average_pool.cu", Planes.macros(dtype, vector) | {"ROWS": window[0], "COLUMNS": window[1]})
