"""What a wheel brings compiled: the kernels that methods say they need are those that they ask for."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from escort.cuda import shipped
from escort.cuda.compiler import Variant, compile_source
from escort.cuda.gpu import H200
from escort.methods import by_name
from escort.planner.plan import Layer
from shipping.__main__ import GPUS, arch_of, compile_all, in_place_of_a_gpu, key_of, plane_variants, variants_of, wanted
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
    between = {key_of(variant, arch) for variant in plane_variants() for arch in ("sm_80", "sm_90")}
    assert {*itertools.islice(variants, len(between))} == between
    assert {arch for *_, arch in variants} == {"sm_80", "sm_90", "sm_90a"}
    first = dict(itertools.islice(variants.items(), 4))
    binaries = compile_all(first, 10**6)
    assert [(binary.source, binary.arch) for binary in binaries] == [(source, arch) for source, _, _, arch in first]
    sizes = [len(shipped.pack([binary])) for binary in binaries]
    assert compile_all(first, sum(sizes[:2])) == binaries[:2]
    variant, (*_, arch) = next(iter(first.values())), next(iter(first))
    assert compile_source(variant.source, variant.defines, arch) == binaries[0]


def test_layers_are_of_every_kind() -> None:
    problems = [layer.problem for layer in LAYERS]
    assert {problem.kernel_size for problem in problems} == {(1, 1), (3, 3), (5, 5)}
    assert {problem.memory_format for problem in problems} == {"contiguous", "channels_last"}
    assert all(problem.memory_format == "contiguous" for problem in problems if problem.precision == "fp32")
    with in_place_of_a_gpu(GPUS[1]):
        assert all(not variant.native for variant in variants_of(LAYERS))
