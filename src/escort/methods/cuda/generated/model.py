"""A model of the machine: how long generated kernels take, many configs at once.

A `Space` has a column for each knob of `GeneratedConfig`. The configs of one `Space` agree in how they stage the input
(copy, arranged) and in what the blocks of a cluster share (split, multicast): that changes what is modelled.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from escort.cuda.gpu import Gpu
from escort.filter import SparseFilter
from escort.methods import activation
from escort.methods.cuda.generated.config import LANES, GeneratedConfig
from escort.methods.cuda.generated.staging import Stage
from escort.methods.cuda.generated.steps import slice_channels
from escort.methods.cuda.generated.words import Words, computed, elements_per_word
from escort.methods.space import Space
from escort.problem import Problem

Floats = NDArray[np.float64]
Whole = NDArray[np.int64]

_INSTRUCTION_BYTES = 16

# Fitted to 1522 timings on an H200 (docs/notes/generated.md), in clocks of a multiprocessor.
_CLOCK_MHZ = 1850.0
_LAUNCH_US = 1.8
_ISSUE, _ALONE = 3.1, 3.7  # instructions per clock, all warps together; clocks per instruction of a warp alone
_COLD = 0.28  # instructions per clock that arrive when asked for
_LOST_SHARERS = 23.0  # half of that where so many ask for the same lost code
_LOST = 0.2  # lost code arrives so much later in any case
_PREFETCH, _JUMPS = 0.27, 1.06  # each prefetch warp makes code arrive so much faster; its jumps add instructions
_SUPPLY, _GROUP = 2.5, 16.5  # instructions per clock for a group of so many multiprocessors with one instruction cache
_PREFETCH_SUPPLY = 0.7  # share of them where prefetch warps ask for code that is not the next
_HOT_BYTES, _LOST_BYTES = 62e3, 808e3  # code that stays in the instruction caches, and code of which nothing stays
_L2 = 18.6  # bytes per clock that reach a multiprocessor when all of them read
_COPY, _COPY_ISSUE = 21.5, 8.0  # per copy of a producer warp, and instructions for it
_CHUNK, _OUTPUT = 18.0, 9.4  # instructions around the steps of a chunk, and per element of an output
_SPARE_REGISTERS, _TIGHT = 28, 1.23  # with fewer beside the sums, reads come right before their use
_ADD_SLICES = 1000.0  # where channels are split
_ARRANGE_US, _ARRANGE_RATE = 3.0, 2.15e6  # of the kernel that lays out the input; bytes per us
_MEMORY_RATE = 4.2e6  # bytes per us


def space_of(config: GeneratedConfig) -> Space:
    """A space of one config."""
    return Space({name: np.array([value]) for name, value in asdict(config).items()})


def common(space: Space, knob: str) -> Any:
    """The value of a knob in which all configs of a space agree, as a Python scalar."""
    return space[knob][0].item()


def words_of(problem: Problem, space: Space) -> Words:
    """The words of the input, which all configs of a space stage alike."""
    return Words.of(problem, copy=common(space, "copy"), arranged=common(space, "arranged"))


def stage_of(words: Words, space: Space) -> Stage[Whole]:
    """How a tile of the input lies in shared memory."""
    return Stage(words, space["consumers"] * LANES, space["channel_block"])


def part_count(problem: Problem, space: Space) -> Whole:
    """How many parts the output channels are dealt to."""
    count: Whole = problem.groups * -(-problem.out_channels // problem.groups // space["out_channels"])
    return count


def part_steps(problem: Problem, sparse_filter: SparseFilter, space: Space) -> Floats:
    """About how many steps a slice of a part takes: multiply-adds, and a read for each tap that a channel needs."""
    parts = part_count(problem, space)
    channels = problem.out_channels / parts
    density = sparse_filter.nnz / math.prod(problem.weight_shape)
    taps = math.prod(problem.weight_shape[1:])
    whole_words = common(space, "arranged") or elements_per_word(problem) == 1
    reads = 1.0 if whole_words else 1.6  # odd taps join two words
    steps: Floats = sparse_filter.nnz / parts + reads * taps * (1.0 - (1.0 - density) ** channels)
    return steps / space["split"]


def work(problem: Problem, words: Words, space: Space) -> tuple[Whole, Whole]:
    """The number of tiles, and of work items: pairs of a part and a tile, for each slice of the channels."""
    tiles = -(-words.count(max(problem.batch, 1)) // (space["consumers"] * LANES))
    tiles = -(-tiles // space["multicast"]) * space["multicast"]
    return tiles, part_count(problem, space) * space["split"] * tiles


def registers(space: Space, gpu: Gpu) -> Whole:
    """Registers that a thread may have; each quarter of a multiprocessor shares its own among its warps."""
    warps = space["consumers"] + space["producers"] + space["prefetch_warps"]
    warps = -(-warps * space["occupancy"] // 4) * 4
    return np.minimum(gpu.registers // (LANES * warps) // 8 * 8, 255)


def resident(space: Space, gpu: Gpu) -> Whole:
    """Blocks that run at a time."""
    cluster = common(space, "split") * common(space, "multicast")
    blocks: Whole = gpu.clusters(cluster) * cluster * space["occupancy"]
    return blocks


def predict_us(problem: Problem, sparse_filter: SparseFilter, space: Space, gpu: Gpu) -> Floats:
    """What bounds a tile, times the tiles that a multiprocessor computes in turn; of each config."""
    problem = computed(problem)
    words = words_of(problem, space)
    chunks = -(-slice_channels(problem, common(space, "split")) // (space["channel_block"] * space["stages"]))
    chunks = chunks * space["stages"]
    output = _OUTPUT + activation.clocks(problem) * activation.RATE
    steps = part_steps(problem, sparse_filter, space) + _CHUNK * chunks
    steps = steps + output * space["out_channels"] * words.elements
    steps = steps * np.where(space["prefetch_warps"] > 0, _JUMPS, 1.0)
    hot = _tile_clocks(problem, words, space, steps, gpu)
    clocks = _clocks(problem, words, space, steps, chunks, hot, gpu)
    moved = (math.prod(problem.input_shape) + math.prod(problem.output_shape)) * problem.storage.itemsize
    arrange_us = _arrange_us(problem, words) if common(space, "arranged") else 0.0
    return np.hypot(_LAUNCH_US + arrange_us + clocks / _CLOCK_MHZ, moved / _MEMORY_RATE)


def _tile_clocks(problem: Problem, words: Words, space: Space, steps: Floats, gpu: Gpu) -> Floats:
    """Clocks of a tile whose code is in the instruction caches."""
    channels = slice_channels(problem, common(space, "split"))
    stage, planes = stage_of(words, space), len(words.phases)
    issued, copying = steps * space["consumers"], np.zeros(len(space))
    if common(space, "copy"):
        per_round = space["copy"] * LANES * space["producers"]
        copies = -(-(stage.tile + words.reach) // per_round) * channels * planes
        issued, copying = issued + _COPY_ISSUE * copies * space["producers"], _COPY * copies
    spare = registers(space, gpu) - space["out_channels"] * space["sums"]
    issued = issued * np.where(spare < _SPARE_REGISTERS, _TIGHT, 1.0)
    staging = channels * planes * stage.channel_words * 4 / _L2
    occupancy = space["occupancy"]
    return _side_by_side(issued / _ISSUE * occupancy, staging * occupancy, copying, _ALONE * steps)


def _clocks(
    problem: Problem, words: Words, space: Space, steps: Floats, chunks: Whole, hot: Floats, gpu: Gpu
) -> Floats:
    """Clocks of all tiles that a multiprocessor computes in turn, some of which have to wait for their code.

    Code is cold when a multiprocessor runs it first, and whenever it was lost from the cache meanwhile. The code of all
    parts that run at the same time competes for the cache. Cold code arrives line by line: later where it was lost and
    many multiprocessors ask for the same lines, and later where those of a group run different code.

    Args:
        steps: instructions of a tile.
        hot: clocks of a tile whose code is in the caches.
    """
    (tiles, items), slots = work(problem, words, space), resident(space, gpu)
    rounds = -(-items // slots)
    parts = np.minimum(items / tiles, 1.0 + slots / tiles)
    lost = np.clip((steps * _INSTRUCTION_BYTES * parts - _HOT_BYTES) / (_LOST_BYTES - _HOT_BYTES), 0.0, 1.0)
    start_points = np.maximum(np.minimum(space["start_points"], chunks // space["stages"]), 1)
    sharers = np.minimum(tiles, slots) / start_points
    late = (1.0 + lost * sharers / _LOST_SHARERS) / (1.0 + _PREFETCH * space["prefetch_warps"])
    multicast = space["multicast"]
    apart = np.where(multicast == 1, np.minimum(parts * start_points, _GROUP), np.maximum(_GROUP / multicast, 1.0))
    supply = _SUPPLY * np.where(space["prefetch_warps"] > 0, _PREFETCH_SUPPLY, 1.0)
    cold = _side_by_side(hot, steps * (1.0 + _LOST * lost) * np.maximum(late / _COLD, apart / supply))
    first = np.minimum(np.minimum(rounds, -(-rounds * np.minimum(items, slots) // tiles)), items // tiles)
    met = first + lost * (rounds - first)
    adding = np.where(space["split"] > 1, _ADD_SLICES, 0.0)
    return met * cold + (rounds - met) * hot + adding


def _arrange_us(problem: Problem, words: Words) -> float:
    """How long the kernel takes that lays out the input."""
    arranged = problem.in_channels * len(words.phases) * words.count(max(problem.batch, 1)) * 4
    read = math.prod(problem.input_shape) * problem.storage.itemsize
    return _ARRANGE_US + (arranged + read) / _ARRANGE_RATE


def _side_by_side(*clocks: Floats) -> Floats:
    """The clocks of things that run at the same time: a little more than the longest."""
    return np.sum([part**4 for part in clocks], axis=0) ** 0.25
