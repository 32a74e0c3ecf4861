"""The kernel for a network's first convolution: its source compiled for the CPU, and on a GPU."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import get_args

import pytest
import torch

from escort import reference
from escort.cuda.compiler import KERNELS
from escort.cuda.gpu import H200
from escort.cuda.params import pack
from escort.filter import SparseFilter
from escort.methods import activation, by_name
from escort.methods.cuda.stem import StemConfig, in_steps
from escort.methods.cuda.stem.layout import Layout
from escort.methods.cuda.stem.params import Params
from escort.problem import TORCH_DTYPE, TORCH_MEMORY_FORMAT, Activation, Epilogue, MemoryFormat, Precision, Problem
from tests.cases import FULL, Case
from tests.emulated import launch
from tests.host import struct_fields

METHOD = by_name("stem", "cuda:0")
FORMATS: tuple[MemoryFormat, ...] = get_args(MemoryFormat)
PRECISIONS: tuple[Precision, ...] = ("tf32", "fp16", "bf16")

#: Windows of an odd and an even number of elements, with pixels of whole words and of others.
STEMS = tuple(
    Case(name, problem, density)
    for name, problem, density in (
        ("7x7, stride 2", Problem(1, 3, 25, 37, 64, (7, 7), (2, 2), (3, 3, 3, 3), epilogue=Epilogue(True)), 1.0),
        ("3x3 of 3 channels", Problem(2, 3, 7, 19, 32, (3, 3), padding=(1, 1, 1, 1), epilogue=FULL), 0.6),
        ("padded as TensorFlow does", Problem(2, 3, 10, 20, 16, (3, 3), (2, 2), (0, 1, 0, 1), epilogue=FULL), 1.0),
        ("11x11, stride 4", Problem(1, 3, 31, 39, 96, (11, 11), (4, 4), epilogue=Epilogue(True, False, "relu6")), 1.0),
        ("5x5 of one channel", Problem(3, 1, 9, 18, 8, (5, 5), padding=(2, 2, 2, 2), epilogue=Epilogue(True)), 0.5),
        ("one channel, stride 2", Problem(1, 1, 12, 9, 24, (3, 3), (2, 2), (1, 1, 1, 1)), 1.0),
        ("2 channels, dilation", Problem(1, 2, 14, 15, 24, (3, 3), padding=(2, 2, 3, 3), dilation=(2, 3)), 1.0),
        ("dilation and stride", Problem(1, 3, 17, 20, 40, (3, 2), (2, 3), (2, 2, 3, 3), (3, 2), epilogue=FULL), 1.0),
        ("one pixel of 4 channels", Problem(2, 4, 5, 9, 80, (1, 1)), 1.0),
        ("patches", Problem(1, 3, 16, 24, 48, (4, 4), (4, 4), epilogue=Epilogue(True)), 1.0),
        ("padding beyond the kernel", Problem(1, 3, 4, 5, 8, (3, 3), padding=(5, 4, 6, 7)), 1.0),
        ("stride beyond the kernel", Problem(1, 3, 17, 17, 8, (2, 2), (5, 4)), 1.0),
        ("silu", Problem(1, 3, 9, 9, 16, (3, 3), (2, 2), (1, 1, 1, 1), epilogue=Epilogue(True, False, "silu")), 1.0),
        ("prelu", Problem(1, 3, 6, 9, 16, (3, 3), epilogue=Epilogue(True, True, "prelu")), 1.0),
        ("no weights at all", Problem(2, 3, 8, 8, 8, (3, 3), epilogue=FULL), 0.0),
    )
)
every_stem = pytest.mark.parametrize("case", STEMS, ids=lambda case: case.name)


@pytest.fixture(autouse=True)
def a_gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The numbers of an H200, where there is none."""
    if request.node.get_closest_marker("gpu") is None:
        monkeypatch.setattr("escort.methods.cuda.stem.unavailable", lambda device: None)
        monkeypatch.setattr("escort.cuda.gpu.Gpu.of", lambda device: H200)


def on_gpu(case: Case, memory_format: MemoryFormat, precision: Precision) -> Problem:
    return replace(case.problem, device="cuda:0", memory_format=memory_format, precision=precision)


def run_on_cpu(
    problem: Problem,
    config: StemConfig,
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    slope: torch.Tensor | None = None,
    folder: Path,
) -> torch.Tensor:
    """What the kernel's source makes of x, as `prepare` launches it."""
    layout = Layout.of(problem, config)
    (variant,), params = METHOD.kernels(problem, config), Params.of(layout, config)
    shape, dtype = (len(x), *problem.output_shape[1:]), problem.storage
    y = torch.full(shape, torch.nan, dtype=dtype).contiguous(memory_format=problem.torch_memory_format)
    tables = layout.arrange(weight), torch.from_numpy(layout.table.view("int32"))
    per_channel = activation.per_channel(replace(problem, device="cpu", memory_format="contiguous"), bias, slope)
    in_x = in_steps(problem)[not x.is_contiguous()]
    args = x, y, residual, *tables, per_channel, None, pack(params), *in_x
    launch(variant, (len(x) * params.blocks, 1, 1), 128, args, folder)
    return y


def test_the_struct_is_the_dataclass() -> None:
    in_c = struct_fields((KERNELS / "stem.cu").read_text(), "Params")
    assert in_c == [(field.type, field.name) for field in fields(Params)]


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("precision", PRECISIONS)
@every_stem
def test_the_source_computes_every_stem(
    case: Case, precision: Precision, memory_format: MemoryFormat, tmp_path_factory: pytest.TempPathFactory
) -> None:
    problem, dtype = on_gpu(case, memory_format, precision), TORCH_DTYPE[precision]
    x, weight, bias, residual = case.tensors()
    x, weight = x.to(dtype), weight.to(dtype)
    residual = None if residual is None else residual.to(dtype).contiguous(memory_format=problem.torch_memory_format)
    expected = reference.conv2d(problem, x, weight, bias, residual, case.slope())
    assert METHOD.unsupported(problem) is None
    configs = METHOD.configs(problem, case.filter())
    rest = {"bias": bias, "residual": residual, "slope": case.slope(), "folder": tmp_path_factory.getbasetemp()}
    for config, its_format in zip((configs[0], configs[-1]), TORCH_MEMORY_FORMAT.values(), strict=True):
        y = run_on_cpu(problem, config, x.contiguous(memory_format=its_format), weight.float(), **rest)
        assert reference.compare(y, expected) <= reference.ERROR_BOUND[precision], config
