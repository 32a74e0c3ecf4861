"""Shared memory of a block, as generated.cuh lays it out: how a tile of the input is staged, and what else there is.

Numbers may be columns of a search space, one number per config.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from escort.methods.cuda.generated.words import Words

Whole = TypeVar("Whole", int, NDArray[np.int64])

_BARRIER_BYTES = 8


@dataclass(frozen=True, eq=False)
class Stage(Generic[Whole]):
    """A tile of some input channels.

    Attributes:
        input: the sequence of words that tiles are cut from.
        tile: words of a tile.
        channel_block: input channels per stage.
    """

    input: Words
    tile: Whole
    channel_block: Whole

    @property
    def channel_words(self) -> Whole:
        """Words of a plane of a channel: the tile and what taps reach behind it, whole copies."""
        return -(-(self.tile + self.input.reach) // 4) * 4

    @property
    def words(self) -> Whole:
        """Words of all planes of all channels."""
        return self.channel_block * len(self.input.phases) * self.channel_words


def ring_bytes(stage: Stage[Whole], stages: Whole, split: int, out_channels: Whole) -> Whole:
    """Bytes of the ring of stages; where channels are split, the sums of a part's output channels take their place."""
    ring = stages * stage.words * 4
    if split == 1:
        return ring
    largest: Whole = np.maximum(ring, -(-out_channels // split) * split * stage.tile * 4)
    return largest


def shared_bytes(stage: Stage[Whole], stages: Whole, split: int, out_channels: Whole) -> Whole:
    """Bytes of the ring, of two barriers per stage, and of what comes from the others where channels are split."""
    needed = ring_bytes(stage, stages, split, out_channels) + stages * 2 * _BARRIER_BYTES
    if split == 1:
        return needed
    return needed + 2 * _BARRIER_BYTES + (split - 1) * -(-out_channels // split) * stage.tile * 4
