"""Tensor maps, which describe tensors to a kernel's bulk copies (compute capability 9.0 or newer).

    rows = tiled(x, (64, 56, 56, 32), (64, 58, 6, 1))          x is (32, 56, 56, 64), channels innermost
    taps = im2col(x, (64, 56, 56, 32), (-1, -1), (-1, -1), 64, 128)     3x3, padding 1: 128 pixels of any tap

Tensors are fp16, bf16 or float32 (mapped as TF32) of four dimensions, given innermost first: channels, columns, rows,
samples. What a copy reads out of bounds is zero, and what it would write there is left out. Maps are remembered by what
they are made from, the tensor's address included, so that asking again on every call costs little.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import torch

from escort.cuda import driver
from escort.cuda.launch import TensorMap, aligned_bytes

Four = tuple[int, int, int, int]

# Values of the driver's enumerations.
_TYPES = {torch.float16: 6, torch.bfloat16: 9, torch.float32: 11}
_SWIZZLES = {0: 0, 32: 1, 64: 2, 128: 3}
_PROMOTIONS = {0: 0, 64: 1, 128: 2, 256: 3}
_NOT_INTERLEAVED = _FILLED_WITH_ZEROS = 0
_BYTES = 128  # of a map
_DRIVER = 12000  # the CUDA whose version of the driver's functions is called
_RULES = (
    "address, strides and the bytes of a copy's channels must be multiples of 16, no size may be 0, a box has at most "
    "256 along each dimension, channels have no more bytes than the swizzle, and corners are within -128 and 127"
)


class _Tensor(NamedTuple):
    """What both kinds of maps are made from: the tensor in memory, and how copies bring it."""

    device: int
    dtype: torch.dtype
    address: int
    sizes: Four
    strides: tuple[int, int, int] | None
    swizzle: int
    promotion: int


def tiled(
    x: torch.Tensor,
    sizes: Four,
    box: Four,
    strides: tuple[int, int, int] | None = None,
    *,
    swizzle: int = 128,
    promotion: int = 256,
) -> TensorMap:
    """A map for copies of boxes, either way (`cp.async.bulk.tensor.4d`).

    Args:
        x: where the first element lies; its own shape does not matter.
        sizes: channels, columns, rows and samples.
        box: of a copy, each at most 256; with a swizzle its channels have at most so many bytes.
        strides: bytes from one column, row and sample to the next, multiples of 16; by default nothing lies between.
        swizzle: 128: the number of each 16-byte chunk within a row of 128 bytes of shared memory is xored with the
            row's number modulo 8; 64 or 32: alike, in shorter rows; 0: chunks stay in order.
        promotion: bytes that the level-2 cache fetches at once: 0, 64, 128 or 256.

    Raises:
        ValueError: x is on no GPU or of another type; or the driver refuses the values, which the error lists.
        RuntimeError: the driver failed.
    """
    tensor = _Tensor(x.get_device(), x.dtype, x.data_ptr(), sizes, strides, swizzle, promotion)
    return _encode("cuTensorMapEncodeTiled", tensor, box=box, steps=(1, 1, 1, 1))


def im2col(
    x: torch.Tensor,
    sizes: Four,
    lower: tuple[int, int],
    upper: tuple[int, int],
    channels: int,
    pixels: int,
    stride: int | tuple[int, int] = 1,
    strides: tuple[int, int, int] | None = None,
    *,
    swizzle: int = 128,
    promotion: int = 256,
) -> TensorMap:
    """A map for copies of what one tap of a filter reads for consecutive outputs (`cp.async.bulk.tensor.4d.im2col`).

    A copy starts at the first tap's (column, row, sample), goes on from output to output through rows and samples, and
    reads each at an offset (columns, rows), 0 to 255, which is an operand of the copy: dilation times the tap.

    Args:
        x, sizes, strides, swizzle, promotion: as for `tiled`.
        lower: the (column, row) of the first output's first tap: the padding on the left and on top, negated.
        upper: how far beyond the last (column, row) of x an output's first tap may lie: the padding on the right and
            at the bottom, less dilation * (taps - 1). As `lower`, between -128 and 127.
        channels: of a copy, at most 256; with a swizzle at most so many bytes.
        pixels: of a copy, at most 1024.
        stride: of the convolution, or those of its (columns, rows), at most 8.

    Raises:
        ValueError, RuntimeError: as for `tiled`.
    """
    right, down = (stride, stride) if isinstance(stride, int) else stride
    tensor = _Tensor(x.get_device(), x.dtype, x.data_ptr(), sizes, strides, swizzle, promotion)
    copied = {"lower": lower, "upper": upper, "channels": channels, "pixels": pixels, "steps": (1, right, down, 1)}
    return _encode("cuTensorMapEncodeIm2col", tensor, **copied)


# A map depends on nothing but these values, so that one may be used again for another tensor at the same address.
@lru_cache(maxsize=4096)
def _encode(function: str, tensor: _Tensor, **copied: int | tuple[int, ...]) -> TensorMap:
    """Asks the driver; `copied` is what its function takes between strides and interleaving, in that order."""
    device, dtype, address, sizes, strides, swizzle, promotion = tensor
    if device < 0:
        raise ValueError("a tensor map is made of a tensor on a GPU; move it there")
    if dtype not in _TYPES:
        raise ValueError(f"a tensor map is made of a tensor of {', '.join(map(str, _TYPES))}, not {dtype}")
    if swizzle not in _SWIZZLES or promotion not in _PROMOTIONS:
        raise ValueError(
            f"swizzle {swizzle} of {[*_SWIZZLES]}, promotion {promotion} of {[*_PROMOTIONS]}: choose one of these"
        )
    if strides is None:
        strides = (dtype.itemsize * sizes[0], dtype.itemsize * prod(sizes[:2]), dtype.itemsize * prod(sizes[:3]))
    values = {"sizes": sizes, "strides": strides, **copied, "swizzle": swizzle}
    described = ", ".join(f"{name} {value}" for name, value in values.items())
    args = (
        _TYPES[dtype],
        len(sizes),
        ctypes.c_void_p(address),
        (ctypes.c_uint64 * len(sizes))(*sizes),
        (ctypes.c_uint64 * len(strides))(*strides),
        *[(ctypes.c_int * len(part))(*part) if isinstance(part, tuple) else part for part in copied.values()],
        _NOT_INTERLEAVED,
        _SWIZZLES[swizzle],
        _PROMOTIONS[promotion],
        _FILLED_WITH_ZEROS,
    )
    return _ask(f"a tensor map of {dtype} at {address:#x}, {described}", device, function, args)


def _ask(what: str, device: int, function: str, args: tuple[Any, ...]) -> TensorMap:
    """The map that a function of the driver writes.

    Args:
        what: is described, for errors.
        device: the index of the GPU that has the tensor.
        function: such as "cuTensorMapEncodeTiled".
        args: what it takes behind the address of the map: C ints, and ctypes values for all else.

    Raises:
        ValueError: the driver finds a value that no tensor map may have.
        RuntimeError: the driver refused for another reason.
    """
    encoded = aligned_bytes(_BYTES)
    with driver.device(device).current():
        # Called by its address: cuda.bindings lets the driver write to wherever Python allocates the map, which need
        # not be a multiple of 64 bytes, as the driver demands.
        address = driver.call("cuGetProcAddress", function.encode(), _DRIVER, 0)
        status = driver.api().CUresult(ctypes.CFUNCTYPE(ctypes.c_int)(address)(encoded, *args))
    if status:
        error = driver.DriverError(function, status)
        if error.name == "CUDA_ERROR_INVALID_VALUE":
            raise ValueError(f"{what}: {error.text}; {_RULES}")
        raise error.of(what)
    return TensorMap(encoded.raw)
