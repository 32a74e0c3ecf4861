"""How the direct kernel cuts a sample into tiles, and how it stages their input.

The output plane is numbered row by row in a pitch that leaves room for the padding. Any range of positions is then a
tile, and every nonzero reads the input at one constant distance from it (the Escoin paper's stretched offsets, arXiv
1802.10280, section 3). Padded rows share their zeros: the right padding of one row is the left padding of the next.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from escort.filter import Geometry
from escort.problem import Problem

# The structs of kernels/cpu/direct.hpp, which says what the fields mean.
RUN = np.dtype([(name, "i4") for name in ("stage_position", "plane_position", "length", "zeros")])
SEGMENT = np.dtype([(name, "i4") for name in ("plane_position", "tile_position", "length")])
TILE = np.dtype(
    [(name, "i4") for name in ("first_run", "end_run", "first_segment", "end_segment", "start", "length", "vectors")]
)

Records = NDArray[np.void]


def records(dtype: np.dtype[Any], count: int, **columns: ArrayLike) -> Records:
    """So many records with these columns, each a number or of shape (count,). Fields without a column are zero."""
    table = np.zeros(count, dtype)
    for name, column in columns.items():
        table[name] = column
    return table


class Run(NamedTuple):
    """A record of RUN."""

    stage_position: int
    plane_position: int
    length: int
    zeros: int


class Segment(NamedTuple):
    """A record of SEGMENT."""

    plane_position: int
    tile_position: int
    length: int


@dataclass(frozen=True)
class PlaneShape:
    """What the layout depends on: a problem without batch, channels and epilogue."""

    height: int
    width: int
    out_height: int
    out_width: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]

    @classmethod
    def of(cls, p: Problem) -> PlaneShape:
        return cls(p.height, p.width, p.out_height, p.out_width, p.kernel_size, p.stride, p.padding, p.dilation)


@dataclass(frozen=True, eq=False)
class Layout:
    """How a sample is cut into tiles, and how a tile's input is staged.

    Attributes:
        geometry: of the staged input, or of x where tiles are read in place.
        origin: where tap (0, 0, 0) of a tile's first position lies in the stage.
        in_place: whether tiles are read from x and written to y directly, without a stage.
        vectors: of the largest tile.
        runs: records of RUN.
        segments: records of SEGMENT.
        tiles: records of TILE.
    """

    geometry: Geometry
    origin: int
    in_place: bool
    vectors: int
    runs: Records
    segments: Records
    tiles: Records

    @classmethod
    def of(cls, problem: Problem, lanes: int, most_vectors: int) -> Layout:
        """Cuts the output plane into tiles of nearly equal size, of at most `most_vectors` vectors of `lanes` floats.

        Raises:
            ValueError: if the planes are too large for 32-bit offsets.
        """
        return _layout(PlaneShape.of(problem), lanes, most_vectors)

    @property
    def channel_stride(self) -> int:
        return self.geometry.channel_stride


@lru_cache(maxsize=256)
def _layout(shape: PlaneShape, lanes: int, most_vectors: int) -> Layout:
    plane = shape.height * shape.width
    if max(plane, shape.out_height * (shape.width + shape.out_width + sum(shape.padding))) > np.iinfo(np.int32).max:
        raise ValueError(f"a plane of {shape.height}x{shape.width} does not fit 32-bit offsets; use a smaller input")
    pointwise = shape.kernel_size == (1, 1) and shape.stride == (1, 1) and not any(shape.padding)
    if pointwise and plane >= lanes:
        return _in_place_layout(shape, lanes, most_vectors)
    return _staged_layout(shape, lanes, most_vectors)


def _in_place_layout(shape: PlaneShape, lanes: int, most_vectors: int) -> Layout:
    plane = shape.height * shape.width
    starts, vectors = _cut(plane, lanes, most_vectors)
    lengths = np.minimum(vectors * lanes, plane - starts)
    tiles = records(TILE, len(starts), start=starts, length=lengths, vectors=vectors)
    geometry = Geometry(channel_stride=plane, row_pitch=shape.width)
    return Layout(geometry, 0, True, int(vectors.max()), records(RUN, 0), records(SEGMENT, 0), tiles)


def _staged_layout(shape: PlaneShape, lanes: int, most_vectors: int) -> Layout:
    tap_rows, tap_columns = (
        [tap * dilation for tap in range(taps)]
        for taps, dilation in zip(shape.kernel_size, shape.dilation, strict=True)
    )
    row_stride, column_stride = shape.stride
    if column_stride == 1:
        pitch = max(shape.width + max(shape.padding[2:]), shape.out_width)
    else:
        pitch = shape.out_width + tap_columns[-1] // column_stride
    starts, vectors = _cut((shape.out_height - 1) * pitch + shape.out_width, lanes, most_vectors)
    # The centre column of the kernel, which a pitch of whole vectors would keep aligned, falls on a whole vector.
    origin = -shape.padding[2] // column_stride % lanes
    reach = tap_rows[-1] // row_stride * pitch + tap_columns[-1] // column_stride
    phase_stride = -(-(origin + int(vectors.max()) * lanes + reach) // lanes) * lanes
    phases = sorted({(row % row_stride, column % column_stride) for row in tap_rows for column in tap_columns})
    last_phase = phases[-1][0] * column_stride + phases[-1][1]
    channel_stride = (last_phase + 1) * phase_stride
    if channel_stride % 1024 == 0:  # multiples of a page would fall on the same cache sets
        channel_stride += lanes

    runs: list[Run] = []
    segments: list[Segment] = []
    tiles = records(TILE, len(starts), start=starts, length=vectors * lanes, vectors=vectors)
    for tile in tiles:
        start, end = int(tile["start"]), int(tile["start"] + tile["length"])
        tile["first_run"], tile["first_segment"] = len(runs), len(segments)
        for phase in phases:
            shift = (phase[0] * column_stride + phase[1]) * phase_stride + origin - start
            runs += _stage_runs(shape, pitch, phase, range(start, end + reach), shift)
        segments += _out_segments(shape, pitch, range(start, end))
        tile["end_run"], tile["end_segment"] = len(runs), len(segments)
    geometry = Geometry(channel_stride, pitch, phase_stride, shape.stride, shape.dilation)
    return Layout(geometry, origin, False, int(vectors.max()), np.array(runs, RUN), np.array(segments, SEGMENT), tiles)


def _cut(positions: int, lanes: int, most_vectors: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Tiles over so many positions: first position and vectors of each. The sizes differ by one at most, and rise."""
    vectors = -(-positions // lanes)
    tiles = -(-vectors // most_vectors)
    edges = np.arange(tiles + 1) * vectors // tiles
    return edges[:-1] * lanes, np.diff(edges)


def _stage_runs(shape: PlaneShape, pitch: int, phase: tuple[int, int], positions: range, shift: int) -> list[Run]:
    """The runs that stage these positions of one phase, position p at p + shift."""
    top, _, left, _ = shape.padding
    row_stride, column_stride = shape.stride
    lead = max(-(-(left - phase[1]) // column_stride), 0)  # zeros left of the map row
    first_column = lead * column_stride + phase[1] - left
    length = min(max(-(-(shape.width - first_column) // column_stride), 0), max(pitch - lead, 0))
    runs: list[Run] = []

    def add_zeros(begin: int, count: int) -> None:
        if count > 0 and runs:
            runs[-1] = runs[-1]._replace(zeros=runs[-1].zeros + count)
        elif count > 0:
            runs.append(Run(begin + shift, 0, 0, count))

    for row in range(positions.start // pitch, -(-positions.stop // pitch)):
        map_row = row * row_stride + phase[0] - top
        row_start = row * pitch
        begin, end = max(positions.start, row_start), min(positions.stop, row_start + pitch)
        data_begin, data_end = max(begin, row_start + lead), min(end, row_start + lead + length)
        if not 0 <= map_row < shape.height or data_begin >= data_end:
            add_zeros(begin, end - begin)
            continue
        add_zeros(begin, data_begin - begin)
        column = first_column + (data_begin - row_start - lead) * column_stride
        runs.append(Run(data_begin + shift, map_row * shape.width + column, data_end - data_begin, 0))
        add_zeros(data_end, end - data_end)
    return runs


def _out_segments(shape: PlaneShape, pitch: int, positions: range) -> list[Segment]:
    """The segments of a tile: where in its positions it holds outputs, row by row."""
    first, end = positions.start, positions.stop
    if pitch == shape.out_width:
        return [Segment(first, 0, min(end, shape.out_height * pitch) - first)]
    segments = []
    for row in range(first // pitch, min(-(-end // pitch), shape.out_height)):
        begin, stop = max(first, row * pitch), min(end, row * pitch + shape.out_width)
        if begin < stop:
            segments.append(Segment(row * shape.out_width + begin - row * pitch, begin - first, stop - begin))
    return segments
