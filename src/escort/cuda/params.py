"""A kernel's parameters as one struct, filled from a dataclass of the same names.

@dataclass(frozen=True)                      struct Params {
class Params:                                  int channels;
    channels: int                              float scale;
    scale: float                             };
                                             extern "C" __global__ void scale(const __grid_constant__ Params p)

launch = kernel.bind(256, 0, (pack(Params(3, 0.5)),))
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


#: How kernels number the types of elements: their macro STORAGE (kernels/cuda/elements.cuh).
STORAGE = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


@dataclass(frozen=True)
class Divisor:
    """Division by a constant as multiplication: ``n // divisor == (2 * n * magic >> 32) >> shift`` for n below 2^31.

    Kernels find the struct in kernels/cuda/divisor.cuh.
    """

    magic: int
    shift: int

    @classmethod
    def of(cls, divisor: int) -> Divisor:
        shift = (divisor - 1).bit_length()
        return cls(-(-(1 << (31 + shift)) // divisor), shift)


def pack(params: DataclassInstance) -> bytes:
    """The bytes of the C struct with the same fields in the same order, of which each takes four bytes.

    Args:
        params: of int (C's int or unsigned), bool (C's int), float (C's float) and dataclasses of these (C structs).

    Raises:
        TypeError: a field has another type, such as a number of numpy.
        ValueError: an integer does not fit 32 bits.
    """
    return b"".join(
        _packed(f"{type(params).__name__}.{field.name}", getattr(params, field.name)) for field in fields(params)
    )


def _packed(name: str, value: Any) -> bytes:
    if hasattr(value, "__dataclass_fields__"):
        return pack(value)
    if type(value) is float:
        return struct.pack("f", value)
    if type(value) not in (int, bool):
        raise TypeError(f"{name} is {value!r}; a kernel's struct holds int, bool, float and dataclasses of them")
    if not -(2**31) <= value < 2**32:
        raise ValueError(f"{name} is {value}, which does not fit 32 bits")
    return struct.pack("I", value & 0xFFFFFFFF)
