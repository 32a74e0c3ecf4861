"""Method `direct` on CUDA: the convolution computed straight from the compressed filter (kernels/direct.cu).

As on the CPU, output positions are numbered row by row, and image by image, in a pitch that leaves room for the
padding, so that any range of positions is a tile and every nonzero reads its input at one constant distance (the Escoin
paper's stretched offsets, arXiv 1802.10280, section 3). A tile's input is brought into shared memory block by block of
channels, its padding resolved on the way. Words of 16-bit storage hold the same position of two neighbouring images, so
that every offset stays aligned.

This file lays out the tables that the kernel walks and predicts which configs are worth timing. What bounds the kernel
is shared memory, which delivers one wavefront of 32 words per clock: a wavefront per nonzero and 32 positions.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from escort import jit
from escort.methods.base import Runner
from escort.problem import Problem
from escort.sparse import Geometry, IntArray, StretchedCSR

_SOURCE = "direct.cu"
_LANES = 32
_ACTIVATIONS = {"none": 0, "relu": 1, "relu6": 2}
_STORAGE = {"fp32": 0, "tf32": 0, "fp16": 1, "bf16": 2}
_MOST_INDEX = np.iinfo(np.int32).max
#: Most words (pairs of words where two columns are read at once) that a lane copies per channel; kernels are compiled
#: for the least of these that suffices.
_SLOT_CLASSES = (2, 4, 8, 16, 32)
#: Blocks along y; more tiles than these continue along z.
_MOST_TILES_Y = 32768


@dataclass(frozen=True)
class DirectConfig:
    """The knobs of the direct kernel. A block computes ``32 * words * position_warps`` positions of
    ``row_warps * rows`` output channels.

    Attributes:
        words: positions per lane.
        rows: output channels per warp.
        position_warps, row_warps, channel_warps: consumer warps along positions, output channels and input channels.
            Channel warps share the nonzeros of an output channel and add up their sums at the end.
        producers: warps that copy the input.
        channel_block: input channels per stage.
        stages: of the ring in shared memory.
        blocks: per multiprocessor that registers leave room for.
        packed: 16-bit storage: sums of up to 32 products are kept in 16 bits, two images per instruction. Else every
            product is added in float32, as it always is for fp32.
        balanced: output channels are dealt to warps by their nonzeros, else in their own order.
    """

    words: int
    rows: int
    position_warps: int
    row_warps: int
    channel_warps: int
    producers: int
    channel_block: int
    stages: int
    blocks: int = 1
    packed: bool = False
    balanced: bool = True

    @property
    def consumers(self) -> int:
        return self.position_warps * self.row_warps * self.channel_warps

    @property
    def threads(self) -> int:
        return (self.consumers + self.producers) * _LANES

    @property
    def tile(self) -> int:
        """Words of a tile."""
        return _LANES * self.words * self.position_warps


@dataclass(frozen=True)
class Gpu:
    """What the search needs to know of a device."""

    multiprocessors: int
    shared_bytes: int  # of a block at most
    registers: int = 65536  # of a multiprocessor

    @classmethod
    def of(cls, device: str) -> Gpu:
        p: Any = torch.cuda.get_device_properties(device)  # torch's stubs lack some of its attributes
        return cls(p.multi_processor_count, p.shared_memory_per_block_optin, p.regs_per_multiprocessor)


H200 = Gpu(multiprocessors=132, shared_bytes=232448)


class DirectCuda:
    """Our kernel for NVIDIA GPUs: fp32, fp16 and bf16; a TF32 problem is computed in fp32, which is more precise."""

    name = "direct"
    device_type = "cuda"
    config_type = DirectConfig

    def unsupported(self, problem: Problem) -> str | None:
        if problem.batch > (most := most_images(problem)):
            return f"the kernel addresses {most} images of this size at most; use a smaller batch"
        try:
            jit.compiler_version()
            jit.arch(torch.device(problem.device))
            gpu = Gpu.of(problem.device)
        except (ImportError, RuntimeError) as error:
            return str(error)
        if not len(_space(problem, None, gpu, packed=False)["clocks"]):
            return "the input of the smallest tile, with its halo, does not fit into shared memory"
        return None

    def configs(self, problem: Problem, filter: StretchedCSR) -> Sequence[DirectConfig]:
        return search(problem, filter, Gpu.of(problem.device))

    def neighbours(self, config: DirectConfig, problem: Problem, filter: StretchedCSR) -> dict[str, list[DirectConfig]]:
        """For each knob, the configs that differ from `config` in it alone, as far as the device can run them."""
        return neighbours(config, problem, filter, Gpu.of(problem.device))

    def prepare(
        self, problem: Problem, filter: StretchedCSR, bias: torch.Tensor | None, config: DirectConfig
    ) -> Runner:
        device = torch.device(problem.device)
        shape, tables = _Shape.of(problem), pack(problem, filter, config)
        layout = Layout.of(problem, config.tile)
        shared = int(_shared_bytes(layout, config, tables.entry_bytes))
        kernel = jit.kernel(_SOURCE, defines(config, layout, problem.dtype), device)
        arrays = (tables.entries, tables.segments, tables.rows, tables.first_channels)
        on_device = [torch.from_numpy(array).to(device) for array in arrays]
        offsets = None if bias is None else bias.detach().to(device, torch.float32).contiguous()
        launch = kernel.bind(
            config.threads,
            shared,
            (
                *(torch.Tensor, torch.Tensor, torch.Tensor, offsets, *on_device, int, int),
                *scalars(problem, layout, tables, config),
            ),
            overlap=torch.cuda.get_device_capability(device) >= (9, 0),
        )
        torch.cuda.synchronize(device)  # the tables are there before any stream reads them
        in_shape, out_shape, dtype = problem.input_shape[1:], problem.output_shape[1:], problem.torch_dtype
        most = most_images(problem)
        groups, tile = len(tables.first_channels), config.tile
        takes_residual = problem.epilogue.residual

        def run(x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
            images = len(x)
            if x.shape[1:] != in_shape or x.dtype is not dtype or x.device != device:
                raise ValueError(
                    f"prepared for {dtype} inputs of shape (N, *{in_shape}) on {device}, got {x.dtype} "
                    f"{tuple(x.shape)} on {x.device}"
                )
            if images > most:
                raise ValueError(f"the kernel addresses {most} images of this size at most, got {images}")
            x = x.contiguous()
            if layout.paired and x.data_ptr() % 4:
                x = x.clone()  # the kernel reads two columns at once
            y = torch.empty((images, *out_shape), dtype=dtype, device=device)
            if (residual is not None) is not takes_residual:
                raise ValueError(f"prepared {'for' if takes_residual else 'without'} a residual, and called otherwise")
            if residual is not None:
                if residual.shape != y.shape or residual.dtype is not dtype or residual.device != device:
                    raise ValueError(
                        f"a residual is {dtype} of shape {tuple(y.shape)} on {device}, got {residual.dtype} "
                        f"{tuple(residual.shape)} on {residual.device}"
                    )
                residual = residual.contiguous()
            if images:
                tiles = -(-shape.positions(-(-images // layout.images_per_word)) // tile)
                grid = groups, min(tiles, _MOST_TILES_Y), -(-tiles // _MOST_TILES_Y)
                launch(grid, x, y, residual, images, tiles)
            return y

        return run


@dataclass(frozen=True)
class _Shape:
    """The sequence of positions: what it depends on, without batch, channels and epilogue."""

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
        return cls(p.height, p.width, p.out_height, p.out_width, p.kernel, p.stride, p.padding, p.dilation)

    @property
    def pitch(self) -> int:
        """Positions from row to row. Without stride the right padding of a row is the left padding of the next."""
        if self.stride[1] == 1:
            return max(self.width + max(self.padding[2:]), self.out_width)
        return self.out_width + (self.kernel[1] - 1) * self.dilation[1] // self.stride[1]

    @property
    def image_rows(self) -> int:
        """Rows from image to image; the padding between two images is shared as well."""
        if self.stride[0] == 1:
            return max(self.height + max(self.padding[:2]), self.out_height)
        return self.out_height + (self.kernel[0] - 1) * self.dilation[0] // self.stride[0]

    @property
    def reach(self) -> int:
        """How far behind a position its last tap reads."""
        rows, columns = ((k - 1) * d // s for k, d, s in zip(self.kernel, self.dilation, self.stride, strict=True))
        return rows * self.pitch + columns

    @property
    def phases(self) -> int:
        """Phases of a strided input that are kept, see :class:`escort.sparse.Geometry`."""
        last = [
            max(i * d % s for i in range(k)) for k, d, s in zip(self.kernel, self.dilation, self.stride, strict=True)
        ]
        return last[0] * self.stride[1] + last[1] + 1

    def positions(self, images: int) -> int:
        """Of so many images, up to the last output."""
        unused = (self.image_rows - self.out_height) * self.pitch + self.pitch - self.out_width
        return images * self.image_rows * self.pitch - unused


@dataclass(frozen=True)
class Layout:
    """How a stage holds a tile's input.

    Attributes:
        paired: two neighbouring columns of 16-bit storage are read at once.
        odd: a channel has an odd number of elements.
        phase_words: words of each phase: the tile and what its last position reaches.
        channel_words: words of a channel, whole rows of banks.
        slots: words, or pairs of words, that a lane copies per channel.
    """

    images_per_word: int
    paired: bool
    odd: bool
    phase_words: int
    channel_words: int
    slots: int

    @classmethod
    def of(cls, problem: Problem, tile: Any) -> Layout:
        """The layout for a tile of so many words; with an array of tile sizes, arrays of what depends on them."""
        shape, half = _Shape.of(problem), _STORAGE[problem.dtype] != 0
        phase_words = tile + shape.reach
        words = phase_words * shape.phases
        paired = half and shape.stride == (1, 1) and int(np.prod(problem.input_shape[1:])) % 2 == 0
        slots = -(-words // _LANES)
        if paired:
            # Columns in any window of so many positions, and for each image that it meets a pair at either end.
            columns = phase_words // shape.pitch * shape.width + np.minimum(phase_words % shape.pitch, shape.width)
            images = phase_words // (shape.pitch * shape.image_rows) + 2
            slots = -(-(columns // 2 + 2 * images) // _LANES)
        slots = slots if np.ndim(slots) else int(slots)
        odd = bool(problem.height * problem.width % 2)
        return cls(1 + half, paired, odd, phase_words, -(-words // _LANES) * _LANES, slots)


def most_images(problem: Problem) -> int:
    """What the kernel's 32-bit numbers reach: bytes of the input, elements of the output, positions."""
    shape, dtype = _Shape.of(problem), problem.torch_dtype
    in_size, out_size = (int(np.prod(s[1:], dtype=object)) for s in (problem.input_shape, problem.output_shape))
    positions = _MOST_INDEX // 2 // (shape.image_rows * shape.pitch)
    images_per_word = 1 if _STORAGE[problem.dtype] == 0 else 2
    return min((2**32 - 1) // (in_size * dtype.itemsize), _MOST_INDEX // out_size, positions * images_per_word)


def defines(config: DirectConfig, layout: Layout, dtype: str) -> dict[str, int]:
    """The macros that a config is compiled with; kernels/direct.cu says what each means."""
    return {
        "STORAGE": _STORAGE[dtype],
        "PACKED": int(config.packed),
        "PAIRED": int(layout.paired),
        "ODD": int(layout.odd),
        "WORDS": config.words,
        "ROWS": config.rows,
        "SLOTS": next(slots for slots in _SLOT_CLASSES if slots >= layout.slots),
        "THREADS": config.threads,
        "BLOCKS": config.blocks,
    }


def scalars(problem: Problem, layout: Layout, tables: Tables, config: DirectConfig) -> tuple[int, ...]:
    """The kernel's last parameters, the same in every launch."""
    shape = _Shape.of(problem)
    return (
        problem.in_channels,
        shape.height,
        shape.width,
        problem.out_channels,
        shape.out_height,
        shape.out_width,
        shape.pitch,
        *_divisor(shape.pitch),
        shape.image_rows,
        *_divisor(shape.image_rows),
        *_divisor(shape.width),
        *_divisor(-(-shape.height * shape.width // 2)),
        shape.padding[0],
        shape.padding[2],
        *shape.stride,
        shape.phases,
        layout.phase_words,
        layout.channel_words,
        layout.slots,
        tables.chunks,
        config.channel_block,
        config.stages,
        config.position_warps,
        config.row_warps,
        config.channel_warps,
        config.producers,
        tables.entry_bytes,
        _ACTIVATIONS[problem.epilogue.activation],
    )


def _shared_bytes(layout: Layout, config: Any, entry_bytes: Any) -> Any:
    """What a block needs: the ring with its barriers and, in its place at the end, sums that channel warps exchange.

    Also for arrays of knobs in place of a config.
    """
    ring = config.stages * (config.channel_block * layout.channel_words * 4 + entry_bytes + 24)
    sums = _LANES * config.words * config.position_warps * config.row_warps * config.rows * layout.images_per_word * 4
    return np.maximum(ring, (config.channel_warps - 1) * sums)


def _divisor(divisor: int) -> tuple[int, int]:
    """(magic, shift) for division by multiplication, magic as the int32 of the same bits; see kernels/direct.cu."""
    shift = (divisor - 1).bit_length()
    magic = -(-(1 << (31 + shift)) // divisor)
    return magic - (magic >> 31 << 32), shift


@dataclass(frozen=True, eq=False)
class Tables:
    """A filter in the order in which the kernel walks it.

    A group is what a block computes: output channels of one or several groups of the convolution whose input channels
    lie side by side. A segment is what a stage holds of a group's nonzeros.

    Attributes:
        entries: int32, the segments one after the other in units of 16 bytes. A segment begins with a header word per
            row: where its nonzeros start, in units, << 16 | how many there are. A nonzero is (offset in bytes, float32
            bits) for fp32 and (offset in bytes << 16 | 16-bit value) for 16-bit storage; rows start at whole units.
        segments: (groups, chunks + 1, 2) where each segment begins, in units, and its first channel within the group;
            the last of a group is where its last one ends.
        rows: (groups, row_warps, rows) output channels, -1 where there is none.
        first_channels: (groups,) the first input channel of each.
        chunks: stages that a group takes. The first ones are small, so that the first nonzeros need not wait long.
        entry_bytes: room for the largest segment, and for what the kernel reads ahead.
    """

    entries: IntArray
    segments: IntArray
    rows: IntArray
    first_channels: IntArray
    chunks: int
    entry_bytes: int


def pack(problem: Problem, filter: StretchedCSR, config: DirectConfig) -> Tables:
    """Lays a filter out for a config. Raises ValueError where a weight does not fit the storage type."""
    shape, layout = _Shape.of(problem), Layout.of(problem, config.tile)
    half = layout.images_per_word == 2
    per_group = config.row_warps * config.rows
    group_rows, merged = _grouping(problem, per_group)
    super_rows, super_channels = group_rows * merged, filter.shape[1] * merged
    nnz = np.diff(filter.indptr)
    groups: list[NDArray[np.int64]] = []
    first_channels: list[int] = []
    for start in range(0, problem.out_channels, super_rows):
        dealt = _deal(nnz[start : start + super_rows], config)
        groups += [np.where(rows >= 0, rows + start, -1) for rows in dealt]
        first_channels += [start // group_rows * filter.shape[1]] * len(dealt)
    rows = np.stack(groups)
    slot_of = np.empty(problem.out_channels, dtype=np.int64)  # place of a row among all (group, warp, row)
    flat = rows.ravel()
    slot_of[flat[flat >= 0]] = np.flatnonzero(flat >= 0)

    # A cell is what a warp does of one row in one stage; cells lie in the order (group, chunk, channel warp, slot).
    geometry = Geometry(layout.channel_words, shape.pitch, layout.phase_words, shape.stride, shape.dilation)
    starts = _chunk_starts(super_channels, config)
    chunks, warps = len(starts) - 1, config.channel_warps
    row, (channel, r, s) = filter.rows.astype(np.int64), filter.taps
    channel = channel + row // group_rows % merged * filter.shape[1]
    chunk = np.searchsorted(starts, channel, side="right") - 1
    channel = channel - starts[chunk]
    channel_warp = channel // -(-np.diff(starts) // warps)[chunk]
    group, slot = np.divmod(slot_of[row], per_group)
    cell = ((group * chunks + chunk) * warps + channel_warp) * per_group + slot
    cells_per_segment = warps * per_group
    segments = len(rows) * chunks
    order = np.argsort(cell, kind="stable")
    count = np.bincount(cell, minlength=segments * cells_per_segment)
    if count.max(initial=0) > 0xFFFF:
        raise ValueError("more than 65535 nonzeros of an output channel in one stage; use a smaller channel_block")
    nonzeros_per_unit = 4 if half else 2
    units = (-(-count // nonzeros_per_unit)).reshape(segments, cells_per_segment)
    header_units = -(-cells_per_segment // 4)
    start_in_segment = header_units + np.cumsum(units, axis=1) - units
    if start_in_segment.max(initial=0) > 0xFFFF:
        raise ValueError("a stage's nonzeros exceed 1 MiB; use a smaller channel_block")
    segment_units = header_units + units.sum(axis=1)
    segment_start = np.concatenate(([0], np.cumsum(segment_units)))
    entries = np.zeros((int(segment_start[-1]), 4), dtype=np.uint32)
    words = entries.reshape(-1)
    header = segment_start[:-1, None] * 4 + np.arange(cells_per_segment)
    words[header.ravel()] = (start_in_segment.astype(np.uint32) << 16 | count.reshape(units.shape)).ravel()

    offset = geometry.offset(channel.astype(np.int32), r, s)[order]
    value = filter.values[order]
    sorted_cell = cell[order]
    first = np.cumsum(count) - count
    at = (segment_start[:-1, None] + start_in_segment).reshape(-1)[sorted_cell] * 4
    place = np.arange(filter.nnz) - first[sorted_cell]
    if half:
        words[at + place] = offset.astype(np.uint32) << 18 | _bits(value, problem.dtype)
    else:
        words[at + 2 * place] = offset.astype(np.uint32) * 4
        words[at + 2 * place + 1] = value.view(np.uint32)
    bounds = np.empty((len(rows), chunks + 1, 2), dtype=np.int32)
    bounds[:, :, 0] = segment_start[np.arange(len(rows))[:, None] * chunks + np.arange(chunks + 1)]
    bounds[:, :, 1] = np.minimum(starts, problem.in_channels - np.array(first_channels)[:, None])
    return Tables(
        entries.view(np.int32),
        bounds,
        rows.reshape(len(rows), config.row_warps, config.rows).astype(np.int32),
        np.array(first_channels, dtype=np.int32),
        chunks,
        int(segment_units.max(initial=1)) * 16 + 32,
    )


def _grouping(problem: Problem, per_group: int) -> tuple[int, int]:
    """Output channels per group of the convolution, and how many such groups a block takes together."""
    group_rows = problem.out_channels // problem.groups
    return group_rows, min(max(per_group // group_rows, 1), problem.groups)


def _chunk_starts(channels: int, config: DirectConfig) -> IntArray:
    """Where the chunks of a group's input channels begin, and the end of the last."""
    block = config.channel_block
    sizes = []
    if channels > 2 * block:
        sizes = [-(-block // part // config.channel_warps) * config.channel_warps for part in (4, 2)]
    rest = channels - sum(sizes)
    count = -(-rest // block)
    even = np.diff(np.arange(count + 1) * rest // count)
    return np.concatenate(([0], np.cumsum(np.concatenate((sizes, even))))).astype(np.int32)


def _deal(nnz: IntArray, config: DirectConfig) -> list[NDArray[np.int64]]:
    """Deals rows to groups of warps: one array of row_warps * rows places per group, -1 where a place stays empty."""
    groups = -(-len(nnz) // (config.row_warps * config.rows))
    warps = groups * config.row_warps
    hands: list[list[int]] = [[] for _ in range(warps)]
    if config.balanced:
        loads = [(0, warp) for warp in range(warps)]
        for row in np.argsort(-nnz, kind="stable").tolist():  # the heaviest row to the least loaded warp with room
            load, warp = heapq.heappop(loads)
            hands[warp].append(row)
            if len(hands[warp]) < config.rows:
                heapq.heappush(loads, (load + int(nnz[row]), warp))
    else:
        for row in range(len(nnz)):
            hands[row // config.rows].append(row)
    filled = np.full((warps, config.rows), -1, dtype=np.int64)
    for warp, hand in enumerate(hands):
        filled[warp, : len(hand)] = hand
    return list(filled.reshape(groups, -1))


def _bits(values: NDArray[np.float32], dtype: str) -> NDArray[np.uint32]:
    rounded = torch.from_numpy(values).to(torch.float16 if dtype == "fp16" else torch.bfloat16)
    if not torch.isfinite(rounded).all():
        raise ValueError(f"a weight of {np.abs(values).max():.3g} does not fit {dtype}; use bf16 or fp32")
    return rounded.view(torch.int16).numpy().astype(np.uint16).astype(np.uint32)


#: The search space. Every combination that the device can run is ranked by the predicted time.
_AXES: dict[str, tuple[int, ...]] = {
    "words": (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 13, 14, 16),
    "rows": (1, 2, 4),
    "position_warps": (1, 2, 4),
    "row_warps": (1, 2, 4, 8, 12, 13, 16, 20, 24, 26),
    "channel_warps": (1, 2, 4, 8),
    "producers": (4, 8),
    "blocks": (1, 2, 3),
}
_STAGING_AXES: dict[str, tuple[int, ...]] = {
    "channel_block": (4, 8, 16, 24, 32, 48, 64, 96, 128),
    "stages": (2, 3, 4),
}
_Numbers = dict[str, NDArray[Any]]

# What the prediction takes for constants, in clocks of a multiprocessor; docs/performance.md says how well it does.
_LAUNCH = 4000  # from launch to launch, beside the work of the blocks
_FETCH = 900  # latency of global memory
_LOOP = 30  # of a row's nonzeros in a stage: header, flush, loop exit
_EPILOGUE = 60  # of a warp's positions of one output channel
_ROUND_TRIP = 45  # of four nonzeros of a lone warp, beside its instructions


@lru_cache(maxsize=8)
def _tiles(half: bool, packed: bool, registers: int) -> _Numbers:
    """The combinations of _AXES whose threads and registers a multiprocessor has."""
    grid = np.meshgrid(*(np.array(axis) for axis in _AXES.values()), indexing="ij")
    tiles = {name: axis.ravel() for name, axis in zip(_AXES, grid, strict=True)}
    consumers = tiles["position_warps"] * tiles["row_warps"] * tiles["channel_warps"]
    threads = (consumers + tiles["producers"]) * _LANES
    words, rows = tiles["words"], tiles["rows"]
    needed = rows * words * (1 + half) + words * (1 + packed) + 2 * rows + (24 if half else 20)
    most = np.minimum(registers // (threads * tiles["blocks"]) // 8 * 8, 255)
    fits = (threads <= 1024) & (consumers >= 4) & (needed <= most) & (most >= 64)
    tiles |= {"consumers": consumers, "threads": threads, "most_registers": most}
    return {name: numbers[fits] for name, numbers in tiles.items()}


def _space(problem: Problem, filter: StretchedCSR | None, gpu: Gpu, packed: bool) -> _Numbers:
    """All configs that fit, as arrays, with their predicted clocks under "clocks"."""
    shape, half = _Shape.of(problem), _STORAGE[problem.dtype] != 0
    nnz = filter.nnz if filter is not None else 0
    tiles = _tiles(half, packed, gpu.registers)
    grid = np.meshgrid(np.arange(len(tiles["words"])), *map(np.array, _STAGING_AXES.values()), indexing="ij")
    index, channel_block, stages = (axis.ravel() for axis in grid)
    c = {name: numbers[index] for name, numbers in tiles.items()} | {"channel_block": channel_block, "stages": stages}

    tile = _LANES * c["words"] * c["position_warps"]
    layout = Layout.of(problem, tile)
    per_group = c["row_warps"] * c["rows"]
    group_rows = problem.out_channels // problem.groups
    merged = np.minimum(np.maximum(per_group // group_rows, 1), problem.groups)
    groups = -(-problem.groups // merged) * -(-group_rows * merged // per_group)
    channels = merged * (problem.in_channels // problem.groups)
    chunks = -(-channels // channel_block)
    images = -(-max(problem.batch, 1) // layout.images_per_word)
    blocks = -(-shape.positions(images) // tile) * groups

    group_nnz = nnz / groups
    entry_bytes = group_nnz / chunks * _unevenness(filter) * (4 if half else 8)
    entry_bytes += per_group * c["channel_warps"] * 8 + 96
    shared = _shared_bytes(layout, SimpleNamespace(**c), entry_bytes)
    per_slot = 5 + 2 * layout.odd if layout.paired else layout.images_per_word
    slot_registers = np.maximum(layout.slots, 4) * per_slot + (44 if half else 30)
    fits = (
        (shared <= gpu.shared_bytes)
        & (c["blocks"] * (shared + 1024) <= gpu.shared_bytes + 1024)
        & (layout.slots <= _SLOT_CLASSES[-1])
        & ((not half) | (channel_block * layout.channel_words * 4 <= 0x10000))
        & (slot_registers <= c["most_registers"])
        & (channel_block < np.maximum(2 * channels, _STAGING_AXES["channel_block"][0] + 1))
        & (channel_block % c["channel_warps"] == 0)
    )

    # Wavefronts of shared memory, instruction slots (four per clock) and the time of a warp on its own.
    sharing = c["position_warps"]  # warps that read the same nonzeros
    cells = per_group * c["channel_warps"] * chunks
    reads = group_nnz * sharing * (c["words"] + 1 / (4 if half else 2)) + cells * sharing * 2
    writes = channels * layout.slots * (7 if layout.paired else 4 if half else 2)
    wavefronts = reads + writes + group_nnz / 8 + per_group * tile / _LANES * 2
    per_product = 2 if packed or not half else 5
    instructions = sharing * (group_nnz * (per_product * c["words"] + 2) + cells * (_LOOP + 4 * c["words"] * packed))
    instructions += channels * layout.slots * (24 if layout.paired else 12 if half else 5)
    warps = c["row_warps"] * c["channel_warps"]
    alone = group_nnz / warps * (per_product * c["words"] + _ROUND_TRIP / 4) + cells / warps * 2 * _LOOP + chunks * 60
    resident = np.minimum(c["blocks"], -(-blocks // gpu.multiprocessors))
    waves = -(-blocks // (gpu.multiprocessors * resident))
    # A stage is filled by copies that go on by themselves, or by loads and stores in batches that wait for each other.
    if half:
        batches = -(-channel_block * layout.slots // (8 * c["producers"]))
        fill = _FETCH + _FETCH / 2 * batches
    else:
        fill = _FETCH + channel_block * layout.slots * 6 / c["producers"]
    busy = np.maximum(np.maximum(wavefronts, instructions / 4) * resident, alone)
    busy = np.maximum(busy, chunks * fill / (stages - 1))
    # Blocks beside each other cover each other's first stage and epilogue.
    edges = fill + _EPILOGUE * c["rows"] * c["words"] * (1 + half)
    c["clocks"] = waves * (busy + edges / resident**2) + _LAUNCH
    return {name: c[name][fits] for name in (*_AXES, *_STAGING_AXES, "clocks")}


def _unevenness(filter: StretchedCSR | None) -> float:
    """Nonzeros of the fullest four neighbouring input channels over the average."""
    if filter is None or not filter.nnz:
        return 1.0
    per_channel = np.bincount(filter.taps[0] // 4)
    return 1.2 * float(per_channel.max() / (filter.nnz / -(-filter.shape[1] // 4)))


def search(problem: Problem, filter: StretchedCSR, gpu: Gpu, most: int = 12) -> list[DirectConfig]:
    """The most promising configs by predicted time, at most two that differ in staging alone.

    For 16-bit storage a quarter of them add every product in float32, in case the others are not exact enough.
    """
    half = _STORAGE[problem.dtype] != 0
    found: list[DirectConfig] = []
    for packed, share in ((True, most - most // 4), (False, most // 4)) if half else ((False, most),):
        space = _space(problem, filter, gpu, packed)
        taken: dict[tuple[int, ...], int] = {}
        chosen: list[DirectConfig] = []
        for i in np.argsort(space["clocks"], kind="stable") if share else ():
            shape = tuple(int(space[name][i]) for name in _AXES if name != "producers")
            if taken.get(shape, 0) < 2:
                taken[shape] = taken.get(shape, 0) + 1
                knobs: dict[str, Any] = {name: int(space[name][i]) for name in (*_AXES, *_STAGING_AXES)}
                chosen.append(DirectConfig(**knobs, packed=packed))
            if len(chosen) == share:
                break
        found += chosen
    return found


def neighbours(config: DirectConfig, problem: Problem, filter: StretchedCSR, gpu: Gpu) -> dict[str, list[DirectConfig]]:
    """For each knob, the configs of the search space that differ from `config` in it alone."""
    space = _space(problem, filter, gpu, config.packed)
    names = (*_AXES, *_STAGING_AXES)
    there = set(zip(*(space[name].tolist() for name in names), strict=True))
    found: dict[str, list[DirectConfig]] = {}
    for name in names:
        axis = (_AXES | _STAGING_AXES)[name]
        values: list[Any] = [value for value in axis if value != getattr(config, name)]
        others = [replace(config, **{name: value}) for value in values]
        found[name] = [c for c in others if tuple(getattr(c, n) for n in names) in there]
    found["balanced"] = [replace(config, balanced=not config.balanced)]
    if _STORAGE[problem.dtype]:
        found["packed"] = [replace(config, packed=not config.packed)]
    return {name: configs for name, configs in found.items() if configs}


def variants() -> list[tuple[str, dict[str, int], int]]:
    """Kernels to hold the compiler to: (source, macros, most registers per thread).

    The choices of the search for three layers of the paper, in each way to store and to copy.
    """
    found = []
    for dtype in ("fp32", "fp16", "bf16"):
        for channels, size, stride in ((64, 56, 1), (256, 14, 1), (512, 7, 1), (128, 28, 2)):
            padding, spread = (1, 1, 1, 1), range(0, 9 * channels * channels, 16)
            problem = Problem(32, channels, size, size, channels, (3, 3), (stride, stride), padding, dtype=dtype)
            weight = np.zeros(problem.weight_shape, dtype=np.float32)
            weight.reshape(-1)[spread] = 1.0
            config = search(problem, StretchedCSR.from_dense(weight), H200, most=1)[0]
            macros = defines(config, Layout.of(problem, config.tile), dtype)
            found.append((_SOURCE, macros, 65536 // (config.threads * config.blocks) // 8 * 8))
    return found
