"""Which rows or columns of a plane are pooled or blended into which of the result, as torch defines it."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Window = tuple[int, int, float]  # the first, the one behind the last, and what their sum is divided by
Between = tuple[int, int, float]  # two neighbours, and the share of the second

Cubic = tuple[list[int], list[float]]  # four neighbours, and the share of each

RESIZES = ("nearest", "nearest-exact", "bilinear", "bicubic")


def pooled(size: int, out: int, kernel_size: int, stride: int, padding: int, *, count_padding: bool) -> list[Window]:
    """The windows of average pooling along an axis of `size`, whose result has `out`."""
    result = []
    for i in range(out):
        begin = i * stride - padding
        end = min(begin + kernel_size, size + padding)
        inside = max(begin, 0), min(end, size)
        result.append((*inside, float(end - begin if count_padding else inside[1] - inside[0])))
    return result


def divided(windows: list[Window], divisor: int) -> list[Window]:
    """The same windows, whose sums are divided by a number."""
    return [(begin, end, float(divisor)) for begin, end, _ in windows]


def adaptive(size: int, out: int) -> list[Window]:
    """The windows of adaptive average pooling."""
    ends = [(i * size // out, math.ceil((i + 1) * size / out)) for i in range(out)]
    return [(begin, end, float(end - begin)) for begin, end in ends]


def _source(size: int, out: int, factor: float | None, align_corners: bool) -> NDArray[np.float32]:
    """Where the middle of each row or column of a resized plane lies in the plane."""
    position = np.arange(out, dtype=np.float32)
    if align_corners:
        return position * np.float32((size - 1) / (out - 1) if out > 1 else 0.0)
    scale = np.float32(size / out if factor is None else 1.0 / factor)
    return (position + np.float32(0.5)) * scale - np.float32(0.5)


def resized(size: int, out: int, factor: float | None, mode: str, align_corners: bool) -> list[Between]:
    """What each row or column of a resized plane is made of.

    Args:
        factor: by which torch was asked to scale; None where it was asked for a size.
    """
    if mode != "bilinear":
        position = np.arange(out, dtype=np.float32)
        scale = np.float32(size / out if factor is None else 1.0 / factor)
        middle = np.float32(0.5 if mode == "nearest-exact" else 0.0)
        nearest = np.minimum(np.floor((position + middle) * scale).astype(int), size - 1)
        return [(int(i), int(i), 0.0) for i in nearest]
    source = np.maximum(_source(size, out, factor, align_corners), np.float32(0.0))
    low = np.minimum(source.astype(int), size - 1)
    high, share = np.minimum(low + 1, size - 1), np.clip(source - low.astype(np.float32), 0.0, 1.0)
    return [(int(a), int(b), float(each)) for a, b, each in zip(low, high, share, strict=True)]


def cubic(size: int, out: int, factor: float | None, align_corners: bool) -> list[Cubic]:
    """What each row or column of a plane is made of that is resized by cubic convolution, whose constant is -0.75."""
    source = _source(size, out, factor, align_corners)
    low = np.floor(source).astype(int)
    neighbours = np.clip(low[:, None] + np.arange(-1, 3), 0, size - 1)
    away = np.abs((source - low.astype(np.float32))[:, None] - np.arange(-1, 3, dtype=np.float32))
    near = (1.25 * away - 2.25) * away * away + 1.0
    far = ((-0.75 * away + 3.75) * away - 6.0) * away + 3.0
    return list(zip(neighbours.tolist(), np.where(away <= 1.0, near, far).tolist(), strict=True))
