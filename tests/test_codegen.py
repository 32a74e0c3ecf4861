"""Kernel steps: run by their interpreter against the reference, their text, and that it assembles."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from escort import reference
from escort.cuda import compiler
from escort.filter import SparseFilter
from escort.methods.cuda.generated import codegen
from escort.methods.cuda.generated.codegen import arrange_defines
from escort.methods.cuda.generated.config import GeneratedConfig
from escort.methods.cuda.generated.steps import Join, KernelSteps, Load, MultiplyAdd
from escort.methods.cuda.generated.words import Words, computed
from escort.problem import Epilogue, Problem
from tests import generated_interpreter
from tests.cases import CASES, FULL, Case

GOLDEN = Path(__file__).parent / "golden"
SMALL = [case for case in CASES if case.problem.batch < 8]
CONFIGS = {
    "fp32": [
        GeneratedConfig(5, 1, 1, 3),
        GeneratedConfig(64, 2, 1, 4, start_points=4),
        GeneratedConfig(16, 3, 1, 2, copy=0, arranged=True, split=3),
        GeneratedConfig(16, 3, 2, 2, copy=4, stages=2),
    ],
    "fp16": [
        GeneratedConfig(5, 1, 1, 3, copy=0, arranged=True, sums=2),
        GeneratedConfig(64, 2, 1, 4, copy=4, arranged=True, start_points=4),
        GeneratedConfig(16, 3, 1, 2, copy=0, arranged=True, split=2, sums=3),
        GeneratedConfig(16, 3, 2, 2, copy=2),
    ],
}


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_kernel_steps_compute_the_convolution(case: Case, precision: str) -> None:
    p = replace(case.problem, precision=precision, epilogue=Epilogue())  # type: ignore[arg-type]
    if max(p.height, p.width) > 40 or p.in_channels * p.out_channels > 5000:
        p = replace(p, batch=min(p.batch, 1))
    x, weight = case.tensors()[0][: p.batch].double(), case.tensors()[1]
    expected = reference.conv2d(replace(p, precision="fp32"), x, weight)
    for config in CONFIGS[precision][: 1 if p.out_channels * p.height * p.width > 40000 else None]:
        odd = not config.arranged and computed(p).width * p.storage.itemsize % (4 * config.copy)
        if not config.arranged and (p.stride != (1, 1) or odd):
            with pytest.raises(ValueError, match="needs an arranged input"):
                KernelSteps.of(p, case.filter(), config)
            continue
        kernel_steps = KernelSteps.of(p, case.filter(), config)
        y = torch.from_numpy(generated_interpreter.run(kernel_steps, x.numpy())).reshape(expected.shape)
        assert reference.compare(y, expected) <= 1e-12 if len(x) else y.shape == expected.shape, config


def small(name: str) -> tuple[KernelSteps, np.ndarray | None]:
    """Kernel steps small enough to be read."""
    weight = torch.zeros(3, 2, 3, 3)
    weight[0, 0, 0, 0], weight[0, 1, 1, 2], weight[1, 0, 0, 0], weight[2, 1, 2, 1] = 0.5, -2.0, 3.0, 0.25
    bias = np.array([1.0, -1.0, 0.0], dtype=np.float32)
    problem = Problem(1, 2, 6, 6, 3, (3, 3), padding=(1, 1, 1, 1))
    sparse_filter = SparseFilter.from_dense(weight)
    if name == "fp32":
        return KernelSteps.of(problem, sparse_filter, GeneratedConfig(3, 1, 1, 2, stages=2)), None
    if name == "fp32-two-parts":
        problem = replace(problem, epilogue=FULL)
        return KernelSteps.of(
            problem, sparse_filter, GeneratedConfig(2, 1, 1, 1, copy=2, stages=2, start_points=2)
        ), bias
    problem = replace(problem, precision="fp16", epilogue=Epilogue(True, False, "relu6"))
    if name == "fp16":
        return KernelSteps.of(problem, sparse_filter, GeneratedConfig(3, 1, 1, 2, stages=2, sums=2)), bias
    return KernelSteps.of(
        problem, sparse_filter, GeneratedConfig(3, 1, 1, 1, copy=0, stages=2, arranged=True, split=2)
    ), bias


@pytest.mark.parametrize("name", ["fp32", "fp32-two-parts", "fp16", "fp16-split"])
def test_texts_are_the_golden_ones(name: str) -> None:
    """After a change that is meant: write `text` into the file, and read the difference."""
    kernel_steps, bias = small(name)
    text = codegen.text(kernel_steps, bias)
    assert text == (GOLDEN / f"generated-{name}.cu").read_text()
    assert text == codegen.text(kernel_steps, bias), "the same twice"


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize(
    ("copy", "arranged", "split", "multicast", "prefetch_warps"),
    [
        (1, False, 1, 1, 0),
        (2, False, 1, 1, 2),
        (4, True, 1, 1, 0),
        (0, True, 1, 8, 1),
        (0, True, 2, 1, 2),
    ],
)
def test_everything_assembles_without_spills(
    arch: str, precision: str, copy: int, arranged: bool, split: int, multicast: int, prefetch_warps: int
) -> None:
    if copy == 0 and arch < "sm_90":
        pytest.skip("bulk copies and clusters need compute capability 9.0")
    sums = 2 if precision == "fp16" else 1
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 16, 3, 3, generator=generator) * (torch.rand(64, 16, 3, 3, generator=generator) < 0.1)
    problem = Problem(2, 16, 14, 16, 64, (3, 3), padding=(1, 1, 1, 1), precision=precision, epilogue=FULL)  # type: ignore[arg-type]
    if multicast > 1:  # sums that end in 16 bits
        problem = replace(problem, epilogue=Epilogue(True, False, "relu6"))
        sums = 1
    config = GeneratedConfig(
        32,
        12,
        4 if copy else 1,
        4,
        copy=copy,
        sums=sums,
        arranged=arranged,
        split=split,
        multicast=multicast,
        prefetch_warps=prefetch_warps,
    )
    kernel_steps = KernelSteps.of(problem, SparseFilter.from_dense(weight), config)
    binary = compiler.compile_source(
        compiler.Text("generated.cu", codegen.text(kernel_steps, np.ones(64, np.float32))), {}, arch
    )
    assert binary.registers <= 128 and binary.spill_bytes == binary.stack_bytes == 0
    if arranged:
        binary = compiler.compile_source("generated_arrange.cu", arrange_defines(kernel_steps, 128), arch)
        assert binary.registers <= 64 and binary.spill_bytes == binary.stack_bytes == 0


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("split", [1, 2])
@pytest.mark.parametrize("activation", ["prelu", "silu", "gelu"])
def test_activations_assemble_without_spills(activation: str, split: int, precision: str, arch: str) -> None:
    if split > 1 and arch < "sm_90":
        pytest.skip("clusters need compute capability 9.0")
    weight = torch.randn(64, 16, 3, 3) * (torch.rand(64, 16, 3, 3) < 0.1)
    epilogue = Epilogue(bias=True, residual=True, activation=activation)  # type: ignore[arg-type]
    problem = Problem(2, 16, 14, 16, 64, (3, 3), padding=(1, 1, 1, 1), precision=precision, epilogue=epilogue)  # type: ignore[arg-type]
    config = GeneratedConfig(32, 12, 4, 4, copy=4, arranged=True, split=split)
    kernel_steps = KernelSteps.of(problem, SparseFilter.from_dense(weight), config)
    slopes = np.linspace(0.0, 0.63, 64).astype(np.float32) if activation == "prelu" else None
    text = codegen.text(kernel_steps, np.ones(64, np.float32), slopes)
    assert f"#define ACTIVATION {'leaky_relu' if activation == 'prelu' else activation}\n" in text
    assert ("0f3F2147AE" in text) is (split == 1 and activation == "prelu"), "the last slope is part of the code"
    binary = compiler.compile_source(compiler.Text("generated.cu", text), {}, arch)
    assert binary.registers <= 128 and binary.spill_bytes == binary.stack_bytes == 0


@pytest.mark.parametrize("stride", [(1, 1), (2, 2)])
def test_the_code_reads_where_its_stage_lies(stride: tuple[int, int]) -> None:
    problem = Problem(1, 12, 9, 9, 8, (3, 3), stride, padding=(1, 1, 1, 1))
    sparse_filter = SparseFilter.from_dense(torch.ones(problem.weight_shape))
    kernel_steps = KernelSteps.of(problem, sparse_filter, GeneratedConfig(8, 1, 1, 2, copy=0, arranged=True))
    text = codegen.text(kernel_steps)
    (stage_bytes,) = (int(size) for size in re.findall(r"#define STAGE_BYTES (\d+)", text))
    reads = iter(int(at) for at in re.findall(r"ld\.shared\.f32 x\d+, \[%1\+(\d+)\]", text))
    for i, chunk in enumerate(kernel_steps.parts[0].slices[0]):
        for step in chunk.steps:
            if isinstance(step, Load):
                assert step.offset * 4 < stage_bytes
                assert next(reads) == i % kernel_steps.config.stages * stage_bytes + step.offset * 4
    assert kernel_steps.shared_bytes == kernel_steps.config.stages * (stage_bytes + 16) and not list(reads)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_prefetch_warps_jump_where_no_word_is_held(precision: str) -> None:
    problem = Problem(1, 24, 8, 8, 8, (3, 3), padding=(1, 1, 1, 1), precision=precision)  # type: ignore[arg-type]
    sparse_filter = SparseFilter.from_dense(torch.ones(problem.weight_shape))
    for prefetch_warps in (0, 1, 3):
        kernel_steps = KernelSteps.of(
            problem, sparse_filter, GeneratedConfig(8, 1, 1, 4, prefetch_warps=prefetch_warps)
        )
        code = re.findall(r'^        "(.*)\\n"', codegen.text(kernel_steps), flags=re.MULTILINE)
        loaded: set[str] = set()
        jumps: dict[str, str] = {}
        for line in code:
            if jump := re.match(r"(LOOK\w+): @prefetch bra.uni (\w+);", line):
                jumps[jump[1]] = jump[2]
                loaded = set()
            elif load := re.match(r"(?:ld\.shared\.\w+|prmt\.b32) (x\d+),(.*)", line):
                assert set(re.findall(r"\bx\d+", load[2])) <= loaded
                loaded.add(load[1])
            elif line.startswith(("fma", "mov.b32 t,")):
                assert set(re.findall(r"\bx\d+", line)) <= loaded, line
        # Prefetch warps see all places of a chunk and then its end, which leaves the stage.
        ends = {to for to in jumps.values() if to not in jumps}
        chunks = len(kernel_steps.parts[0].slices[0])
        assert ends == ({f"SEEN{i}" for i in range(chunks)} if prefetch_warps else set())
        assert not prefetch_warps or len(jumps) > 2 * chunks


@pytest.mark.parametrize(
    ("sums", "residual", "bias", "short"),
    [
        (1, False, None, True),
        (1, False, 0.5, True),
        (1, False, 0.1, False),
        (1, True, 0.5, False),
        (2, False, 0.5, False),
    ],
)
def test_16_bit_sums_end_as_they_are_where_that_is_exact(
    sums: int, residual: bool, bias: float | None, short: bool
) -> None:
    epilogue = Epilogue(bias is not None, residual, "relu")
    problem = Problem(1, 3, 8, 8, 8, (3, 3), padding=(1, 1, 1, 1), precision="fp16", epilogue=epilogue)
    sparse_filter = SparseFilter.from_dense(torch.ones(problem.weight_shape))
    kernel_steps = KernelSteps.of(problem, sparse_filter, GeneratedConfig(8, 1, 1, 3, sums=sums))
    text = codegen.text(kernel_steps, None if bias is None else np.full(8, bias, dtype=np.float32))
    assert ("max.NaN.f16x2" in text) is short and ("cvt.f32.f16" in text) is not short


def test_a_word_is_read_once_for_all_channels() -> None:
    weight = torch.ones(8, 3, 3, 3)
    problem = Problem(1, 3, 8, 8, 8, (3, 3), padding=(1, 1, 1, 1))
    for precision, reads, joins in (("fp32", 27, 0), ("fp16", 27, 18)):
        kernel_steps = KernelSteps.of(
            replace(problem, precision=precision),  # type: ignore[arg-type]
            SparseFilter.from_dense(weight),
            GeneratedConfig(8, 1, 1, 3, stages=2),
        )
        (part,) = kernel_steps.parts
        steps = [step for chunk in part.slices[0] for step in chunk.steps]
        counts = [sum(isinstance(step, kind) for step in steps) for kind in (Load, Join, MultiplyAdd)]
        assert counts == [reads, joins, 8 * 27]


def test_sums_share_the_products_of_a_channel() -> None:
    problem = Problem(1, 3, 8, 8, 8, (3, 3), padding=(1, 1, 1, 1), precision="fp16")
    sparse_filter = SparseFilter.from_dense(torch.ones(problem.weight_shape))
    (part,) = KernelSteps.of(problem, sparse_filter, GeneratedConfig(8, 1, 1, 3, copy=0, arranged=True, sums=4)).parts
    places = [step.to for chunk in part.slices[0] for step in chunk.steps if isinstance(step, MultiplyAdd)]
    assert np.bincount(places).tolist() == [7] * 24 + [6] * 8


def test_parts_share_the_nonzeros_evenly() -> None:
    case = next(case for case in CASES if case.name == "uneven rows")
    sparse_filter, config = case.filter(), GeneratedConfig(4, 1, 1, 4)
    kernel_steps = KernelSteps.of(case.problem, sparse_filter, config)
    assert sorted(channel for part in kernel_steps.parts for channel in part.channels) == list(
        range(case.problem.out_channels)
    )
    nnz = np.diff(sparse_filter.indptr)
    loads = [int(nnz[list(part.channels)].sum()) for part in kernel_steps.parts]
    assert max(loads) - min(loads) <= nnz.max()


def test_rows_begin_with_whole_copies() -> None:
    problem = Problem(1, 3, 28, 28, 8, (3, 3), padding=(1, 1, 1, 1))
    for precision, copy, pitch, left in (
        ("fp32", 1, 29, 1),
        ("fp32", 4, 32, 4),
        ("fp16", 1, 15, 2),
        ("fp16", 2, 16, 4),
    ):
        words = Words.of(replace(problem, precision=precision), copy=copy)  # type: ignore[arg-type]
        assert (words.pitch, words.left) == (pitch, left)


def test_arranged_words_hold_two_samples_and_no_more_padding_than_needed() -> None:
    problem = Problem(5, 3, 13, 13, 8, (3, 3), padding=(1, 1, 1, 1), precision="fp16")
    words = Words.of(problem, copy=0, arranged=True)
    assert (words.samples, words.columns, words.pitch, words.sample_rows, words.left) == (2, 1, 14, 14, 1)
    assert words.count(5) == 3 * 14 * 14 - 14 - 1


def test_a_weight_beyond_half_precision_is_refused() -> None:
    problem = Problem(1, 1, 4, 4, 1, (1, 1), precision="fp16")
    sparse_filter = SparseFilter.from_dense(torch.full(problem.weight_shape, 1e5))
    with pytest.raises(ValueError, match="does not fit fp16; use fp32"):
        codegen.text(KernelSteps.of(problem, sparse_filter, GeneratedConfig(1, 1, 1, 1)))
