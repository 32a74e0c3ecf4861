"""The search for configs: those that fit a convolution, ranked by a model of the machine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache

from escort.cuda.gpu import Gpu
from escort.filter import SparseFilter
from escort.methods.cuda.sparse_tc.config import ELEMENTS, SparseTcConfig, TapGroup, UnfitError
from escort.methods.cuda.sparse_tc.model import CLUSTERS, Remainder, predict_us
from escort.methods.cuda.sparse_tc.orders import order_filter
from escort.methods.cuda.sparse_tc.tiling import Tiling
from escort.problem import MemoryFormat, Problem

_SHAPES = (  # across, m_blocks and whether by turns
    (2, 1, False),
    (2, 2, False),
    (1, 1, False),
    (1, 2, False),
    (1, 1, True),
    (1, 2, True),
)
_PIXELS = (48, 64, 96, 112, 128, 192, 256)  # of products whose tiles are not rows
_SAMPLES = (2, 3, 4, 6, 8)  # of a tile of several
_LEAST_USED = 0.5  # of a tile's channels
_CLOSE = 1.2  # times whose order the model does not know
_ALIKE = 2  # configs that differ in their clusters only
_MOST_LISTED = 256  # problems whose tilings are remembered


def search(
    problem: Problem, sparse_filter: SparseFilter, gpu: Gpu, most: int, memory_format: MemoryFormat
) -> list[SparseTcConfig]:
    """At most so many configs, those of least predicted time, of some variety: few differ in their clusters only.

    The best whose warpgroups take turns and the best whose do not come first where they are close: only a timing tells
    which is faster.
    """
    remainder = Remainder.of(order_filter(sparse_filter, memory_format, ELEMENTS[problem.precision]))
    predicted = [(predict_us(tiling, remainder, gpu), tiling) for tiling in _listed(problem, gpu, memory_format)]
    predicted.sort(key=lambda one: one[0])
    other = next(
        (i for i, (_, tiling) in enumerate(predicted) if tiling.config.by_turns != predicted[0][1].config.by_turns), 0
    )
    if other and predicted[other][0] < _CLOSE * predicted[0][0]:
        predicted.insert(1, predicted.pop(other))
    chosen: list[SparseTcConfig] = []
    alike: Counter[SparseTcConfig] = Counter()  # of those that are chosen, but for their clusters
    for _, tiling in predicted:
        if len(chosen) == most:
            break
        kind = replace(tiling.config, cluster=1)
        if alike[kind] < _ALIKE:
            alike[kind] += 1
            chosen.append(tiling.config)
    return chosen


@lru_cache(_MOST_LISTED)
def _listed(problem: Problem, gpu: Gpu, memory_format: MemoryFormat) -> tuple[Tiling, ...]:
    """The candidates, which a prediction and the search behind it both ask for."""
    return tuple(candidates(problem, gpu, memory_format))


def candidates(problem: Problem, gpu: Gpu, memory_format: MemoryFormat) -> Iterator[Tiling]:
    """Every config that fits, of tiles that are not mostly empty."""
    for across, m_blocks, by_turns in _SHAPES:
        if _is_mostly_empty(problem, across, m_blocks):
            continue
        for tap_group, pixels, rows, samples in _tiles(problem, across, m_blocks, by_turns):
            for cluster in CLUSTERS:
                config = SparseTcConfig(
                    tap_group, pixels, across, m_blocks, rows, samples, cluster, memory_format, by_turns
                )
                try:
                    tiling = Tiling.of(problem, config, gpu.shared_bytes)
                except UnfitError:
                    break
                if _fills(tiling):
                    yield tiling


def is_offered(problem: Problem, gpu: Gpu, config: SparseTcConfig) -> bool:
    """Whether a config is one of the candidates in the problem's memory format."""
    shape, tile = (config.across, config.m_blocks, config.by_turns), (config.tap_group, config.pixels, config.rows)
    if config.memory_format != problem.memory_format or config.cluster not in CLUSTERS:
        return False
    if shape not in _SHAPES or _is_mostly_empty(problem, *shape[:2]):
        return False
    if (*tile, config.samples) not in _tiles(problem, *shape):
        return False
    try:
        return _fills(Tiling.of(problem, config, gpu.shared_bytes))
    except UnfitError:
        return False


def _is_mostly_empty(problem: Problem, across: int, m_blocks: int) -> bool:
    return across * m_blocks > 1 and problem.out_channels < _LEAST_USED * 64 * across * m_blocks


def _fills(tiling: Tiling) -> bool:
    """Whether there is a tile for each thread block of a cluster."""
    return tiling.config.cluster == 1 or tiling.tiles(max(tiling.problem.batch, 1)) >= tiling.config.cluster


def _tiles(p: Problem, across: int, m_blocks: int, by_turns: bool) -> Iterator[tuple[TapGroup, int, int, int]]:
    """(tap group, pixels of a warpgroup, rows, samples) of tiles that hold their outputs."""
    pointwise = p.kernel_size == p.stride == (1, 1) and not any(p.padding)
    yield from (("flat" if pointwise else "im2col", pixels, 0, 1) for pixels in _PIXELS)
    down = (p.kernel_size[0] - 1) * p.dilation[0]
    # The fewest rows for each number of tiles; and tiles of several samples, which have all their rows.
    rows = {-(-p.out_height // tiles) for tiles in range(1, p.out_height + 1)}
    shapes = [(rows, 1) for rows in sorted(rows)] + [(p.out_height, samples) for samples in _SAMPLES]
    pitches: tuple[tuple[TapGroup, int, int], ...] = (
        ("columns", -(-p.out_width // 8) * 8, p.out_height + down),
        ("halo", p.width + max(p.padding[2:]), p.height + max(p.padding[:2])),
    )
    for tap_group, pitch, sample_rows in pitches:
        for tile_rows, samples in shapes:
            outputs = ((samples - 1) * sample_rows + tile_rows - 1) * pitch + p.out_width
            pixels = -(-outputs * (2 if by_turns else across) // 16) * 8
            if p.kernel_size != (1, 1) and pixels * m_blocks <= 256:
                yield tap_group, pixels, tile_rows, samples
