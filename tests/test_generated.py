"""Method `generated`: what it refuses, its search, and on a GPU its kernels."""

from __future__ import annotations

from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from escort import reference
from escort.cuda.gpu import H200
from escort.filter import SparseFilter
from escort.layers import runners
from escort.methods.cuda.generated import Generated
from escort.methods.cuda.generated.config import GeneratedConfig
from escort.methods.cuda.generated.model import part_count, part_steps, predict_us, space_of
from escort.methods.cuda.generated.search import candidates, search
from escort.methods.cuda.generated.steps import KernelSteps
from escort.problem import Epilogue, Precision, Problem
from tests.cases import CASES, FULL, Case, check_kernels

RES3 = Problem(32, 128, 28, 28, 128, (3, 3), padding=(1, 1, 1, 1), device="cuda:0")


def sparse(problem: Problem, density: float) -> SparseFilter:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(problem.weight_shape, generator=generator)
    return SparseFilter.from_dense(weight * (torch.rand(weight.shape, generator=generator) < density), problem.groups)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"precision": "bf16"}, "fp32 and fp16"),
        ({"groups": 32}, "fewer than 8 output channels"),
        ({"height": 4096, "width": 4096}, "2 GiB"),
    ],
)
def test_refusals(change: dict[str, object], reason: str) -> None:
    refused = Generated().unsupported(replace(RES3, **change))  # type: ignore[arg-type]
    assert refused is not None and reason in refused


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_search_space_fits_the_device(precision: str) -> None:
    problem = replace(RES3, precision=precision)  # type: ignore[arg-type]
    sparse_filter = sparse(problem, 0.08)
    spaces = list(candidates(problem, sparse_filter, H200))
    assert sum(map(len, spaces)) > 100
    for space in spaces:
        threads = 32 * (space["consumers"] + space["producers"] + space["prefetch_warps"])
        assert np.all(space["consumers"] > 0) and np.all(space["occupancy"] * threads <= 1024)
        assert np.all(65536 // (threads * space["occupancy"]) >= space["out_channels"])
    configs = search(problem, sparse_filter, H200, 6)
    assert len(configs) == len(set(configs)) == 6 and all(type(config.out_channels) is int for config in configs)
    for config in configs:
        assert KernelSteps.of(problem, sparse_filter, config).shared_bytes * config.occupancy <= H200.shared_bytes
    times = [Generated().predict_us(problem, sparse_filter, H200, config) for config in configs]
    assert times == pytest.approx(sorted(times))
    assert times[0] == pytest.approx(min(predict_us(problem, sparse_filter, space, H200).min() for space in spaces))
    assert len({(config.arranged, config.split, config.multicast, config.prefetch_warps) for config in configs}) > 1


def test_a_config_holds_scalars() -> None:
    for value in (np.arange(3), np.int64(3), 3.0):
        with pytest.raises(TypeError, match="out_channels takes a whole number"):
            GeneratedConfig(value, 1, 1, 1)  # type: ignore[arg-type]


def test_predictions_follow_the_work() -> None:
    config = GeneratedConfig(32, 26, 6, 8)
    times = [Generated().predict_us(RES3, sparse(RES3, density), H200, config) for density in (0.02, 0.08, 0.3)]
    assert times == sorted(times)
    assert Generated().predict_us(replace(RES3, batch=128), sparse(RES3, 0.08), H200, config) > 2 * times[1]


def test_the_step_estimate_is_near() -> None:
    for precision in ("fp32", "fp16"):
        problem = replace(RES3, precision=precision)  # type: ignore[arg-type]
        sparse_filter, config = sparse(problem, 0.08), GeneratedConfig(32, 8, 4, 8)
        space = space_of(config)
        (estimate,) = part_count(problem, space) * part_steps(problem, sparse_filter, space)
        assert estimate == pytest.approx(KernelSteps.of(problem, sparse_filter, config).step_count, rel=0.1)


def on_the_gpu(case: Case, precision: Precision) -> tuple[Problem, list[GeneratedConfig]]:
    """The case on the GPU, and some configs of it; none where it is refused or takes more than a minute to compile."""
    method, sparse_filter = Generated(), case.filter()
    problem = replace(case.problem, device="cuda:0", precision=precision)
    if method.unsupported(problem) is not None:
        return problem, []
    configs = method.configs(problem, sparse_filter)
    quick = method.compile_s(problem, sparse_filter, configs[0]) <= 60.0
    return problem, [configs[0], configs[-1]] if quick else []


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "tf32", "fp16"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_case(case: Case, precision: Precision) -> None:
    _, configs = on_the_gpu(case, precision)
    if not configs:
        pytest.skip("refused, or takes more than a minute to compile")
    check_kernels(Generated(), case, "cuda:0", precision, configs)


def stagings(sums: int) -> list[GeneratedConfig]:
    """Every way to stage the input and of clusters; tiles begin at different chunks, parts of channels are uneven."""
    return [
        GeneratedConfig(32, 8, 4, 8, copy=1, start_points=5, sums=sums),
        GeneratedConfig(32, 8, 4, 8, copy=2, sums=sums),
        GeneratedConfig(32, 8, 4, 8, copy=4, arranged=True, start_points=5, sums=sums),
        GeneratedConfig(32, 8, 1, 8, copy=0, arranged=True, start_points=5, sums=sums),
        GeneratedConfig(24, 8, 1, 8, copy=0, arranged=True, split=2, sums=sums),
        GeneratedConfig(32, 4, 1, 4, copy=0, arranged=True, stages=4, start_points=2, split=3, sums=sums),
        GeneratedConfig(32, 4, 1, 4, copy=0, arranged=True, stages=2, occupancy=2, split=8, sums=sums),
        GeneratedConfig(24, 8, 1, 8, copy=0, arranged=True, split=2, sums=sums, prefetch_warps=2),
        GeneratedConfig(32, 8, 4, 8, copy=2, sums=sums, multicast=4, prefetch_warps=1),
        GeneratedConfig(32, 8, 1, 8, copy=0, arranged=True, start_points=5, sums=sums, multicast=8, prefetch_warps=3),
    ]


@pytest.mark.gpu
@pytest.mark.parametrize("epilogue", [Epilogue(), FULL], ids=["plain", "full"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("pointwise", [False, True], ids=["3x3", "1x1"])
def test_any_batch_in_any_place_on_the_gpu(precision: str, epilogue: Epilogue, pointwise: bool) -> None:
    """One runner for any batch, and for slices that are not aligned."""
    problem = replace(RES3, precision=precision, batch=4, epilogue=epilogue)  # type: ignore[arg-type]
    if pointwise:
        problem = replace(problem, kernel_size=(1, 1), padding=(0, 0, 0, 0))
    sparse_filter = sparse(problem, 0.08)
    bias = torch.randn(128) if epilogue.bias else None
    for config in stagings(2 if precision == "fp16" else 1):
        run = Generated().prepare(problem, sparse_filter, bias, config)
        for batch in (0, 1, 4, 7):
            x = torch.randn(batch * 128 * 28 * 28 + 1, device="cuda", dtype=problem.storage)[1:]
            x = x.view(batch, 128, 28, 28)
            residual = torch.randn_like(x) if epilogue.residual else None
            y = run(x, residual)
            weight, more = sparse_filter.to_dense().cuda(), None if bias is None else bias.cuda()
            expected = reference.conv2d(replace(problem, batch=batch), x, weight, more, residual)
            assert y.shape == expected.shape
            assert batch == 0 or reference.compare(y, expected) <= reference.ERROR_BOUND[precision], (config, batch)
            assert torch.equal(run(x, residual), y), "not the same twice: a race"


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("copy", [1, 2, 4])
def test_an_input_size_that_the_config_does_not_fit(precision: str, copy: int) -> None:
    """Another config then: copies of several words would meet the middle of a row."""
    config = GeneratedConfig(32, 4, 1, 4, copy=copy)
    problem = Problem(2, 16, 16, 16, 32, (3, 3), padding=(1, 1, 1, 1), precision=precision, device="cuda:0")  # type: ignore[arg-type]
    sparse_filter = sparse(problem, 0.1)
    for height, width in ((16, 16), (5, 18), (13, 13)):
        p = replace(problem, height=height, width=width)
        x = torch.randn(p.input_shape, device="cuda", dtype=p.storage)
        y = runners.prepare(p, sparse_filter, None, runners.Choice(p, "generated", asdict(config)))(x)
        assert (
            reference.compare(y, reference.conv2d(p, x, sparse_filter.to_dense().cuda()))
            <= reference.ERROR_BOUND[p.precision]
        )


@pytest.mark.gpu
def test_the_binary_is_reported() -> None:
    run = Generated().prepare(replace(RES3, batch=1), sparse(RES3, 0.02), None, GeneratedConfig(32, 8, 4, 8))
    assert len(run.binary.cubin) > 100_000
