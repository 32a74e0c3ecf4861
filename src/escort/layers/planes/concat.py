"""Concatenation along the channels; in channels_last torch's copies element by element."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import nn

from escort.cuda.compiler import Variant
from escort.cuda.params import Divisor, pack
from escort.layers.planes.base import MOST, THREADS, OnPlanes, Planes, Work

_AT_ONCE = 8  # inputs that a launch takes
_LEAST_BYTES = 8  # that a thread copies; where so many are not aligned, torch's is as fast


@dataclass(frozen=True)
class Params:
    """The kernel's parameters: the fields of its struct, in their order. Channels are counted in vectors.

    Attributes:
        vectors: that are copied.
        slice: those of a pixel.
        pitch, offset: those of a pixel of y, and where the slice begins in them.
        by_slice: divides by the slice.
        end0 to end7: where each input ends in the slice, which missing ones end with.
    """

    vectors: int
    slice: int
    pitch: int
    offset: int
    by_slice: Divisor
    end0: int
    end1: int
    end2: int
    end3: int
    end4: int
    end5: int
    end6: int
    end7: int


class _Concat(nn.Module):
    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return torch.cat(inputs, 1)


class Concat(OnPlanes, _Concat):
    """``torch.cat(inputs, 1)``, for channels_last on a GPU by kernels/cuda/concat.cu."""

    def settings(self) -> tuple[()]:
        return ()

    @staticmethod
    def work(settings: tuple[()], x: Planes, *others: Planes) -> Work | None:
        channels = [each.shape[1] for each in (x, *others)]
        vector = x.vector(math.gcd(*channels))
        samples, _, *size = x.shape
        pixels, total = samples * math.prod(size), sum(channels)
        is_alike = all((each.shape[0], *each.shape[2:]) == (samples, *size) for each in others)
        if not is_alike or not x.is_last or vector * x.dtype.itemsize < _LEAST_BYTES or pixels * total > MOST:
            return None
        launches, offset = [], 0
        for begin in range(0, len(channels), _AT_ONCE):
            ends = [*itertools.accumulate(count // vector for count in channels[begin : begin + _AT_ONCE])]
            width = ends[-1]
            ends += [width] * (_AT_ONCE - len(ends))
            params = Params(pixels * width, width, total // vector, offset, Divisor.of(width), *ends)
            launches.append(((-(-params.vectors // THREADS), 1, 1), (pack(params),)))
            offset += width
        variant, out_shape = concat_kernel(x.dtype, vector), (samples, total, *size)
        return Work(variant, tuple(launches), out_shape, vector * x.dtype.itemsize, inputs=_AT_ONCE)


def concat_kernel(dtype: torch.dtype, vector: int) -> Variant:
    """The kernel for elements of a type, so many at once."""
    return Variant("concat.cu", {"BYTES": dtype.itemsize, "VECTOR": vector})
