"""Method `sparse_tc` without a GPU: packed filters, and the kernel's coordinates, against their models in numpy."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from escort.cuda.gpu import H200
from escort.filter import SparseFilter
from escort.methods.cuda.sparse_tc.config import ELEMENTS, SparseTcConfig, UnfitError
from escort.methods.cuda.sparse_tc.orders import order_filter
from escort.methods.cuda.sparse_tc.packing import pack, tiles_key
from escort.methods.cuda.sparse_tc.search import candidates
from escort.methods.cuda.sparse_tc.split import split
from escort.methods.cuda.sparse_tc.tiling import Tiling
from escort.problem import TORCH_DTYPE, Precision, Problem
from tests.sparse_tc_model import decode, emulate, laid_out

SAME = (1, 1, 1, 1)
CASES = {
    "3x3": (Problem(3, 64, 14, 14, 72, (3, 3), padding=SAME), 0.1),
    "few channels": (Problem(2, 8, 9, 9, 24, (3, 3), padding=SAME), 0.3),
    "channels beyond a block": (Problem(2, 72, 7, 7, 136, (3, 3), padding=SAME), 0.1),
    "pointwise": (Problem(3, 128, 7, 7, 200, (1, 1)), 0.2),
    "pointwise, even plane": (Problem(3, 64, 8, 6, 64, (1, 1)), 0.9),
    "every weight": (Problem(2, 64, 8, 8, 64, (3, 3), padding=SAME), 1.0),
    "no weights": (Problem(2, 64, 8, 8, 64, (3, 3), padding=SAME), 0.0),
    "stride 2": (Problem(2, 64, 9, 11, 64, (3, 3), (2, 2), SAME), 0.1),
    "pointwise stride 2": (Problem(2, 64, 8, 8, 64, (1, 1), (2, 2)), 0.1),
    "stride 1 by 3, uneven padding": (Problem(2, 64, 6, 13, 64, (3, 2), (1, 3), (0, 2, 1, 0)), 0.1),
    "valid 5x5": (Problem(2, 64, 12, 11, 64, (5, 5)), 0.1),
    "wide kernel": (Problem(2, 64, 5, 18, 64, (1, 7), padding=(0, 0, 3, 3)), 0.1),
    "tall kernel": (Problem(2, 64, 18, 5, 64, (7, 1), padding=(3, 3, 0, 0)), 0.1),
    "even kernel, uneven padding": (Problem(3, 64, 10, 9, 64, (4, 2), padding=(1, 2, 0, 1)), 0.1),
    "padding on the right and below": (Problem(3, 64, 7, 6, 64, (3, 3), padding=(0, 2, 0, 2)), 0.1),
    "padding on the left and above": (Problem(3, 64, 7, 6, 64, (3, 3), padding=(2, 0, 2, 0)), 0.1),
    "padding beyond the kernel": (Problem(1, 64, 4, 5, 64, (3, 3), padding=(5, 4, 6, 7)), 0.1),
    "dilation": (Problem(2, 64, 11, 10, 64, (3, 3), padding=(2, 2, 3, 3), dilation=(2, 3)), 0.1),
    "dilation and stride": (Problem(1, 64, 13, 16, 64, (3, 3), (2, 3), (2, 2, 3, 3), (3, 2)), 0.1),
}


def integers(shape: tuple[int, ...], density: float) -> np.ndarray:
    """Small ones, of which any precision holds every sum."""
    generator = np.random.default_rng(0)
    return np.where(generator.random(shape) < density, generator.integers(1, 5, shape), 0).astype(np.float32)


def uneven(shape: tuple[int, int, int, int]) -> np.ndarray:
    """A tenth is kept; some rows and channels hold most of it, one row all and one nothing."""
    generator = np.random.default_rng(0)
    rows, channels = generator.lognormal(size=(shape[0], 1, 1, 1)), generator.lognormal(size=(1, shape[1], 1, 1))
    importance = rows * channels * np.abs(generator.standard_normal(shape))
    kept = importance > np.quantile(importance, 0.9)
    kept[17], kept[1] = True, False
    return np.where(kept, generator.standard_normal(shape), 0).astype(np.float32)


def structured(shape: tuple[int, int, int, int], precision: Precision = "fp16") -> np.ndarray:
    """The two largest of four neighbouring input channels, as ASP and torchao prune; for TF32 the larger of two."""
    whole = SparseFilter.from_dense(np.random.default_rng(0).standard_normal(shape).astype(np.float32))
    return split(whole, ELEMENTS[precision].kept, ELEMENTS[precision].of).structured.to_dense().numpy()


def rounded(weight: np.ndarray, precision: Precision) -> np.ndarray:
    """To what a precision holds, the nearest."""
    if precision != "tf32":
        return torch.from_numpy(weight).to(TORCH_DTYPE[precision]).double().numpy()
    mantissa, exponent = np.frexp(weight.astype(np.float64))
    return np.ldexp(np.rint(mantissa * 2**11), exponent - 11)


def some_tilings(problem: Problem, tap_group: str, memory_format: str) -> list[Tiling]:
    """A few that differ in what matters: warpgroups, blocks, clusters, several samples, uneven pixels."""
    tilings = [t for t in candidates(problem, H200, memory_format) if t.config.tap_group == tap_group]  # type: ignore[arg-type]
    wanted = (
        lambda c: c.across == 2 and c.m_blocks == 1,
        lambda c: c.across == 1 and c.cluster == 2,
        lambda c: c.across == 1 and c.m_blocks == 2,
        lambda c: c.samples > 1 and c.pixels % 16,
        lambda c: 1 < c.rows < problem.out_height,
    )
    picked: dict[SparseTcConfig, Tiling] = {}
    for want in wanted:
        picked.update({tiling.config: tiling for tiling in [t for t in tilings if want(t.config)][:1]})
    return list(picked.values())


def tap_groups(problem: Problem) -> tuple[str, ...]:
    """Those that can be had."""
    if problem.stride != (1, 1):
        return ("im2col",)
    if problem.kernel_size == (1, 1):
        return ("flat",)
    return ("im2col", "columns") if problem.padding[0] > 3 else ("im2col", "columns", "halo")


@pytest.mark.parametrize("precision", ["fp16", "tf32"])
@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("name", "tap_group"), [(name, tap_group) for name in CASES for tap_group in tap_groups(CASES[name][0])]
)
def test_the_kernels_coordinates_make_a_convolution(
    name: str, tap_group: str, memory_format: str, precision: Precision
) -> None:
    problem, density = CASES[name]
    problem = replace(problem, precision=precision)
    tilings = some_tilings(problem, tap_group, memory_format)
    assert tilings
    weight = integers(problem.weight_shape, density)
    sparse_filter = SparseFilter.from_dense(weight)
    x = np.random.default_rng(1).integers(-3, 4, problem.input_shape).astype(np.float64)
    top, bottom, left, right = problem.padding
    padded = F.pad(torch.from_numpy(x), (left, right, top, bottom))
    expected = F.conv2d(
        padded, torch.from_numpy(weight).double(), stride=problem.stride, dilation=problem.dilation
    ).numpy()
    ordered = order_filter(sparse_filter, memory_format, ELEMENTS[precision])  # type: ignore[arg-type]
    for tiling in tilings:
        packed = pack(ordered, tiling)
        assert np.array_equal(emulate(tiling, packed, laid_out(x, ordered, tiling)), expected), tiling.config


RES4 = Problem(8, 256, 14, 14, 192, (3, 3), padding=SAME, precision="fp16")
CONFIGS = [
    SparseTcConfig("halo", 216, rows=14),
    SparseTcConfig("columns", 112, across=1, rows=14),
    SparseTcConfig("im2col", 64, across=2, m_blocks=2),
    SparseTcConfig("im2col", 64, memory_format="channels_last"),
]


SHARED = SparseTcConfig("columns", 112, across=1, rows=7, memory_format="channels_last", by_turns=True, split=2)


@pytest.mark.parametrize("precision", ["fp16", "bf16", "tf32"])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_packed_filters_are_the_filter(config: SparseTcConfig, precision: Precision) -> None:
    problem = replace(RES4, precision=precision)
    weight = uneven(problem.weight_shape)
    sparse_filter = SparseFilter.from_dense(weight)
    tiling, ordered = (
        Tiling.of(problem, config, H200.shared_bytes),
        order_filter(sparse_filter, config.memory_format, ELEMENTS[precision]),
    )
    packed = pack(ordered, tiling)
    assert np.array_equal(decode(packed, ordered, tiling), rounded(weight, precision))
    regular = tiling.channel_tiles * len(tiling.tap_groups) * len(tiling.tap_groups[0])
    assert (
        len(packed.weight_tiles) - regular
        == round(ordered.remainder_share(config.tile_channels, ordered.k_block) * regular)
        > 0
    )
    assert 0.0 < ordered.split.share < 0.2


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_a_packed_filter_is_placed_for_other_input_sizes(config: SparseTcConfig) -> None:
    sparse_filter = SparseFilter.from_dense(uneven(RES4.weight_shape))
    sizes = [replace(RES4, height=size, width=size) for size in (14, 6)]
    here, there = (Tiling.of(problem, config, H200.shared_bytes) for problem in sizes)
    ordered = order_filter(sparse_filter, config.memory_format, here.element)
    assert tiles_key(here) == tiles_key(there)
    placed, expected = pack(ordered, here).placed(there), pack(ordered, there)
    for name, table in vars(expected).items():
        assert np.array_equal(getattr(placed, name), table), name


@pytest.mark.parametrize("precision", ["fp16", "tf32"])
def test_the_decoder_notices(precision: Precision) -> None:
    sparse_filter = SparseFilter.from_dense(uneven(RES4.weight_shape))
    tiling = Tiling.of(replace(RES4, precision=precision), CONFIGS[0], H200.shared_bytes)
    ordered = order_filter(sparse_filter, "contiguous", tiling.element)
    packed = pack(ordered, tiling)
    expected = decode(packed, ordered, tiling)
    for at in (18, 2 * 4096 + 5):  # a value, metadata
        weight_tiles = packed.weight_tiles.copy()
        weight_tiles[3, at] ^= 0x11
        try:
            assert not np.array_equal(decode(replace(packed, weight_tiles=weight_tiles), ordered, tiling), expected)
        except AssertionError as error:
            assert "ascend" in str(error) or "means anything" in str(error)


@pytest.mark.parametrize("precision", ["fp16", "tf32"])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_a_structured_filter_leaves_nothing_over(config: SparseTcConfig, precision: Precision) -> None:
    weight = structured(RES4.weight_shape, precision)
    sparse_filter = SparseFilter.from_dense(weight)
    tiling = Tiling.of(replace(RES4, precision=precision), config, H200.shared_bytes)
    ordered = order_filter(sparse_filter, config.memory_format, tiling.element)
    packed = pack(ordered, tiling)
    assert ordered.split.remainder.nnz == 0 and ordered.remainder_share(64, ordered.k_block) == 0.0
    assert len(packed.weight_tiles) == tiling.channel_tiles * len(tiling.tap_groups) * len(tiling.tap_groups[0])
    assert np.array_equal(decode(packed, ordered, tiling), rounded(weight, precision))


@pytest.mark.parametrize("precision", ["fp16", "tf32"])
def test_the_order_leaves_less_over_in_fewer_weight_tiles(precision: Precision) -> None:
    sparse_filter, element = SparseFilter.from_dense(uneven((256, 256, 3, 3))), ELEMENTS[precision]
    spread, natural = (
        order_filter(sparse_filter, "contiguous", element),
        order_filter(sparse_filter, "channels_last", element),
    )
    assert spread.split.share < natural.split.share
    assert spread.remainder_share(128, spread.k_block) < natural.remainder_share(128, natural.k_block)
    assert order_filter(sparse_filter, "contiguous", element) is spread, "remembered"


@pytest.mark.parametrize("precision", ["fp16", "bf16", "tf32"])
@pytest.mark.parametrize("seed", range(6))
def test_random_filters_are_packed_without_what_is_empty(seed: int, precision: Precision) -> None:
    rng = np.random.default_rng(seed)
    in_channels, out_channels = (8 * int(rng.integers(1, most)) for most in (20, 36))
    kernel_size, stride = [((1, 1), (1, 1)), ((3, 3), (1, 1)), ((3, 2), (2, 2))][seed % 3]
    problem = Problem(4, in_channels, 9, 11, out_channels, kernel_size, stride, precision=precision)
    weight = rng.standard_normal(problem.weight_shape) * (rng.random(problem.weight_shape) < rng.choice([0.03, 0.3]))
    weight[rng.random(weight.shape) < 0.2] *= 1e-9  # zero in fp16, of either sign
    weight = weight.astype(np.float32)
    sparse_filter = SparseFilter.from_dense(weight)
    for memory_format in ("contiguous", "channels_last"):
        ordered = order_filter(sparse_filter, memory_format, ELEMENTS[precision])  # type: ignore[arg-type]
        for tiling in list(candidates(problem, H200, memory_format))[::30]:  # type: ignore[arg-type]
            packed, across = pack(ordered, tiling), tiling.config.across
            assert np.array_equal(decode(packed, ordered, tiling), rounded(weight, precision))
            used = packed.weight_tiles[:, : tiling.config.tile_channels * 64].any(axis=1)
            opens_group, opens_tile = packed.first[:-1], packed.first[: -1 : len(tiling.tap_groups)]
            assert np.isin(np.flatnonzero(~used), opens_group).all(), "an empty weight tile"
            halves = packed.steps[: len(packed.weight_tiles)] >> 16 & (1 << 2 * across) - 1
            assert (halves[opens_tile] == (1 << 2 * across) - 1).all()
            rest = np.setdiff1d(np.arange(len(halves)), opens_tile)
            assert np.array_equal(halves[rest] > 0, used[rest])


def test_empty_halves_of_weight_tiles_are_not_multiplied() -> None:
    problem, _ = CASES["few channels"]
    sparse_filter = SparseFilter.from_dense(integers(problem.weight_shape, 0.3))
    tiling = Tiling.of(replace(problem, precision="fp16"), SparseTcConfig("halo", 96, rows=9), H200.shared_bytes)
    packed = pack(order_filter(sparse_filter, "channels_last", tiling.element), tiling)
    halves = packed.steps[: len(packed.weight_tiles)] >> 16 & 3
    assert halves[0] == 3 and set(halves[1:].tolist()) == {1}


@pytest.mark.parametrize(
    ("precision", "large", "message"),
    [
        ("fp16", 1e6, r"1e\+06 is too large for fp16; scale the filter, or choose bf16"),
        ("bf16", 3.4e38, r"3.4e\+38 is too large for bf16; scale the filter$"),
        ("tf32", 3.4028e38, r"3.4028e\+38 is too large for tf32; scale the filter$"),
    ],
)
def test_a_weight_beyond_the_precision_is_refused(precision: Precision, large: float, message: str) -> None:
    weight = integers(RES4.weight_shape, 0.1)
    weight[0, 0, 0, 0] = large
    sparse_filter = SparseFilter.from_dense(weight)
    tiling = Tiling.of(replace(RES4, precision=precision), CONFIGS[0], H200.shared_bytes)
    with pytest.raises(ValueError, match=message):
        pack(order_filter(sparse_filter, "contiguous", tiling.element), tiling)


def test_packing_is_quick() -> None:
    problem = Problem(32, 512, 7, 7, 512, (3, 3), padding=SAME, precision="fp16")
    sparse_filter = SparseFilter.from_dense(uneven(problem.weight_shape))
    tiling = Tiling.of(problem, SparseTcConfig("halo", 248, rows=7, samples=4), H200.shared_bytes)
    ordered = order_filter(sparse_filter, "channels_last", tiling.element)
    begin = time.thread_time()
    pack(ordered, tiling)
    assert time.thread_time() - begin < 1.0


@pytest.mark.parametrize(
    ("problem", "config", "reason"),
    [
        (CASES["stride 2"][0], SparseTcConfig("halo", 96, rows=4), "stride 1, got"),
        (RES4, SparseTcConfig("flat", 96), "flat is for pointwise"),
        (RES4, SparseTcConfig("halo", 208, rows=14), "208 pixels of a tile do not hold its 209 outputs"),
        (RES4, SparseTcConfig("halo", 216, rows=7, samples=2), "has all their rows"),
        (RES4, SparseTcConfig("im2col", 256, m_blocks=2), "do not fit a warpgroup"),
        (RES4, SparseTcConfig("columns", 112, across=1, rows=7, by_turns=True, split=2), "share tiles of one sample"),
        (RES4, SHARED, "cannot share a tile of 16 by 7 pixels"),
        (RES4, replace(SHARED, pixels=128), "cannot share a tile of 16 by 7 pixels"),
        (replace(RES4, precision="tf32"), replace(SHARED, pixels=16, rows=1, split=4), "whole eights of pixels"),
        (replace(RES4, in_channels=64), replace(SHARED, pixels=64, rows=4), "its share of tap groups"),
        (RES4, SparseTcConfig("im2col", 100), "do not fit a warpgroup"),
        (CASES["pointwise"][0], SparseTcConfig("flat", 256, across=1), "larger than what the device copies"),
        (CASES["padding beyond the kernel"][0], SparseTcConfig("halo", 256, rows=4), "choose columns"),
        (replace(RES4, stride=(9, 1)), SparseTcConfig("im2col", 64), "reach no such stride"),
        (replace(RES4, out_channels=20), SparseTcConfig("im2col", 64, memory_format="channels_last"), "multiples of 8"),
        (
            replace(RES4, in_channels=22, precision="tf32"),
            SparseTcConfig("im2col", 64, memory_format="channels_last"),
            "multiples of 4",
        ),
    ],
)
def test_configs_that_do_not_fit(problem: Problem, config: SparseTcConfig, reason: str) -> None:
    with pytest.raises(UnfitError, match=reason):
        Tiling.of(
            replace(problem, precision="fp16") if problem.precision == "fp32" else problem, config, H200.shared_bytes
        )


def test_shared_memory_that_is_too_small() -> None:
    with pytest.raises(UnfitError, match="two stages"):
        Tiling.of(RES4, CONFIGS[0], 100 * 1024)
