"""The knobs of the direct kernel, the sequence of its positions, and how a stage holds a tile's input."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from escort.problem import Problem

LANES = 32
STORAGE = {"fp32": 0, "tf32": 0, "fp16": 1, "bf16": 2}
MOST_INDEX = np.iinfo(np.int32).max
HALF_REACH = 0x10000  # bytes of a stage that the offsets of 16-bit nonzeros reach
#: Kernels are compiled for the least of these that suffices: words (pairs of words where two columns are read at once)
#: that a lane copies per channel at most.
SLOT_CLASSES = (2, 4, 8, 16, 32)


@dataclass(frozen=True)
class DirectConfig:
    """The knobs of the direct kernel.

    A block computes ``32 * words * position_warps`` positions of ``out_channel_warps * out_channels`` output channels.

    Attributes:
        words: positions per lane.
        out_channels: output channels per warp.
        position_warps, out_channel_warps, in_channel_warps: consumer warps along positions, output channels and input
            channels. Those along input channels share the nonzeros of an output channel and add up their sums at the
            end.
        producers: warps that copy the input.
        channel_block: input channels per stage.
        stages: of the ring in shared memory.
        occupancy: blocks per multiprocessor that registers leave room for.
        packed: for 16-bit storage: up to 32 products are summed in 16 bits, two samples per instruction. Else every
            product is added in float32, as in fp32 always.
        balanced: output channels are dealt to warps by their nonzeros; else in their own order.
    """

    words: int
    out_channels: int
    position_warps: int
    out_channel_warps: int
    in_channel_warps: int
    producers: int
    channel_block: int
    stages: int
    occupancy: int = 1
    packed: bool = False
    balanced: bool = True

    @property
    def consumers(self) -> int:
        return self.position_warps * self.out_channel_warps * self.in_channel_warps

    @property
    def threads(self) -> int:
        return (self.consumers + self.producers) * LANES

    @property
    def tile(self) -> int:
        """Words of a tile."""
        return LANES * self.words * self.position_warps

    @property
    def block_channels(self) -> int:
        """Output channels of a block."""
        return self.out_channel_warps * self.out_channels


@dataclass(frozen=True)
class Positions:
    """The sequence of a problem's output positions, through rows and samples."""

    problem: Problem

    @property
    def pitch(self) -> int:
        """Positions from row to row. Without stride the right padding of a row is the left padding of the next."""
        p = self.problem
        if p.stride[1] == 1:
            return max(p.width + max(p.padding[2:]), p.out_width)
        return p.out_width + (p.kernel_size[1] - 1) * p.dilation[1] // p.stride[1]

    @property
    def sample_rows(self) -> int:
        """Rows from sample to sample; the padding between two samples is shared as well."""
        p = self.problem
        if p.stride[0] == 1:
            return max(p.height + max(p.padding[:2]), p.out_height)
        return p.out_height + (p.kernel_size[0] - 1) * p.dilation[0] // p.stride[0]

    @property
    def reach(self) -> int:
        """How far behind a position its last tap reads."""
        p = self.problem
        rows, columns = ((k - 1) * d // s for k, d, s in zip(p.kernel_size, p.dilation, p.stride, strict=True))
        return rows * self.pitch + columns

    @property
    def phases(self) -> int:
        """Phases of a strided input that are kept, see :class:`escort.filter.Geometry`."""
        p = self.problem
        last = [max(i * d % s for i in range(k)) for k, d, s in zip(p.kernel_size, p.dilation, p.stride, strict=True)]
        return last[0] * p.stride[1] + last[1] + 1

    def count(self, samples: int) -> int:
        """Positions of so many samples, up to the last output."""
        p = self.problem
        unused = (self.sample_rows - p.out_height) * self.pitch + self.pitch - p.out_width
        return samples * self.sample_rows * self.pitch - unused


@dataclass(frozen=True)
class Layout:
    """How a stage holds a tile's input.

    Attributes:
        samples_per_word: 2 for 16-bit storage, else 1.
        paired: two neighbouring columns of 16-bit storage are read at once.
        odd: a channel has an odd number of elements.
        phase_words: words of each phase: the tile and what its last position reaches.
        channel_words: words of a channel, whole rows of banks.
        slots: words, or pairs of words, that a lane copies per channel.
    """

    samples_per_word: int
    paired: bool
    odd: bool
    phase_words: int
    channel_words: int
    slots: int

    @classmethod
    def of(cls, problem: Problem, tile: Any) -> Layout:
        """The layout for a tile of so many words; with an array of tile sizes, arrays of what depends on them."""
        positions, half = Positions(problem), STORAGE[problem.precision] != 0
        phase_words = tile + positions.reach
        words = phase_words * positions.phases
        paired = half and problem.stride == (1, 1) and int(np.prod(problem.input_shape[1:])) % 2 == 0
        slots = -(-words // LANES)
        if paired:
            # Columns in any window of so many positions, and for each sample that it meets a pair at either end.
            pitch, width = positions.pitch, problem.width
            columns = phase_words // pitch * width + np.minimum(phase_words % pitch, width)
            samples = phase_words // (pitch * positions.sample_rows) + 2
            slots = -(-(columns // 2 + 2 * samples) // LANES)
        slots = slots if np.ndim(slots) else int(slots)
        odd = bool(problem.height * problem.width % 2)
        return cls(1 + half, paired, odd, phase_words, -(-words // LANES) * LANES, slots)


def most_samples(problem: Problem) -> int:
    """As many samples as 32-bit numbers reach: bytes of the input, elements of the output, positions."""
    positions = Positions(problem)
    in_size, out_size = (int(np.prod(s[1:], dtype=object)) for s in (problem.input_shape, problem.output_shape))
    most_positions = MOST_INDEX // 2 // (positions.sample_rows * positions.pitch)
    samples_per_word = 1 if STORAGE[problem.precision] == 0 else 2
    most_bytes, itemsize = 2**32 - 1, problem.storage.itemsize
    return min(most_bytes // (in_size * itemsize), MOST_INDEX // out_size, most_positions * samples_per_word)


def shared_bytes(layout: Layout, knobs: Mapping[str, Any], record_bytes: Any) -> Any:
    """What a block needs: the ring with its barriers. In the end, sums that warps exchange take the place of the ring.

    Args:
        layout: for the tile of these knobs.
        knobs: of a config by name, or columns of a space; then the result is a column, too.
        record_bytes: room for records in a stage.
    """
    ring = knobs["stages"] * (knobs["channel_block"] * layout.channel_words * 4 + record_bytes + 24)
    sums = LANES * knobs["words"] * knobs["position_warps"] * knobs["out_channel_warps"] * knobs["out_channels"]
    return np.maximum(ring, (knobs["in_channel_warps"] - 1) * sums * layout.samples_per_word * 4)


def grouping(problem: Problem, block_channels: Any) -> tuple[int, Any]:
    """Output channels per group of the convolution, and how many groups a block of so many output channels computes."""
    group_channels = problem.out_channels // problem.groups
    return group_channels, np.minimum(np.maximum(block_channels // group_channels, 1), problem.groups)
