"""Concatenation along the channels, and a batch norm behind it; in channels_last torch's copies element by element."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import nn

from escort.cuda.compiler import Variant
from escort.cuda.launch import Grid
from escort.cuda.params import Divisor, pack
from escort.layers.planes.base import MOST, THREADS, OnPlanes, Planes, Work
from escort.problem import Activation

_AT_ONCE, _TABLES = 8, 4  # inputs that a launch takes, and tensors of a norm
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
        epsilon: is added to variances, where channels are normalised.
        bound: of normalised channels: 0 none, 1 ReLU.
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
    epsilon: float = 0.0
    bound: int = 0


class _Concat(nn.Module):
    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return torch.cat(inputs, 1)


class Concat(OnPlanes, _Concat):
    """``torch.cat(inputs, 1)``, for channels_last on a GPU by kernels/cuda/concat.cu."""

    def settings(self) -> tuple[()]:
        return ()

    @staticmethod
    def work(settings: tuple[()], x: Planes, *others: Planes) -> Work | None:
        work = _work(x, *others)
        if work is None or not others:
            return None
        launches = tuple((grid, (*[None] * _TABLES, pack(params))) for grid, params in work.launches)
        return Work(concat_kernel(x.dtype, work.vector), launches, work.out_shape, work.alignment, inputs=_AT_ONCE)


class _NormedConcat(nn.BatchNorm2d):
    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        y = super().forward(inputs[0] if len(inputs) == 1 else torch.cat(inputs, 1))
        return torch.relu_(y) if self.activation == "relu" else y


class NormedConcat(OnPlanes, _NormedConcat):
    """``relu(batch_norm(torch.cat(inputs, 1)))`` in eval mode, for channels_last on a GPU by kernels/cuda/concat.cu.

    It has the arguments and tensors of :class:`torch.nn.BatchNorm2d`.

    Attributes:
        activation: "none" or "relu".
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        activation: Activation = "none",
    ) -> None:
        if not (affine and track_running_stats) or activation not in ("none", "relu"):
            raise ValueError(f"it is affine, has statistics and is followed by a ReLU or nothing, got {activation!r}")
        super().__init__(num_features, eps, momentum, affine, track_running_stats)
        self.activation = activation

    def settings(self) -> tuple[Any, ...]:
        return self.training, self.num_features, self.eps, self.activation

    def tables(self) -> tuple[torch.Tensor, ...]:
        tables = self.running_mean, self.running_var, self.weight, self.bias
        return tuple(table for table in tables if table is not None)

    @staticmethod
    def work(settings: tuple[Any, ...], x: Planes, *others: Planes) -> Work | None:
        is_training, channels, epsilon, activation = settings
        work = _work(x, *others)
        if work is None or is_training or work.out_shape[1] != channels:
            return None
        bound = int(activation == "relu")
        launches = tuple(
            (grid, (pack(replace(params, epsilon=epsilon, bound=bound)),)) for grid, params in work.launches
        )
        variant = concat_kernel(x.dtype, work.vector, norm=True)
        return Work(variant, launches, work.out_shape, work.alignment, inputs=_AT_ONCE, tables=_TABLES)


class _Slices(NamedTuple):
    """How inputs are copied: the grid and parameters of each launch."""

    launches: list[tuple[Grid, Params]]
    out_shape: tuple[int, ...]
    vector: int
    alignment: int


def _work(x: Planes, *others: Planes) -> _Slices | None:
    """None where torch joins them."""
    channels = [each.shape[1] for each in (x, *others)]
    vector = x.vector(math.gcd(*channels))
    samples, _, *size = x.shape
    pixels, total, alignment = samples * math.prod(size), sum(channels), vector * x.dtype.itemsize
    is_alike = all((each.shape[0], *each.shape[2:]) == (samples, *size) for each in others)
    if not is_alike or not x.is_last or alignment < _LEAST_BYTES or pixels * total > MOST:
        return None
    launches, offset = [], 0
    for begin in range(0, len(channels), _AT_ONCE):
        ends = [*itertools.accumulate(count // vector for count in channels[begin : begin + _AT_ONCE])]
        width = ends[-1]
        ends += [width] * (_AT_ONCE - len(ends))
        params = Params(pixels * width, width, total // vector, offset, Divisor.of(width), *ends)
        launches.append(((-(-params.vectors // THREADS), 1, 1), params))
        offset += width
    return _Slices(launches, (samples, total, *size), vector, alignment)


def concat_kernel(dtype: torch.dtype, vector: int, *, norm: bool = False) -> Variant:
    """The kernel for elements of a type, so many at once, which normalises or does not."""
    return Variant("concat.cu", Planes.macros(dtype, vector) | {"NORM": int(norm)})
