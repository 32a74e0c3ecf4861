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
_FEWEST_PIXELS = 32  # the same by turns, where thread blocks may share tiles
_SPLITS = (2, 4, 8)  # thread blocks that share a tile
_SAMPLES = (2, 3, 4, 6, 8)  # of a tile of several
_LEAST_USED = 0.5  # of a tile's channels
_CLOSE = 1.2  # times whose order the model does not know
_ALIKE = 2  # configs that differ in their clusters only
_MOST_LISTED = 256  # problems whose tilings are remembered


def search(
    problem: Problem, sparse_filter: SparseFilter, gpu: Gpu, most: int, memory_format: MemoryFormat
) -> list[SparseTcConfig]:
    """At most so many configs, those of least predicted time, of some variety: few differ in their clusters only.

    The best of each kind comes first where they are close, by whether warpgroups take turns and whether thread blocks
    share tiles: only a timing tells which is faster.
    """
    remainder = Remainder.of(order_filter(sparse_filter, memory_format, ELEMENTS[problem.precision]))
    predicted = [(predict_us(tiling, remainder, gpu), tiling) for tiling in _listed(problem, gpu, memory_format)]
    predicted.sort(key=lambda one: one[0])
    best: dict[tuple[bool, bool], tuple[float, Tiling]] = {}
    for one in predicted:
        best.setdefault((one[1].config.by_turns, one[1].config.split > 1), one)
    close = [one for one in best.values() if one[0] < _CLOSE * predicted[0][0]]
    chosen: list[SparseTcConfig] = []
    alike: Counter[SparseTcConfig] = Counter()  # of those that are chosen, but for their clusters
    for _, tiling in dict.fromkeys([*close, *predicted]):
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
            config = SparseTcConfig(tap_group, pixels, across, m_blocks, rows, samples, 1, memory_format, by_turns)
            for clusters in (_clusters, _splits):
                try:
                    for cluster in clusters(Tiling.of(problem, config, gpu.shared_bytes), gpu):
                        yield Tiling.of(problem, cluster, gpu.shared_bytes)
                except UnfitError:
                    break


def is_offered(problem: Problem, gpu: Gpu, config: SparseTcConfig) -> bool:
    """Whether a config is one of the candidates in the problem's memory format."""
    shape, tile = (config.across, config.m_blocks, config.by_turns), (config.tap_group, config.pixels, config.rows)
    if config.memory_format != problem.memory_format:
        return False
    if shape not in _SHAPES or _is_mostly_empty(problem, *shape[:2]):
        return False
    if (*tile, config.samples) not in _tiles(problem, *shape):
        return False
    try:
        tiling = Tiling.of(problem, config, gpu.shared_bytes)
    except UnfitError:
        return False
    return config in (*_clusters(tiling, gpu), *_splits(tiling, gpu))


def _is_mostly_empty(problem: Problem, across: int, m_blocks: int) -> bool:
    return across * m_blocks > 1 and problem.out_channels < _LEAST_USED * 64 * across * m_blocks


def _clusters(tiling: Tiling, gpu: Gpu) -> Iterator[SparseTcConfig]:
    """The config with clusters whose thread blocks have a tile each."""
    tiles = tiling.tiles(max(tiling.problem.batch, 1))
    yield from (replace(tiling.config, cluster=size, split=1) for size in CLUSTERS if size == 1 or size <= tiles)


def _splits(tiling: Tiling, gpu: Gpu) -> Iterator[SparseTcConfig]:
    """The config with thread blocks that share a tile, where there are multiprocessors for all of these."""
    if tiling.config.by_turns and tiling.config.takes_channels_last:
        tiles = tiling.tiles(max(tiling.problem.batch, 1)) * tiling.channel_tiles
        yield from (replace(tiling.config, cluster=1, split=size) for size in _SPLITS if tiles <= gpu.clusters(size))


def _tiles(p: Problem, across: int, m_blocks: int, by_turns: bool) -> Iterator[tuple[TapGroup, int, int, int]]:
    """(tap group, pixels of a warpgroup, rows, samples) of tiles that hold their outputs."""
    pointwise = p.kernel_size == p.stride == (1, 1) and not any(p.padding)
    few = (_FEWEST_PIXELS,) if by_turns else ()
    yield from (("flat" if pointwise else "im2col", pixels, 0, 1) for pixels in few + _PIXELS)
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
