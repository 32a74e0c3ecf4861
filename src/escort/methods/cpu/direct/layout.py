"""How the direct kernel cuts a sample into tiles, and how it stages their input.

The output plane is cut into strips of columns, and a strip is numbered row by row. A range of its positions is a tile,
and every nonzero reads the stage at one constant distance from it (the Escoin paper's stretched offsets, arXiv
1802.10280, section 3). The stage holds as many copies of the input as it takes for these distances to be whole vectors.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from escort.problem import Problem

# The structs of kernels/cpu/direct.hpp, which says what the fields mean.
_RUN = "stage_position plane_position count plane_step lanes more_lanes joins"
RUN = np.dtype([(name, "i4") for name in _RUN.split()])
SEGMENT = np.dtype([(name, "i4") for name in ("plane_position", "tile_position", "length")])
TILE = np.dtype(
    [
        (name, "i4")
        for name in ("x_start", "first_run", "end_run", "first_segment", "end_segment", "y_start", "length", "vectors")
    ]
)

Records = NDArray[np.void]


def records(dtype: np.dtype[Any], count: int | tuple[int, ...], **columns: ArrayLike) -> Records:
    """So many records with these columns, each a number or of shape (count,). Fields without a column are zero."""
    table = np.zeros(count, dtype)
    for name, column in columns.items():
        table[name] = column
    return table


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
        tap_offsets: (R, S) where a tile's first position reads each tap of input channel 0, from where a block starts.
        channel_stride: between the input channels of a block, in the stage or in x.
        in_place: whether tiles are read from x, without a stage.
        vectors: of the largest tile.
        runs: records of RUN.
        segments: records of SEGMENT.
        tiles: records of TILE.
    """

    tap_offsets: NDArray[np.int64]
    channel_stride: int
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


@lru_cache(maxsize=256)
def _layout(shape: PlaneShape, lanes: int, most_vectors: int) -> Layout:
    plane = shape.height * shape.width
    if max(plane, shape.out_height * (shape.width + shape.out_width + sum(shape.padding))) > np.iinfo(np.int32).max:
        raise ValueError(f"a plane of {shape.height}x{shape.width} does not fit 32-bit offsets; use a smaller input")
    if shape.kernel_size == (1, 1) and shape.stride == (1, 1) and not any(shape.padding):
        shape = replace(shape, height=1, width=plane, out_height=1, out_width=plane)  # a plane is one long row
        if plane % lanes == 0:
            return _in_place_layout(plane, lanes, most_vectors)
    return _staged_layout(shape, lanes, most_vectors)


def _in_place_layout(plane: int, lanes: int, most_vectors: int) -> Layout:
    starts, vectors = _cut(plane, lanes, most_vectors)
    tiles = records(TILE, len(starts), x_start=starts, y_start=starts, length=vectors * lanes, vectors=vectors)
    return Layout(
        np.zeros((1, 1), np.int64), plane, True, int(vectors.max()), records(RUN, 0), records(SEGMENT, 0), tiles
    )


class _Copy(NamedTuple):
    """One copy of a tile's input in the stage, shifted so that the taps that read it read whole vectors.

    Attributes:
        start: where it lies in the stage of a channel.
        row, row_phase: the first map row that it holds for output row 0 is row * row_stride + row_phase.
        column: the map column that it holds for output column 0.
        vectors: how many it holds.
    """

    start: int
    row: int
    row_phase: int
    column: int
    vectors: int


class _Strips(NamedTuple):
    """The tiles as they lie in strips of columns, whose positions are numbered row by row in a pitch; each (tiles,).

    Attributes:
        left: the first output column of the strip.
        start: the first position in the strip.
        vectors: how many the tile has.
    """

    left: NDArray[np.int64]
    start: NDArray[np.int64]
    vectors: NDArray[np.int64]

    @classmethod
    def of(cls, shape: PlaneShape, lanes: int, most_vectors: int) -> tuple[int, _Strips]:
        """The pitch, and the tiles."""
        if shape.out_height == 1:  # each tile is a strip
            starts, vectors = _cut(shape.out_width, lanes, most_vectors)
            return int(vectors.max()) * lanes, cls(starts, np.zeros_like(starts), vectors)
        # Where the kernel has one row, rows may follow one another, as each tap is aligned in a copy of its own.
        narrow = min(lanes, 1 << (shape.out_width - 1).bit_length())
        pitch = shape.out_width if shape.kernel_size[0] == 1 else narrow
        strips = -(-shape.out_width // pitch)
        starts, vectors = _cut((shape.out_height - 1) * pitch + min(pitch, shape.out_width), lanes, most_vectors)
        # Tiles of the same rows follow one another: a thread then computes rows, as in layers that have no strips, and
        # reads those that it wrote.
        left = np.tile(np.arange(strips) * pitch, len(starts))
        return pitch, cls(left, np.repeat(starts, strips), np.repeat(vectors, strips))


def _staged_layout(shape: PlaneShape, lanes: int, most_vectors: int) -> Layout:
    pitch, strips = _Strips.of(shape, lanes, most_vectors)
    most = int(strips.vectors.max())
    copies, tap_offsets, channel_stride = _copies(shape, lanes, most, pitch)
    tiles = records(TILE, len(strips.left), vectors=strips.vectors)

    # Tiles that read alike, from different places, share their runs.
    row = strips.start // pitch
    tiles["x_start"] = row * shape.stride[0] * shape.width + strips.left * shape.stride[1]
    readings = _readings(shape, pitch, most * lanes, strips)
    _, first, kind = np.unique(readings, axis=0, return_index=True, return_inverse=True)
    kind = kind.ravel()  # some versions of numpy keep the axis
    own = _Strips(*(column[first] for column in strips))
    runs = np.concatenate([_stage_runs(shape, lanes, pitch, copy, own) for copy in copies], axis=1)
    runs["plane_position"] -= tiles["x_start"][first, None]
    runs, counts = _joined(runs, lanes)
    end = np.cumsum(counts)
    tiles["first_run"], tiles["end_run"] = (end - counts)[kind], end[kind]

    segments = records(SEGMENT, (len(tiles), 0))
    if shape.out_height == 1 or pitch == shape.out_width:
        tiles["y_start"] = strips.left + strips.start
        positions = shape.out_height * shape.out_width - tiles["y_start"]
        tiles["length"] = np.minimum(strips.vectors * lanes, positions)
    else:
        segments = _segments(shape, lanes, pitch, strips)
    holds = segments["length"] > 0
    tiles["end_segment"] = np.cumsum(holds.sum(axis=1))
    tiles["first_segment"] = tiles["end_segment"] - holds.sum(axis=1)
    return Layout(tap_offsets, channel_stride, False, most, runs, segments[holds], tiles)


def _readings(shape: PlaneShape, pitch: int, positions: int, strips: _Strips) -> NDArray[np.int64]:
    """What the runs of tiles depend on besides their place, (tiles, 6): tiles with equal numbers read alike.

    That is where in a row the tile starts, its size, and by how much what it reads reaches beyond each side of the map.
    """
    row, column = np.divmod(strips.start, pitch)
    row_reach, column_reach = ((taps - 1) * step for taps, step in zip(shape.kernel_size, shape.dilation, strict=True))
    first_row = row * shape.stride[0] - shape.padding[0]
    last_row = first_row + (column + positions) // pitch * shape.stride[0] + row_reach
    first_column = strips.left * shape.stride[1] - shape.padding[2]
    last_column = first_column + (pitch - 1) * shape.stride[1] + column_reach
    beyond = (-first_row, last_row - shape.height + 1, -first_column, last_column - shape.width + 1)
    return np.stack([column, strips.vectors, *(np.maximum(side, 0) for side in beyond)], axis=1)


def _copies(shape: PlaneShape, lanes: int, vectors: int, pitch: int) -> tuple[list[_Copy], NDArray[np.int64], int]:
    """The copies that make every tap's loads aligned, the offset of each tap in them, and the stride of a channel.

    Taps share a copy where they read the same columns, and rows that are whole vectors apart and near one another.
    """
    taps: dict[tuple[int, int, int], list[tuple[int, int, int]]] = {}
    for r, s in np.ndindex(shape.kernel_size):
        row, row_phase = divmod(r * shape.dilation[0], shape.stride[0])
        taps.setdefault((s * shape.dilation[1], row_phase, row * pitch % lanes), []).append((row, r, s))
    tap_offsets = np.zeros(shape.kernel_size, np.int64)
    copies: list[_Copy] = []
    end = 0
    for (column, row_phase, _), readers in sorted(taps.items()):
        for row, r, s in readers:
            copy = copies[-1] if copies and row != readers[0][0] else None
            if copy is None or (row - copy.row) * pitch > copy.vectors * lanes:
                copies.append(_Copy(end, row, row_phase, column, vectors))
            else:
                copies[-1] = copy._replace(vectors=vectors + (row - copy.row) * pitch // lanes)
            tap_offsets[r, s] = copies[-1].start + (row - copies[-1].row) * pitch
            end = copies[-1].start + copies[-1].vectors * lanes
    return copies, tap_offsets, end + (lanes if end % 1024 == 0 else 0)  # pages would fall on the same cache sets


def _cut(positions: int, lanes: int, most_vectors: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Tiles over so many positions: first position and vectors of each. The sizes differ by one at most, and rise."""
    vectors = -(-positions // lanes)
    tiles = -(-vectors // most_vectors)
    edges = np.arange(tiles + 1) * vectors // tiles
    return edges[:-1] * lanes, np.diff(edges)


def _stage_runs(shape: PlaneShape, lanes: int, pitch: int, copy: _Copy, strips: _Strips) -> Records:
    """The runs of one vector that stage a copy, (tiles, runs). Those to leave out have lanes -1."""
    most_rows = (lanes + pitch - 2) // pitch + 1  # that a vector reaches
    part, vector = np.divmod(np.arange(copy.vectors * most_rows), copy.vectors)
    position = strips.start[:, None] + copy.row * pitch + vector * lanes
    row = position // pitch + part
    lane = row * pitch - position  # of the row's first column
    map_row = row * shape.stride[0] + copy.row_phase - shape.padding[0]
    map_column = strips.left[:, None] * shape.stride[1] + copy.column - shape.padding[2]  # of the row's first column
    first = np.maximum(lane + np.maximum(-(map_column // shape.stride[1]), 0), 0)
    end = np.minimum(lane + np.minimum(-((map_column - shape.width) // shape.stride[1]), pitch), lanes)
    is_empty = (map_row < 0) | (map_row >= shape.height) | (first >= end)
    first, end = np.where(is_empty, 0, first), np.where(is_empty, 0, end)
    lanes_loaded, more_lanes = (1 << end) - (1 << first), np.zeros_like(first)
    if shape.stride[1] == 2:
        lanes_loaded = (1 << np.minimum(2 * end - 1, lanes).clip(0)) - (1 << np.minimum(2 * first, lanes))
        more_lanes = (1 << (2 * end - lanes).clip(0)) - (1 << (2 * first - lanes + 1).clip(0))
    return records(
        RUN,
        row.shape,
        stage_position=copy.start + vector * lanes,
        plane_position=np.where(is_empty, 0, map_row * shape.width + map_column - lane * shape.stride[1]),
        lanes=np.where(is_empty & (part > 0), -1, lanes_loaded),
        more_lanes=more_lanes,
        joins=part > 0,
    )


def _joined(runs: Records, lanes: int) -> tuple[Records, NDArray[np.int64]]:
    """Runs of one vector, (tiles, runs), as runs of vectors that lie evenly apart, and how many each tile has."""
    brings = runs["lanes"] >= 0
    tile, runs = np.nonzero(brings)[0], runs[brings]
    follows = (np.diff(tile) == 0) & (np.diff(runs["stage_position"]) == lanes)
    for name in ("lanes", "more_lanes", "joins"):
        follows &= np.diff(runs[name]) == 0
    step = np.diff(runs["plane_position"])
    # One that would be the third or later of its run must be as far away as the second was.
    follows[1:] &= ~follows[:-1] | (np.diff(step) == 0)
    first = np.flatnonzero(np.append(True, ~follows))
    joined = runs[first]
    joined["count"] = np.diff(np.append(first, len(runs)))
    joined["plane_step"] = np.where(joined["count"] > 1, np.append(step, 0)[first], 0)
    return joined, np.bincount(tile[first], minlength=len(brings))


def _segments(shape: PlaneShape, lanes: int, pitch: int, strips: _Strips) -> Records:
    """The segments of each tile, (tiles, segments), with length 0 where there is none."""
    position = np.arange(0, strips.vectors.max() * lanes, pitch)
    row = strips.start[:, None] // pitch + position // pitch
    length = np.minimum(shape.out_width - strips.left, pitch)[:, None]
    holds = (row < shape.out_height) & (position < strips.vectors[:, None] * lanes)
    return records(
        SEGMENT,
        row.shape,
        plane_position=row * shape.out_width + strips.left[:, None],
        tile_position=np.broadcast_to(position, row.shape),
        length=np.where(holds, length, 0),
    )
