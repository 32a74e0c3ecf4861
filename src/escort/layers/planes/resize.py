"""Maps made larger or smaller, by the nearest element or by means of four."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from escort.cuda.compiler import Variant
from escort.cuda.params import pack
from escort.layers.planes.base import MOST, THREADS, OnPlanes, Planes, Work

_MODES = ("nearest", "nearest-exact", "bilinear")


@dataclass(frozen=True)
class Params:
    """The kernel's parameters: the fields of its struct, in their order.

    Attributes:
        vectors: of y.
        pitch: elements from pixel to pixel: the channels in channels_last, 1 in NCHW.
        height, width, out_height, out_width: of x and y.
        is_linear: whether an output is a mean of four elements; else it is the nearest one.
        scale_down, scale_right: rows and columns of x for one of y.
        centre, shift: output i along an axis lies at ``(i + centre) * scale - shift`` of x.
    """

    vectors: int
    pitch: int
    height: int
    width: int
    out_height: int
    out_width: int
    is_linear: bool
    scale_down: float
    scale_right: float
    centre: float
    shift: float


class Upsample(OnPlanes, nn.Upsample):
    """torch's, on a GPU by kernels/cuda/resize.cu where it takes the nearest element or is bilinear."""

    def settings(self) -> tuple[Any, ...]:
        size, factor = (
            tuple(each) if isinstance(each, (tuple, list)) else each for each in (self.size, self.scale_factor)
        )
        return size, factor, self.mode, bool(self.align_corners), bool(self.recompute_scale_factor)

    @staticmethod
    def work(settings: tuple[Any, ...], x: Planes, *others: Planes) -> Work | None:
        size, factor, mode, aligns, recomputes = settings
        if mode not in _MODES or (size is None) is (factor is None):
            return None
        if size is None:
            factors = factor if isinstance(factor, tuple) else (factor, factor)
            out = [int(own * each) for own, each in zip(x.shape[2:], factors, strict=True)]
        else:
            factors, out = (None, None), list(size if isinstance(size, tuple) else (size, size))
        vector = x.vector(x.shape[1]) if x.is_last else 1
        vectors = x.shape[0] * x.shape[1] * out[0] * out[1] // vector
        if min(out) < 1 or vectors > MOST:
            return None
        down, right = (
            _scale(own, its_out, None if recomputes else each, aligns)
            for own, its_out, each in zip(x.shape[2:], out, factors, strict=True)
        )
        is_linear = mode == "bilinear"
        is_centred = mode == "nearest-exact" or (is_linear and not aligns)
        params = Params(
            vectors=vectors,
            pitch=x.shape[1] if x.is_last else 1,
            height=x.shape[2],
            width=x.shape[3],
            out_height=out[0],
            out_width=out[1],
            is_linear=is_linear,
            scale_down=down,
            scale_right=right,
            centre=0.5 if is_centred else 0.0,
            shift=0.5 if is_linear and is_centred else 0.0,
        )
        variant, out_shape = resize_kernel(x.dtype, vector), (*x.shape[:2], *out)
        launch = (-(-vectors // THREADS), 1, 1), (pack(params),)
        return Work(variant, (launch,), out_shape, vector * x.dtype.itemsize)


def _scale(size: int, out_size: int, factor: float | None, aligns: bool) -> float:
    """Elements of x for one of y along an axis, as torch counts them."""
    if aligns:
        return (size - 1) / (out_size - 1) if out_size > 1 else 0.0
    return size / out_size if factor is None else 1.0 / factor


def resize_kernel(dtype: torch.dtype, vector: int) -> Variant:
    """The kernel for elements of a type, so many channels at once."""
    return Variant("resize.cu", Planes.macros(dtype, vector))
