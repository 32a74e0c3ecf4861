"""Which configs of the direct kernel are worth timing: a prediction of their time, and the best of the search space."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from escort.cuda.gpu import Gpu
from escort.filter import SparseFilter
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
from escort.problem import Problem

#: The search space. Every combination that the device can run is ranked by the predicted time.
AXES: dict[str, tuple[int, ...]] = {
    "words": (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 13, 14, 16),
    "rows": (1, 2, 4),
    "position_warps": (1, 2, 4),
    "row_warps": (1, 2, 4, 8, 12, 13, 16, 20, 24, 26),
    "channel_warps": (1, 2, 4, 8),
    "producers": (4, 8),
    "blocks": (1, 2, 3),
}
STAGING_AXES: dict[str, tuple[int, ...]] = {
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
def _space(half: bool, packed: bool, registers: int) -> _Numbers:
    """The combinations of AXES whose threads and registers a multiprocessor has, each with all of STAGING_AXES.

    All axes ascend, so that no config needs less room than the first.
    """
    tiles = _product(AXES)
    consumers = tiles["position_warps"] * tiles["row_warps"] * tiles["channel_warps"]
    threads = (consumers + tiles["producers"]) * LANES
    words, rows = tiles["words"], tiles["rows"]
    needed = rows * words * (1 + half) + words * (1 + packed) + 2 * rows + (24 if half else 20)
    most = np.minimum(registers // (threads * tiles["blocks"]) // 8 * 8, 255)
    found = np.flatnonzero((threads <= 1024) & (consumers >= 4) & (needed <= most) & (most >= 64))
    space = _product({"tile": found, **STAGING_AXES})
    at = space.pop("tile")
    return {name: numbers[at] for name, numbers in (tiles | {"most_registers": most}).items()} | space


def _product(axes: Mapping[str, Any]) -> _Numbers:
    grid = np.meshgrid(*map(np.asarray, axes.values()), indexing="ij")
    return {name: axis.ravel() for name, axis in zip(axes, grid, strict=True)}


def _shares(problem: Problem, sparse_filter: SparseFilter | None, c: _Numbers) -> tuple[NDArray[Any], ...]:
    """Groups of output channels, and of each its input channels, its nonzeros, and its stages."""
    per_group = c["row_warps"] * c["rows"]
    group_rows, merged = grouping(problem, per_group)
    groups = -(-problem.groups // merged) * -(-group_rows * merged // per_group)
    channels = merged * (problem.in_channels // problem.groups)
    return (
        groups,
        channels,
        (sparse_filter.nnz if sparse_filter is not None else 0) / groups,
        -(-channels // c["channel_block"]),
    )


def _fits(problem: Problem, sparse_filter: SparseFilter | None, gpu: Gpu, c: _Numbers) -> NDArray[np.bool_]:
    """Which configs find room in a multiprocessor's shared memory and registers."""
    half = STORAGE[problem.precision] != 0
    layout = Layout.of(problem, LANES * c["words"] * c["position_warps"])
    _, channels, nnz, chunks = _shares(problem, sparse_filter, c)
    entry_bytes = nnz / chunks * _unevenness(sparse_filter) * (4 if half else 8)
    entry_bytes += c["row_warps"] * c["rows"] * c["channel_warps"] * 8 + 96
    shared = shared_bytes(layout, SimpleNamespace(**c), entry_bytes)
    per_slot = 5 + 2 * layout.odd if layout.paired else layout.images_per_word
    slot_registers = np.maximum(layout.slots, 4) * per_slot + (44 if half else 30)
    fits: NDArray[np.bool_] = (
        (shared <= gpu.shared_bytes)
        & (c["blocks"] * (shared + 1024) <= gpu.shared_bytes + 1024)
        & (layout.slots <= SLOT_CLASSES[-1])
        & ((not half) | (c["channel_block"] * layout.channel_words * 4 <= HALF_REACH))
        & (slot_registers <= c["most_registers"])
        & (c["channel_block"] < np.maximum(2 * channels, STAGING_AXES["channel_block"][0] + 1))
        & (c["channel_block"] % c["channel_warps"] == 0)
    )
    return fits


def has_room(problem: Problem, gpu: Gpu) -> bool:
    """Whether a device can run any config of the search space."""
    first = {
        name: numbers[:1] for name, numbers in _space(STORAGE[problem.precision] != 0, False, gpu.registers).items()
    }
    return bool(_fits(problem, None, gpu, first)[0])


def candidates(problem: Problem, sparse_filter: SparseFilter, gpu: Gpu, packed: bool) -> _Numbers:
    """All configs that fit, as arrays, with their predicted clocks under "clocks"."""
    half = STORAGE[problem.precision] != 0
    space = _space(half, packed, gpu.registers)
    fits = _fits(problem, sparse_filter, gpu, space)
    c = {name: numbers[fits] for name, numbers in space.items()}

    tile, channel_block, stages = LANES * c["words"] * c["position_warps"], c["channel_block"], c["stages"]
    layout = Layout.of(problem, tile)
    per_group = c["row_warps"] * c["rows"]
    groups, channels, group_nnz, chunks = _shares(problem, sparse_filter, c)
    images = -(-max(problem.batch, 1) // layout.images_per_word)
    blocks = -(-Positions(problem).count(images) // tile) * groups

    # Wavefronts of shared memory, instruction slots (four per clock) and the time of a warp on its own.
    sharing = c["position_warps"]  # warps that read the same nonzeros
    cells = per_group * c["channel_warps"] * chunks
    reads = group_nnz * sharing * (c["words"] + 1 / (4 if half else 2)) + cells * sharing * 2
    writes = channels * layout.slots * (7 if layout.paired else 4 if half else 2)
    wavefronts = reads + writes + group_nnz / 8 + per_group * tile / LANES * 2
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
    return c


def predicted_clocks(
    problem: Problem, sparse_filter: SparseFilter, gpu: Gpu, packed: bool, config: DirectConfig | None
) -> float:
    """The clocks that the model predicts for a config, or the least of all that fit."""
    space = candidates(problem, sparse_filter, gpu, packed)
    if config is None:
        return float(space["clocks"].min())
    is_config = np.all([space[name] == getattr(config, name) for name in (*AXES, *STAGING_AXES)], axis=0)
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
    found: list[DirectConfig] = []
    for packed, share in ((True, most - most // 4), (False, most // 4)) if half else ((False, most),):
        space = candidates(problem, sparse_filter, gpu, packed)
        taken: dict[tuple[int, ...], int] = {}
        chosen: list[DirectConfig] = []
        for i in np.argsort(space["clocks"], kind="stable") if share else ():
            shape = tuple(int(space[name][i]) for name in AXES if name != "producers")
            if taken.get(shape, 0) < 2:
                taken[shape] = taken.get(shape, 0) + 1
                knobs: dict[str, Any] = {name: int(space[name][i]) for name in (*AXES, *STAGING_AXES)}
                chosen.append(DirectConfig(**knobs, packed=packed))
            if len(chosen) == share:
                break
        found += chosen
    return found


def neighbours(
    config: DirectConfig, problem: Problem, sparse_filter: SparseFilter, gpu: Gpu
) -> dict[str, list[DirectConfig]]:
    """For each knob, the configs of the search space that differ from `config` in it alone."""
    space = candidates(problem, sparse_filter, gpu, config.packed)
    names = (*AXES, *STAGING_AXES)
    there = set(zip(*(space[name].tolist() for name in names), strict=True))
    found: dict[str, list[DirectConfig]] = {}
    for name in names:
        axis = (AXES | STAGING_AXES)[name]
        values: list[Any] = [value for value in axis if value != getattr(config, name)]
        others = [replace(config, **{name: value}) for value in values]
        found[name] = [c for c in others if tuple(getattr(c, n) for n in names) in there]
    found["balanced"] = [replace(config, balanced=not config.balanced)]
    if STORAGE[problem.precision]:
        found["packed"] = [replace(config, packed=not config.packed)]
    return {name: configs for name, configs in found.items() if configs}
