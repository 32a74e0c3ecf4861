"""How the kernel divides its shared memory: barriers, stages of weight tiles (A), stages of pixels (B), outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from escort.methods.cuda.sparse_tc.config import M_BLOCK_BYTES, PIXEL_BYTES, Element, SparseTcConfig, UnfitError

_BARRIER_BYTES = 1024
_MOST_STAGES = 8
_MOST_BY_TURNS, _LEAST_BY_TURNS = 6, 3  # stages of weight tiles for each of two warpgroups that take turns
_FLOAT_STAGINGS, _FLOAT_STAGING_BYTES = 8, 2560  # one for each warp: 16 channels of 32 pixels, with gaps


class Staging(NamedTuple):
    """Where outputs wait to be stored.

    Attributes:
        buffers: one for each 64 channels of a warpgroup; for floats one for each warp.
        buffer_bytes: of each.
        pitch: bytes from one channel to the next, of 16-bit elements in NCHW.
    """

    buffers: int
    buffer_bytes: int
    pitch: int

    @classmethod
    def of(cls, config: SparseTcConfig, element: Element, store_pixels: int) -> Staging:
        pitch = (config.tile_pixels // 8 | 1) * 16  # odd: channels one below the other lie in different banks
        m_blocks = config.tile_channels // 64 * (2 if config.by_turns else 1)  # they store by turns, too
        if element.bytes == 4:
            return cls(_FLOAT_STAGINGS, _FLOAT_STAGING_BYTES, pitch)
        if config.takes_channels_last:
            return cls(m_blocks, up(max(config.tile_pixels, store_pixels) * PIXEL_BYTES, 1024), pitch)
        return cls(m_blocks, up(64 * pitch, 1024), pitch)


class SharedMemory(NamedTuple):
    """A thread block's shared memory.

    Attributes:
        a_stages, b_stages: of weight tiles, and of the pixels of a tap group.
        b_stage_bytes: of the pixels of a tap group.
        b_begin, staging_begin, sums_begin: where the pixels begin, the staging of outputs, and the sums that a
            warpgroup gives the other one.
        staging: of outputs.
        bytes: of all.
    """

    a_stages: int
    b_stages: int
    b_stage_bytes: int
    b_begin: int
    staging_begin: int
    sums_begin: int
    staging: Staging
    bytes: int

    @classmethod
    def of(
        cls,
        config: SparseTcConfig,
        element: Element,
        starts: Sequence[int],
        load_pixels: int,
        store_pixels: int,
        most: int,
    ) -> SharedMemory:
        """As many stages as fit. Raises UnfitError where too few do.

        Args:
            starts: the first pixel of each tap of a group.
            load_pixels: of a tap group, with the zeros that follow.
            store_pixels: that are stored at a time in NHWC.
            most: bytes that a thread block may have.
        """
        staging = Staging.of(config, element, store_pixels)
        a_bytes, b_stage_bytes = config.tile_channels // 64 * M_BLOCK_BYTES, up(load_pixels * PIXEL_BYTES, 1024)
        # Sums that a warpgroup gives the other one lie where both stage outputs; the staging of floats is too small.
        # Other thread blocks may read this one's for longer than it does not stage.
        lie_apart = (config.by_turns and element.bytes == 4) or config.split > 1
        sums_bytes = config.tile_channels * config.tile_pixels * 4 if lie_apart else 0
        room = most - _BARRIER_BYTES - staging.buffers * staging.buffer_bytes - sums_bytes - 1024
        if config.by_turns:
            a_stages, b_stages = _stages_by_turns(len(starts), room, a_bytes, b_stage_bytes)
        elif len(starts) == 1:
            a_stages = b_stages = min(_MOST_STAGES, room // (a_bytes + b_stage_bytes))
        else:
            b_stages = 2
            a_stages = min(_MOST_STAGES, (room - b_stages * b_stage_bytes) // a_bytes)
        if min(a_stages, b_stages) < 2:  # a stage is freed while the next step runs, which needs another one
            raise UnfitError("two stages do not fit shared memory; choose smaller tiles")
        b_begin = up(_BARRIER_BYTES + a_stages * a_bytes, 1024)
        staging_begin = b_begin + b_stages * b_stage_bytes
        behind_staging = staging_begin + staging.buffers * staging.buffer_bytes
        sums_begin, end = (behind_staging if sums_bytes else staging_begin), behind_staging + sums_bytes
        # What lies behind a group's pixels is read too, and its products are dropped; but it must be shared memory.
        if staging_begin - b_stage_bytes + (max(starts) + config.tile_pixels) * PIXEL_BYTES > end:
            raise UnfitError("a tile's last pixels would be read from beyond shared memory")
        return cls(a_stages, b_stages, b_stage_bytes, b_begin, staging_begin, sums_begin, staging, end)


def _stages_by_turns(taps: int, room: int, a_bytes: int, b_bytes: int) -> tuple[int, int]:
    """Stages of weight tiles, and of pixels, half of them for each warpgroup. Raises UnfitError where too few fit."""
    b_ring = min(3 if taps == 1 else 2, (room // 2 - _LEAST_BY_TURNS * a_bytes) // b_bytes)
    a_ring = min(_MOST_BY_TURNS, (room // 2 - b_ring * b_bytes) // a_bytes)
    if b_ring < 2:
        raise UnfitError("the stages of two warpgroups that take turns do not fit shared memory; choose smaller tiles")
    return 2 * a_ring, 2 * b_ring


def up(value: int, multiple: int) -> int:
    """The least multiple that is no less."""
    return -(-value // multiple) * multiple
