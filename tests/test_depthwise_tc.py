"""The depthwise kernel on tensor cores: its source compiled for the CPU, whose products are emulated, and on a GPU."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from escort import reference
from escort.cuda.compiler import KERNELS
from escort.cuda.gpu import H200
from escort.cuda.params import pack
from escort.filter import SparseFilter
from escort.methods import activation, by_name
from escort.methods.cuda.depthwise_tc import DepthwiseTcConfig, Params, Rectangle, Tile
from escort.problem import Epilogue, Precision, Problem
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
    problem = case.problem
    x, weight, bias, residual = case.tensors()
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
    assert reference.compare(y, expected) <= reference.ERROR_BOUND[problem.precision] / 4, config


@pytest.mark.parametrize("case", EVERY, ids=lambda case: case.name)
def test_the_source_computes_every_case(case: Case, tmp_path_factory: pytest.TempPathFactory) -> None:
    for config in configs(case.problem):
        check(case, config, tmp_path_factory.getbasetemp())
