"""How the stem kernel lays out a tile of x in shared memory, the words of a window, and the weights by register.

Numbers of lanes and registers are those of `multiply_add` in kernels/cuda/mma.cuh.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from escort.methods.cuda.stem.config import StemConfig
from escort.problem import Problem

OCTET = 8  # outputs of a row that a warp's product has side by side
_STEP_WORDS = 8  # of a product along what is summed
_LANES = 32
_MOST_TILES = 8  # that registers hold the sums of
_SMALL_BYTES = 56 * 1024  # of shared memory, of which a multiprocessor of compute capability 9.0 has four times as much


@dataclass(frozen=True)
class Channels:
    """How output channels are dealt to products.

    Attributes:
        tiles: of 8 channels that a warp multiplies at a time.
        vector: neighbours that a lane writes: channels in NHWC, outputs of a row in NCHW.
        groups: of `tiles` that there are.
    """

    tiles: int
    vector: int
    groups: int

    @classmethod
    def of(cls, problem: Problem) -> Channels:
        """The deal with the fewest products, and among like ones the widest vectors."""
        is_last = problem.memory_format == "channels_last"
        widest = 16 // problem.storage.itemsize
        in_a_row = 2 if problem.out_width % 2 == 0 else 1
        choices = [
            cls(tiles, vector if is_last else in_a_row, -(-problem.out_channels // (8 * tiles)))
            for vector in (widest, widest // 2)
            for tiles in range(_MOST_TILES, 0, -2)
            if tiles % (vector // 2) == 0
        ]
        return min(choices, key=lambda choice: choice.groups * (choice.tiles + 1))  # gathering x is a product's work

    def columns(self, is_last: bool) -> NDArray[np.int64]:
        """The output channel of each column of the tiles, or row where NCHW is written, (groups * tiles, 8)."""
        group, tile, column = np.ogrid[: self.groups, : self.tiles, :8]
        first = group * self.tiles * 8
        if not is_last:
            return (first + tile * 8 + column).reshape(-1, 8)
        pairs = self.vector // 2
        within = tile // pairs * 4 * self.vector + column // 2 * self.vector + tile % pairs * 2 + column % 2
        return (first + within).reshape(-1, 8)


@dataclass(frozen=True)
class Layout:
    """What a block holds in shared memory.

    Attributes:
        pixel, pitch: elements from a pixel or row of the staged input to the next.
        in_rows, in_columns: of the staged input.
        together: how the weights lie; as of the config.
        words: of a window, a multiple of those of a product.
    """

    problem: Problem
    channels: Channels
    pixel: int
    pitch: int
    in_rows: int
    in_columns: int
    together: bool

    @classmethod
    def of(cls, problem: Problem, config: StemConfig) -> Layout:
        in_rows, in_columns = (
            (outputs - 1) * stride + (taps - 1) * dilation + 1
            for outputs, stride, taps, dilation in zip(
                (config.rows, config.octets * OCTET),
                *(problem.stride, problem.kernel_size, problem.dilation),
                strict=True,
            )
        )
        # Windows begin at whole words, and so do taps that lie apart.
        elements, pixel = 4 // problem.storage.itemsize, problem.in_channels
        steps = [problem.stride[1]] + [1] * (problem.dilation[1] > 1)
        pixel += any(pixel * step % elements for step in steps)
        pitch = -(-in_columns * pixel // elements) * elements
        return cls(problem, Channels.of(problem), pixel, pitch, in_rows, in_columns, config.together)

    @cached_property
    def elements(self) -> NDArray[np.int64]:
        """For each half of each word, the element (c, r, s) of a filter that it is, or -1: (words, 1 or 2)."""
        return self._windows[0]

    @cached_property
    def table(self) -> NDArray[np.uint32]:
        """For each word its bytes from the window's begin, and the bits of it that count: (words, 2)."""
        elements, places = self._windows
        bits = 32 // elements.shape[1]
        counted = [(half >= 0) * (((1 << bits) - 1) << (bits * i)) for i, half in enumerate(elements.T)]
        return np.stack([places * 4, sum(counted)], axis=1).astype(np.uint32)

    @cached_property
    def _windows(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        p, elements = self.problem, 4 // self.problem.storage.itemsize
        (rows, columns), channels = p.kernel_size, p.in_channels
        known: dict[int, list[int]] = {}
        for r in range(rows):
            for s in range(columns):
                for c in range(channels):
                    at = r * p.dilation[0] * self.pitch + s * p.dilation[1] * self.pixel + c
                    word = known.setdefault(at // elements, [-1] * elements)
                    word[at % elements] = (c * rows + r) * columns + s
        padding = -len(known) % _STEP_WORDS
        places = np.array([*known, *[0] * padding], dtype=np.int64)
        return np.array([*known.values(), *[[-1] * elements] * padding], dtype=np.int64), places

    @property
    def steps(self) -> int:
        return len(self.table) // _STEP_WORDS

    @property
    def weight_vectors(self) -> int:
        """Of 16 bytes."""
        return self.channels.groups * self.steps * self.channels.tiles // 2 * _LANES

    @property
    def shared_bytes(self) -> int:
        staged = self.in_rows * self.pitch * self.problem.storage.itemsize + 4  # a word may reach beyond the last pixel
        return self.weight_vectors * 16 + self.table.nbytes + -(-staged // 16) * 16

    @property
    def threads(self) -> int:
        """Of a block: more where shared memory has room for few of them."""
        return 128 if self.shared_bytes <= _SMALL_BYTES else 256

    def arrange(self, weight: torch.Tensor) -> torch.Tensor:
        """The weights as lanes load them, or tensor cores: (groups, steps, tiles / 2, lanes, 4) int32.

        Args:
            weight: (K, C, R, S) float32.

        Raises:
            ValueError: a weight is too large for the storage type.
        """
        is_last, storage = self.problem.memory_format == "channels_last", self.problem.storage
        columns = self.channels.columns(is_last)
        rows = torch.zeros(columns.max() + 1, math.prod(weight.shape[1:]) + 1)  # the last stands for what is none
        rows[: len(weight), :-1] = weight.flatten(1)
        elements = rows[:, torch.from_numpy(self.elements.reshape(-1))].to(storage).contiguous()
        if not bool(elements.isfinite().all()):
            largest, precision = float(weight.abs().max()), self.problem.precision
            raise ValueError(f"a weight of {largest:g} is too large for {precision}; scale the filter, or use bf16")
        words = elements.view(torch.int32)
        if storage is torch.float32:
            words = (words + 0x1000) & ~0x1FFF  # to the nearest number of TF32
        words = words[torch.from_numpy(columns)]  # of each tile's columns
        groups, tiles = self.channels.groups, self.channels.tiles
        # (group, pair of tiles, tile of the pair, column g, step, half, t)
        words = words.view(groups, tiles // 2, 2, 8, self.steps, 2, 4)
        if self.together:
            lanes = words.permute(0, 4, 1, 2, 5, 3, 6)
        else:
            lanes = words.permute(0, 4, 1, 3, 6, 2, 5) if is_last else words.permute(0, 4, 1, 3, 6, 5, 2)
        return lanes.reshape(groups, self.steps, tiles // 2, _LANES, 4).contiguous()
