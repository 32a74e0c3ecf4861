"""TF32: all that tensor cores multiply was rounded to the nearest, and nothing else was.

They cut floats off, always towards zero; a network of 50 layers that leaves it to them loses 2 % of its outputs. One
weight of 1 in each output channel shows what a kernel makes of its inputs, bit by bit.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from escort.filter import SparseFilter
from escort.methods import by_name
from escort.methods.cuda.depthwise_tc import DepthwiseTcConfig
from escort.methods.cuda.stem import StemConfig
from escort.problem import Epilogue, MemoryFormat, Problem
from tests.cases import Case
from tests.test_depthwise_tc import computed
from tests.test_stem import run_on_cpu

SAME = (1, 1, 1, 1)
TF32 = Problem(2, 64, 9, 14, 72, (3, 3), padding=SAME, precision="tf32", device="cuda:0")
DEPTHWISE = replace(TF32, in_channels=40, out_channels=40, groups=40, memory_format="channels_last")
STEM = replace(TF32, in_channels=3, out_channels=32)


def ones(problem: Problem) -> torch.Tensor:
    """One in each output channel, at different taps and input channels."""
    weight = torch.zeros(problem.weight_shape)
    taps = weight.flatten(1)
    channel = torch.arange(len(taps))
    taps[channel, channel * 7 % taps.shape[1]] = 1.0
    return weight


def rounded(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """To the nearest number of TF32, a tie to the even one, and a tie away from zero."""
    bits = x.view(torch.int32)
    even, away = bits + 0xFFF + (bits >> 13 & 1) & ~0x1FFF, bits + 0x1000 & ~0x1FFF
    return even.view(torch.float32), away.view(torch.float32)


def inputs(problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    """x, with ties, and a residual."""
    generator = torch.Generator().manual_seed(0)
    x, residual = (torch.randn(shape, generator=generator) for shape in (problem.input_shape, problem.output_shape))
    x.flatten()[::7] = (x.flatten()[::7].view(torch.int32) & ~0x1FFF | 0x1000).view(torch.float32)
    return x, residual


def check(problem: Problem, x: torch.Tensor, y: torch.Tensor, residual: torch.Tensor | None) -> None:
    """Whether y is x rounded, with the residual as it is."""
    possible = []
    for of_x in rounded(x.cpu()):
        expected = F.conv2d(of_x.double(), ones(problem).double(), padding=1, groups=problem.groups).float()
        possible.append(expected if residual is None else expected + residual.cpu())
    y = y.cpu()
    assert ((y == possible[0]) | (y == possible[1])).all()
    assert bool((y.contiguous().view(torch.int32) & 0x1FFF).any()) == (residual is not None), "bits of the residual"


def test_a_cut_is_noticed() -> None:
    x, _ = inputs(TF32)
    cut = (x.view(torch.int32) & ~0x1FFF).view(torch.float32)
    y = F.conv2d(cut.double(), ones(TF32).double(), padding=1).float()
    with pytest.raises(AssertionError):
        check(TF32, x, y, None)


def test_the_depthwise_kernel_rounds(tmp_path: Path) -> None:
    x, _ = inputs(DEPTHWISE)
    case = Case("ones", DEPTHWISE, 0.9)
    y, _ = computed(case, (x, ones(DEPTHWISE), None, None), DepthwiseTcConfig(1, 9, 2, 1), tmp_path)
    check(DEPTHWISE, x, y, None)


def test_the_stem_rounds(tmp_path: Path) -> None:
    x, _ = inputs(STEM)
    y = run_on_cpu(STEM, StemConfig(2, 2), x, ones(STEM), folder=tmp_path)
    check(STEM, x, y, None)


@pytest.mark.gpu
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(
    ("method", "problem", "memory_format"),
    [
        ("sparse_tc", TF32, "contiguous"),
        ("sparse_tc", TF32, "channels_last"),
        ("depthwise_tc", DEPTHWISE, "channels_last"),
        ("stem", STEM, "contiguous"),
        ("stem", STEM, "channels_last"),
    ],
)
def test_inputs_are_rounded_and_residuals_are_not_on_the_gpu(
    method: str, problem: Problem, memory_format: MemoryFormat, residual: bool
) -> None:
    problem = replace(problem, memory_format=memory_format, epilogue=Epilogue(residual=residual))
    sparse_filter, runs = SparseFilter.from_dense(ones(problem), problem.groups), by_name(method, "cuda:0")
    assert runs.unsupported(problem) is None
    x, added = (each.cuda().contiguous(memory_format=problem.torch_memory_format) for each in inputs(problem))
    configs = runs.configs(problem, sparse_filter)
    for config in configs[:: math.ceil(len(configs) / 4)]:
        y = runs.prepare(problem, sparse_filter, None, config)(x, added if residual else None)
        check(problem, x, y, added if residual else None)
