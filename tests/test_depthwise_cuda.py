"""The depthwise kernel of GPUs: its source compiled for the CPU over the table of cases, and on a GPU."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import get_args

import pytest
import torch

from escort import reference
from escort.cuda.compiler import KERNELS
from escort.cuda.gpu import H200
from escort.cuda.params import pack
from escort.filter import SparseFilter
from escort.methods import activation, by_name
from escort.methods.cuda.depthwise import DepthwiseConfig, Params, Tile
from escort.problem import TORCH_DTYPE, Epilogue, MemoryFormat, Precision, Problem
from tests.cases import ACTIVATED, CASES, DEPTHWISE, Case
from tests.emulated import launch
from tests.host import struct_fields

METHOD = by_name("depthwise", "cuda:0")
FORMATS: tuple[MemoryFormat, ...] = get_args(MemoryFormat)


def of_channels(problem: Problem, channels: int) -> Problem:
    return replace(problem, in_channels=channels, out_channels=channels, groups=channels)


#: Enough channels for whole vectors, and strips that end within a row.
VECTORS = tuple(
    Case(f"{case.name}, {channels} channels", of_channels(case.problem, channels))
    for case, channels in (
        *((case, 16) for case in DEPTHWISE if case.problem.out_channels == case.problem.in_channels),
        (DEPTHWISE[1], 72),
        (DEPTHWISE[4], 12),
    )
)
#: Behind depthwise convolutions: one of each kind that is compiled in.
COMPILED_IN = [
    case
    for case in ACTIVATED
    if "depthwise" in case.name and case.problem.epilogue.activation in ("leaky_relu", "prelu", "silu")
]
EVERY = [case for case in (*CASES, *DEPTHWISE, *VECTORS) if case.problem.groups == case.problem.in_channels]


@pytest.fixture(autouse=True)
def a_gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The numbers of an H200, where there is none."""
    if request.node.get_closest_marker("gpu") is None:
        monkeypatch.setattr("escort.methods.cuda.depthwise.unavailable", lambda device: None)
        monkeypatch.setattr("escort.cuda.gpu.Gpu.of", lambda device: H200)


def on_gpu(case: Case, memory_format: MemoryFormat, precision: Precision = "fp32") -> Problem:
    return replace(case.problem, device="cuda:0", memory_format=memory_format, precision=precision)


def test_the_struct_is_the_dataclass() -> None:
    in_c = struct_fields((KERNELS / "depthwise.cu").read_text(), "Params")
    assert in_c == [(field.type, field.name) for field in fields(Params)]


def runs(problem: Problem) -> Iterator[DepthwiseConfig]:
    assert METHOD.unsupported(problem) is None
    yield from METHOD.configs(problem, None)  # type: ignore[arg-type]


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("case", [*EVERY, *COMPILED_IN], ids=lambda case: case.name)
def test_the_source_computes_every_case(
    case: Case, precision: Precision, memory_format: MemoryFormat, tmp_path_factory: pytest.TempPathFactory
) -> None:
    problem = on_gpu(case, memory_format, precision)
    dtype, torch_format = TORCH_DTYPE[precision], problem.torch_memory_format
    x, weight, bias, residual = case.tensors()
    x, residual = (
        None if each is None else each.to(dtype).contiguous(memory_format=torch_format) for each in (x, residual)
    )
    assert x is not None
    weight = weight.to(dtype)
    expected = reference.conv2d(problem, x, weight, bias, residual, case.slope())
    per_channel = activation.per_channel(replace(problem, device="cpu", memory_format="contiguous"), bias, case.slope())
    by_tap = weight.flatten(1).t().contiguous()
    for config in runs(problem):
        (variant,), tile = METHOD.kernels(problem, config), Tile.of(problem, config)
        y = torch.full(expected.shape, float("nan"), dtype=dtype).contiguous(memory_format=torch_format)
        args = x, y, residual, by_tap, per_channel, pack(Params.of(problem, tile))
        launch(variant, (problem.batch * tile.blocks, 1, 1), 128, args, tmp_path_factory.getbasetemp())
        assert reference.compare(y, expected) <= reference.ERROR_BOUND[precision], config


@pytest.mark.parametrize("memory_format", FORMATS)
def test_infinities_and_nan_pass_as_in_torch(memory_format: MemoryFormat, tmp_path: Path) -> None:
    problem = Problem(2, 8, 9, 11, 8, (3, 3), padding=(1, 1, 1, 1), groups=8, epilogue=Epilogue(activation="relu6"))
    problem = replace(problem, device="cuda:0", memory_format=memory_format)
    x = torch.randn(problem.input_shape)
    x[0, 0, 0, 0], x[0, 1, 4, 10], x[1, 2, 8, 9] = torch.nan, torch.inf, -torch.inf
    weight = torch.randn(problem.weight_shape)
    weight[1, 0, 1, 1] = 0.0  # times infinity is NaN
    expected = reference.conv2d(problem, x, weight).float()
    assert expected.isnan().any()
    x, by_tap = x.contiguous(memory_format=problem.torch_memory_format), weight.flatten(1).t().contiguous()
    for config in runs(problem):
        (variant,), tile = METHOD.kernels(problem, config), Tile.of(problem, config)
        y = torch.empty_like(expected, memory_format=problem.torch_memory_format)
        args = x, y, None, by_tap, None, pack(Params.of(problem, tile))
        launch(variant, (problem.batch * tile.blocks, 1, 1), 128, args, tmp_path)
        torch.testing.assert_close(y, expected, equal_nan=True, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("shape", [(1, 32, 112, 112), (32, 96, 112, 112), (1, 1152, 7, 7), (8, 144, 56, 56)])
def test_a_tile_is_a_block_and_tiles_cover_the_plane(shape: tuple[int, ...], memory_format: MemoryFormat) -> None:
    batch, channels, height, width = shape
    problem = Problem(batch, channels, height, width, channels, (3, 3), padding=(1, 1, 1, 1), groups=channels)
    problem = replace(problem, device="cuda:0", memory_format=memory_format, precision="fp16")
    for config in runs(problem):
        tile = Tile.of(problem, config)
        vectors = channels // 8 if memory_format == "channels_last" else channels
        assert math.prod(tile.sizes) == 128
        for size, count, length in zip(
            tile.sizes, tile.counts, (vectors, -(-width // config.strip), height), strict=True
        ):
            assert (count - 1) * size < length <= count * size
        used = vectors * -(-width // config.strip) * height / (math.prod(tile.counts) * 128)
        assert used > 0.6, (config, tile)  # of the threads


def test_what_is_refused() -> None:
    problem = Problem(1, 8, 20, 20, 8, (3, 3), groups=4, device="cuda:0")
    assert METHOD.unsupported(problem) == "each output channel reads 2 input channels, not one"
    assert "11 columns" in str(METHOD.unsupported(replace(problem, groups=8, kernel_size=(3, 13))))
    dilated = replace(problem, groups=8, dilation=(1, 2), memory_format="channels_last")
    assert METHOD.configs(dilated, None) == (DepthwiseConfig(1),)  # type: ignore[arg-type]


def test_strips_are_wide_where_threads_are_many() -> None:
    small = Problem(1, 96, 14, 14, 96, (3, 3), groups=96, device="cuda:0", memory_format="channels_last")
    first = [METHOD.configs(replace(small, batch=batch), None)[0].strip for batch in (1, 256)]  # type: ignore[arg-type]
    assert first == [1, 4]


@pytest.mark.gpu
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("precision", get_args(Precision))
@pytest.mark.parametrize(
    "case", [*EVERY, *(case for case in ACTIVATED if "depthwise" in case.name)], ids=lambda c: c.name
)
def test_every_case_on_the_gpu(case: Case, precision: Precision, memory_format: MemoryFormat) -> None:
    problem, x, weight, bias, residual = case.on("cuda:0", precision)
    problem = replace(problem, memory_format=memory_format)
    expected = reference.conv2d(problem, x, weight, bias, residual, case.slope())
    sparse_filter = SparseFilter.from_dense(weight, problem.groups)
    assert METHOD.unsupported(problem) is None
    for config in METHOD.configs(problem, sparse_filter):
        y = METHOD.prepare(problem, sparse_filter, bias, config, case.slope())(x, residual)
        assert y.is_contiguous(memory_format=problem.torch_memory_format)
        assert reference.compare(y, expected) <= reference.ERROR_BOUND[precision], config


@pytest.mark.gpu
def test_any_batch_and_misaligned_inputs_on_the_gpu() -> None:
    problem = Problem(2, 16, 9, 9, 16, (3, 3), padding=(1, 1, 1, 1), groups=16, precision="fp16", device="cuda:0")
    problem = replace(problem, memory_format="channels_last")
    weight = torch.randn(problem.weight_shape)
    sparse_filter = SparseFilter.from_dense(weight, 16)
    run = METHOD.prepare(problem, sparse_filter, None, METHOD.configs(problem, sparse_filter)[0])
    for samples in (0, 1, 5):
        memory = torch.randn(samples * 16 * 81 + 1, device="cuda:0").half()[1:]
        x = memory.view(samples, 9, 9, 16).permute(0, 3, 1, 2)
        expected = reference.conv2d(problem, x, weight)
        assert reference.compare(run(x), expected) <= reference.ERROR_BOUND["fp16"]
        assert reference.compare(run(x.contiguous()), expected) <= reference.ERROR_BOUND["fp16"]
