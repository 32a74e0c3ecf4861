"""What a config of sparse_tc says, and how sparse tensor cores take each precision."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from escort.problem import MemoryFormat

PIXEL_BYTES = 128  # of a block of input channels
M_BLOCK_BYTES = 64 * 64 + 512  # of 64 output channels of a weight tile: values, then metadata

TapGroup = Literal["im2col", "columns", "halo", "flat"]


class UnfitError(ValueError):
    """This config does not suit this convolution."""


@dataclass(frozen=True)
class Element:
    """How sparse tensor cores take a precision.

    Attributes:
        storage: the kernel's number for it.
        bytes: of an element of x, residual and y.
        kept, of: of each `of` neighbouring input channels, `kept` may be nonzero.
        type: what the instruction calls it.
    """

    storage: int
    bytes: int
    kept: int
    of: int
    type: str

    @property
    def k_block(self) -> int:
        """Input channels of a weight tile."""
        return PIXEL_BYTES // self.bytes

    def vector(self, run: int) -> int:
        """How many neighbouring elements one instruction moves, where a run has so many and is a multiple of them."""
        return math.gcd(run, 16 // self.bytes)


ELEMENTS: dict[str, Element] = {
    "tf32": Element(0, 4, 1, 2, "tf32"),
    "fp16": Element(1, 2, 2, 4, "f16"),
    "bf16": Element(2, 2, 2, 4, "bf16"),
}


@dataclass(frozen=True)
class SparseTcConfig:
    """How the tensor cores' work is cut up.

    Attributes:
        tap_group: the taps whose pixels are copied at once: "im2col", one tap, by im2col copies; "columns", a column of
            taps, as whole rows; "halo", all taps, as whole rows; "flat", the only tap of a pointwise convolution, as
            pixels in a row.
        pixels: of a warpgroup's products, a multiple of 8 up to 256.
        across: 2 where the two warpgroups take different output channels, 1 where they take different pixels.
        m_blocks: of 64 output channels that a warpgroup computes.
        rows: of the output in a tile, for columns and halo.
        samples: in a tile, for columns and halo; several only where a tile has all rows of each.
        cluster: thread blocks that copy the filter to one another.
        memory_format: of x, residual and y. For "contiguous" a kernel arranges x before, and y is written in NCHW;
            "channels_last" converts nothing.
        by_turns: the two warpgroups take half of the tap groups each and add their sums up, with `across` 1.
        split: thread blocks of a cluster that share a tile: each takes a share of its tap groups, and adds up and
            stores a share of its pixels. With `by_turns` and `cluster` 1, in channels_last.
    """

    tap_group: TapGroup
    pixels: int
    across: int = 2
    m_blocks: int = 1
    rows: int = 0
    samples: int = 1
    cluster: int = 1
    memory_format: MemoryFormat = "contiguous"
    by_turns: bool = False
    split: int = 1

    @property
    def thread_blocks(self) -> int:
        """Of a cluster, whatever they share."""
        return self.cluster * self.split

    @property
    def whole_rows(self) -> bool:
        """Whether a tile is rows of the output; else it is any pixels in a row."""
        return self.tap_group in ("columns", "halo")

    @property
    def takes_channels_last(self) -> bool:
        return self.memory_format == "channels_last"

    @property
    def along(self) -> int:
        """Warpgroups side by side along the pixels."""
        return 1 if self.by_turns else 2 // self.across

    @property
    def tile_channels(self) -> int:
        return 64 * self.across * self.m_blocks

    @property
    def tile_pixels(self) -> int:
        return self.along * self.pixels
