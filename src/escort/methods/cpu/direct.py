"""Method `direct`: the convolution computed straight from the compressed filter by our own kernel (direct.cpp).

The output plane is numbered row by row in a pitch that leaves room for the padding, so that any range of positions is a
tile and every nonzero reads the input at one constant distance from it (the Escoin paper's stretched offsets, arXiv
1802.10280, section 3). Padded rows share their zeros: the right padding of one row is the left padding of the next.
This file lays out the tables that the kernel walks; kernels/cpu/direct.hpp says what each means.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

from escort.filter import Geometry, IntArray, SparseFilter
from escort.kernels import _cpu
from escort.methods.base import Method, Prepared, input_check
from escort.problem import Problem

#: name -> (floats per vector, largest tile in vectors), fastest first.
ISAS: dict[str, tuple[int, int]] = {name: (lanes, vectors) for name, lanes, vectors in _cpu.isas()}

_CACHE_FLOATS = 6 * 1024  # of a 32 KiB level-1 cache, leaving room for the filter stream and the partial sums


@dataclass(frozen=True)
class DirectConfig:
    """The knobs of the direct kernel.

    Attributes:
        isa: instruction set, a key of :data:`ISAS`.
        vectors: largest tile, in vectors of that instruction set.
        channel_block: input channels that are staged, and accumulated, together.
        parts: shares into which the output channels of a group are cut, to feed threads where tiles are few.
    """

    isa: str
    vectors: int
    channel_block: int
    parts: int = 1


class Direct(Method):
    """Our kernel: float32 on the CPU, every shape."""

    name = "direct"
    device_type = "cpu"
    config_type = DirectConfig

    def unsupported(self, problem: Problem) -> str | None:
        return None if problem.precision == "fp32" else f"computes in fp32, not in {problem.precision}"

    def configs(self, problem: Problem, sparse_filter: SparseFilter) -> Sequence[DirectConfig]:
        channels = sparse_filter.shape[1]
        found: dict[DirectConfig, None] = {}
        for isa in [name for name in ISAS if name != "generic"] or ["generic"]:
            lanes, most = ISAS[isa]
            for vectors in (most, most // 2):
                layout = _layout(_Shape.of(problem), lanes, vectors)
                # At least a task for each thread with one image, so that the plan serves every batch; four balance
                # better, but each part stages its input anew.
                tasks, most_parts = problem.groups * len(layout.tiles), problem.out_channels // problem.groups
                few, many = (min(-(-n * torch.get_num_threads() // tasks), most_parts) for n in (1, 4))
                fits = max(_CACHE_FLOATS // (layout.vectors * lanes if layout.in_place else layout.channel_stride), 1)
                for block, parts in ((fits, few), (2 * fits, few), (4 * fits, few), (fits // 2, few), (fits, many)):
                    # Blocks of equal size: a last one of a few channels would cost as much as a full one.
                    blocks = -(-channels // min(max(block, 1), channels))
                    found[DirectConfig(isa, vectors, -(-channels // blocks), parts)] = None
        return tuple(found)

    def prepare(
        self, problem: Problem, sparse_filter: SparseFilter, bias: torch.Tensor | None, config: DirectConfig
    ) -> Prepared:
        lanes, most = ISAS[config.isa]
        layout = _layout(_Shape.of(problem), lanes, min(config.vectors, most))
        work = _schedule(sparse_filter, layout, bias, config.channel_block, config.parts)
        height, width, out_height, out_width = problem.height, problem.width, problem.out_height, problem.out_width
        convolution = _cpu.DirectConvolution(
            isa=config.isa,
            entries=work.entries,
            rows=work.rows,
            blocks=work.blocks,
            jobs=work.jobs,
            runs=layout.runs,
            segments=layout.segments,
            tiles=layout.tiles,
            in_place=layout.in_place,
            column_stride=problem.stride[1],
            channel_stride=layout.channel_stride,
            stage_size=0 if layout.in_place else config.channel_block * layout.channel_stride,
            partial_size=work.partial_rows * layout.vectors * lanes,
            x_image=problem.in_channels * height * width,
            x_plane=height * width,
            y_image=problem.out_channels * out_height * out_width,
            y_plane=out_height * out_width,
            activation=problem.epilogue.activation_number,
        )
        run_kernel, threads = convolution.run, torch.get_num_threads
        check, out_shape = input_check(problem), problem.output_shape[1:]

        def run(x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
            check(x, residual)
            images, x = len(x), x.contiguous()
            y = torch.empty((images, *out_shape))
            if residual is not None:
                residual = residual.contiguous()
            at = 0 if residual is None else residual.data_ptr()
            run_kernel(x.data_ptr(), at, y.data_ptr(), images, threads())
            return y

        return Prepared(run)


@dataclass(frozen=True)
class _Shape:
    """What the layout of tiles depends on: the problem without batch, channels and epilogue."""

    height: int
    width: int
    out_height: int
    out_width: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]

    @classmethod
    def of(cls, p: Problem) -> _Shape:
        return cls(p.height, p.width, p.out_height, p.out_width, p.kernel_size, p.stride, p.padding, p.dilation)


@dataclass(frozen=True, eq=False)
class _Layout:
    """How an image is cut into tiles and how a tile's input is staged; tables as in kernels/cpu/direct.hpp."""

    geometry: Geometry
    origin: int  # where tap (0, 0, 0) of a tile's first position lies in the stage
    in_place: bool
    vectors: int  # of the largest tile
    runs: IntArray
    segments: IntArray
    tiles: IntArray

    @property
    def channel_stride(self) -> int:
        return self.geometry.channel_stride


@lru_cache(maxsize=256)
def _layout(shape: _Shape, lanes: int, most_vectors: int) -> _Layout:
    """Cuts the output plane into tiles of at most `most_vectors` vectors of nearly equal size."""
    plane = shape.height * shape.width
    if max(plane, shape.out_height * (shape.width + shape.out_width + sum(shape.padding))) > np.iinfo(np.int32).max:
        raise ValueError(f"an image of {shape.height}x{shape.width} does not fit 32-bit offsets; use a smaller input")
    plain = shape.kernel == (1, 1) and shape.stride == (1, 1) and not any(shape.padding)
    if plain and plane >= lanes:
        starts, counts = _cut(plane, lanes, most_vectors)
        tiles = np.zeros((len(starts), 7), dtype=np.int32)
        tiles[:, 4], tiles[:, 5], tiles[:, 6] = starts, np.minimum(counts * lanes, plane - starts), counts
        none = np.zeros((0, 4), dtype=np.int32)
        geometry = Geometry(channel_stride=plane, row_pitch=shape.width)
        return _Layout(geometry, 0, True, int(counts.max()), none, none[:, :3].copy(), tiles)

    rows = [r * shape.dilation[0] for r in range(shape.kernel[0])]
    columns = [s * shape.dilation[1] for s in range(shape.kernel[1])]
    row_stride, column_stride = shape.stride
    if column_stride == 1:
        pitch = max(shape.width + max(shape.padding[2:]), shape.out_width)
    else:
        pitch = shape.out_width + columns[-1] // column_stride
    starts, counts = _cut((shape.out_height - 1) * pitch + shape.out_width, lanes, most_vectors)
    # The centre column of the kernel, which a pitch of whole vectors would keep aligned, falls on a whole vector.
    origin = -shape.padding[2] // column_stride % lanes
    reach = rows[-1] // row_stride * pitch + columns[-1] // column_stride
    phase_stride = -(-(origin + int(counts.max()) * lanes + reach) // lanes) * lanes
    phases = sorted({(r % row_stride, s % column_stride) for r in rows for s in columns})
    last_phase = phases[-1][0] * column_stride + phases[-1][1]
    channel_stride = (last_phase + 1) * phase_stride
    if channel_stride % 1024 == 0:  # multiples of a page would fall on the same cache sets
        channel_stride += lanes
    geometry = Geometry(channel_stride, pitch, phase_stride, shape.stride, shape.dilation)

    runs: list[tuple[int, int, int, int]] = []
    segments: list[tuple[int, int, int]] = []
    tiles = np.zeros((len(starts), 7), dtype=np.int32)
    for tile, (start, count) in enumerate(zip(starts.tolist(), counts.tolist(), strict=True)):
        first_run, first_segment = len(runs), len(segments)
        for phase in phases:
            at = (phase[0] * column_stride + phase[1]) * phase_stride + origin - start
            runs += _stage_runs(shape, pitch, phase, start, start + count * lanes + reach, at)
        segments += _out_segments(shape, pitch, start, start + count * lanes)
        tiles[tile] = first_run, len(runs), first_segment, len(segments), start, count * lanes, count
    table = [np.array(t, dtype=np.int32).reshape(-1, n) for t, n in ((runs, 4), (segments, 3))]
    return _Layout(geometry, origin, False, int(counts.max()), table[0], table[1], tiles)


def _cut(positions: int, lanes: int, most_vectors: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Tiles over so many positions: (start position, vectors) of each; the sizes differ by one at most, rising."""
    vectors = -(-positions // lanes)
    tiles = -(-vectors // most_vectors)
    edges = np.arange(tiles + 1) * vectors // tiles
    return edges[:-1] * lanes, np.diff(edges)


def _stage_runs(
    shape: _Shape, pitch: int, phase: tuple[int, int], first: int, end: int, at: int
) -> list[tuple[int, int, int, int]]:
    """The runs that stage positions first .. end of one phase, position p at p + at."""
    top, _, left, _ = shape.padding
    row_stride, column_stride = shape.stride
    lead = max(-(-(left - phase[1]) // column_stride), 0)  # zeros left of the image
    source = lead * column_stride + phase[1] - left
    length = min(max(-(-(shape.width - source) // column_stride), 0), max(pitch - lead, 0))
    runs: list[tuple[int, int, int, int]] = []

    def zeros(begin: int, count: int) -> None:
        if count > 0 and runs:
            runs[-1] = (*runs[-1][:3], runs[-1][3] + count)
        elif count > 0:
            runs.append((begin + at, 0, 0, count))

    for row in range(first // pitch, -(-end // pitch)):
        image_row = row * row_stride + phase[0] - top
        begin, stop = max(first, row * pitch), min(end, (row + 1) * pitch)
        data_begin, data_stop = max(begin, row * pitch + lead), min(stop, row * pitch + lead + length)
        if not 0 <= image_row < shape.height or data_begin >= data_stop:
            zeros(begin, stop - begin)
            continue
        zeros(begin, data_begin - begin)
        column = source + (data_begin - row * pitch - lead) * column_stride
        runs.append((data_begin + at, image_row * shape.width + column, data_stop - data_begin, 0))
        zeros(data_stop, stop - data_stop)
    return runs


def _out_segments(shape: _Shape, pitch: int, first: int, end: int) -> list[tuple[int, int, int]]:
    """The pieces of output rows in positions first .. end: (place in the plane, place in the tile, length)."""
    if pitch == shape.out_width:
        return [(first, 0, min(end, shape.out_height * pitch) - first)]
    segments = []
    for row in range(first // pitch, min(-(-end // pitch), shape.out_height)):
        begin, stop = max(first, row * pitch), min(end, row * pitch + shape.out_width)
        if begin < stop:
            segments.append((row * shape.out_width + begin - row * pitch, begin - first, stop - begin))
    return segments


@dataclass(frozen=True, eq=False)
class _Schedule:
    """A filter in the order in which the kernel walks it; tables as in kernels/cpu/direct.hpp."""

    entries: IntArray
    rows: IntArray
    blocks: IntArray
    jobs: IntArray
    partial_rows: int


def _schedule(
    sparse_filter: SparseFilter, layout: _Layout, bias: torch.Tensor | None, channel_block: int, parts: int
) -> _Schedule:
    """Sorts the filter by job, block of input channels and row.

    Rows are dealt to the parts by falling nnz, so that the parts weigh the same. Within a block rows ascend by nnz:
    neighbours then leave the inner loop after as many rounds as the one before, which the branch predictor learns.
    """
    out_channels, group_channels = sparse_filter.shape[:2]
    group_rows = out_channels // sparse_filter.groups
    parts = min(parts, group_rows)
    block_count = -(-group_channels // channel_block)

    nnz = np.diff(sparse_filter.indptr).reshape(sparse_filter.groups, group_rows)
    rank = np.argsort(np.argsort(-nnz, axis=1, kind="stable"), axis=1, kind="stable")
    lap, seat = np.divmod(rank, parts)
    part = np.where(lap % 2 == 0, seat, parts - 1 - seat)
    job = (np.arange(sparse_filter.groups)[:, None] * parts + part).ravel()
    by_job = np.argsort(job, kind="stable")
    slot = np.empty(out_channels, dtype=np.int64)
    job_sizes = np.bincount(job, minlength=sparse_filter.groups * parts)
    slot[by_job] = np.arange(out_channels) - np.repeat(np.cumsum(job_sizes) - job_sizes, job_sizes)

    # A cell is one row within one block. The first and the last block hold every row: one starts the sums, one ends.
    stretched = sparse_filter.stretch(layout.geometry)
    assert stretched.offsets is not None
    block_of = stretched.taps[0] // channel_block
    cell_nnz = np.bincount(
        stretched.rows.astype(np.int64) * block_count + block_of, minlength=out_channels * block_count
    )
    cell_start = np.cumsum(cell_nnz) - cell_nnz  # columns ascend, so a cell's nonzeros lie side by side
    cell_row, cell_block = np.divmod(np.arange(out_channels * block_count), block_count)
    kept = np.flatnonzero((cell_nnz > 0) | (cell_block == 0) | (cell_block == block_count - 1))
    cell_key = job[cell_row[kept]] * block_count + cell_block[kept]
    order = np.lexsort((cell_nnz[kept], cell_key))
    cells, cell_key = kept[order], cell_key[order]

    count = cell_nnz[cells]
    first_entry = np.cumsum(count) - count
    source = np.arange(sparse_filter.nnz) + np.repeat(cell_start[cells] - first_entry, count)
    entries = np.empty((sparse_filter.nnz, 2), dtype=np.int32)
    entries[:, 0] = (stretched.offsets - block_of * (channel_block * layout.channel_stride) + layout.origin)[source]
    entries[:, 1] = sparse_filter.values[source].view(np.int32)

    rows = np.zeros((len(cells) + 1, 4), dtype=np.int32)
    rows[:-1, 0], rows[:-1, 1], rows[:-1, 2] = cell_row[cells], slot[cell_row[cells]], first_entry
    rows[-1, 2] = sparse_filter.nnz
    if bias is not None:
        rows[:-1, 3] = bias.detach().numpy().astype(np.float32).view(np.int32)[cell_row[cells]]

    keys, first_row = np.unique(cell_key, return_index=True)
    block_job, block = np.divmod(keys, block_count)
    first_channel = block_job // parts * group_channels + block * channel_block
    end_channel = np.minimum(first_channel + channel_block, (block_job // parts + 1) * group_channels)
    blocks = np.stack((first_channel, end_channel, first_row, np.append(first_row[1:], len(cells))), axis=1)
    edges = np.searchsorted(block_job, np.arange(sparse_filter.groups * parts + 1))
    return _Schedule(
        entries,
        rows,
        blocks.astype(np.int32),
        np.stack((edges[:-1], edges[1:]), axis=1).astype(np.int32),
        int(job_sizes.max()) if block_count > 1 else 0,
    )
