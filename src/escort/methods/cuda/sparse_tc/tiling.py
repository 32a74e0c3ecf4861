"""How a config cuts a convolution up: its loads and stores, its list of taps, and its variant of sparse_tc.cuh."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

from escort.cuda.compiler import Text
from escort.methods import activation
from escort.methods.cuda.sparse_tc.config import ELEMENTS, Element, SparseTcConfig, TapGroup, UnfitError
from escort.methods.cuda.sparse_tc.shared_memory import SharedMemory, up
from escort.methods.cuda.sparse_tc.source import kernel_source
from escort.problem import Problem

_MOST_BOX = 256  # along each dimension
_MOST_SUMS = 128  # of a thread
_MOST_REACH = {"stride": 8, "corner": 128, "offset": 255}  # of im2col copies

Box = tuple[int, int, int, int]  # channels, columns, rows, samples


class Tap(NamedTuple):
    """A tap (row, column) of the filter for a block of input channels, and its first pixel among its group's."""

    k_block: int
    row: int
    column: int
    start: int


class Rows(NamedTuple):
    """How the pixels of a tap group lie where they are whole rows.

    Attributes:
        pitch: pixels from row to row.
        sample_rows: rows from sample to sample.
        zeros: pixels of zeros that must follow.
    """

    pitch: int
    sample_rows: int
    zeros: int


@dataclass(frozen=True)
class Tiling:
    """A config's view of a problem.

    Attributes:
        channels: of x as the kernel reads it; whole blocks where x is arranged for it.
        tap_groups: the taps of each, in the order in which they are computed.
        load: what a copy brings: a box (channels, columns, rows, samples), or so many pixels by im2col.
        store: the box of 16-bit elements that is stored at a time in NHWC.
        rows: how pixels lie.
        memory: of a thread block.
        vector: outputs that a lane stores at once in NCHW, neighbours in y.
        unaligned: whether these lie unaligned in staging.
    """

    problem: Problem
    config: SparseTcConfig
    channels: int
    tap_groups: tuple[tuple[Tap, ...], ...]
    load: Box
    store: Box
    rows: Rows
    memory: SharedMemory
    vector: int
    unaligned: bool

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

    @property
    def first_groups(self) -> list[int]:
        """The tap groups with which the sums of a thread block, and by turns of a warpgroup, begin."""
        split, groups = self.config.split, len(self.tap_groups)
        begins = [groups * rank // split for rank in range(split + 1)]
        if self.config.by_turns:
            begins += [(begin + end) // 2 for begin, end in pairwise(begins)]
        return sorted(set(begins) - {groups})

    @property
    def tile_rows(self) -> int:
        """Rows of the output in a tile, where those are whole rows."""
        return _tile_rows(self.problem, self.config)

    def tiles(self, samples: int) -> int:
        """Pixel tiles of so many samples."""
        p, config = self.problem, self.config
        if not config.whole_rows:
            return -(-samples * p.out_height * p.out_width // config.tile_pixels)
        return -(-samples // config.samples) * -(-p.out_height // self.tile_rows)

    def tile_groups(self, samples: int) -> int:
        """Groups of pixel tiles of so many samples, one tile for each thread block of a cluster."""
        return -(-self.tiles(samples) // self.config.cluster)

    @property
    def source(self) -> Text:
        return kernel_source(self.config.pixels, self.element)

    @property
    def defines(self) -> dict[str, str | int]:
        """The macros that the kernel is compiled with; kernels/cuda/sparse_tc.cuh says what each means."""
        config, element = self.config, self.element
        macros: dict[str, str | int] = {
            "STORAGE": element.storage,
            "TAP_GROUP": config.tap_group.upper(),
            "PIXELS": config.pixels,
            "M_BLOCKS": config.m_blocks,
            "ACROSS": config.across,
            "BY_TURNS": int(config.by_turns),
            "A_STAGES": self.memory.a_stages,
            "B_STAGES": self.memory.b_stages,
            "OUT_NCHW": int(not config.takes_channels_last),
        }
        if element.bytes == 2 and not config.takes_channels_last:
            macros |= {"VECTOR": self.vector, "UNALIGNED": int(self.unaligned)}
        if config.split > 1:
            macros["SPLIT"] = 1
        return macros | activation.macros(self.problem.epilogue)

    @classmethod
    def of(cls, problem: Problem, config: SparseTcConfig, shared_bytes: int) -> Tiling:
        """The tiling, on a device whose thread blocks have so much shared memory. Raises UnfitError."""
        element = ELEMENTS[problem.precision]
        _check(problem, config, element)
        k_blocks = -(-problem.in_channels // element.k_block)
        rows = _rows(problem, config) if config.whole_rows else Rows(1, 1, 0)
        down, right = problem.dilation[0] * rows.pitch, problem.dilation[1]
        tap_groups = _tap_groups(config.tap_group, problem.kernel_size, k_blocks, down, right)
        load, store = _boxes(problem, config, rows, element)
        load_pixels, store_pixels = math.prod(load[1:]), math.prod(store[1:])
        starts = [tap.start for tap in tap_groups[0]]
        if config.by_turns and len(tap_groups) < 2:
            raise UnfitError("warpgroups take turns at tap groups: there must be two")
        if config.split > 1 and len(tap_groups) < 2 * config.split:
            raise UnfitError("each thread block takes turns at its share of tap groups, which are too few")
        in_eights = config.pixels >= 8 * config.split if element.bytes == 4 else store_pixels % 8 == 0
        if config.split > 1 and not in_eights:
            raise UnfitError("each thread block stores whole eights of pixels")
        memory = SharedMemory.of(config, element, starts, load_pixels + rows.zeros, store_pixels, shared_bytes)
        vector, unaligned = _vector(problem, config, rows, element)
        channels = problem.in_channels if config.takes_channels_last else k_blocks * element.k_block
        return cls(problem, config, channels, tap_groups, load, store, rows, memory, vector, unaligned)


def _check(p: Problem, config: SparseTcConfig, element: Element) -> None:
    """Raises UnfitError where a config is not for this convolution, whatever the device's memory."""
    least = 16 // element.bytes
    if config.takes_channels_last and (p.in_channels % least or p.out_channels % least):
        raise UnfitError(
            f"in channels_last the channels must be multiples of {least}: choose the contiguous memory format"
        )
    if config.pixels % 8 or not 0 < config.pixels * config.m_blocks <= 2 * _MOST_SUMS:
        raise UnfitError(f"{config.pixels} pixels by {config.m_blocks} blocks of channels do not fit a warpgroup")
    if config.by_turns and (config.across != 1 or config.tap_group == "halo"):
        raise UnfitError(
            "warpgroups take turns with the same channels, and not with halo, which is slower than columns"
        )
    if config.split > 1 and not (
        config.by_turns and config.takes_channels_last and config.samples == config.cluster == 1
    ):
        raise UnfitError("thread blocks share tiles of one sample by turns, in channels_last")
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
    """Rows of the output in a tile."""
    return max(1, min(config.rows, problem.out_height))


def im2col_corners(p: Problem) -> tuple[tuple[int, int], tuple[int, int]]:
    """(column, row) of the first output's first tap, and how far beyond x's end an output's first tap may lie."""
    top, bottom, left, right = p.padding
    reach = [(size - 1) * step for size, step in zip(p.kernel_size, p.dilation, strict=True)]
    return (-left, -top), (right - reach[1], bottom - reach[0])


def _rows(p: Problem, config: SparseTcConfig) -> Rows:
    """How the pixels of a tap group lie. Raises UnfitError where a tile's outputs are more than its pixels."""
    top, bottom, left, right = p.padding
    reach = [(size - 1) * step for size, step in zip(p.kernel_size, p.dilation, strict=True)]
    rows = _tile_rows(p, config)
    whole = rows == p.out_height
    if config.samples > 1 and not whole:
        raise UnfitError("a tile of several samples has all their rows")
    if config.tap_group == "columns":
        layout = Rows(up(p.out_width, 8), rows + reach[0], 0)
    else:
        # What follows a row pads it on the right and the next one on the left, and so for a sample's bottom and top.
        if min(left, right) > reach[1] or min(top, bottom) > reach[0]:
            raise UnfitError("halo is for padding within the filter's reach; choose columns")
        pitch, zeros = p.width + max(left, right), min(left, right)
        if whole:
            layout = Rows(pitch, p.height + max(top, bottom), min(top, bottom) * pitch + zeros)
        else:
            layout = Rows(pitch, rows + reach[0], zeros)
    outputs = ((config.samples - 1) * layout.sample_rows + rows - 1) * layout.pitch + p.out_width
    if outputs > config.tile_pixels:
        raise UnfitError(f"{config.tile_pixels} pixels of a tile do not hold its {outputs} outputs")
    return layout


@lru_cache(maxsize=64)  # the many configs of a problem have few lists of taps
def _tap_groups(
    tap_group: TapGroup, kernel_size: tuple[int, int], k_blocks: int, down: int, right: int
) -> tuple[tuple[Tap, ...], ...]:
    """The taps of each group, block by block of the input channels.

    Args:
        down, right: pixels from a tap to the one below it, and to the one on its right.
    """
    taps_down, taps_right = (range(size) for size in kernel_size)
    groups: list[tuple[Tap, ...]] = []
    for k_block in range(k_blocks):
        if tap_group == "halo":
            groups.append(tuple(Tap(k_block, r, s, r * down + s * right) for r in taps_down for s in taps_right))
        elif tap_group == "columns":
            groups += [tuple(Tap(k_block, r, s, r * down) for r in taps_down) for s in taps_right]
        else:
            groups += [(Tap(k_block, r, s, 0),) for r in taps_down for s in taps_right]
    return tuple(groups)


def _boxes(p: Problem, config: SparseTcConfig, rows: Rows, element: Element) -> tuple[Box, Box]:
    """The boxes that are loaded for a tap group, and stored at a time in NHWC."""
    channels = element.k_block
    load: Box = channels, config.tile_pixels, 1, 1
    if config.tap_group == "im2col":  # each warpgroup's own
        copied = store = channels, config.pixels, 1, 1
    elif config.tap_group == "flat":
        copied = store = load
    else:
        copied = load = channels, rows.pitch, rows.sample_rows, config.samples
        store = channels, rows.pitch, rows.sample_rows if config.samples > 1 else _tile_rows(p, config), config.samples
    if config.split > 1 and element.bytes == 2:
        store = _share(store, config)
    if max(copied + store) > _MOST_BOX:
        raise UnfitError(f"a box of {copied[1:]} or {store[1:]} pixels is larger than what the device copies")
    return load, store


def _share(store: Box, config: SparseTcConfig) -> Box:
    """The box of a thread block's share of a tile. Raises UnfitError where shares are not equal."""
    channels, columns, rows, samples = store
    shared = rows if config.whole_rows else columns
    if shared % config.split or columns * rows != config.tile_pixels:
        raise UnfitError(f"{config.split} thread blocks cannot share a tile of {columns} by {rows} pixels")
    if config.whole_rows:
        return channels, columns, rows // config.split, samples
    return channels, columns // config.split, rows, samples


def _vector(p: Problem, config: SparseTcConfig, rows: Rows, element: Element) -> tuple[int, bool]:
    """How many outputs a lane stores at once in NCHW, neighbours in y, and whether they lie unaligned in staging."""
    if element.bytes == 4:
        return 1, False
    if not config.whole_rows:
        return element.vector(p.out_height * p.out_width), False
    vector = element.vector(p.out_width)
    unaligned = vector > 1 and rows.pitch % vector > 0
    return min(vector, 2) if unaligned else vector, unaligned
