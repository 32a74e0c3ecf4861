"""The search for the config of a generated kernel: tens of thousands are ranked at once by model.py."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from escort.cuda.gpu import Gpu
from escort.filter import SparseFilter
from escort.methods.cuda.generated.config import GeneratedConfig
from escort.methods.cuda.generated.model import common, predict_us, registers, resident, stage_of, words_of, work
from escort.methods.cuda.generated.staging import shared_bytes
from escort.methods.cuda.generated.words import computed, copies_as_it_is, elements_per_word
from escort.methods.space import Space
from escort.problem import Problem

_LEAST_CHANNELS, _MOST_CHANNELS = 8, 208  # output channels of a part
_APART_STAGES, _START_POINTS = 2, 8  # few stages, so that there are chunks to begin at
_LEAST_BUSY = 0.75  # of the multiprocessors' time, where there are several rounds of tiles
_BEST = 256  # configs of a way to stage the input; the chosen ones are among them
_KIN = 1.08  # a further config of a kind counts as if it took so many times as long
#: Products that a sum in fp16 may have: a relative error of about 1.8e-3, of 2e-3 allowed.
_MOST_PRODUCTS = 165.0
_RESERVED_BYTES = 1024  # of shared memory, per block


def search(problem: Problem, sparse_filter: SparseFilter, gpu: Gpu, most: int) -> list[GeneratedConfig]:
    """The configs of least predicted time, no two of them alike, and not all of one kind.

    The model errs in the same way for all configs of a kind, so each further one of a kind must be better by a share.
    """
    best: dict[tuple[int, ...], tuple[float, Space, int]] = {}  # predicted time and row, by kind and size
    for space in candidates(problem, sparse_filter, gpu):
        times = predict_us(problem, sparse_filter, space, gpu)
        channels, size, kind = space["out_channels"], space["consumers"] * space["occupancy"] // 4, _kind(space)
        for i in space.rank(times)[:_BEST].tolist():
            alike = (*kind, int(channels[i]), int(size[i]))
            if alike not in best or times[i] < best[alike][0]:
                best[alike] = float(times[i]), space, i
    ranked: list[tuple[float, float, GeneratedConfig]] = []
    of_kind: Counter[tuple[int, ...]] = Counter()
    for time_us, space, i in sorted(best.values(), key=lambda row: row[0]):
        kind = _kind(space)
        ranked.append((time_us * _KIN ** of_kind[kind], time_us, GeneratedConfig(**space.row(i))))
        of_kind[kind] += 1
    chosen = sorted(ranked, key=lambda ranking: ranking[0])[:most]
    return [config for _, _, config in sorted(chosen, key=lambda ranking: ranking[1])]


def _kind(space: Space) -> tuple[int, ...]:
    """The knobs that make a kind: for configs that share them the model errs in the same way."""
    return tuple(common(space, knob) for knob in ("arranged", "split", "multicast", "prefetch_warps", "start_points"))


def is_offered(problem: Problem, sparse_filter: SparseFilter, gpu: Gpu, config: GeneratedConfig) -> bool:
    """Whether a config is of the search space."""
    knobs = asdict(config)
    return any(
        np.all([space[knob] == value for knob, value in knobs.items()], axis=0).any()
        for space in candidates(problem, sparse_filter, gpu, knobs)
    )


def candidates(
    problem: Problem, sparse_filter: SparseFilter, gpu: Gpu, wanted: Mapping[str, int] = MappingProxyType({})
) -> Iterator[Space]:
    """The search space: every config that fits the device and leaves few multiprocessors idle in the last round.

    Yields the configs of each way to stage the input and to share it and the code, with a column per knob.

    Args:
        wanted: knobs by name: ways that have others are left out.
    """
    problem = computed(problem)
    group_channels, channels = problem.out_channels // problem.groups, problem.in_channels // problem.groups
    parts = range(-(-group_channels // _MOST_CHANNELS), max(group_channels // _LEAST_CHANNELS, 1) + 1)
    knobs = {
        "out_channels": sorted({-(-group_channels // count) for count in parts}),
        "occupancy": (1, 2),
        "consumers": range(4, 32),
        "channel_block": (8, 4, 16),
    }
    sizes = Space.product(knobs)
    for staging, sharing in itertools.product(list(_stagings(problem, gpu)), _sharings(problem, gpu)):
        if any(wanted.get(knob, value) != value for knob, value in (staging | sharing).items()):
            continue
        split = sharing["split"]
        if staging["copy"] and split > 1:
            continue  # producers take most of the time: there is nothing to gain
        chunks = -(-channels // (split * sizes["channel_block"]))
        sums = _sums(problem, sparse_filter, split)
        space = sizes.with_columns(**staging, **sharing, sums=sums, stages=_stages(chunks), start_points=1)
        fits, several_rounds = _fits(problem, space, gpu)
        apart = fits & several_rounds & (chunks >= 4 * _APART_STAGES)
        if fits.any():
            yield space.where(fits)
        if apart.any():
            yield space.where(apart).with_columns(stages=_APART_STAGES, start_points=_START_POINTS)


def _fits(problem: Problem, space: Space, gpu: Gpu) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which configs the device has room for and keeps busy, and which take several rounds of tiles."""
    words, occupancy = words_of(problem, space), space["occupancy"]
    shared = shared_bytes(stage_of(words, space), space["stages"], common(space, "split"), space["out_channels"])
    (_, items), slots = work(problem, words, space), resident(space, gpu)
    fits = (
        (occupancy * (space["consumers"] + space["producers"] + space["prefetch_warps"]) <= 32)
        & (space["out_channels"] * space["sums"] + 14 <= registers(space, gpu))
        & (occupancy * (shared + _RESERVED_BYTES) <= gpu.shared_bytes + _RESERVED_BYTES)
        & ((items <= slots) | (items >= _LEAST_BUSY * slots * -(-items // slots)))
    )
    return fits, items > slots


def _sums(problem: Problem, sparse_filter: SparseFilter, split: int) -> int:
    """Sums per output channel that keep the error of 16-bit storage within its bound."""
    if elements_per_word(problem) == 1:
        return 1
    nnz = np.diff(sparse_filter.indptr).astype(np.float64)
    # The products of a channel, weighted as its outputs count in the relative error: by their size.
    products = float((nnz * nnz).sum() / max(nnz.sum(), 1.0))
    return math.ceil(max(products, 1.0) / (_MOST_PRODUCTS * split))


def _stages(chunks: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many stages leave the fewest empty chunks at the end; the most of those."""
    depths = np.array([4, 3, 2])
    return depths[np.argmin([-(-chunks // depth) * depth for depth in depths], axis=0)]


def _stagings(problem: Problem, gpu: Gpu) -> Iterator[dict[str, int]]:
    """The ways to stage the input."""
    for copy in (4, 2, 1):
        if copies_as_it_is(problem, copy):
            yield from ({"copy": copy, "arranged": False, "producers": producers} for producers in (2, 3, 4, 6, 8))
    if gpu.capability < (9, 0):
        yield from ({"copy": 4, "arranged": True, "producers": producers} for producers in (2, 4))
    else:
        yield {"copy": 0, "arranged": True, "producers": 1}


def _sharings(problem: Problem, gpu: Gpu) -> Iterator[dict[str, int]]:
    """What the blocks of a cluster share, and who brings the code."""
    yield {"split": 1, "multicast": 1, "prefetch_warps": 0}
    yield {"split": 1, "multicast": 1, "prefetch_warps": 2}
    if gpu.capability < (9, 0):
        return
    yield {"split": 1, "multicast": 8, "prefetch_warps": 2}
    for split in (2, 4):
        if split <= problem.in_channels // problem.groups:
            yield {"split": split, "multicast": 1, "prefetch_warps": 0}
