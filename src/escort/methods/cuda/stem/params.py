"""The stem kernel's parameters that are the same in every launch."""

from __future__ import annotations

from dataclasses import dataclass

from escort.cuda.params import Divisor
from escort.methods import activation
from escort.methods.cuda.stem.config import StemConfig
from escort.methods.cuda.stem.layout import OCTET, Layout


@dataclass(frozen=True)
class Params:
    """The fields of the kernel's struct, in their order.

    Attributes:
        channels: of y.
        height, width, out_height, out_width: of x and y.
        stride_down, stride_right, top, left: of the convolution.
        rows, octets: of a block.
        row_tiles, column_tiles: blocks down and across a sample.
        in_rows, in_columns: of the staged input.
        pixel, pitch: its elements from a pixel or row to the next.
        steps: products along what is summed.
        groups: of channels that are multiplied one after the other.
        by_row_tiles, by_column_tiles, by_octets, by_in_columns: divide by these.
        bound: 0 none, 1 ReLU, 2 ReLU6.
    """

    channels: int
    height: int
    width: int
    out_height: int
    out_width: int
    stride_down: int
    stride_right: int
    top: int
    left: int
    rows: int
    octets: int
    row_tiles: int
    column_tiles: int
    in_rows: int
    in_columns: int
    pixel: int
    pitch: int
    steps: int
    groups: int
    by_row_tiles: Divisor
    by_column_tiles: Divisor
    by_octets: Divisor
    by_in_columns: Divisor
    bound: int

    @classmethod
    def of(cls, layout: Layout, config: StemConfig) -> Params:
        problem = layout.problem
        row_tiles = -(-problem.out_height // config.rows)
        column_tiles = -(-problem.out_width // (OCTET * config.octets))
        return cls(
            channels=problem.out_channels,
            height=problem.height,
            width=problem.width,
            out_height=problem.out_height,
            out_width=problem.out_width,
            stride_down=problem.stride[0],
            stride_right=problem.stride[1],
            top=problem.padding[0],
            left=problem.padding[2],
            rows=config.rows,
            octets=config.octets,
            row_tiles=row_tiles,
            column_tiles=column_tiles,
            in_rows=layout.in_rows,
            in_columns=layout.in_columns,
            pixel=layout.pixel,
            pitch=layout.pitch,
            steps=layout.steps,
            groups=layout.channels.groups,
            by_row_tiles=Divisor.of(row_tiles),
            by_column_tiles=Divisor.of(column_tiles),
            by_octets=Divisor.of(config.octets),
            by_in_columns=Divisor.of(layout.in_columns),
            bound=activation.bound(problem.epilogue),
        )

    @property
    def blocks(self) -> int:
        """Those of a sample."""
        return self.row_tiles * self.column_tiles
