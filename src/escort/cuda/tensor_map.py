"""Tensor maps, which describe tensors to a kernel's bulk copies (compute capability 9.0 or newer).

    boxes = tiled(torch.float16, (64, 56, 56, 1), (64, 58, 6, 1))     of x (N, 56, 56, 64), channels innermost
    taps = im2col(torch.float16, (64, 56, 56, 1), (-1, -1), (-1, -1), 64, 128)    3x3, padding 1: 128 pixels of any tap
    launch = kernel.bind(256, 0, (boxes, int))
    launch(grid, x, len(x))

Tensors are fp16, bf16 or float32 of four dimensions, given innermost first: channels, columns, rows, samples. What a
copy reads out of bounds is zero, and what it would write there is left out. A float32 is rounded as it is read, to the
nearest number of TF32, which is what tensor cores multiply, unless the map says that it stays what it is (`rounded`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from escort.cuda import _launch, driver

Four = tuple[int, int, int, int]

# Values of the driver's enumerations.
_TYPES = {torch.float16: 6, torch.bfloat16: 9, torch.float32: 11}
_FLOAT32 = 7
_SWIZZLES = {0: 0, 32: 1, 64: 2, 128: 3}
_PROMOTIONS = {0: 0, 64: 1, 128: 2, 256: 3}
_RULES = (
    "the address and the bytes of a copy's channels must be multiples of 16, no size may be 0, a box has at most "
    "256 along each dimension, channels have no more bytes than the swizzle, and corners are within -128 and 127"
)


@dataclass(frozen=True)
class TensorMap:
    """How the copy engine of a GPU sees the tensors of a kernel's launches. `tiled` and `im2col` make it.

    A kernel takes it (the driver's `CUtensorMap`) as `const __grid_constant__ T map`, where T has 128 bytes and is
    aligned to 64. Each launch makes it anew, for the tensor that it is given and its number of samples.

    Attributes:
        function: of the driver, which makes it.
        dtype: of the tensors.
        sizes: of a sample: channels, columns, rows, samples. A tensor has whole samples, one behind the other.
        samples_along: the dimension that grows with each sample.
        copied: what a copy brings, by the driver function's names.
        swizzle, promotion: as for `tiled`.
        pitch: elements from pixel to pixel, where those of the tensor have more channels than are mapped; else 0.
        begin: the first channel that is mapped.
        rounded: whether a float32 is rounded to TF32 as it is read.
    """

    function: str
    dtype: torch.dtype
    sizes: Four
    samples_along: int
    copied: Mapping[str, Any]
    swizzle: int
    promotion: int
    pitch: int = 0
    begin: int = 0
    rounded: bool = True

    def __post_init__(self) -> None:
        if self.dtype not in _TYPES:
            raise ValueError(f"a tensor map is of a tensor of {', '.join(map(str, _TYPES))}, not {self.dtype}")
        if self.swizzle not in _SWIZZLES or self.promotion not in _PROMOTIONS:
            raise ValueError(
                f"swizzle {self.swizzle} of {[*_SWIZZLES]}, promotion {self.promotion} of {[*_PROMOTIONS]}: choose one "
                "of these"
            )
        end, channels = self.begin + self.sizes[0], self.pitch or self.sizes[0]
        if end > channels:
            raise ValueError(f"of {channels} channels those from {self.begin} to {end} are not there")

    def encoder(self) -> _launch.TensorMap:
        """What makes it for the tensors of launches."""
        modes = _SWIZZLES[self.swizzle], _PROMOTIONS[self.promotion]
        is_exact = self.dtype == torch.float32 and not self.rounded
        x = _launch.Tensor(
            _FLOAT32 if is_exact else _TYPES[self.dtype],
            self.dtype.itemsize,
            self.sizes,
            self.samples_along,
            *modes,
            self.pitch or self.sizes[0],
            self.begin,
        )
        make = _launch.tiled if self.function == "cuTensorMapEncodeTiled" else _launch.im2col
        return make(driver.address(self.function), x, **self.copied)

    def error(self, kernel: str, x: torch.Tensor, status: Any) -> Exception:
        """The error for a tensor of which the driver makes no map: a ValueError where it finds a value wrong."""
        values = {"of samples of": self.sizes, **self.copied, "swizzle": self.swizzle}
        values |= {"pitch": self.pitch, "begin": self.begin} if self.pitch else {}
        described = ", ".join(f"{name} {value}" for name, value in values.items())
        what = f"{kernel}: a tensor map of {self.dtype} {tuple(x.shape)} at {x.data_ptr():#x}, {described}"
        error = driver.DriverError(self.function, status)
        if error.name == "CUDA_ERROR_INVALID_VALUE":
            return ValueError(f"{what}: {error.text}; {_RULES}")
        return error.of(what)


def tiled(
    dtype: torch.dtype,
    sizes: Four,
    box: Four,
    samples_along: int = 3,
    *,
    swizzle: int = 128,
    promotion: int = 256,
    rounded: bool = True,
) -> TensorMap:
    """A map for copies of boxes, either way (`cp.async.bulk.tensor.4d`).

    Args:
        dtype: of the tensors.
        sizes: channels, columns, rows and samples, of one sample.
        box: of a copy, each at most 256; with a swizzle its channels have at most so many bytes.
        samples_along: the dimension that grows with each sample; 1 where the pixels of all samples are one row.
        swizzle: 128: the number of each 16-byte chunk within a row of 128 bytes of shared memory is xored with the
            row's number modulo 8; 64 or 32: alike, in shorter rows; 0: chunks stay in order.
        promotion: bytes that the level-2 cache fetches at once: 0, 64, 128 or 256.
        rounded: whether a float32 is rounded to TF32 as it is read; not in a map through which tensors are written.

    Raises:
        ValueError: another type, swizzle or promotion.
    """
    return TensorMap(
        "cuTensorMapEncodeTiled", dtype, sizes, samples_along, {"box": box}, swizzle, promotion, rounded=rounded
    )


def im2col(
    dtype: torch.dtype,
    sizes: Four,
    lower: tuple[int, int],
    upper: tuple[int, int],
    channels: int,
    pixels: int,
    stride: int | tuple[int, int] = 1,
    *,
    swizzle: int = 128,
    promotion: int = 256,
) -> TensorMap:
    """A map for copies of what one tap of a filter reads for consecutive outputs (`cp.async.bulk.tensor.4d.im2col`).

    A copy starts at the first tap's (column, row, sample), goes on from output to output through rows and samples, and
    reads each at an offset (columns, rows), 0 to 255, which is an operand of the copy: dilation times the tap.

    Args:
        dtype, sizes, swizzle, promotion: as for `tiled`.
        lower: the (column, row) of the first output's first tap: the padding on the left and on top, negated.
        upper: how far beyond the last (column, row) of x an output's first tap may lie: the padding on the right and
            at the bottom, less dilation * (taps - 1). As `lower`, between -128 and 127.
        channels: of a copy, at most 256; with a swizzle at most so many bytes.
        pixels: of a copy, at most 1024.
        stride: of the convolution, or those of its (columns, rows), at most 8.

    Raises:
        ValueError: as for `tiled`.
    """
    right, down = (stride, stride) if isinstance(stride, int) else stride
    copied = {"lower": lower, "upper": upper, "channels": channels, "pixels": pixels, "steps": (1, right, down, 1)}
    return TensorMap("cuTensorMapEncodeIm2col", dtype, sizes, 3, copied, swizzle, promotion)
