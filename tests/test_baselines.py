"""The baselines for GPUs, as far as the CPU can tell: which precision and memory format they ask for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from escort.filter import SparseFilter
from escort.methods import by_name
from escort.methods.precision import float32_convolutions, float32_products
from escort.problem import Precision, Problem
from tests.cases import CASES, benchmark_configs


@pytest.mark.parametrize(("precision", "allowed"), [("fp32", False), ("tf32", True), ("fp16", False)])
def test_each_call_tells_cudnn_the_precision(cudnn: list[dict[str, Any]], precision: Precision, allowed: bool) -> None:
    problem = Problem(2, 8, 6, 6, 8, (3, 3), precision=precision)
    sparse_filter = SparseFilter.from_dense(torch.randn(problem.weight_shape))
    method = by_name("cudnn", "cuda")
    for config in benchmark_configs(method, problem, sparse_filter):
        method.prepare(problem, sparse_filter, None, config)(torch.randn(problem.input_shape).to(problem.storage))
        call = cudnn[-1]
        last = config.memory_format == "channels_last"
        assert (call["allow_tf32"], call["benchmark"]) == (allowed, True)
        assert call["weight"].dtype is problem.storage
        for tensor in (call["x"], call["weight"]):
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
    wanted_settings: dict[Precision, str | None] = {"fp32": exact, "fp16": exact, "tf32": rounded}
    for precision, wanted in wanted_settings.items():
        with pytest.raises(ZeroDivisionError), float32_products(precision), float32_convolutions(precision):
            if wanted is not None:
                assert settings() == (wanted, wanted)
            raise ZeroDivisionError
        assert settings() == before
