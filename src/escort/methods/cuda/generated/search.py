"""The search for the config of a generated kernel: a space, and a model of the machine that ranks it.

Tens of thousands of configs are ranked at once: where a function says so, the fields of a `GeneratedConfig` may be
arrays of one length, many configs side by side, and so may its result.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from escort.cuda.gpu import Gpu
from escort.filter import SparseFilter
from escort.methods.cuda.generated import steps as kernel_steps
from escort.methods.cuda.generated.steps import LANES, GeneratedConfig, Words
from escort.problem import Problem

_LEAST_ROWS, _MOST_ROWS = 8, 208  # of a piece
_INSTRUCTION_BYTES = 16
_APART_STAGES = 2  # few, so that there are places to begin at
_LEAST_BUSY = 0.75  # of the multiprocessors' time, where there are several rounds of tiles
_BEST = 256  # of a way to stage the input, among which those that are not alike are found
_KIN = 1.08  # a further config of a kind counts as if it took so much longer
#: Products that a sum in fp16 may have: a relative error of about 1.8e-3, of 2e-3 allowed.
_MOST_PRODUCTS = 165.0

# The model of the machine, in clocks of a multiprocessor, fitted to 1522 timings on an H200 (docs/performance.md).
_CLOCK_MHZ = 1850.0
_LAUNCH_US = 1.8
_ISSUE, _ALONE = 3.1, 3.7  # instructions per clock, all warps together; clocks per instruction of a warp alone
_COLD = 0.28  # instructions per clock that arrive when asked for
_LOST_SHARERS = 23.0  # half of that where so many ask for the same lost code
_LOST = 0.2  # lost code arrives so much later in any case
_PREFETCH, _JUMPS = (
    0.27,
    1.06,
)  # each prefetch warp makes code arrive so much faster; the instructions that its jumps add
_FILL, _GROUP = 2.5, 16.5  # instructions per clock for a group of so many multiprocessors with one instruction cache
_PREFETCH_FILL = 0.7  # share of them where prefetch warps ask for code that is not the next
_HOT_BYTES, _LOST_BYTES = 62e3, 808e3  # code that stays in the instruction caches, and code of which nothing stays
_L2 = 18.6  # bytes per clock that reach a multiprocessor when all of them read
_COPY, _COPY_ISSUE = 21.5, 8.0  # per copy of a producer warp, and instructions for it
_CHUNK, _ROW = 18.0, 9.4  # instructions around the steps of a chunk, and per element of an output
_SPARE_REGISTERS, _TIGHT = 28, 1.23  # with fewer beside the sums, reads come right before their use
_ADD_PARTS = 1000.0  # of channels that are split
_ARRANGE_US, _ARRANGE_RATE = 3.0, 2.15e6  # of the kernel that lays out the input; bytes per us
_MEMORY_RATE = 4.2e6  # bytes per us


def search(problem: Problem, sparse_filter: SparseFilter, gpu: Gpu, most: int) -> list[GeneratedConfig]:
    """The configs of least predicted time, no two of them alike, and not all of one kind.

    The model errs in the same way for all of a kind, so each further one of it must be better by a share.
    """
    best: dict[tuple[int, ...], tuple[float, GeneratedConfig]] = {}  # by kind and size
    for many in candidates(problem, sparse_filter, gpu):
        times = predict_us(problem, sparse_filter, many, gpu)
        for i in np.argsort(times, kind="stable")[:_BEST].tolist():
            config = _one(many, i)
            alike = (*_kind(config), config.out_channels, config.consumers * config.occupancy // 4)
            if alike not in best or times[i] < best[alike][0]:
                best[alike] = float(times[i]), config
    ranked: list[tuple[float, float, GeneratedConfig]] = []
    of_kind: Counter[tuple[int, ...]] = Counter()
    for time, config in sorted(best.values(), key=lambda found: found[0]):
        ranked.append((time * _KIN ** of_kind[_kind(config)], time, config))
        of_kind[_kind(config)] += 1
    chosen = sorted(ranked, key=lambda found: found[0])[:most]
    return [config for _, _, config in sorted(chosen, key=lambda found: found[1])]


def _kind(config: GeneratedConfig) -> tuple[int, ...]:
    """What configs have in common about which the model errs in the same way."""
    return config.arranged, config.split, config.multicast, config.prefetch_warps, config.start_points


def candidates(problem: Problem, sparse_filter: SparseFilter, gpu: Gpu) -> Iterator[GeneratedConfig]:
    """The search space: every config that fits the device and leaves few multiprocessors idle in the last round.

    Yields configs with arrays as fields, those of each way to stage the input together.
    """
    problem = kernel_steps.computed(problem)
    half, group_rows = kernel_steps.elements_per_word(problem) == 2, problem.out_channels // problem.groups
    nnz = np.diff(sparse_filter.indptr).astype(np.float64)
    # Products of a row as they count in the error of all outputs, whose size grows with them.
    products = float((nnz * nnz).sum() / max(nnz.sum(), 1.0))
    channels = problem.in_channels // problem.groups
    hands = range(-(-group_rows // _MOST_ROWS), max(group_rows // _LEAST_ROWS, 1) + 1)
    knobs = sorted({-(-group_rows // hand) for hand in hands}), (1, 2), range(4, 32), (8, 4, 16)
    rows, occupancy, consumers, block = (knob.ravel() for knob in np.meshgrid(*knobs, indexing="ij"))
    stagings, clusters = list(_stagings(problem, gpu)), _clusters(problem, gpu)
    for (copy, arranged, producers), (split, multicast, prefetch_warps) in itertools.product(stagings, clusters):
        if copy and split > 1:
            continue  # nothing to gain where producers take most of the time
        words = Words.of(problem, GeneratedConfig(1, 1, 1, 1, copy=copy, arranged=arranged))
        sums = math.ceil(max(products, 1.0) / (_MOST_PRODUCTS * split)) if half else 1
        chunks = -(-channels // (split * block))
        depths = np.array([4, 3, 2])
        stages = depths[np.argmin([-(-chunks // depth) * depth for depth in depths], axis=0)]
        many = _configs(
            rows,
            consumers,
            producers,
            block,
            copy,
            stages,
            occupancy,
            1,
            sums,
            arranged,
            split,
            multicast,
            prefetch_warps,
        )
        room = occupancy * (kernel_steps.shared_bytes(words, many, rows) + 1024)
        (_, items), slots = _items(problem, words, many), resident(many, gpu)
        fits = (
            (occupancy * (consumers + producers + prefetch_warps) <= 32)
            & (rows * sums + 14 <= _registers(many, gpu))
            & (room <= gpu.shared_bytes + 1024)
            & ((items <= slots) | (items >= _LEAST_BUSY * slots * -(-items // slots)))
        )
        apart = fits & (items > slots) & (chunks >= 4 * _APART_STAGES)
        if fits.any():
            yield _some(many, fits)
        if apart.any():
            yield replace(_some(many, apart), stages=_APART_STAGES, start_points=8)


def _configs(*values: Any) -> GeneratedConfig:
    """A config whose fields may be arrays, which its type does not say."""
    return GeneratedConfig(*values)


def _some(many: GeneratedConfig, mask: NDArray[np.bool_]) -> GeneratedConfig:
    return _picked(many, lambda values: values[mask])


def _one(many: GeneratedConfig, index: int) -> GeneratedConfig:
    return _picked(many, lambda values: values[index].item())


def _picked(many: GeneratedConfig, pick: Callable[[NDArray[Any]], Any]) -> GeneratedConfig:
    values = (getattr(many, field.name) for field in fields(many))
    return _configs(*(pick(value) if isinstance(value, np.ndarray) else value for value in values))


def _stagings(problem: Problem, gpu: Gpu) -> Iterator[tuple[int, bool, int]]:
    """The ways to stage the input: (copy, arranged, producers)."""
    for copy in (4, 2, 1):
        if kernel_steps.copies_as_it_is(problem, copy):
            yield from ((copy, False, producers) for producers in (2, 3, 4, 6, 8))
    if gpu.capability < (9, 0):
        yield from ((4, True, producers) for producers in (2, 4))
    else:
        yield 0, True, 1


def _clusters(problem: Problem, gpu: Gpu) -> list[tuple[int, int, int]]:
    """What blocks of a cluster share, and who brings the code: (split, multicast, prefetch_warps)."""
    alone = [(1, 1, 0), (1, 1, 2)]
    if gpu.capability < (9, 0):
        return alone
    splits = [(split, 1, 0) for split in (2, 4) if split <= problem.in_channels // problem.groups]
    return [*alone, (1, 8, 2), *splits]


def piece_count(problem: Problem, config: GeneratedConfig) -> Any:
    """Into so many pieces the output channels are dealt; for arrays too."""
    return problem.groups * -(-problem.out_channels // problem.groups // config.out_channels)


def piece_steps(problem: Problem, sparse_filter: SparseFilter, config: GeneratedConfig) -> Any:
    """About how many steps a piece takes: its multiply-adds, and a read for each tap that any of its rows needs.

    For arrays too.
    """
    pieces = piece_count(problem, config)
    rows = problem.out_channels / pieces
    density = sparse_filter.nnz / math.prod(problem.weight_shape)
    taps = math.prod(problem.weight_shape[1:])
    reads = 1.0 if config.arranged or kernel_steps.elements_per_word(problem) == 1 else 1.6  # odd taps join two words
    return (sparse_filter.nnz / pieces + reads * taps * (1.0 - (1.0 - density) ** rows)) / config.split


def _items(problem: Problem, words: Words, config: GeneratedConfig) -> tuple[Any, Any]:
    """Tiles, and what blocks do: pairs of a piece and a tile, for each part of the channels. For arrays too."""
    tiles = -(-words.count(max(problem.batch, 1)) // config.tile)
    tiles = -(-tiles // config.multicast) * config.multicast
    return tiles, piece_count(problem, config) * config.split * tiles


def _registers(config: GeneratedConfig, gpu: Gpu) -> Any:
    """That a thread may have; each quarter of a multiprocessor shares its own among its warps."""
    warps = -(-(config.consumers + config.producers + config.prefetch_warps) * config.occupancy // 4) * 4
    return np.minimum(gpu.registers // (LANES * warps) // 8 * 8, 255)


def resident(config: GeneratedConfig, gpu: Gpu) -> Any:
    """Blocks that run at a time; for arrays too."""
    return gpu.clusters(config.cluster) * config.cluster * config.occupancy


def predict_us(problem: Problem, sparse_filter: SparseFilter, config: GeneratedConfig, gpu: Gpu) -> Any:
    """The model of the machine: what bounds a tile, times the tiles that a multiprocessor computes in turn.

    Fields of the config that differ between ways to stage the input are numbers, the others may be arrays.
    """
    problem = kernel_steps.computed(problem)
    words = Words.of(problem, config)
    (tiles, items), slots = _items(problem, words, config), resident(config, gpu)
    rounds = -(-items // slots)
    channels = kernel_steps.part_channels(problem, config)
    chunks = -(-channels // (config.channel_block * config.stages)) * config.stages
    elements = words.columns * words.samples
    steps = piece_steps(problem, sparse_filter, config) + _CHUNK * chunks + _ROW * config.out_channels * elements
    steps = steps * (_JUMPS if config.prefetch_warps else 1.0)
    issued, copying = steps * config.consumers, 0.0
    stage_bytes = channels * len(words.phases) * kernel_steps.channel_words(words, config) * 4
    if config.copy:
        copies = (
            -(-(config.tile + words.reach) // (config.copy * LANES * config.producers)) * channels * len(words.phases)
        )
        issued, copying = issued + _COPY_ISSUE * copies * config.producers, _COPY * copies
    spare = _registers(config, gpu) - config.out_channels * config.sums
    issued = issued * np.where(spare < _SPARE_REGISTERS, _TIGHT, 1.0)
    staging = stage_bytes / _L2
    busy = _side_by_side(issued / _ISSUE * config.occupancy, staging * config.occupancy, copying, _ALONE * steps)
    # Code is cold when a multiprocessor meets it first, and each time where it does not stay. What wants to stay is
    # the code of all pieces that run at the same time.
    pieces = np.minimum(items / tiles, 1.0 + slots / tiles)
    lost = np.clip((steps * _INSTRUCTION_BYTES * pieces - _HOT_BYTES) / (_LOST_BYTES - _HOT_BYTES), 0.0, 1.0)
    # It arrives line by line, later where it is lost and many ask for the same, and a group of multiprocessors can
    # bring in only so much for all the places at which its own are.
    places = np.maximum(np.minimum(config.start_points, chunks // config.stages), 1)
    sharers = np.minimum(tiles, slots) / places
    late = (1.0 + lost * sharers / _LOST_SHARERS) / (1.0 + _PREFETCH * config.prefetch_warps)
    apart = np.minimum(pieces * places, _GROUP) if config.multicast == 1 else max(_GROUP / config.multicast, 1.0)
    fill = _FILL * (_PREFETCH_FILL if config.prefetch_warps else 1.0)
    cold = _side_by_side(busy, steps * (1.0 + _LOST * lost) * np.maximum(late / _COLD, apart / fill))
    first = np.minimum(np.minimum(rounds, -(-rounds * np.minimum(items, slots) // tiles)), items // tiles)
    met = first + lost * (rounds - first)
    clocks = met * cold + (rounds - met) * busy + (_ADD_PARTS if config.split > 1 else 0.0)
    moved = (math.prod(problem.input_shape) + math.prod(problem.output_shape)) * problem.storage.itemsize
    arrange_us = 0.0
    if config.arranged:
        arranged = problem.in_channels * len(words.phases) * words.count(max(problem.batch, 1)) * 4
        read = math.prod(problem.input_shape) * problem.storage.itemsize
        arrange_us = _ARRANGE_US + (arranged + read) / _ARRANGE_RATE
    return np.hypot(_LAUNCH_US + arrange_us + clocks / _CLOCK_MHZ, moved / _MEMORY_RATE)


def _side_by_side(*clocks: Any) -> Any:
    """What runs at the same time takes a little longer than the longest."""
    return sum(np.asarray(part) ** 4 for part in clocks) ** 0.25
