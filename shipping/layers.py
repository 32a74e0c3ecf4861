"""Layers of many networks, by a rule: no network is listed, so that none is served better than others of its kind."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import cache

import torch

from escort.filter import SparseFilter
from escort.planner.plan import Layer
from escort.problem import Activation, Epilogue, MemoryFormat, Precision, Problem

#: Sides of maps, which networks halve from pictures.
_PICTURE, _SIDES = 224, (112, 56, 28, 14, 7)
#: Output channels of a network's first convolution, which reads three.
_STEMS = (32, 64)
#: Channels of a map, times its side: networks keep this about the same, and wide ones have eight times as many.
_CHANNELS_BY_SIDE = (896, 1792, 3584, 7168, 14336)
_BATCHES = (1, 8, 32, 128)
#: Channels of maps of one pixel, by what divides them, and the activations of squeezes and classifiers.
_PIXEL_CHANNELS = (2, 4, 8)
_PIXEL_ACTIVATIONS: tuple[Activation, ...] = ("relu", "silu", "sigmoid", "hardsigmoid")
_SPARSITY = 0.9
_PRECISIONS: tuple[Precision, ...] = ("fp16", "tf32", "bf16", "fp32")


def common_layers(precisions: tuple[Precision, ...] = _PRECISIONS) -> Iterator[Layer]:
    """Pointwise and 3x3 convolutions of maps of common sizes, pruned at random, and depthwise ones, on "cuda:0"."""
    for side, precision, batch in itertools.product((_PICTURE, *_SIDES), precisions, _BATCHES):
        for filters, stride in _filters(side):
            size = filters.shape[2]
            for memory_format, activation in _variations(precision):
                problem = Problem(
                    *(batch, filters.shape[1] * filters.groups, side, side, filters.shape[0]),
                    *((size, size), (stride, stride), (size // 2,) * 4),
                    groups=filters.groups,
                    epilogue=Epilogue(True, False, activation),
                    precision=precision,
                    device="cuda:0",
                    memory_format=memory_format,
                )
                yield Layer(problem, filters, torch.zeros(filters.shape[0]))


def pixel_problems(precisions: tuple[Precision, ...] = _PRECISIONS) -> Iterator[tuple[Problem, SparseFilter]]:
    """Convolutions of maps of one pixel on "cuda:0", for every width of a load that numbers of channels leave."""
    for precision, channels, batch in itertools.product(precisions, _PIXEL_CHANNELS, (1, _BATCHES[-1])):
        filters = _filter(_PIXEL_CHANNELS[-1], channels, 1)
        for activation in _PIXEL_ACTIVATIONS:
            problem = Problem(
                *(batch, channels, 1, 1, filters.shape[0], (1, 1)),
                epilogue=Epilogue(True, False, activation),
                precision=precision,
                device="cuda:0",
            )
            yield problem, filters


def _variations(precision: Precision) -> Iterator[tuple[MemoryFormat, Activation]]:
    """Memory formats in which networks are planned, and activations: kernels with ReLU have all bounds and none.

    Most of what networks have else is SiLU, as they run in channels_last. Others are compiled where they are met.
    """
    if precision != "fp32":
        yield from (("channels_last", "relu"), ("channels_last", "silu"))
    yield "contiguous", "relu"


def _filters(side: int) -> Iterator[tuple[SparseFilter, int]]:
    """A map's convolutions, each with its stride: from any number of channels to any, larger ones to as many."""
    if side == _PICTURE:
        yield from ((_filter(k, 3, 3), 2) for k in _STEMS)
        return
    widths = [channels // side for channels in _CHANNELS_BY_SIDE]
    for c, k in itertools.product(widths, widths):
        yield _filter(k, c, 1), 1
        if k == c:
            yield from ((_filter(k, c, 3), stride) for stride in (1, 2))
            yield from ((_depthwise(c, size), stride) for size in (3, 5) for stride in (1, 2))


@cache
def _filter(k: int, c: int, size: int) -> SparseFilter:
    generator, shape = torch.Generator().manual_seed(0), (k, c, size, size)
    weight = torch.randn(shape, generator=generator) * (torch.rand(shape, generator=generator) >= _SPARSITY)
    return SparseFilter.from_dense(weight)


@cache
def _depthwise(c: int, size: int) -> SparseFilter:
    """Seldom pruned, as it has few weights."""
    return SparseFilter.from_dense(torch.ones(c, 1, size, size), groups=c)
