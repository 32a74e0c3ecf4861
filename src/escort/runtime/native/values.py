"""What a native program computes with: values in storages, and the instructions that fill them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch

from escort.kernels import _cpu

Sizes = tuple[int, ...]


class Storage:
    """Memory of samples that lie one behind the other.

    Attributes:
        samples, sample: how many there are, and how many floats each has.
        source: where it comes from: a value of the program by number, or a tensor; None where instructions fill it.
    """

    def __init__(self, samples: int, sample: int, source: int | torch.Tensor | None = None) -> None:
        self.samples, self.sample, self.source = samples, sample, source

    @classmethod
    def of(cls, shape: Sizes, source: int | torch.Tensor | None = None) -> Storage:
        """That of a contiguous tensor."""
        return cls(shape[0], math.prod(shape[1:]), source) if len(shape) > 1 else cls(1, math.prod(shape), source)


@dataclass(frozen=True)
class Value:
    """A tensor of float32 in a storage, whose samples are as far apart as if nothing else lay between them."""

    storage: Storage
    offset: int
    shape: Sizes
    strides: Sizes

    @classmethod
    def new(cls, shape: Sizes, source: torch.Tensor | None = None) -> Value:
        """A contiguous one in a storage of its own."""
        return cls(Storage.of(shape, source), 0, shape, contiguous_strides(shape))

    @property
    def is_whole(self) -> bool:
        """Whether it is all of its storage, as that lies."""
        is_all = self.offset == 0 and math.prod(self.shape) == self.storage.samples * self.storage.sample
        return is_all and self.is_contiguous

    @property
    def is_contiguous(self) -> bool:
        return is_contiguous(self.shape, self.strides)


class Operand(NamedTuple):
    """Samples in a storage: where the first of them begins, and how far they are apart, in floats."""

    storage: Storage
    offset: int
    stride: int


class Instruction(NamedTuple):
    """A call of an operation on so many samples. An input that is left out is None."""

    op: _cpu.Op
    samples: int
    inputs: tuple[Operand | None, ...]
    output: Operand


@lru_cache(4096)
def contiguous_strides(shape: Sizes) -> Sizes:
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * size)
    return tuple(reversed(strides)) if shape else ()


def is_contiguous(shape: Sizes, strides: Sizes) -> bool:
    """Whether numbers lie as they are counted; an axis of size 1 may have any stride."""
    expected = contiguous_strides(shape)
    return strides == expected or all(
        size == 1 or stride == wanted for size, stride, wanted in zip(shape, strides, expected, strict=True)
    )


def operand(value: Value, samples: int, size: int) -> Operand | None:
    """A value as contiguous samples of a size, or None where they are not contiguous."""
    shape, strides = value.shape, value.strides
    if math.prod(shape) != samples * size:
        raise ValueError(f"a value of shape {shape} is not {samples} samples of {size} numbers")
    if shape and shape[0] == samples and is_contiguous(shape[1:], strides[1:]):
        return Operand(value.storage, value.offset, strides[0] if samples > 1 else size)
    return Operand(value.storage, value.offset, size) if value.is_contiguous else None


def collapsed(shape: Sizes, strides: list[Sizes]) -> tuple[Sizes, list[Sizes]]:
    """A shape of fewer axes, and strides that read the same: neighbours that lie alike in all operands become one."""
    axes: list[tuple[int, tuple[int, ...]]] = []  # the last one first
    for size, *steps in reversed(list(zip(shape, *strides, strict=True))):
        if size == 1:
            continue
        if axes and all(step == inner * axes[-1][0] for step, inner in zip(steps, axes[-1][1], strict=True)):
            axes[-1] = axes[-1][0] * size, axes[-1][1]
        else:
            axes.append((size, tuple(steps)))
    axes = axes[::-1] or [(1, (0,) * len(strides))]
    return tuple(size for size, _ in axes), [tuple(steps[i] for _, steps in axes) for i in range(len(strides))]
