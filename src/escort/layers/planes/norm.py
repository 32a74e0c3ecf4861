"""Local response normalisation in one pass; torch's takes several, and in 16 bits rounds in between."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from escort.cuda.compiler import Variant
from escort.cuda.params import pack
from escort.layers.planes.base import MOST, MOST_ACROSS, THREADS, OnPlanes, Planes, Work

_MOST_SIZE = 16  # channels of a sum, which lie in registers
_PLANE_BYTES = 8  # most that a thread reads of a plane at once: it has that of several channels in registers
_WALKS = 32, 8  # most and least channels that a thread walks along
_RESIDENT = 2048  # threads of a multiprocessor


@dataclass(frozen=True)
class Params:
    """The kernel's parameters: the fields of its struct, in their order."""

    alpha: float
    beta: float
    k: float


class LocalResponseNorm(OnPlanes, nn.LocalResponseNorm):
    """torch's, on a GPU by kernels/cuda/local_response_norm.cu."""

    def settings(self) -> tuple[int, float, float, float]:
        return self.size, self.alpha, self.beta, self.k

    @staticmethod
    def work(settings: tuple[int, float, float, float], x: Planes, *others: Planes) -> Work | None:
        size, alpha, beta, k = settings
        samples, channels, *sizes = x.shape
        plane = sizes[0] * sizes[1]
        if type(size) is not int or not 1 <= size <= _MOST_SIZE:
            return None
        vector = x.vector(channels) if x.is_last else x.vector(plane, max(_PLANE_BYTES, x.dtype.itemsize))
        variant = local_response_kernel(x.dtype, vector, x.is_last, size)
        params = pack(Params(float(alpha) / size, float(beta), float(k)))
        alignment = vector * x.dtype.itemsize
        if x.is_last:
            vectors = samples * plane * channels // vector
            if vectors > MOST:
                return None
            launches = (((-(-vectors // THREADS), 1, 1), (vectors, channels, params)),)
            return Work(variant, launches, x.shape, alignment)
        walk, walks = _walk(channels, samples * plane // vector, x.gpu.multiprocessors)
        across = -(-plane // (vector * THREADS))
        if samples * walks > MOST or across > MOST_ACROSS:
            return None
        grid, args = (samples * walks, across, 1), (plane, channels, walk, walks, params)
        return Work(variant, ((grid, args),), x.shape, alignment)


def _walk(channels: int, threads: int, multiprocessors: int) -> tuple[int, int]:
    """How many channels a thread walks along, and how many such walks there are: few, but enough for all threads."""
    walk, least = _WALKS
    while walk > least and threads * -(-channels // walk) < multiprocessors * _RESIDENT:
        walk //= 2
    return walk, -(-channels // walk)


def local_response_kernel(dtype: torch.dtype, vector: int, is_last: bool, size: int) -> Variant:
    """The kernel for elements of a type, so many at once, and sums of so many channels."""
    macros = Planes.macros(dtype, vector) | {"LAST": int(is_last), "SIZE": size}
    return Variant("local_response_norm.cu", macros)
