"""Which rows or columns of a plane are pooled or blended into which of the result, as torch defines it."""

from __future__ import annotations

import math

import numpy as np

Window = tuple[int, int, float]  # the first, the one behind the last, and what their sum is divided by
Between = tuple[int, int, float]  # two neighbours, and the share of the second

RESIZES = ("nearest", "nearest-exact", "bilinear")


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


def resized(size: int, out: int, factor: float | None, mode: str, align_corners: bool) -> list[Between]:
    """What each row or column of a resized plane is made of.

    Args:
        factor: by which torch was asked to scale; None where it was asked for a size.
    """
    position = np.arange(out, dtype=np.float32)
    scale = np.float32(size / out if factor is None else 1.0 / factor)
    if mode != "bilinear":
        middle = np.float32(0.5 if mode == "nearest-exact" else 0.0)
        nearest = np.minimum(np.floor((position + middle) * scale).astype(int), size - 1)
        return [(int(i), int(i), 0.0) for i in nearest]
    if align_corners:
        source = position * np.float32((size - 1) / (out - 1) if out > 1 else 0.0)
    else:
        source = np.maximum((position + np.float32(0.5)) * scale - np.float32(0.5), np.float32(0.0))
    low = np.minimum(source.astype(int), size - 1)
    high, share = np.minimum(low + 1, size - 1), np.clip(source - low.astype(np.float32), 0.0, 1.0)
    return [(int(a), int(b), float(each)) for a, b, each in zip(low, high, share, strict=True)]
