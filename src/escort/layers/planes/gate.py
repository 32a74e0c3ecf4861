"""Gates: each channel of each sample times a number, as behind squeeze-excitation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from escort.cuda.compiler import Variant
from escort.cuda.params import Divisor, pack
from escort.layers.planes.base import MOST, THREADS, OnPlanes, Planes, Work


@dataclass(frozen=True)
class Params:
    """The kernel's parameters: the fields of its struct, in their order.

    Attributes:
        vectors: of x.
        row_vectors: those of a pixel's channels in channels_last, of a channel's pixels in NCHW.
        sample_vectors: those of a sample.
        by_row, by_sample: divide by these.
    """

    vectors: int
    row_vectors: int
    sample_vectors: int
    by_row: Divisor
    by_sample: Divisor


class _Product(nn.Module):
    def forward(self, x: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        return x * gates


class Gate(OnPlanes, _Product):
    """``x * gates`` for x (N, C, H, W) and gates (N, C, 1, 1), on a GPU by kernels/cuda/gate.cu."""

    def settings(self) -> tuple[()]:
        return ()

    @staticmethod
    def work(settings: tuple[()], x: Planes, *others: Planes) -> Work | None:
        (gates,) = others
        samples, channels, height, width = x.shape
        if gates.shape != (samples, channels, 1, 1):
            return None
        vector = x.vector(channels if x.is_last else height * width)
        row, sample = (channels if x.is_last else height * width) // vector, channels * height * width // vector
        if samples * sample > MOST:
            return None
        params = Params(samples * sample, row, sample, Divisor.of(row), Divisor.of(sample))
        variant = gate_kernel(x.dtype, vector, x.is_last)
        launch = (-(-params.vectors // THREADS), 1, 1), (pack(params),)
        return Work(variant, (launch,), x.shape, vector * x.dtype.itemsize, inputs=2)


def gate_kernel(dtype: torch.dtype, vector: int, is_last: bool) -> Variant:
    """The kernel for elements of a type, so many at once."""
    return Variant("gate.cu", Planes.macros(dtype, vector) | {"LAST": int(is_last)})
