"""The baselines for GPUs, as far as the CPU can tell: what they compute, and which precision they ask for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from escort import reference
from escort.filter import SparseFilter
from escort.methods import Method, by_name
from escort.methods.precision import float32_convolutions, float32_products
from escort.problem import Precision, Problem
from tests.cases import CASES, Case, benchmark_configs

BASELINES = [by_name(name, "cuda") for name in ("cudnn", "cublas", "cusparse")]


@pytest.fixture
def cudnn(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Stands in for cuDNN, and notes what it was asked for."""
    asked: list[dict[str, Any]] = []

    def convolution(
        x: torch.Tensor, weight: torch.Tensor, padding: Any, stride: Any, dilation: Any, groups: int, **options: Any
    ) -> torch.Tensor:
        asked.append({**options, "x": x, "weight": weight})
        return F.conv2d(x, weight, None, stride, padding, dilation, groups)

    monkeypatch.setattr(torch, "cudnn_convolution", convolution)
    return asked


@pytest.mark.usefixtures("cudnn")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("method", BASELINES, ids=lambda method: method.name)
def test_case(method: Method, case: Case) -> None:
    x, weight, bias, residual = case.tensors()
    expected = reference.conv2d(case.problem, x, weight, bias, residual)
    for config in benchmark_configs(method, case.problem, case.filter()):
        run = method.prepare(case.problem, case.filter(), bias, config)
        for memory_format in (torch.contiguous_format, torch.channels_last):
            y = run(x.contiguous(memory_format=memory_format), residual)
            assert reference.compare(y, expected) <= reference.ERROR_BOUND["fp32"], config
            assert y.is_contiguous() or method.input_format(config) == "channels_last", config


@pytest.mark.parametrize(("dtype", "allowed"), [("fp32", False), ("tf32", True), ("fp16", False)])
def test_cudnn_is_told_the_precision_by_each_call(cudnn: list[dict[str, Any]], dtype: Precision, allowed: bool) -> None:
    problem = Problem(2, 8, 6, 6, 8, (3, 3), precision=dtype)
    sparse_filter = SparseFilter.from_dense(torch.randn(problem.weight_shape))
    method = by_name("cudnn", "cuda")
    for config in benchmark_configs(method, problem, sparse_filter):
        method.prepare(problem, sparse_filter, None, config)(torch.randn(problem.input_shape).to(problem.storage))
        asked = cudnn[-1]
        last = config.memory_format == "channels_last"
        assert (asked["allow_tf32"], asked["benchmark"]) == (allowed, True)
        assert asked["weight"].dtype is problem.storage
        for tensor in (asked["x"], asked["weight"]):
            assert tensor.is_contiguous(memory_format=torch.channels_last) is last


def test_only_benchmarks_leave_the_output_in_channels_last(cudnn: list[dict[str, Any]]) -> None:
    case = CASES[4]
    method = by_name("cudnn", "cuda")
    assert all(config.output == "contiguous" for config in method.configs(case.problem, case.filter()))
    (config,) = method.benchmark_configs(case.problem, case.filter())
    x, _, bias, _ = case.tensors()
    x = x.contiguous(memory_format=torch.channels_last)
    y = method.prepare(case.problem, case.filter(), bias, config)(x)
    assert cudnn[-1]["x"].data_ptr() == x.data_ptr() and y.is_contiguous(memory_format=torch.channels_last)


def test_cusparse_refuses_tf32_with_a_reason() -> None:
    problem = replace(CASES[4].problem, precision="tf32", device="cuda:0")
    assert "ask for fp32" in (by_name("cusparse", "cuda").unsupported(problem) or "")
    assert by_name("cublas", "cuda").unsupported(problem) is None


def settings() -> tuple[Any, ...]:
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):
        return matmul.fp32_precision, cudnn.conv.fp32_precision
    return torch.get_float32_matmul_precision(), cudnn.allow_tf32


@pytest.mark.usefixtures("hostile")
def test_precision_is_set_for_a_while_and_given_back() -> None:
    before = settings()
    exact, rounded = ("ieee", "tf32") if hasattr(torch.backends.cuda.matmul, "fp32_precision") else (None, None)
    for dtype, wanted in (("fp32", exact), ("fp16", exact), ("tf32", rounded)):
        with pytest.raises(ZeroDivisionError), float32_products(dtype), float32_convolutions(dtype):  # type: ignore[arg-type]
            if wanted is not None:
                assert settings() == (wanted, wanted)
            raise ZeroDivisionError
        assert settings() == before
