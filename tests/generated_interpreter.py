"""An interpreter of generated kernels' steps in numpy, against which tests hold what compiled code does."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from escort.methods.cuda.generated.steps import Chunk, Join, KernelSteps, Load, MultiplyAdd
from escort.methods.cuda.generated.words import Words

Floats = NDArray[np.float64]
Whole = NDArray[np.int64]


def run(kernel_steps: KernelSteps, x: Floats) -> Floats:
    """The convolution of x (N, C, H, W), in float64 and without epilogue.

    A pointwise convolution comes as (N, K, 1, out_height * out_width).
    """
    p, w, samples, tile_words = kernel_steps.problem, kernel_steps.words, len(x), kernel_steps.config.tile
    x = x.reshape(samples, *p.input_shape[1:])
    y = np.full((samples, p.out_channels, p.out_height, p.out_width), np.nan)
    for tile in range(kernel_steps.tiles(samples)):
        first = tile * tile_words
        for part in kernel_steps.parts:
            count = len(part.channels)
            sums = np.zeros((kernel_steps.config.sums * count, tile_words, w.elements))
            for chunk in (chunk for chunks in part.slices for chunk in chunks):
                _run_chunk(chunk, stage(kernel_steps, x, chunk, first), sums)
            sample, row, column = _positions(w, first + np.arange(tile_words))
            for element in range(w.elements):
                n, c = sample + element % w.samples, column + element % w.columns
                inside = (row < p.out_height) & (n < samples) & (c < p.out_width)
                at = n[inside], row[inside], c[inside]
                for place, channel in enumerate(part.channels):
                    y[at[0], channel, at[1], at[2]] = sums[place::count].sum(0)[inside, element]
    return y


def stage(kernel_steps: KernelSteps, x: Floats, chunk: Chunk, first_word: int) -> Floats:
    """What a stage holds of x (N, C, H, W) for a chunk and the tile that begins there, as (words, elements)."""
    p, w = kernel_steps.problem, kernel_steps.words
    planes = len(w.phases)
    shape = kernel_steps.config.channel_block * planes, kernel_steps.stage.channel_words, w.elements
    words = np.full(shape, np.nan)
    sample, line, column = _positions(w, first_word + np.arange(kernel_steps.config.tile + w.reach))
    for plane, (below, behind) in enumerate(w.phases):
        row = (line - w.top) * p.stride[0] + below
        for element in range(w.elements):
            n, c = sample + element % w.samples, (column - w.left + element % w.columns) * p.stride[1] + behind
            inside = (row >= 0) & (row < p.height) & (c >= 0) & (c < p.width) & (n < len(x))
            for place, channel in enumerate(chunk.channels):
                values = np.zeros(len(inside))
                values[inside] = x[n[inside], channel, row[inside], c[inside]]
                words[place * planes + plane, : len(inside), element] = values
    return words.reshape(-1, w.elements)


def _run_chunk(chunk: Chunk, words: Floats, sums: Floats) -> None:
    x: dict[int, Floats] = {}
    for step in chunk.steps:
        match step:
            case Load(to, offset):
                x[to] = words[offset : offset + sums.shape[1]]
            case Join(to, low, high):
                x[to] = np.stack((x[low][:, 1], x[high][:, 0]), axis=1)
            case MultiplyAdd(to, source, weight):
                sums[to] += x[source] * weight


def _positions(w: Words, words: Whole) -> tuple[Whole, Whole, Whole]:
    """(sample, row, column) of the first elements of words."""
    line = words // w.pitch
    return line // w.sample_rows * w.samples, line % w.sample_rows, words % w.pitch * w.columns
