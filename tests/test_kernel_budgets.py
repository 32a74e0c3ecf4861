"""What every kernel may use of registers and local memory, held to the compiler; needs no GPU."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from escort.cuda import compiler
from escort.cuda.gpu import H200
from escort.filter import SparseFilter
from escort.methods import by_name
from escort.methods.activation import INSTRUCTIONS
from escort.methods.cuda.depthwise_tc import DepthwiseTcConfig
from escort.methods.cuda.direct.layout import Layout
from escort.methods.cuda.direct.params import defines
from escort.methods.cuda.direct.search import search
from escort.methods.cuda.generated import GeneratedConfig
from escort.methods.cuda.generated.codegen import arrange_defines
from escort.methods.cuda.generated.steps import KernelSteps
from escort.problem import Precision, Problem
from tests.cuda.kernels import ARCHS

#: Source, macros and the most registers per thread.
Variant = tuple[str, dict[str, int | str], int]
#: Bytes of spill stores and loads together; the kernel keeps its inner loops free of them. The tallest tile in 16 bits,
#: 13 words of 4 output channels, spills most, and is the fastest on ResNet-50's first stage all the same.
MOST_SPILLED = 160


pytestmark = pytest.mark.usefixtures("empty_cache")


def direct_variants() -> list[Variant]:
    """The choices of the search for four layers, one of them strided, in each way to store and to copy.

    Then with activations that do more than bound.
    """
    variants: list[Variant] = []
    for precision in ("fp32", "fp16", "bf16"):
        for channels, size, stride in ((64, 56, 1), (256, 14, 1), (512, 7, 1), (128, 28, 2)):
            padding, spread = (1, 1, 1, 1), range(0, 9 * channels * channels, 16)
            problem = Problem(
                32, channels, size, size, channels, (3, 3), (stride, stride), padding, precision=precision
            )  # type: ignore[arg-type]
            weight = np.zeros(problem.weight_shape, dtype=np.float32)
            weight.reshape(-1)[spread] = 1.0
            config = search(problem, SparseFilter.from_dense(weight), H200, most=1)[0]
            macros = defines(problem, config, Layout.of(problem, config.tile))
            variants.append(("direct.cu", macros, 65536 // (config.threads * config.occupancy) // 8 * 8))
    activated = [
        (source, {**macros, "ACTIVATION": name}, budget)
        for name, (source, macros, budget) in zip(itertools.cycle(INSTRUCTIONS), variants, strict=False)
    ]
    return variants + activated


def arrange_variants() -> list[Variant]:
    """Source, defines and budget of registers of what lays out inputs.

    One sample or two per word, one plane or four; and channels_last of either size of elements.
    """
    config = GeneratedConfig(8, 4, 1, 4, copy=0, arranged=True)
    vectors = ((2, 1), (2, 2), (2, 4), (2, 8), (4, 1), (4, 2), (4, 4))
    variants: list[Variant] = [
        ("sparse_tc_arrange.cu", {"BYTES": size, "VECTOR": vector}, 48) for size, vector in vectors
    ]
    for precision, stride in (("fp32", 1), ("fp16", 1), ("fp32", 2), ("fp16", 2)):
        problem = Problem(2, 8, 13, 13, 8, (3, 3), (stride, stride), (1, 1, 1, 1), precision=precision)  # type: ignore[arg-type]
        sparse_filter = SparseFilter.from_dense(torch.ones(problem.weight_shape))
        kernel_steps = KernelSteps.of(problem, sparse_filter, config)
        variants.append(("generated_arrange.cu", arrange_defines(kernel_steps, 128), 48))
    return variants


def pool_variants() -> list[Variant]:
    """The same of max pooling."""
    window: dict[str, int | str] = {"ROWS": 3, "COLUMNS": 3}
    vectors = ((0, 1), (0, 4), (1, 1), (1, 8), (2, 2), (2, 8))
    return [("max_pool.cu", {"STORAGE": storage, "VECTOR": vector, **window}, 64) for storage, vector in vectors]


def plane_variants() -> list[Variant]:
    """The same of what else stands between convolutions."""
    vectors = [{"STORAGE": storage, "VECTOR": vector} for storage, vector in ((0, 1), (0, 4), (1, 1), (1, 8), (2, 8))]
    both = [(macros, {"LAST": last}) for macros in vectors for last in (0, 1)]
    return [
        *(("images.cu", {"STORAGE": storage, "VECTOR": vector}, 40) for storage in (0, 1, 2) for vector in (1, 4)),
        *(("resize.cu", macros, 48) for macros in vectors),
        *(("mean.cu", macros, 64) for macros in vectors),
        *(("squeeze.cu", macros, 80) for macros in vectors if macros["VECTOR"] > 1),
        *(("average_pool.cu", macros | {"ROWS": n, "COLUMNS": n}, 80) for macros in vectors for n in (0, 2, 3)),
        *(("gate.cu", macros | last, 32) for macros, last in both),
        *(("local_response_norm.cu", macros | last | {"SIZE": 5}, 80) for macros, last in both),
        *(("gemv.cu", macros | {"SAMPLES": samples}, 96) for macros in vectors for samples in (1, 8)),
        *(("linear.cu", macros | {"SAMPLES": samples}, 64) for macros in vectors for samples in (1, 4)),
        *(("concat.cu", macros | {"NORM": norm}, 56) for macros in vectors for norm in (0, 1)),
    ]


def depthwise_variants() -> list[Variant]:
    """Filters with strips of each width, for three blocks of a multiprocessor at least."""
    return [
        ("depthwise.cu", {**macros, "ROWS": size, "COLUMNS": size, "WIDTH": width, "RIGHT": right}, 168)
        for macros in ({"STORAGE": 0, "VECTOR": 4}, {"STORAGE": 1, "VECTOR": 8}, {"STORAGE": 2, "VECTOR": 8})
        for size, width, right in ((3, 1, 1), (3, 2, 2), (3, 4, 1), (3, 4, 2), (5, 2, 1), (5, 4, 2), (7, 4, 1))
    ]


def depthwise_tc_variants() -> list[Variant]:
    """Filters of each size, for as many blocks of a multiprocessor as their lanes' numbers leave room for."""
    filters: list[tuple[int, int, Precision]] = [(3, 1, "bf16")]
    filters += [(size, stride, "fp16") for size in (3, 5, 7) for stride in (1, 2)]
    variants: list[Variant] = []
    for (size, stride, precision), down in itertools.product(filters, (1, 2)):
        problem = Problem(1, 32, 14, 14, 32, (size, size), (stride, stride), groups=32, precision=precision)
        config = DepthwiseTcConfig(down, rows=2, strips=1, samples=1)
        (variant,) = by_name("depthwise_tc", "cuda:0").kernels(problem, config)
        most = 65536 // 128 // int(variant.defines["OCCUPANCY"])
        variants.append(("depthwise_tc.cu", dict(variant.defines), most))
    return variants


def stem_variants() -> list[Variant]:
    """As many channels at a time as registers hold, in NHWC and NCHW, for 512 threads of a multiprocessor, or 384."""
    wide = {"CHANNELS": 3, "TILES": 8, "THREADS": 128}
    narrow = {"CHANNELS": 4, "TILES": 6, "STORAGE": 1, "LAST": 1, "VECTOR": 4, "THREADS": 256}
    types = ((0, 4, 168), (1, 8, 128), (2, 8, 128))
    return [
        *(
            ("stem.cu", {**wide, "STORAGE": storage, "LAST": 1, "VECTOR": vector}, most)
            for storage, vector, most in types
        ),
        *(("stem.cu", {**wide, "STORAGE": storage, "LAST": 0, "VECTOR": 2}, most) for storage, _, most in types),
        ("stem.cu", {**narrow, "IMAGES": 1}, 128),
        ("stem.cu", {**narrow, "ACTIVATION": "gelu"}, 128),
    ]


def every_variant() -> list[Variant]:
    planes = pool_variants() + plane_variants() + depthwise_variants() + depthwise_tc_variants()
    return direct_variants() + arrange_variants() + planes + stem_variants()


@pytest.mark.parametrize("arch", ARCHS)
def test_every_kernel_keeps_to_its_budget(arch: str) -> None:
    """Registers are as many as each variant states; at most a few values outside the inner loops are spilled."""
    variants = every_variant()
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        binaries = list(pool.map(lambda variant: compiler.compile_source(*variant[:2], arch), variants))
    for (source, macros, budget), binary in zip(variants, binaries, strict=True):
        used = f"{source} {macros}: {binary.registers} registers of {budget}, {binary.spill_bytes} bytes spilled"
        assert binary.registers <= budget and binary.spill_bytes <= MOST_SPILLED and binary.stack_bytes <= 48, used


def test_every_source_has_a_budget() -> None:
    assert {path.name for path in compiler.KERNELS.glob("*.cu")} == {source for source, _, _ in every_variant()}
