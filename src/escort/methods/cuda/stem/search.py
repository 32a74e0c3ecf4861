"""Which tiles are worth timing for a stem, by a model of what a multiprocessor does; an estimate, not fitted yet."""

from __future__ import annotations

import math
from collections.abc import Iterator

from escort.cuda.gpu import Gpu
from escort.methods import activation
from escort.methods.cuda.stem.config import StemConfig
from escort.methods.cuda.stem.layout import OCTET, Channels, Layout
from escort.methods.cuda.stem.params import Params
from escort.problem import Problem

WARPS, OCTETS = 4, 4  # of a block, of a warp at a time
_ROWS, _MOST_PARTS = (1, 2, 4, 8, 16), 8
_CLOCK_MHZ, _BYTES_PER_US, _CACHED_BYTES_PER_US = 1755.0, 3.8e6, 5.5e6
_START_US, _EXPOSED = 2.0, 0.25  # and the share of the shorter of computing and moving that the longer does not hide
_RESIDENT = {2: 4, 4: 3}  # blocks of a multiprocessor that registers leave room for, by the bytes of an element
_PRODUCT_CLOCKS = 2.0  # of a multiprocessor
_SCHEDULERS = 4
_LOAD_CLOCKS, _LOADED_AT_ONCE = 800.0, 512  # of memory, and pixels that a block asks for before it waits
_STEP_CLOCKS, _FINISH_CLOCKS = 90.0, 400.0  # of a warp that is alone


def candidates(problem: Problem, gpu: Gpu) -> Iterator[StemConfig]:
    """The configs that the GPU has shared memory for."""
    octets = -(-problem.out_width // OCTET)
    widths = dict.fromkeys(-(-octets // parts) for parts in range(1, _MOST_PARTS + 1))
    for width in widths:
        for rows in _ROWS:
            config = StemConfig(rows, width)
            if rows < 2 * problem.out_height and fits(problem, config, gpu):
                yield config


def is_offered(problem: Problem, config: StemConfig, gpu: Gpu) -> bool:
    """Whether the kernel may run a config; all are right that it has room for."""
    within = config.rows in _ROWS and 1 <= config.octets <= -(-problem.out_width // OCTET)
    return within and fits(problem, config, gpu)


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
    steps = channels.groups * layout.steps
    products = passes * steps * OCTETS / 2 * channels.tiles * _PRODUCT_CLOCKS
    values = passes * OCTETS / 2 * channels.groups * channels.tiles * 4  # of a lane
    pixels = layout.in_rows * layout.in_columns
    instructions = (
        passes * steps * (2 + 4 * OCTETS + 2.5 * channels.tiles)
        + values * 4
        + pixels / 32 * (20 + 4 * problem.in_channels)
        + layout.weight_vectors / 32 * 4
    )
    busy = max(products, instructions / _SCHEDULERS) + values * 32 * activation.clocks(problem)
    alone = math.ceil(pixels / _LOADED_AT_ONCE) * _LOAD_CLOCKS + math.ceil(passes / WARPS) * (
        steps * _STEP_CLOCKS + _FINISH_CLOCKS * channels.groups
    )
    each = math.ceil(blocks / gpu.multiprocessors)
    resident = max(min(_RESIDENT[problem.storage.itemsize], gpu.shared_bytes // layout.shared_bytes), 1)
    clocks = max(each * busy, math.ceil(each / resident) * alone)
    outputs = math.prod(problem.output_shape) * (2 if problem.epilogue.residual else 1)
    memory_us = (math.prod(problem.input_shape) + outputs) * problem.storage.itemsize / _BYTES_PER_US
    cached = outputs * problem.storage.itemsize + blocks * layout.shared_bytes
    less, more = sorted((clocks / _CLOCK_MHZ, max(memory_us, cached / _CACHED_BYTES_PER_US)))
    return _START_US + more + _EXPOSED * less
