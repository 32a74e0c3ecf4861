"""What a wheel brings compiled: the kernels that methods say they need are those that they ask for."""

from __future__ import annotations

import itertools
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from escort.cuda import carried, compiler, kernel, shipped
from escort.cuda.compiler import Variant, compile_source
from escort.cuda.gpu import H200
from escort.cuda.kernel import arch
from escort.filter import SparseFilter
from escort.methods import by_name
from escort.planner import plan_layer
from escort.planner.plan import Layer
from escort.planner.search import Search, predict_us
from escort.problem import Epilogue, Precision, Problem
from shipping.__main__ import (
    GPUS,
    arch_of,
    compile_all,
    in_place_of_a_gpu,
    key_of,
    pixel_variants,
    plane_variants,
    variants_of,
    wanted,
)
from shipping.layers import common_layers

LAYERS = list(itertools.islice(common_layers(("fp16", "fp32")), 0, None, 61))


class AskedError(Exception):
    pass


@pytest.mark.parametrize("name", ["direct", "sparse_tc", "depthwise", "depthwise_tc"])
def test_what_a_conversion_asks_for_is_shipped_under_that_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By source, macros and architecture: by these :func:`compile_source` finds what is shipped."""
    method, asked = by_name(name, "cuda:0"), list[Any]()

    def find(source: Any, defines: Any, arch: str, newest: Any) -> Any:
        asked.append(key_of(Variant(source, defines), arch))
        raise AskedError

    monkeypatch.setattr("escort.cuda.kernel.compile_source", find)
    monkeypatch.setattr("escort.cuda.kernel.driver_version", lambda: (13, 0))
    with in_place_of_a_gpu(H200):
        able = [layer for layer in LAYERS if method.unsupported(layer.problem) is None][:8]
        assert len(able) > 1
        for layer in able:
            for config in method.configs(layer.problem, layer.sparse_filter)[:3]:
                named = method.kernels(layer.problem, config)[0]
                with pytest.raises(AskedError):
                    layer.prepare(method, config)
                assert asked[-1] == key_of(named, arch_of(named, H200))


def test_kernels_that_arrange_are_named() -> None:
    method = by_name("sparse_tc", "cuda:0")
    with in_place_of_a_gpu(H200):
        able = [layer for layer in LAYERS if method.unsupported(layer.problem) is None]
        for layer in able:
            names = [str(variant.source) for variant in _first(method, layer)]
            arranges = layer.problem.memory_format == "contiguous"
            assert names == ["sparse_tc.cu", *["sparse_tc_arrange.cu"] * arranges]


def _first(method: Any, layer: Layer) -> list[Variant]:
    return list(method.kernels(layer.problem, method.configs(layer.problem, layer.sparse_filter)[0]))


def test_what_is_wanted_most_comes_first_and_fits() -> None:
    variants = wanted(LAYERS)
    with in_place_of_a_gpu(H200):
        first = [*plane_variants(), *pixel_variants()]
    between = {key_of(variant, arch) for variant in first for arch in ("sm_80", "sm_90")}
    assert {*itertools.islice(variants, len(between))} == between
    assert {arch for *_, arch in variants} == {"sm_80", "sm_90", "sm_90a"}
    four = dict(itertools.islice(variants.items(), 4))
    binaries = compile_all(four, 10**6)
    assert [(binary.source, binary.arch) for binary in binaries] == [(source, arch) for source, _, _, arch in four]
    sizes = [len(shipped.pack([binary])) for binary in binaries]
    assert compile_all(four, sum(sizes[:2])) == binaries[:2]
    variant, (*_, arch) = next(iter(four.values())), next(iter(four))
    assert compile_source(variant.source, variant.defines, arch) == binaries[0]


@pytest.mark.parametrize("precision", ["fp16", "bf16", "tf32", "fp32"])
def test_kernels_of_one_pixel_are_shipped(precision: Precision) -> None:
    """Those of a classifier, and of both layers of a squeeze, of EfficientNet and of MobileNetV3."""
    method = by_name("gemv", "cuda:0")
    with in_place_of_a_gpu(H200):
        shipped_keys = {key_of(variant, arch_of(variant, H200)) for variant in pixel_variants()}
        for channels, out_channels, activation in ((4096, 1000, "none"), (96, 4, "silu"), (10, 240, "sigmoid")):
            layer = pixel(precision, channels, out_channels, activation)
            for config in method.configs(layer.problem, layer.sparse_filter):
                (variant,) = method.kernels(layer.problem, config)
                assert key_of(variant, arch_of(variant, H200)) in shipped_keys


def pixel(precision: Precision, channels: int, out_channels: int, activation: Any) -> Layer:
    problem = Problem(
        *(1, channels, 1, 1, out_channels, (1, 1)),
        epilogue=Epilogue(True, False, activation),
        precision=precision,
        device="cuda:0",
    )
    return Layer(problem, SparseFilter.from_dense(torch.ones(problem.weight_shape)), torch.zeros(out_channels))


def test_without_a_compiler_a_method_runs_what_is_shipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of its configs those whose kernels are there; where none is, it is refused, and no prediction is made of it."""
    method, layer = by_name("gemv", "cuda:0"), pixel("fp16", 8, 8, "relu")
    dense = by_name("cudnn", "cuda:0")
    (eight,) = method.kernels(layer.problem, method.configs(layer.problem, layer.sparse_filter)[1])
    monkeypatch.setattr("escort.planner.search.no_compiler", lambda: "CUDA kernels need NVRTC")
    with in_place_of_a_gpu(H200):
        monkeypatch.setattr(type(method), "unsupported", lambda self, problem: None)
        monkeypatch.setattr("escort.planner.search.is_had", lambda variant, device: variant.key == eight.key)
        search = Search.of(layer, [method, dense], None)
        assert dict(search.tried)[method] == (method.configs(layer.problem, layer.sparse_filter)[1],)
        assert predict_us(layer, [method])
        monkeypatch.setattr("escort.planner.search.is_had", lambda variant, device: False)
        refused = {each.method: each.reason for each in Search.of(layer, [method, dense], None).refused}
        assert refused["gemv"] == "no kernel for it came with this package or a file, and CUDA kernels need NVRTC"
        other = pixel("fp16", 8, 8, "relu")
        assert not predict_us(other, [method])


@pytest.mark.gpu
def test_without_a_compiler_what_is_shipped_runs_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of the configs of gemv is shipped, and is the only one that is tried; in another precision none is."""
    method, layer, device = by_name("gemv", "cuda:0"), pixel("fp16", 64, 32, "relu"), torch.device("cuda:0")
    eight = method.configs(layer.problem, layer.sparse_filter)[1]
    (variant,) = method.kernels(layer.problem, eight)
    binary = compile_source(variant.source, variant.defines, arch(device, native=variant.native))
    (tmp_path / "shipped.kernels").write_bytes(shipped.pack([binary]))
    monkeypatch.setattr(shipped, "FILE", tmp_path / "shipped.kernels")
    monkeypatch.setattr(compiler, "_find_nvrtc", lambda: ImportError("no libnvrtc.so"))
    monkeypatch.setattr(carried, "_binaries", {})
    monkeypatch.setattr(kernel, "_kernels", {})
    assert method.unsupported(layer.problem) is None
    plan = plan_layer(layer.problem, layer.sparse_filter, layer.bias, methods=[method, by_name("cudnn", "cuda:0")])
    timed = [each.config for each in plan.candidates if each.method == "gemv" and each.time_us is not None]
    assert timed == [asdict(eight)]  # type: ignore[call-overload]
    other = pixel("bf16", 64, 32, "relu")
    refused = {each.method: each.reason for each in Search.of(other, [method], None).refused}
    assert "no kernel for it came with this package" in str(refused["gemv"])


def test_layers_are_of_every_kind() -> None:
    problems = [layer.problem for layer in LAYERS]
    assert {problem.kernel_size for problem in problems} == {(1, 1), (3, 3), (5, 5)}
    assert {problem.memory_format for problem in problems} == {"contiguous", "channels_last"}
    assert all(problem.memory_format == "contiguous" for problem in problems if problem.precision == "fp32")
    with in_place_of_a_gpu(GPUS[1]):
        assert all(not variant.native for variant in variants_of(LAYERS))
