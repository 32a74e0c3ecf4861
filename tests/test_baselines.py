"""The baselines for GPUs, as far as the CPU can tell: which precision and memory format they ask for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import pytest
import torch

from escort.cuda.gpu import H200
from escort.filter import SparseFilter
from escort.methods import Method, by_name
from escort.methods.precision import float32_convolutions, float32_products
from escort.problem import Epilogue, Precision, Problem
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
        assert (call["allow_tf32"], call["benchmark"], call["deterministic"]) == (allowed, config.tries, config.tries)
        assert call["weight"].dtype is problem.storage
        for tensor in (call["x"], call["weight"]):
            assert tensor.is_contiguous(memory_format=torch.channels_last) is last


def test_algorithms_are_tried_for_the_batch_that_was_prepared_for(cudnn: list[dict[str, Any]]) -> None:
    problem = Problem(2, 8, 6, 6, 8, (3, 3), precision="fp16")
    sparse_filter = SparseFilter.from_dense(torch.randn(problem.weight_shape))
    method = by_name("cudnn", "cuda")
    configs = method.configs(problem, sparse_filter)
    assert configs[0].tries and not method.without_trying(configs[0]).tries
    assert {method.without_trying(config) for config in configs} < set(configs)
    run = method.prepare(problem, sparse_filter, None, configs[0])
    for samples in (2, 3):
        run(torch.randn(samples, 8, 6, 6).half())
    assert [call["benchmark"] for call in cudnn] == [True, False]


def test_cudnn_says_what_it_takes_where_another_dense_method_is_faster() -> None:
    """Less than what was measured on an H200 (docs/notes/planes.md), and with an epilogue more than ours take."""
    method, ours, gemv = (by_name(name, "cuda") for name in ("cudnn", "depthwise", "gemv"))
    last: Any = {"precision": "fp16", "memory_format": "channels_last", "device": "cuda:0"}
    epilogue, filters = Epilogue(bias=True, activation="silu"), cast(SparseFilter, None)

    def predicted_us(method: Method, problem: Problem) -> float:
        time_us = method.predict_us(problem, filters, H200)
        assert time_us is not None
        return time_us

    for batch, channels, side, taps, stride, measured_us in (
        (32, 96, 112, 3, 2, 69.9),
        (32, 144, 56, 3, 1, 41.7),
        (32, 384, 14, 3, 1, 18.8),
        (32, 1152, 7, 5, 1, 20.0),
        (1, 384, 14, 3, 1, 4.0),
    ):
        sizes = batch, channels, side, side, channels, (taps, taps)
        plain = Problem(*sizes, stride=(stride, stride), padding=(taps // 2,) * 4, groups=channels, **last)
        activated = replace(plain, epilogue=epilogue)
        assert 0.35 * measured_us < predicted_us(method, plain) < measured_us
        assert predicted_us(method, activated) > predicted_us(ours, activated)
    pixel = Problem(32, 1152, 1, 1, 48, (1, 1), epilogue=epilogue, **last)
    assert predicted_us(method, pixel) > 2.0 * predicted_us(gemv, pixel)
    for other in (replace(plain, groups=1), replace(plain, memory_format="contiguous")):
        assert method.predict_us(other, filters, H200) is None


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
