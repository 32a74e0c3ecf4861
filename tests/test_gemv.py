"""The kernel for convolutions of one pixel: its source compiled for the CPU, and on a GPU."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import get_args

import pytest
import torch

from escort import reference
from escort.cuda.compiler import KERNELS
from escort.cuda.params import pack
from escort.filter import SparseFilter
from escort.methods import activation, by_name
from escort.methods.cuda.gemv import Params
from escort.problem import TORCH_DTYPE, Activation, Epilogue, MemoryFormat, Precision, Problem
from tests.cases import FULL, Case
from tests.emulated import launch
from tests.host import struct_fields

METHOD = by_name("gemv", "cuda:0")


def case(samples: int, in_channels: int, out_channels: int, epilogue: Epilogue = FULL, density: float = 0.5) -> Case:
    problem = Problem(samples, in_channels, 1, 1, out_channels, (1, 1), epilogue=epilogue)
    return Case(f"{samples}x{in_channels} to {out_channels}, {epilogue}", problem, density)


CASES = [
    case(1, 96, 4),
    case(3, 1152, 48, Epilogue(True)),
    case(8, 40, 17, Epilogue(activation="relu6")),
    case(17, 7, 9),
    case(1, 520, 33, Epilogue(True, False, "silu")),
    case(9, 12, 8, Epilogue(True, True, "prelu")),
    case(2, 256, 11, Epilogue(False, False, "leaky_relu", 0.2)),
    case(2, 64, 8, density=0.0),
]
every_case = pytest.mark.parametrize("each", CASES, ids=lambda each: each.name)


@pytest.fixture(autouse=True)
def a_gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.node.get_closest_marker("gpu") is None:
        monkeypatch.setattr("escort.methods.cuda.gemv.unavailable", lambda device: None)


def test_the_struct_is_the_dataclass() -> None:
    in_c = struct_fields((KERNELS / "gemv.cu").read_text(), "Params")
    assert in_c == [(field.type, field.name) for field in fields(Params)]


@every_case
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_the_source_computes_every_case(
    each: Case, precision: Precision, tmp_path_factory: pytest.TempPathFactory
) -> None:
    problem = replace(each.problem, device="cuda:0", precision=precision)
    dtype = TORCH_DTYPE[precision]
    x, weight, bias, residual = (None if t is None else t.to(dtype) for t in each.tensors())
    assert METHOD.unsupported(problem) is None and x is not None and weight is not None
    expected = reference.conv2d(problem, x, weight, bias, residual, each.slope())
    per_channel = activation.per_channel(replace(problem, device="cpu"), bias, each.slope())
    for config in METHOD.configs(problem, None):  # type: ignore[arg-type]
        (variant,) = METHOD.kernels(problem, config)
        y = torch.full(expected.shape, float("nan"), dtype=dtype)
        args = x, y, residual, weight.flatten(1), per_channel, pack(Params.of(problem)), problem.batch
        grid = -(-problem.out_channels // 8), -(-problem.batch // config.samples), 1
        launch(variant, grid, 256, args, tmp_path_factory.getbasetemp())
        assert reference.compare(y, expected) <= reference.ERROR_BOUND[precision], config


def test_what_is_refused() -> None:
    problem = replace(CASES[0].problem, device="cuda:0")
    for other in (
        replace(problem, width=2),
        replace(problem, height=3, width=3, kernel_size=(3, 3)),
        replace(problem, padding=(1, 0, 0, 0)),
        replace(problem, kernel_size=(3, 3), padding=(1, 1, 1, 1)),
    ):
        assert METHOD.unsupported(other) == "it takes maps and filters of one pixel"
    assert METHOD.unsupported(replace(problem, groups=2)) == "groups must be 1"


@pytest.mark.gpu
@pytest.mark.parametrize("memory_format", get_args(MemoryFormat))
@pytest.mark.parametrize("precision", get_args(Precision))
@every_case
def test_every_case_on_the_gpu(each: Case, precision: Precision, memory_format: MemoryFormat) -> None:
    problem, x, weight, bias, residual = each.on("cuda:0", precision)
    problem = replace(problem, memory_format=memory_format)
    sparse_filter = SparseFilter.from_dense(weight)
    for samples in (problem.batch, 1, 20, 0):
        some = x.new_empty(samples, *x.shape[1:]).normal_()
        added = None if residual is None else residual.new_empty(samples, *residual.shape[1:]).normal_()
        expected = reference.conv2d(problem, some, weight, bias, added, each.slope())
        for config in METHOD.configs(problem, sparse_filter):
            y = METHOD.prepare(problem, sparse_filter, bias, config, each.slope())(some, added)
            assert reference.compare(y, expected) <= reference.ERROR_BOUND[precision], config


@pytest.mark.gpu
@pytest.mark.parametrize("name", get_args(Activation))
def test_every_activation_on_the_gpu(name: Activation) -> None:
    each = case(4, 64, 24, Epilogue(True, True, name, 0.2 if name == "leaky_relu" else 0.0))
    for precision in ("fp32", "fp16"):
        problem, x, weight, bias, residual = each.on("cuda:0", precision)
        run = METHOD.prepare(problem, each.filter(), bias, METHOD.configs(problem, each.filter())[0], each.slope())
        expected = reference.conv2d(problem, x, weight, bias, residual, each.slope())
        assert reference.compare(run(x, residual), expected) <= reference.ERROR_BOUND[precision]
