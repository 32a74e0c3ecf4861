"""Which tiles are worth timing for a stem, by a model of what a multiprocessor does, roughly fitted to an H200."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator

from escort.cuda.gpu import Gpu
from escort.methods import activation
from escort.methods.cuda.stem.config import StemConfig
from escort.methods.cuda.stem.layout import OCTET, Channels, Layout
from escort.methods.cuda.stem.params import Params
from escort.problem import Problem

OCTETS = 4  # of a warp at a time
_ROWS, _MOST_PARTS = (1, 2, 4, 8, 16), 8
_CLOCK_MHZ, _BYTES_PER_US, _CACHED_BYTES_PER_US = 1755.0, 3.8e6, 5.5e6
_START_US, _EXPOSED = 2.0, 0.25  # and the share of the shorter of computing and moving that the longer does not hide
_RESIDENT = {2: 512, 4: 384}  # threads of a multiprocessor that registers leave room for, by the bytes of an element
_PLANES = 1.8  # times as long as in NHWC, as 4 bytes are written at a time
_PRODUCT_CLOCKS = 2.0  # of a multiprocessor
_SCHEDULERS = 4
_LOAD_CLOCKS, _LOADED_AT_ONCE = 2500.0, 6  # of memory, and pixels that a thread asks for before it waits
_STEP_CLOCKS, _FINISH_CLOCKS = 150.0, 1200.0  # of a warp that is alone


def candidates(problem: Problem, gpu: Gpu) -> Iterator[StemConfig]:
    """The configs that the GPU has shared memory for."""
    octets = -(-problem.out_width // OCTET)
    widths = dict.fromkeys(-(-octets // parts) for parts in range(1, _MOST_PARTS + 1))
    for width in widths:
        for rows in _ROWS:
            for together in (False, True)[: 1 + groups(problem, gpu)]:
                config = StemConfig(rows, width, together)
                if rows < 2 * problem.out_height and fits(problem, config, gpu):
                    yield config


def is_offered(problem: Problem, config: StemConfig, gpu: Gpu) -> bool:
    """Whether the kernel may run a config; all are right that it has room for."""
    within = config.rows in _ROWS and 1 <= config.octets <= -(-problem.out_width // OCTET)
    return within and fits(problem, config, gpu) and (not config.together or groups(problem, gpu))


def groups(problem: Problem, gpu: Gpu) -> bool:
    """Whether warps may multiply together: instructions of one architecture alone, whose rows are outputs."""
    return gpu.capability == (9, 0) and problem.memory_format == "channels_last"


def fits(problem: Problem, config: StemConfig, gpu: Gpu) -> bool:
    return Layout.of(problem, config).shared_bytes <= gpu.shared_bytes


def search(problem: Problem, gpu: Gpu, most: int) -> list[StemConfig]:
    """The configs that are predicted to be fastest."""
    return sorted(candidates(problem, gpu), key=lambda config: predict_us(problem, config, gpu))[:most]


def predict_us(problem: Problem, config: StemConfig, gpu: Gpu) -> float:
    """What memory or the level-2 cache take, and a multiprocessor for its blocks, one mostly hidden by the other."""
    layout, channels = Layout.of(problem, config), Channels.of(problem)
    blocks = problem.batch * Params.of(layout, config).blocks
    passes = -(-config.rows * config.octets // OCTETS)
    pixels = layout.in_rows * layout.in_columns
    values = passes * OCTETS / 2 * channels.groups * channels.tiles * 4  # of a lane
    instructions = passes * channels.groups * (180 + 80 * channels.tiles) + layout.weight_vectors / 32 * 4
    instructions += pixels / 32 * (25 + 5 * problem.in_channels)
    steps = passes * channels.groups * layout.steps
    busy = steps * _step_clocks(layout) + instructions / _SCHEDULERS + values * 32 * activation.clocks(problem)
    loads = math.ceil(pixels / (layout.threads * _LOADED_AT_ONCE))
    alone = loads * _LOAD_CLOCKS + math.ceil(passes / (layout.threads // 32)) * channels.groups * (
        layout.steps * _STEP_CLOCKS + _FINISH_CLOCKS
    )
    each = math.ceil(blocks / gpu.multiprocessors)
    resident = _RESIDENT[problem.storage.itemsize] // layout.threads
    resident = max(min(resident, gpu.shared_bytes // layout.shared_bytes), 1)
    clocks = max(each * busy, math.ceil(each / resident) * alone)
    outputs = math.prod(problem.output_shape) * (2 if problem.epilogue.residual else 1)
    memory_us = (math.prod(problem.input_shape) + outputs) * problem.storage.itemsize / _BYTES_PER_US
    cached = outputs * problem.storage.itemsize + blocks * layout.shared_bytes
    less, more = sorted((clocks / _CLOCK_MHZ, max(memory_us, cached / _CACHED_BYTES_PER_US)))
    slower = 1.0 if problem.memory_format == "channels_last" else _PLANES
    return _START_US + slower * (more + _EXPOSED * less)


def _step_clocks(layout: Layout) -> float:
    """What a multiprocessor takes for a warp's step: of its products, of shared memory and of instructions the most."""
    problem, tiles = layout.problem, layout.channels.tiles
    apart = layout.pixel * problem.stride[1] * problem.storage.itemsize // 4  # words between neighbouring outputs
    banks = Counter(word % 32 for word in {g * apart + t for g in range(8) for t in range(4)})
    gathered = 2 * OCTETS * max(banks.values()) + 2
    products = OCTETS / 2 * tiles * _PRODUCT_CLOCKS
    if layout.together:
        return max(products / 2, gathered + tiles, (6.5 * OCTETS + 14) / _SCHEDULERS)
    return max(products, gathered + 2 * tiles, (6.5 * OCTETS + 2.5 * tiles) / _SCHEDULERS)
