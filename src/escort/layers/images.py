"""Images as decoders give them, normalised: the first layer of a network that takes bytes."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from escort.arguments import is_number
from escort.cuda import kernel
from escort.cuda.binary import Binary
from escort.cuda.compiler import Variant
from escort.cuda.launch import Grid
from escort.cuda.params import STORAGE, Divisor, pack
from escort.layers.observed import PLAIN, is_observed
from escort.layers.pool import pools
from escort.layers.runners import check_not_capturing

_THREADS, _MOST, _MOST_LAUNCHES = 256, 2**31 - 256, 256
_IN_A_ROW = 4  # pixels that a thread has at most
#: A number for each channel.
_Numbers = Sequence[float] | NDArray[Any] | torch.Tensor
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Params:
    """The kernel's parameters: the fields of its struct, in their order.

    Attributes:
        vectors, sample_vectors: of pixels, in all samples and in one.
        channels: of an image.
        in_channel, in_pixel: bytes from a channel and a pixel to the next.
        by_sample: divides by the vectors of a sample.
    """

    vectors: int
    sample_vectors: int
    channels: int
    in_channel: int
    in_pixel: int
    by_sample: Divisor


class Images(nn.Module):
    """Images of bytes as what a network computes with: ``(x * scale - mean) / std``, for each channel.

    It stands in front of a network, ``nn.Sequential(escort.Images(mean, std), model)``, and takes the type and device
    of the model's weights with it. Converted, it is one pass over the images, on a GPU a part of the first convolution
    where method `stem` runs that.

    Args:
        mean, std: of each channel, of the scaled values: a list, an array or a tensor of one dimension.
        scale: what a byte is multiplied by first, more than 0.
        channels_last: whether images are (N, H, W, C), as decoders give them; else (N, C, H, W).

    Raises:
        TypeError: unless mean and std are numbers in a row, and scale is a number.
        ValueError: unless there are as many means as deviations, all finite, and deviations and scale positive.
    """

    factors: torch.Tensor
    frozen: torch.Tensor

    def __init__(self, mean: _Numbers, std: _Numbers, scale: float = 1 / 255, channels_last: bool = True) -> None:
        super().__init__()
        self.mean, self.std = _numbers("mean", mean), _numbers("std", std)
        if not is_number(scale):
            raise TypeError(f"scale is a number that bytes are multiplied by, got {scale!r}; leave it out for 1 / 255")
        self.scale, self.channels_last = float(scale), bool(channels_last)
        numbers = (*self.mean, *self.std, self.scale)
        if not self.mean or len(self.mean) != len(self.std) or not all(map(math.isfinite, numbers)):
            raise ValueError(f"mean and std have a finite number for each channel, got {mean} and {std}, scale {scale}")
        if min(self.std) <= 0.0 or self.scale <= 0.0:
            raise ValueError(f"deviations and the scale are positive, got {std}, scale {scale}")
        self.register_buffer("frozen", torch.empty(0))  # of the type of the results
        self.register_buffer("factors", self._factors(self.frozen.device))

    def _factors(self, device: torch.device) -> torch.Tensor:
        """What bytes are multiplied by, and what is added then: (2, C) float32."""
        scales = [self.scale / deviation for deviation in self.std]
        shifts = [-mean / deviation for mean, deviation in zip(self.mean, self.std, strict=True)]
        return torch.tensor([scales, shifts], dtype=torch.float32, device=device)

    def _apply(self, fn: Callable[..., torch.Tensor], recurse: bool = True) -> Images:
        """Moves it; the factors stay float32, of which 16 bits would lose digits."""
        super()._apply(fn, recurse)
        if self.factors.dtype is not torch.float32:
            self.factors = self._factors(self.frozen.device)
        return self

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Normalises images.

        Args:
            images: uint8, (N, H, W, C) or (N, C, H, W), as `channels_last` says.

        Returns:
            (N, C, H, W) of the type of the network.

        Raises:
            TypeError, ValueError: for what are no such images.
        """
        self.check(images)
        if self.is_taken(images):
            run = _runner(self.channels_last, images.shape, self.frozen.dtype, images.device)
            if run is not None:
                return run(images, self.factors)
        planes = images.movedim(3, 1) if self.channels_last else images
        scale, shift = self.factors[:, :, None, None]
        y = planes.to(torch.float32, memory_format=torch.contiguous_format).mul_(scale).add_(shift)
        return y.to(self.frozen.dtype)

    def check(self, images: torch.Tensor) -> None:
        """Raises TypeError or ValueError for what it does not take."""
        if not isinstance(images, torch.Tensor):
            raise TypeError(f"the network takes a tensor of images, got {type(images).__name__}; use torch.from_numpy")
        if images.dtype is not torch.uint8:
            raise TypeError(f"the network takes images of torch.uint8, and normalises them; got {images.dtype}")
        if images.ndim != 4 or images.shape[3 if self.channels_last else 1] != len(self.mean):
            expected = f"(N, H, W, {len(self.mean)})" if self.channels_last else f"(N, {len(self.mean)}, H, W)"
            raise ValueError(f"the network takes images {expected}, got shape {tuple(images.shape)}")

    def is_taken(self, images: torch.Tensor) -> bool:
        """Whether a kernel of ours runs it on such images."""
        if is_observed() or type(images) not in PLAIN or not images.is_cuda or self.factors.device != images.device:
            return False
        return 0 < images.numel() < _MOST and pools(images.device, self.frozen.dtype)

    def binaries(self, images: torch.Tensor) -> tuple[Binary, ...]:
        """Those of the kernels that run it on such images on a GPU, none where torch's do."""
        if not self.is_taken(images):
            return ()
        variant, *_ = _launched(self.channels_last, images.shape, self.frozen.dtype)
        return (kernel.kernel(variant.source, variant.defines, images.device).binary,)

    def extra_repr(self) -> str:
        return f"mean={self.mean}, std={self.std}, scale={self.scale:g}, channels_last={self.channels_last}"


def _numbers(name: str, given: _Numbers) -> tuple[float, ...]:
    """A number for each channel. Raises TypeError for what are none."""
    values = given.tolist() if isinstance(given, torch.Tensor | np.ndarray) else given
    if not isinstance(values, Sequence) or not all(map(is_number, values)):
        raise TypeError(f"{name} is a list with a number for each channel, got {given!r}; write it as [0.5, 0.5, 0.5]")
    return tuple(map(float, values))


def _launched(channels_last: bool, shape: torch.Size, dtype: torch.dtype) -> tuple[Variant, Grid, Params]:
    """The kernel for images of a shape, its grid and its parameters."""
    channels = shape[3 if channels_last else 1]
    pixels = math.prod(shape[1:]) // channels
    vector = math.gcd(pixels, _IN_A_ROW)
    sample, steps = pixels // vector, (1, channels) if channels_last else (pixels, 1)
    params = Params(shape[0] * sample, sample, channels, *steps, Divisor.of(sample))
    return images_kernel(dtype, vector), (-(-params.vectors // _THREADS), 1, 1), params


def images_kernel(dtype: torch.dtype, vector: int) -> Variant:
    """The kernel for results of a type, so many at once."""
    return Variant("images.cu", {"STORAGE": STORAGE[dtype], "VECTOR": vector})


@lru_cache(_MOST_LAUNCHES)
def _runner(
    channels_last: bool, shape: torch.Size, dtype: torch.dtype, device: torch.device
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None:
    """What normalises images of a shape on a GPU: all that a call need not work out. None where torch does."""
    check_not_capturing(device)
    variant, grid, params = _launched(channels_last, shape, dtype)
    try:
        compiled = kernel.kernel(variant.source, variant.defines, device)
    except ImportError as error:  # there is no compiler, and other kernels than this one are carried
        _log.warning("images of %s on %s are normalised by torch: %s", tuple(shape), device, error)
        return None
    fixed: list[Any] = [*[torch.Tensor] * 3, pack(params)]
    launch = compiled.bind(_THREADS, 0, fixed, overlap=True)
    out_shape = (shape[0], shape[3], *shape[1:3]) if channels_last else shape

    def run(images: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
        y = torch.empty(out_shape, dtype=dtype, device=device)
        launch(grid, images.contiguous(), y, factors)
        return y

    return run
