"""How a config cuts a convolution up: the macros of sparse_tc.cuh, its loads and stores, its list of taps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

from escort.cuda.compiler import Text
from escort.problem import MemoryFormat, Problem

PIXEL_BYTES = 128  # a block of input channels
BLOCK_BYTES = 64 * 64 + 512  # 64 output channels of a weight tile: values, then metadata

_BARRIER_BYTES = 1024
_MOST_BOX = 256  # along each dimension
_MOST_STAGES = 8
_MOST_SUMS = 128  # of a thread
_MOST_REACH = {"stride": 8, "corner": 128, "offset": 255}  # of im2col copies
_FLOAT_STAGINGS, _FLOAT_STAGING_BYTES = 8, 2560  # one for each warp: 16 channels of 32 pixels, with gaps

TapGroup = Literal["im2col", "columns", "halo", "flat"]
Box = tuple[int, int, int, int]  # channels, columns, rows, samples


@dataclass(frozen=True)
class Element:
    """How sparse tensor cores take a precision.

    Attributes:
        storage: the kernel's number for it.
        bytes: of an element of x, residual and y.
        kept, of: of so many neighbouring input channels, how many may be nonzero.
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


ELEMENTS: dict[str, Element] = {
    "tf32": Element(0, 4, 1, 2, "tf32"),
    "fp16": Element(1, 2, 2, 4, "f16"),
    "bf16": Element(2, 2, 2, 4, "bf16"),
}


@dataclass(frozen=True)
class SparseTcConfig:
    """How the tensor cores' work is cut up.

    Attributes:
        tap_group: which taps read what is copied at a time: "im2col", one tap, whose pixels are copied; "columns", a
            column of taps, for which whole rows are; "halo", all taps, in whole rows; "flat", the only tap of a
            pointwise convolution, for which pixels in a row are.
        pixels: of a warpgroup's products, a multiple of 8 up to 256.
        across: of the two warpgroups, so many take different output channels; the others different pixels.
        m_blocks: of 64 output channels that a warpgroup computes.
        rows, samples: columns and halo: of the output in a tile; several samples only where all rows of each are.
        cluster: thread blocks that copy the filter to one another.
        memory_format: of x, residual and y. For "contiguous" a kernel lays x out before, and y is written in NCHW;
            "channels_last" converts nothing.
    """

    tap_group: TapGroup
    pixels: int
    across: int = 2
    m_blocks: int = 1
    rows: int = 0
    samples: int = 1
    cluster: int = 1
    memory_format: MemoryFormat = "contiguous"

    @property
    def whole_rows(self) -> bool:
        """Whether a tile is rows of the output; else it is any pixels in a row."""
        return self.tap_group in ("columns", "halo")

    @property
    def takes_channels_last(self) -> bool:
        return self.memory_format == "channels_last"

    @property
    def tile_channels(self) -> int:
        return 64 * self.across * self.m_blocks

    @property
    def tile_pixels(self) -> int:
        return 2 // self.across * self.pixels


class UnfitError(ValueError):
    """This config does not suit this convolution."""


class Tap(NamedTuple):
    """A tap (row, column) of the filter for a block of input channels, and its first pixel among those of its tap group."""

    k_block: int
    row: int
    column: int
    start: int


class _Rows(NamedTuple):
    """How the pixels of a tap group lie that are whole rows: pixels from row to row, rows from sample to sample, zeros that must follow."""

    pitch: int
    tall: int
    zeros: int


@dataclass(frozen=True)
class Tiling:
    """A config's view of a problem.

    Attributes:
        channels: of x as the kernel reads it; whole blocks where x is laid out for it.
        tap_groups: the taps of each, in the order in which they are computed.
        load: what a copy brings: a box (channels, columns, rows, samples), or so many pixels by im2col.
        store: the box of 16-bit elements that is stored at a time in NHWC.
        defines: of the kernel, but for the epilogue.
        shared_bytes: of a thread block.
    """

    problem: Problem
    config: SparseTcConfig
    channels: int
    tap_groups: tuple[tuple[Tap, ...], ...]
    load: Box
    store: Box
    defines: dict[str, int | str]
    shared_bytes: int

    @property
    def element(self) -> Element:
        return ELEMENTS[self.problem.precision]

    @property
    def stores_boxes(self) -> bool:
        """Whether the copy engine stores y and loads the residual; else warps do."""
        return self.config.takes_channels_last and self.element.bytes == 2

    @property
    def channel_tiles(self) -> int:
        return -(-self.problem.out_channels // self.config.tile_channels)

    def tiles(self, samples: int) -> int:
        """Pixel tiles of so many samples."""
        p, config = self.problem, self.config
        if not config.whole_rows:
            return -(-samples * p.out_height * p.out_width // config.tile_pixels)
        return -(-samples // config.samples) * -(-p.out_height // _tile_rows(p, config))

    def tile_groups(self, samples: int) -> int:
        """Pixel tiles of so many samples, by the cluster."""
        return -(-self.tiles(samples) // self.config.cluster)

    @property
    def source(self) -> Text:
        return _source(self.config.pixels, self.element)

    @classmethod
    def of(cls, problem: Problem, config: SparseTcConfig, shared_bytes: int) -> Tiling:
        """The tiling, on a device whose thread blocks have so much shared memory. Raises UnfitError."""
        element = ELEMENTS[problem.precision]
        _check(problem, config, element)
        k_blocks = -(-problem.in_channels // element.k_block)
        rows = _rows(problem, config) if config.whole_rows else _Rows(1, 1, 0)
        tap_groups = _tap_groups(problem, config, k_blocks, rows)
        load, store = _boxes(problem, config, rows, element.k_block)
        memory = _Memory.of(config, element, tap_groups[0], rows, load, store, shared_bytes)
        defines = _defines(problem, config) | {
            "STORAGE": element.storage,
            "TAP_GROUPS": len(tap_groups),
            "PITCH": rows.pitch,
            "SAMPLE_PITCH": rows.tall * rows.pitch,
            "LOAD_PIXELS": math.prod(load[1:]),
            "BOX_PIXELS": math.prod(store[1:]),
            "ZERO_PIXELS": rows.zeros,
            "A_STAGES": memory.a_stages,
            "B_STAGES": memory.b_stages,
            "B_STAGE_BYTES": memory.b_stage_bytes,
            "STAGING_BYTES": memory.staging_bytes,
            "STAGING_ROW": memory.staging_row,
            "SHARED_BYTES": memory.bytes,
        }
        defines["VECTOR"], defines["UNALIGNED"] = _vector(problem, config, rows, element)
        channels = problem.in_channels if config.takes_channels_last else k_blocks * element.k_block
        return cls(problem, config, channels, tap_groups, load, store, defines, memory.bytes)


def _check(p: Problem, config: SparseTcConfig, element: Element) -> None:
    least = 16 // element.bytes
    if config.takes_channels_last and (p.in_channels % least or p.out_channels % least):
        raise UnfitError(
            f"in channels_last the channels must be multiples of {least}: choose the contiguous memory format"
        )
    if config.pixels % 8 or not 0 < config.pixels * config.m_blocks <= 2 * _MOST_SUMS:
        raise UnfitError(f"{config.pixels} pixels by {config.m_blocks} blocks of channels do not fit a warpgroup")
    if config.tap_group == "flat" and (p.kernel_size != (1, 1) or any(p.padding)):
        raise UnfitError("flat is for pointwise convolutions without padding; choose im2col")
    if config.tap_group != "im2col":
        if p.stride != (1, 1):
            raise UnfitError(f"{config.tap_group} is for stride 1, got {p.stride}; choose im2col")
        return
    lower, upper = im2col_corners(p)
    offset = max((size - 1) * step for size, step in zip(p.kernel_size, p.dilation, strict=True))
    if (
        max(p.stride) > _MOST_REACH["stride"]
        or max(map(abs, lower + upper)) >= _MOST_REACH["corner"]
        or offset > _MOST_REACH["offset"]
    ):
        raise UnfitError("the device's im2col copies reach no such stride, padding or dilation")


def _tile_rows(problem: Problem, config: SparseTcConfig) -> int:
    return max(1, min(config.rows, problem.out_height))


def im2col_corners(p: Problem) -> tuple[tuple[int, int], tuple[int, int]]:
    """(column, row) of the first output's first tap, and how far beyond x's end an output's first tap may lie."""
    top, bottom, left, right = p.padding
    reach = [(size - 1) * step for size, step in zip(p.kernel_size, p.dilation, strict=True)]
    return (-left, -top), (right - reach[1], bottom - reach[0])


def _rows(p: Problem, config: SparseTcConfig) -> _Rows:
    """How the pixels of a tap group lie. Raises UnfitError where a tile's outputs are more than its pixels."""
    top, bottom, left, right = p.padding
    reach = [(size - 1) * step for size, step in zip(p.kernel_size, p.dilation, strict=True)]
    rows = _tile_rows(p, config)
    whole = rows == p.out_height
    if config.samples > 1 and not whole:
        raise UnfitError("a tile of several samples has all their rows")
    if config.tap_group == "columns":
        found = _Rows(_up(p.out_width, 8), rows + reach[0], 0)
    else:
        # What follows a row pads it on the right and the next one on the left, and so for a sample's bottom and top.
        if min(left, right) > reach[1] or min(top, bottom) > reach[0]:
            raise UnfitError("halo is for padding within the filter's reach; choose columns")
        pitch, zeros = p.width + max(left, right), min(left, right)
        if whole:
            found = _Rows(pitch, p.height + max(top, bottom), min(top, bottom) * pitch + zeros)
        else:
            found = _Rows(pitch, rows + reach[0], zeros)
    outputs = ((config.samples - 1) * found.tall + rows - 1) * found.pitch + p.out_width
    if outputs > config.tile_pixels:
        raise UnfitError(f"{config.tile_pixels} pixels of a tile do not hold its {outputs} outputs")
    return found


def _tap_groups(p: Problem, config: SparseTcConfig, k_blocks: int, rows: _Rows) -> tuple[tuple[Tap, ...], ...]:
    taps_down, taps_right = (range(size) for size in p.kernel_size)
    down, right = p.dilation[0] * rows.pitch, p.dilation[1]
    found: list[tuple[Tap, ...]] = []
    for k_block in range(k_blocks):
        if config.tap_group == "halo":
            found.append(tuple(Tap(k_block, r, s, r * down + s * right) for r in taps_down for s in taps_right))
        elif config.tap_group == "columns":
            found += [tuple(Tap(k_block, r, s, r * down) for r in taps_down) for s in taps_right]
        else:
            found += [(Tap(k_block, r, s, 0),) for r in taps_down for s in taps_right]
    return tuple(found)


def _boxes(p: Problem, config: SparseTcConfig, rows: _Rows, channels: int) -> tuple[Box, Box]:
    """What is loaded for a tap group, and stored at a time in NHWC."""
    load: Box = channels, config.tile_pixels, 1, 1
    if config.tap_group == "im2col":  # each warpgroup's own
        copied = store = channels, config.pixels, 1, 1
    elif config.tap_group == "flat":
        copied = store = load
    else:
        copied = load = channels, rows.pitch, rows.tall, config.samples
        store = channels, rows.pitch, rows.tall if config.samples > 1 else _tile_rows(p, config), config.samples
    if max(copied + store) > _MOST_BOX:
        raise UnfitError(f"a box of {copied[1:]} or {store[1:]} pixels is larger than what the device copies")
    return load, store


class _Memory(NamedTuple):
    """Shared memory: barriers, stages of B, stages of A, staging of outputs."""

    a_stages: int
    b_stages: int
    b_stage_bytes: int
    staging_row: int  # bytes from one channel to the next, of 16-bit elements in NCHW
    staging_bytes: int  # of 64 channels, or of floats of a warp
    bytes: int

    @classmethod
    def of(
        cls,
        config: SparseTcConfig,
        element: Element,
        taps: tuple[Tap, ...],
        rows: _Rows,
        load: Box,
        store: Box,
        most: int,
    ) -> _Memory:
        m_blocks = config.tile_channels // 64
        staging_row = (config.tile_pixels // 8 | 1) * 16  # odd: rows one below the other lie in different banks
        stagings = m_blocks
        if element.bytes == 4:
            stagings, staging_bytes = _FLOAT_STAGINGS, _FLOAT_STAGING_BYTES
        elif config.takes_channels_last:
            staging_bytes = _up(max(config.tile_pixels, math.prod(store[1:])) * PIXEL_BYTES, 1024)
        else:
            staging_bytes = _up(64 * staging_row, 1024)
        a_bytes, b_stage_bytes = m_blocks * BLOCK_BYTES, _up((math.prod(load[1:]) + rows.zeros) * PIXEL_BYTES, 1024)
        room = most - _BARRIER_BYTES - stagings * staging_bytes - 1024
        if len(taps) == 1:
            a_stages = b_stages = min(_MOST_STAGES, room // (a_bytes + b_stage_bytes))
        else:
            b_stages = 2
            a_stages = min(_MOST_STAGES, (room - b_stages * b_stage_bytes) // a_bytes)
        if min(a_stages, b_stages) < 2:  # a stage is free when the next step is under way, which needs another
            raise UnfitError("two stages do not fit shared memory; choose smaller tiles")
        b_end = _BARRIER_BYTES + b_stages * b_stage_bytes
        end = _up(b_end + a_stages * a_bytes, 1024) + stagings * staging_bytes
        # What lies behind the pixels of a tap group is read too, and what it gives is cut off; but it must be shared memory.
        reach = (max(tap.start for tap in taps) + config.tile_pixels) * PIXEL_BYTES
        if b_end - b_stage_bytes + reach > end:
            raise UnfitError("a tile's last pixels would be read from beyond shared memory")
        return cls(a_stages, b_stages, b_stage_bytes, staging_row, staging_bytes, end)


def _defines(p: Problem, config: SparseTcConfig) -> dict[str, int | str]:
    """What the problem and the config alone say."""
    rows = _tile_rows(p, config)
    return {
        "TAP_GROUP": config.tap_group.upper(),
        "PIXELS": config.pixels,
        "ACROSS": config.across,
        "M_BLOCKS": config.m_blocks,
        "CLUSTER": config.cluster,
        "OUT_NCHW": int(not config.takes_channels_last),
        "M_TILES": -(-p.out_channels // config.tile_channels),
        "KERNEL_ROWS": p.kernel_size[0],
        "KERNEL_COLUMNS": p.kernel_size[1],
        "STRIDE_DOWN": p.stride[0],
        "STRIDE_RIGHT": p.stride[1],
        "DILATION_DOWN": p.dilation[0],
        "DILATION_RIGHT": p.dilation[1],
        "TOP": p.padding[0],
        "LEFT": p.padding[2],
        "OUT_CHANNELS": p.out_channels,
        "OUT_HEIGHT": p.out_height,
        "OUT_WIDTH": p.out_width,
        "TILE_ROWS": rows,
        "TILE_SAMPLES": config.samples,
        "TILES_PER_SAMPLE": -(-p.out_height // rows),
    }


def _vector(p: Problem, config: SparseTcConfig, rows: _Rows, element: Element) -> tuple[int, int]:
    """How many outputs a lane stores at once in NCHW, neighbours in y, and whether they lie unaligned in staging."""
    if element.bytes == 4:
        return 1, 0
    if not config.whole_rows:
        return at_once(p.out_height * p.out_width, element), 0
    vector = at_once(p.out_width, element)
    unaligned = vector > 1 and rows.pitch % vector > 0
    return min(vector, 2) if unaligned else vector, int(unaligned)


def at_once(elements: int, element: Element) -> int:
    """How many elements one instruction moves, so that whole ones make up a run of so many."""
    return math.gcd(elements, 16 // element.bytes)


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


@lru_cache
def _source(pixels: int, element: Element) -> Text:
    """The kernel for products of so many pixels, whose registers are named one by one."""
    sums, depth, kind = pixels // 2, element.k_block // 2, element.type
    transposed = ", 0, 0" if element.bytes == 2 else ""  # matrices of other types cannot be
    registers = ", ".join(f"%{i}" for i in range(sums))
    outputs = ", ".join(f'"+f"(d[{i}])' for i in range(sums))
    return Text(
        "sparse_tc.cu",
        f"""using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

// d (64 x {pixels}) = a (64 x {depth}, compressed) * b, or += a * b.
template <int SELECTOR>
__device__ __forceinline__ void mma(float (&d)[{sums}], u64 a, u64 b, u32 metadata, int accumulate) {{
  asm volatile(
      "{{ .reg .pred p; setp.ne.b32 p, %{sums + 3}, 0; "
      "wgmma.mma_async.sp.sync.aligned.m64n{pixels}k{depth}.f32.{kind}.{kind} {{{registers}}}, "
      "%{sums}, %{sums + 1}, %{sums + 2}, %{sums + 4}, p, 1, 1{transposed}; }}"
      : {outputs}
      : "l"(a), "l"(b), "r"(metadata), "r"(accumulate), "n"(SELECTOR));
}}
#include "sparse_tc.cuh"
""",
    )
