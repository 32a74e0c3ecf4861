"""What the kernel is launched with: the Params of kernels/cuda/sparse_tc.cuh."""

from __future__ import annotations

import math
from dataclasses import dataclass

from escort.cuda.params import Divisor
from escort.methods import activation
from escort.methods.cuda.sparse_tc.tiling import Tiling


@dataclass(frozen=True)
class Params:
    """The kernel's parameters that are the same in every launch: the fields of its struct, in their order.

    Attributes:
        cluster, by_cluster: thread blocks of a cluster; divides by them, as all that begin with `by` do.
        m_tiles, by_m_tiles: tiles of output channels.
        tap_groups: of a tile.
        kernel_rows, kernel_columns: of the filter.
        stride_down, stride_right, dilation_down, dilation_right: of the convolution.
        top, left: its padding.
        out_channels, out_height, out_width, out_plane: of y.
        tile_rows, tile_samples: of the output in a tile of rows.
        tiles_per_sample: pixel tiles of a sample, of tiles of rows.
        by_tile_plane: by the outputs of a sample in a tile of rows.
        pitch, sample_pitch: pixels from row to row and from sample to sample, of tiles of rows.
        load_pixels, zero_pixels, store_pixels: of a tap group, of the zeros behind it, and of what is stored at a time.
        b_stage_bytes, staging_begin, staging_bytes, staging_pitch, sums_begin: of its :class:`SharedMemory`.
        residual: whether one is added.
        bound: 0 none, 1 ReLU, 2 ReLU6.
    """

    cluster: int
    by_cluster: Divisor
    m_tiles: int
    by_m_tiles: Divisor
    tap_groups: int
    kernel_rows: int
    kernel_columns: int
    stride_down: int
    stride_right: int
    dilation_down: int
    dilation_right: int
    top: int
    left: int
    out_channels: int
    out_height: int
    out_width: int
    out_plane: int
    by_out_height: Divisor
    by_out_width: Divisor
    by_out_plane: Divisor
    tile_rows: int
    tile_samples: int
    tiles_per_sample: int
    by_tiles_per_sample: Divisor
    by_tile_plane: Divisor
    pitch: int
    sample_pitch: int
    by_pitch: Divisor
    by_sample_pitch: Divisor
    load_pixels: int
    zero_pixels: int
    store_pixels: int
    b_stage_bytes: int
    staging_begin: int
    staging_bytes: int
    staging_pitch: int
    sums_begin: int
    residual: bool
    bound: int

    @classmethod
    def of(cls, tiling: Tiling) -> Params:
        p, config, memory = tiling.problem, tiling.config, tiling.memory
        out_plane, sample_pitch = p.out_height * p.out_width, tiling.rows.sample_rows * tiling.rows.pitch
        tiles_per_sample = -(-p.out_height // tiling.tile_rows)
        return cls(
            cluster=config.thread_blocks,
            by_cluster=Divisor.of(config.thread_blocks),
            m_tiles=tiling.channel_tiles,
            by_m_tiles=Divisor.of(tiling.channel_tiles),
            tap_groups=len(tiling.tap_groups),
            kernel_rows=p.kernel_size[0],
            kernel_columns=p.kernel_size[1],
            stride_down=p.stride[0],
            stride_right=p.stride[1],
            dilation_down=p.dilation[0],
            dilation_right=p.dilation[1],
            top=p.padding[0],
            left=p.padding[2],
            out_channels=p.out_channels,
            out_height=p.out_height,
            out_width=p.out_width,
            out_plane=out_plane,
            by_out_height=Divisor.of(p.out_height),
            by_out_width=Divisor.of(p.out_width),
            by_out_plane=Divisor.of(out_plane),
            tile_rows=tiling.tile_rows,
            tile_samples=config.samples,
            tiles_per_sample=tiles_per_sample,
            by_tiles_per_sample=Divisor.of(tiles_per_sample),
            by_tile_plane=Divisor.of(tiling.tile_rows * p.out_width),
            pitch=tiling.rows.pitch,
            sample_pitch=sample_pitch,
            by_pitch=Divisor.of(tiling.rows.pitch),
            by_sample_pitch=Divisor.of(sample_pitch),
            load_pixels=math.prod(tiling.load[1:]),
            zero_pixels=tiling.rows.zeros,
            store_pixels=math.prod(tiling.store[1:]),
            b_stage_bytes=memory.b_stage_bytes,
            staging_begin=memory.staging_begin,
            staging_bytes=memory.staging.buffer_bytes,
            staging_pitch=memory.staging.pitch,
            sums_begin=memory.sums_begin,
            residual=p.epilogue.residual,
            bound=activation.bound(p.epilogue),
        )
