"""Which configs of the direct kernel are worth timing: a prediction of their time, and the best of the search space."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from escort.cuda.gpu import Gpu
from escort.filter import SparseFilter
from escort.methods import activation
from escort.methods.cuda.direct.layout import (
    HALF_REACH,
    LANES,
    SLOT_CLASSES,
    STORAGE,
    DirectConfig,
    Layout,
    Positions,
    grouping,
    shared_bytes,
)
from escort.methods.space import Space
from escort.problem import Problem

#: The search space. Every combination that the device can run is ranked by the predicted time.
AXES: dict[str, tuple[int, ...]] = {
    "words": (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 13, 14, 16),
    "out_channels": (1, 2, 4),
    "position_warps": (1, 2, 4),
    "out_channel_warps": (1, 2, 4, 8, 12, 13, 16, 20, 24, 26),
    "in_channel_warps": (1, 2, 4, 8),
    "producers": (4, 8),
    "occupancy": (1, 2, 3),
}
STAGING_AXES: dict[str, tuple[int, ...]] = {
    "channel_block": (4, 8, 16, 24, 32, 48, 64, 96, 128),
    "stages": (2, 3, 4),
}
_KNOBS = (*AXES, *STAGING_AXES)
_ALIKE = 2  # configs that are taken of those that differ in staging alone
_MOST_ALIKE = len(AXES["producers"]) * math.prod(map(len, STAGING_AXES.values()))  # that there are

#: Columns by name: those of AXES are (tiles, 1), those of STAGING_AXES (1, stagings). Together they are all configs.
_Knobs = Mapping[str, NDArray[Any]]

# Constants of the prediction, in clocks of a multiprocessor; docs/notes/direct-gpu.md says how well it does.
_LAUNCH = 4400  # from launch to launch, beside the work of the blocks
_FETCH = 900  # latency of global memory
_LOOP = 30  # instructions of an output channel's nonzeros in a stage: header, flush, loop exit
_ALONE_LOOP = 119  # the same as latency, which a warp does not hide from itself
_STAGE = 790  # of handing over a stage
_COPY = 29  # of a word that a lane of a producer copies
_EXPOSED = 0.2  # of staging, though stages are filled ahead


@lru_cache(maxsize=8)
def _knobs(half: bool, packed: bool, registers: int) -> _Knobs:
    """The combinations of AXES whose threads and registers a multiprocessor has, and those of STAGING_AXES.

    All axes ascend, so that no config needs less room than the first.
    """
    tiles = Space.product(AXES)
    consumers = tiles["position_warps"] * tiles["out_channel_warps"] * tiles["in_channel_warps"]
    threads = (consumers + tiles["producers"]) * LANES
    words, out_channels = tiles["words"], tiles["out_channels"]
    needed = out_channels * words * (1 + half) + words * (1 + packed) + 2 * out_channels + (24 if half else 20)
    most = np.minimum(registers // (threads * tiles["occupancy"]) // 8 * 8, 255)
    runs = (threads <= 1024) & (consumers >= 4) & (needed <= most) & (most >= 64)
    tiles = tiles.with_columns(most_registers=most).where(runs)
    of_tiles = {name: column[:, None] for name, column in tiles.columns.items()}
    return of_tiles | {name: column[None] for name, column in Space.product(STAGING_AXES).columns.items()}


def _shares(problem: Problem, sparse_filter: SparseFilter | None, knobs: _Knobs) -> tuple[NDArray[Any], ...]:
    """The number of groups of output channels; and input channels, nonzeros and chunks of each."""
    block_channels = knobs["out_channel_warps"] * knobs["out_channels"]
    group_channels, merged = grouping(problem, block_channels)
    groups = -(-problem.groups // merged) * -(-group_channels * merged // block_channels)
    channels = merged * (problem.in_channels // problem.groups)
    nnz = sparse_filter.nnz if sparse_filter is not None else 0
    return groups, channels, nnz / groups, -(-channels // knobs["channel_block"])


def _fits(problem: Problem, sparse_filter: SparseFilter | None, gpu: Gpu, knobs: _Knobs) -> NDArray[np.bool_]:
    """Which configs find room in a multiprocessor's shared memory and registers."""
    half = STORAGE[problem.precision] != 0
    layout = Layout.of(problem, LANES * knobs["words"] * knobs["position_warps"])
    _, channels, nnz, chunks = _shares(problem, sparse_filter, knobs)
    record_bytes = nnz / chunks * _unevenness(sparse_filter) * (4 if half else 8)
    record_bytes += knobs["out_channel_warps"] * knobs["out_channels"] * knobs["in_channel_warps"] * 8 + 96
    shared = shared_bytes(layout, knobs, record_bytes)
    per_slot = 5 + 2 * layout.odd if layout.paired else layout.samples_per_word
    slot_registers = np.maximum(layout.slots, 4) * per_slot + (44 if half else 30)
    fits: NDArray[np.bool_] = (
        (shared <= gpu.shared_bytes)
        & (knobs["occupancy"] * (shared + 1024) <= gpu.shared_bytes + 1024)
        & (layout.slots <= SLOT_CLASSES[-1])
        & ((not half) | (knobs["channel_block"] * layout.channel_words * 4 <= HALF_REACH))
        & (slot_registers <= knobs["most_registers"])
        & (knobs["channel_block"] < np.maximum(2 * channels, STAGING_AXES["channel_block"][0] + 1))
        & (knobs["channel_block"] % knobs["in_channel_warps"] == 0)
    )
    return fits


def has_room(problem: Problem, gpu: Gpu) -> bool:
    """Whether a device can run any config of the search space."""
    knobs = _knobs(STORAGE[problem.precision] != 0, False, gpu.registers)
    return bool(_fits(problem, None, gpu, {name: column[:1, :1] for name, column in knobs.items()}).item())


def is_offered(problem: Problem, sparse_filter: SparseFilter, gpu: Gpu, config: DirectConfig) -> bool:
    """Whether a config is one that :func:`search` chooses from."""
    half = STORAGE[problem.precision] != 0
    if not config.balanced or (config.packed and not half):
        return False
    knobs = _knobs(half, config.packed, gpu.registers)
    tiles, stagings = (
        np.all([knobs[name].ravel() == getattr(config, name) for name in axes], axis=0) for axes in (AXES, STAGING_AXES)
    )
    if not (tiles.any() and stagings.any()):
        return False
    row = {name: column[:, stagings] if name in STAGING_AXES else column[tiles] for name, column in knobs.items()}
    return bool(_fits(problem, sparse_filter, gpu, row).item())


def candidates(problem: Problem, sparse_filter: SparseFilter, gpu: Gpu, packed: bool, most: int | None = None) -> Space:
    """The configs that fit, all or about so many of the best, with their predicted clocks in the column "clocks"."""
    knobs = _knobs(STORAGE[problem.precision] != 0, packed, gpu.registers)
    fits = _fits(problem, sparse_filter, gpu, knobs)
    clocks = np.where(fits, _clocks(problem, sparse_filter, gpu, packed, knobs), np.inf)
    if most is not None and most < clocks.size:
        fits &= clocks <= np.partition(clocks, most - 1, axis=None)[most - 1]
    tile, staging = np.nonzero(fits)
    columns = {name: np.broadcast_to(knobs[name], fits.shape)[tile, staging] for name in _KNOBS}
    return Space(columns | {"clocks": clocks[tile, staging]})


def _clocks(
    problem: Problem, sparse_filter: SparseFilter, gpu: Gpu, packed: bool, knobs: _Knobs
) -> NDArray[np.floating[Any]]:
    """The clocks of a multiprocessor that each config takes."""
    half = STORAGE[problem.precision] != 0
    words, out_channels, occupancy = knobs["words"], knobs["out_channels"], knobs["occupancy"]
    tile = LANES * words * knobs["position_warps"]
    layout = Layout.of(problem, tile)
    groups, channels, group_nnz, chunks = _shares(problem, sparse_filter, knobs)
    samples = -(-max(problem.batch, 1) // layout.samples_per_word)
    blocks = -(-Positions(problem).count(samples) // tile) * groups

    # Wavefronts of shared memory, instruction slots (four per clock) and the time of a warp on its own, which add up:
    # all warps of a block wait for a stage, and then for one another.
    sharing = knobs["position_warps"]  # warps that read the same nonzeros
    block_channels = knobs["out_channel_warps"] * out_channels
    cells = block_channels * knobs["in_channel_warps"] * chunks
    reads = group_nnz * sharing * (words + 1 / (4 if half else 2)) + cells * sharing * 2
    writes = channels * layout.slots * (7 if layout.paired else 4 if half else 2)
    wavefronts = reads + writes + group_nnz / 8 + block_channels * tile / LANES * 2
    per_product = 2 if packed or not half else 5
    instructions = sharing * (group_nnz * (per_product * words + 2) + cells * (_LOOP + 4 * words * packed))
    instructions += channels * layout.slots * (24 if layout.paired else 12 if half else 5)
    warps = knobs["out_channel_warps"] * knobs["in_channel_warps"]
    alone = group_nnz / warps * per_product * words + cells / warps * _ALONE_LOOP + chunks * _STAGE
    resident = np.minimum(occupancy, -(-blocks // gpu.multiprocessors))
    waves = -(-blocks // (gpu.multiprocessors * resident))
    staging = _staging_clocks(layout, knobs)
    busy = np.maximum(wavefronts, instructions / 4) * resident + alone
    busy = busy + _EXPOSED * chunks * staging / (knobs["stages"] - 1)
    # Blocks of one multiprocessor hide each other's first stage and epilogue.
    edges = staging + activation.clocks(problem) * block_channels * tile * layout.samples_per_word
    clocks: NDArray[np.floating[Any]] = waves * (busy + edges / resident**2) + _LAUNCH
    return clocks


def _staging_clocks(layout: Layout, knobs: _Knobs) -> NDArray[np.floating[Any]]:
    """Clocks of staging a chunk. Copies are asynchronous; 16-bit storage is loaded and stored batch by batch."""
    copies, producers = knobs["channel_block"] * layout.slots, knobs["producers"]
    clocks: NDArray[np.floating[Any]]
    if layout.samples_per_word == 1:
        clocks = copies * _COPY / producers
    else:
        clocks = _FETCH + _FETCH / 2 * -(-copies // (8 * producers))
    return clocks


def predicted_clocks(
    problem: Problem, sparse_filter: SparseFilter, gpu: Gpu, packed: bool, config: DirectConfig | None
) -> float:
    """The clocks that the model predicts for a config, or the least of all that fit."""
    space = candidates(problem, sparse_filter, gpu, packed)
    if config is None:
        return float(space["clocks"].min())
    is_config = np.all([space[name] == getattr(config, name) for name in _KNOBS], axis=0)
    return float(space["clocks"][is_config].min())


def _unevenness(sparse_filter: SparseFilter | None) -> float:
    """Nonzeros of the fullest four neighbouring input channels over the average."""
    if sparse_filter is None or not sparse_filter.nnz:
        return 1.0
    per_channel = np.bincount(sparse_filter.taps[0] // 4)
    return 1.2 * float(per_channel.max() / (sparse_filter.nnz / -(-sparse_filter.shape[1] // 4)))


def search(problem: Problem, sparse_filter: SparseFilter, gpu: Gpu, most: int = 12) -> list[DirectConfig]:
    """The most promising configs by predicted time, at most two that differ in staging alone.

    For 16-bit storage a quarter of them add every product in float32, in case the others are not exact enough.
    """
    half = STORAGE[problem.precision] != 0
    configs: list[DirectConfig] = []
    for packed, share in ((True, most - most // 4), (False, most // 4)) if half else ((False, most),):
        if share:
            enough = -(-share * _MOST_ALIKE // _ALIKE)  # even if all are alike that can be
            configs += _best(candidates(problem, sparse_filter, gpu, packed, enough), packed, share)
    return configs


def _best(space: Space, packed: bool, most: int) -> list[DirectConfig]:
    """The first by predicted clocks, at most two that differ in staging alone."""
    taken: Counter[tuple[int, ...]] = Counter()
    configs: list[DirectConfig] = []
    for i in space.rank(space["clocks"]):
        row = space.row(i)
        shape = tuple(row[name] for name in AXES if name != "producers")
        if taken[shape] < _ALIKE:
            taken[shape] += 1
            configs.append(DirectConfig(**{name: row[name] for name in _KNOBS}, packed=packed))
        if len(configs) == most:
            break
    return configs


def neighbours(
    config: DirectConfig, problem: Problem, sparse_filter: SparseFilter, gpu: Gpu
) -> dict[str, list[DirectConfig]]:
    """For each knob, the configs of the search space that differ from `config` in it alone."""
    space = candidates(problem, sparse_filter, gpu, config.packed)
    fitting = set(zip(*(space[name].tolist() for name in _KNOBS), strict=True))
    by_knob: dict[str, list[DirectConfig]] = {}
    for name in _KNOBS:
        values: list[Any] = [value for value in (AXES | STAGING_AXES)[name] if value != getattr(config, name)]
        others = [replace(config, **{name: value}) for value in values]
        by_knob[name] = [other for other in others if tuple(getattr(other, knob) for knob in _KNOBS) in fitting]
    by_knob["balanced"] = [replace(config, balanced=not config.balanced)]
    if STORAGE[problem.precision]:
        by_knob["packed"] = [replace(config, packed=not config.packed)]
    return {name: configs for name, configs in by_knob.items() if configs}
