"""The tables of methods/cpu/direct: what the compiled kernel takes for its structs, and what it refuses."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from escort.filter import SparseFilter
from escort.kernels import _cpu
from escort.methods import by_name
from escort.methods.cpu import direct
from escort.methods.cpu.direct import ISAS, PARAMS, DirectConfig, schedule
from escort.methods.cpu.direct.layout import RUN, SEGMENT, TILE, Layout, Records, records
from escort.methods.cpu.direct.schedule import BLOCK, NONZERO, OUT_CHANNEL
from escort.problem import Problem
from tests.cases import Case, every_case

TABLES = {
    "params": PARAMS,
    "nonzeros": NONZERO,
    "out_channels": OUT_CHANNEL,
    "blocks": BLOCK,
    "runs": RUN,
    "segments": SEGMENT,
    "tiles": TILE,
}
ISA = next(iter(ISAS))


def convolution(**change: Any) -> _cpu.DirectConvolution:
    tables: dict[str, Records] = {name: np.ones(1, dtype) for name, dtype in TABLES.items()}
    return _cpu.DirectConvolution(ISA, {**tables, **change})


def test_the_dtypes_are_the_structs() -> None:
    convolution()


@pytest.mark.parametrize("name", TABLES)
def test_another_struct_is_refused(name: str) -> None:
    fields = [(field, TABLES[name][field].str) for field in TABLES[name].names or ()]
    renamed = [("other", fields[0][1]), *fields[1:]]
    retyped = [(fields[0][0], "u4"), *fields[1:]]
    swapped = [fields[1], fields[0], *fields[2:]]
    for other in (renamed, retyped, swapped, fields[:-1], [*fields, ("more", "i4")]):
        with pytest.raises(TypeError, match=f"{name} are records of .*{fields[0][0]}"):
            convolution(**{name: np.ones(1, np.dtype(other))})
    padded = np.dtype({"names": [f for f, _ in fields], "formats": [t for _, t in fields], "itemsize": 128})
    for array in (np.ones(1, padded), np.ones((1, len(fields)), np.int32)):
        with pytest.raises(TypeError, match=f"{name} are records of"):
            convolution(**{name: array})


def test_records_apart_are_refused() -> None:
    with pytest.raises(ValueError, match="contiguous"):
        convolution(tiles=np.ones(4, TILE)[::2])


def test_a_missing_table_is_refused() -> None:
    with pytest.raises(KeyError, match="tiles"):
        _cpu.DirectConvolution(ISA, {name: np.ones(1, dtype) for name, dtype in TABLES.items() if name != "tiles"})


def test_tiles_that_registers_do_not_hold_are_refused() -> None:
    most = ISAS[ISA][1]
    convolution(tiles=records(TILE, 2, vectors=most))
    for vectors in (0, most + 1):
        with pytest.raises(ValueError, match="too many vectors"):
            convolution(tiles=records(TILE, 2, vectors=[1, vectors]))


def test_channels_that_registers_do_not_hold_are_refused() -> None:
    most = ISAS[ISA][1]
    two_at_a_time = records(PARAMS, 1, parts=1, blocks_of_part=1, channels=2)
    convolution(params=two_at_a_time, tiles=records(TILE, 1, vectors=most // 2))
    with pytest.raises(ValueError, match="too many vectors"):
        convolution(params=two_at_a_time, tiles=records(TILE, 1, vectors=most // 2 + 1))
    for channels in (0, 5):
        with pytest.raises(ValueError, match="1 to 4 channels"):
            convolution(params=records(PARAMS, 1, parts=1, blocks_of_part=1, channels=channels))


@every_case
@pytest.mark.parametrize("lanes", [4, 8, 16])
@pytest.mark.parametrize("vectors", [1, 7])
def test_every_load_is_aligned(case: Case, lanes: int, vectors: int) -> None:
    layout = Layout.of(case.problem, lanes, vectors)
    assert not np.any(layout.tap_offsets % lanes)
    assert layout.channel_stride % lanes == 0
    if layout.in_place:
        assert not np.any(layout.tiles["x_start"] % lanes)
    else:
        assert not np.any(layout.runs["stage_position"] % lanes)
        assert layout.runs["stage_position"].max() + lanes <= layout.channel_stride
        assert layout.tap_offsets.max() + layout.vectors * lanes <= layout.channel_stride


def test_tiles_that_read_alike_share_their_runs() -> None:
    def runs(size: int) -> int:
        return len(Layout.of(Problem(1, 1, size, size, 1, (3, 3), (2, 2), (1, 1, 1, 1)), 16, 7).runs)

    assert runs(4096) <= 4 * runs(64), "a table of runs does not grow with the map"


def test_blocks_are_those_of_parts() -> None:
    with pytest.raises(ValueError, match="as many for each part"):
        convolution(blocks=np.ones(3, BLOCK), params=records(PARAMS, 1, parts=2, blocks_of_part=1, channels=1))


def test_params_are_one_record() -> None:
    with pytest.raises(ValueError, match="one record"):
        convolution(params=np.ones(2, PARAMS))


def test_an_instruction_set_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="'mmx' is not available"):
        _cpu.DirectConvolution("mmx", {})


@pytest.mark.skipif("avx2" not in ISAS, reason="opcodes of x86-64")
def test_the_compiler_keeps_prefetches_of_what_is_written() -> None:
    """GCC dropped those of a function that did nothing else. PREFETCHW is 0F 0D and a byte with 1 in its middle."""
    code = Path(_cpu.__file__).read_bytes()
    assert len(re.findall(rb"\x0f\x0d[\x08-\x0f\x48-\x4f\x88-\x8f]", code)) > 100


@pytest.mark.parametrize(
    ("threads", "tasks", "parts"),
    [(1, 1, 1), (2, 1, 2), (2, 7, 2), (2, 8, 1), (16, 1, 16), (16, 2, 8), (16, 7, 2), (16, 28, 1), (16, 40, 2)],
)
def test_parts_feed_threads_and_stage_little(
    monkeypatch: pytest.MonkeyPatch, threads: int, tasks: int, parts: int
) -> None:
    """Seven tiles in two parts leave two of sixteen threads idle; in three, eleven wait while five do a second one."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert direct._parts(tasks) == (parts, -(-4 * threads // tasks) if threads > 1 else 1)


def random_filter(out_channels: int, groups: int = 1) -> SparseFilter:
    weight = torch.randn(out_channels, 64, 1, 1, generator=torch.Generator().manual_seed(0))
    return SparseFilter.from_dense(
        weight * (weight.abs() > torch.linspace(1.0, 2.0, out_channels)[:, None, None, None]), groups
    )


@pytest.mark.parametrize(("out_channels", "parts", "groups"), [(64, 2, 1), (512, 16, 1), (100, 3, 1), (256, 4, 2)])
def test_jobs_of_many_channels_are_consecutive_and_weigh_the_same(out_channels: int, parts: int, groups: int) -> None:
    sparse_filter = random_filter(out_channels, groups)
    job, slot = schedule._deal(sparse_filter, parts)
    assert (np.diff(job) >= 0).all() and set(job) == set(range(parts * groups))
    assert all(sorted(slot[job == one]) == list(range((job == one).sum())) for one in set(job))
    weights = np.bincount(job, np.diff(sparse_filter.indptr) + 4).reshape(groups, parts)
    assert (weights <= 1.2 * weights.mean(axis=1, keepdims=True)).all()


def test_jobs_of_few_channels_are_dealt_and_weigh_the_same() -> None:
    sparse_filter = random_filter(64)
    job, _ = schedule._deal(sparse_filter, 8)
    weights = np.bincount(job, np.diff(sparse_filter.indptr))
    assert (np.bincount(job) == 8).all() and weights.max() <= 1.05 * weights.mean()


def test_a_channel_that_outweighs_all_others_leaves_jobs_empty() -> None:
    weight = torch.zeros(128, 4096, 1, 1)
    weight[:, 0], weight[70] = 1.0, 2.0
    sparse_filter, x = SparseFilter.from_dense(weight), torch.randn(1, 4096, 4, 4)
    job, _ = schedule._deal(sparse_filter, 4)
    assert len(set(job)) < 4
    problem = Problem(1, 4096, 4, 4, 128, (1, 1))
    y = by_name("direct").prepare(problem, sparse_filter, None, DirectConfig(ISA, 1, 64, parts=4)).run(x)
    assert torch.allclose(y, torch.conv2d(x, weight), rtol=1e-4, atol=1e-3)


def test_where_no_weight_is_zero_tiles_leave_registers_for_weights() -> None:
    problem = Problem(1, 3, 32, 32, 64, (3, 3), padding=(1, 1, 1, 1))
    full = SparseFilter.from_dense(torch.ones(64, 3, 3, 3))
    lanes, most = ISAS[ISA]
    config = by_name("direct").configs(problem, full)[0]
    assert config.vectors == min(96 // lanes, most)
    x, bias = torch.randn(2, 3, 32, 32), torch.randn(64)
    weight = torch.randn(64, 3, 3, 3)
    for channels in (64, 62, 3):  # the last ones are no four
        sparse_filter = SparseFilter.from_dense(weight[:channels])
        one = replace(problem, out_channels=channels)
        for config in by_name("direct").configs(one, sparse_filter):
            y = by_name("direct").prepare(one, sparse_filter, bias[:channels], config).run(x)
            assert torch.allclose(y, torch.conv2d(x, weight[:channels], bias[:channels], padding=1), atol=1e-4)


def test_threads_share_positions_where_there_are_tiles_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    full = SparseFilter.from_dense(torch.eye(64)[:, :, None, None])
    for threads, least in ((2, 2), (16, 1)):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        problem = Problem(1, 64, 14, 14, 64, (1, 1))
        configs = by_name("direct").configs(problem, full)
        assert min(len(Layout.of(problem, *_size(config)).tiles) for config in configs) == least


def _size(config: DirectConfig) -> tuple[int, int]:
    return ISAS[config.isa][0], config.vectors


def test_tiles_of_the_same_rows_follow_one_another() -> None:
    tiles = Layout.of(Problem(1, 1, 56, 56, 1, (3, 3), padding=(1, 1, 1, 1)), 16, 7).tiles
    assert len(tiles) == 4 * 8 and (np.diff(tiles["x_start"] // 56) >= 0).all()


def test_what_is_tried_does_not_depend_on_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan for a large batch has parts enough for the threads that single samples get."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 16)
    filter_of_ones = SparseFilter.from_dense(torch.ones(64, 64, 3, 3))
    one, many = (Problem(batch, 64, 7, 7, 64, (3, 3), padding=(1, 1, 1, 1)) for batch in (1, 64))
    assert by_name("direct").configs(one, filter_of_ones) == by_name("direct").configs(many, filter_of_ones)
    assert by_name("direct").configs(many, filter_of_ones)[0].parts == 16


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("samples", [1, 2, 3, 5, 16])
def test_tasks_take_several_parts_of_a_batch(samples: int, groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread takes all parts at once, several take as many as feed them; blocks without nonzeros are left out."""
    weight = torch.randn(42, 96 // groups, 3, 3)
    weight[weight.abs() < 1.5] = 0.0
    weight[:, 10:20] = 0.0
    sparse_filter = SparseFilter.from_dense(weight, groups)
    problem = Problem(samples, 96, 7, 7, 42, (3, 3), padding=(1, 1, 1, 1), groups=groups)
    x = torch.randn(samples, 96, 7, 7)
    y = torch.conv2d(x, weight, padding=1, groups=groups)
    _cpu.assume_fork_join_ns(1.0)  # so that threads are taken
    try:
        for threads in (1, 2, 5):
            monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
            run = by_name("direct").prepare(problem, sparse_filter, None, DirectConfig(ISA, 4, 10, parts=7)).run
            assert torch.allclose(run(x), y, rtol=1e-4, atol=1e-4)
    finally:
        _cpu.assume_fork_join_ns(0.0)
