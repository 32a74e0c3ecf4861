"""The depthwise kernel on tensor cores: its source compiled for the CPU, whose products are emulated, and on a GPU."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from escort import reference
from escort.cuda.compiler import KERNELS
from escort.cuda.gpu import H200
from escort.cuda.params import pack
from escort.filter import SparseFilter
from escort.methods import activation, by_name
from escort.methods.cuda.depthwise_tc import DepthwiseTcConfig, Params, Rectangle, Tile
from escort.problem import Precision, Problem
from tests.cases import ACTIVATED, DEPTHWISE, Case
from tests.emulated import launch
from tests.host import struct_fields

METHOD = by_name("depthwise_tc", "cuda:0")


def on_gpu(problem: Problem, channels: int = 40, precision: Precision = "fp16") -> Problem:
    """With so many channels: by default a tile of vectors, and a part of one."""
    wide = replace(problem, in_channels=channels, out_channels=channels, groups=channels)
    return replace(wide, precision=precision, device="cuda:0", memory_format="channels_last")


#: Depthwise convolutions without dilation.
EVERY = [
    Case(case.name, on_gpu(case.problem), 0.9)
    for case in DEPTHWISE
    if case.problem.dilation == (1, 1) and case.problem.groups > 1
]
#: What may stand behind one.
BEHIND = [Case(case.name, on_gpu(case.problem), 0.9) for case in ACTIVATED if case.name.endswith(", depthwise")]


@pytest.fixture(autouse=True)
def a_gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The numbers of an H200, where there is none."""
    if request.node.get_closest_marker("gpu") is None:
        monkeypatch.setattr("escort.methods.cuda.depthwise_tc.unavailable", lambda device: None)
        monkeypatch.setattr("escort.cuda.gpu.Gpu.of", lambda device: H200)


def configs(problem: Problem) -> Sequence[DepthwiseTcConfig]:
    assert METHOD.unsupported(problem) is None
    return METHOD.configs(problem, None)  # type: ignore[arg-type]


def check(case: Case, config: DepthwiseTcConfig, folder: Path) -> None:
    y, expected = computed(case, case.tensors(), config, folder)
    assert reference.compare(y, expected) <= reference.ERROR_BOUND[case.problem.precision] / 2, config


def computed(case: Case, tensors: Any, config: DepthwiseTcConfig, folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """What the source computes, and the reference."""
    problem = case.problem
    x, weight, bias, residual = tensors
    x, residual = (
        None if each is None else each.to(problem.storage).contiguous(memory_format=torch.channels_last)
        for each in (x, residual)
    )
    assert x is not None
    weight = weight.to(problem.storage)
    expected = reference.conv2d(problem, x, weight, bias, residual, case.slope())
    per_channel = activation.per_channel(replace(problem, device="cpu", memory_format="contiguous"), bias, case.slope())
    by_tap = weight.flatten(1).t().contiguous()
    (variant,), tile = METHOD.kernels(problem, config), Tile.of(problem, config)
    y = torch.full(expected.shape, float("nan"), dtype=problem.storage).contiguous(memory_format=torch.channels_last)
    args = x, y, residual, by_tap, per_channel, pack(Params.of(problem, tile)), problem.batch
    grid = -(-problem.batch // config.samples) * tile.blocks, 1, 1
    launch(variant, grid, 128, args, folder, tile.shared_bytes)
    return y, expected


#: One of each kind that is compiled in, and every kind of epilogue.
SOME = {
    "depthwise 3x3 on 7x7, odd channels": 2,
    "depthwise 5x5 to 8x8, threefold": 1,
    "depthwise padding beyond the kernel": 1,
    "depthwise 7x7": 1,
    "prelu and residual, depthwise": 1,
}


@pytest.mark.parametrize(("name", "count"), SOME.items(), ids=str)
def test_the_source_computes(name: str, count: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    case = next(case for case in (*EVERY, *BEHIND) if case.name == name)
    for config in configs(case.problem)[:count]:
        check(case, config, tmp_path_factory.getbasetemp())


@pytest.mark.parametrize(
    ("name", "precision"), [("5x5 on 7x7", "bf16"), ("5x5 to 8x8", "tf32"), ("3x3 on 7x7", "tf32")], ids=str
)
def test_the_source_computes_other_types(name: str, precision: Precision, tmp_path: Path) -> None:
    case = next(case for case in EVERY if name in case.name)
    case = replace(case, problem=replace(case.problem, precision=precision))
    check(case, configs(case.problem)[0], tmp_path)


@pytest.mark.parametrize(("precision", "beside", "channels"), [("fp16", 6, 2), ("tf32", 10, 1)])
def test_a_nan_reaches_few_outputs_that_do_not_read_it(
    precision: Precision, beside: int, channels: int, tmp_path: Path
) -> None:
    problem = on_gpu(Problem(1, 8, 9, 40, 8, (3, 3), padding=(1, 1, 1, 1), groups=8), 8, precision)
    case = Case("nan", problem, 0.0)
    x, *others = case.tensors()
    row, column, channel = 4, 19, 5
    x[0, channel, row, column] = math.nan
    y, _ = computed(case, (x, *others), configs(problem)[0], tmp_path)
    found = y[0].isnan()
    assert found[channel, row - 1 : row + 2, column - 1 : column + 2].all()
    first = channel // channels * channels
    found[first : first + channels, row - 1 : row + 2, column - 1 - beside : column + 2 + beside] = False
    assert not found.any()


def test_the_structs_are_the_dataclasses() -> None:
    source = (KERNELS / "depthwise_tc.cu").read_text()
    for kind in (Params, Rectangle):
        assert struct_fields(source, kind.__name__) == [(field.type, field.name) for field in fields(kind)]


@pytest.mark.parametrize(
    "shape",
    [
        *((1, 32, 112, 112), (32, 96, 112, 112), (1, 1152, 7, 7), (8, 144, 56, 56)),
        *((1, 32, 512, 1024), (2, 32, 4, 8192), (1, 32, 8192, 4)),  # too large for 16 tiles down and across
    ],
)
@pytest.mark.parametrize("taps", [3, 5])
def test_tiles_cover_the_plane_and_fit(shape: tuple[int, ...], taps: int) -> None:
    batch, channels, height, width = shape
    problem = Problem(batch, channels, height, width, channels, (taps, taps), padding=(taps // 2,) * 4)
    problem = on_gpu(problem, channels)
    found = configs(problem)
    assert len(found) == len(set(found)) > 2 and {config.down for config in found} == {1, 2}
    for config in found:
        tile, (vectors, strips, rows) = Tile.of(problem, config), Tile.of(problem, config).counts
        assert tile.shared_bytes <= 48 * 1024 and config.rows % config.down == 0 and config.samples <= batch
        assert tile.blocks == vectors * strips * rows and vectors == math.ceil(channels / 32)
        assert (strips - 1) * config.strips * 4 < width <= strips * config.strips * 4
        assert (rows - 1) * config.rows < height <= rows * config.rows


def test_what_is_refused() -> None:
    problem = on_gpu(Problem(1, 8, 20, 20, 8, (3, 3)), 16)
    refused = {
        "an input channel of its own": replace(problem, groups=8),
        "fp16, bf16 or TF32": replace(problem, precision="fp32"),
        "channels_last": replace(problem, memory_format="contiguous"),
        "multiple of 8": on_gpu(problem, 12),
        "no dilation": replace(problem, dilation=(1, 2)),
        "registers": replace(problem, kernel_size=(11, 11)),
    }
    for says, each in refused.items():
        assert says in str(METHOD.unsupported(each))


def test_few_threads_are_left_without_work() -> None:
    """Tiles of a large batch hold whole planes of small maps, and several samples of the smallest."""
    plane = Problem(32, 8, 7, 7, 8, (3, 3), padding=(1, 1, 1, 1))
    assert configs(on_gpu(plane, 960))[0].samples > 1
    assert configs(on_gpu(replace(plane, batch=1), 960))[0].samples == 1


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp16", "bf16", "tf32"])
@pytest.mark.parametrize("case", [*EVERY, *BEHIND], ids=lambda case: case.name)
def test_every_case_on_the_gpu(case: Case, precision: Precision) -> None:
    problem, x, weight, bias, residual = case.on("cuda:0", precision)
    expected = reference.conv2d(problem, x, weight, bias, residual, case.slope())
    sparse_filter = SparseFilter.from_dense(weight, problem.groups)
    assert METHOD.unsupported(problem) is None
    for config in METHOD.configs(problem, sparse_filter):
        run = METHOD.prepare(problem, sparse_filter, bias, config, case.slope())
        y = run(x, residual)
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert reference.compare(y, expected) <= reference.ERROR_BOUND[precision], config
        assert torch.equal(run(x, residual), y), "not the same twice: a race"


@pytest.mark.gpu
def test_any_batch_and_misaligned_inputs_on_the_gpu() -> None:
    problem = on_gpu(Problem(4, 8, 9, 9, 8, (3, 3), padding=(1, 1, 1, 1)), 16)
    weight = torch.randn(problem.weight_shape)
    sparse_filter = SparseFilter.from_dense(weight, 16)
    run = METHOD.prepare(problem, sparse_filter, None, DepthwiseTcConfig(down=1, rows=9, strips=3, samples=4))
    for samples in (0, 1, 5):
        memory = torch.randn(samples * 16 * 81 + 1, device="cuda:0").half()[1:]
        x = memory.view(samples, 9, 9, 16).permute(0, 3, 1, 2)
        expected = reference.conv2d(problem, x, weight)
        assert reference.compare(run(x), expected) <= reference.ERROR_BOUND["fp16"]
        assert reference.compare(run(x.contiguous()), expected) <= reference.ERROR_BOUND["fp16"]
