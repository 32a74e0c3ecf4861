"""The kernel for linear layers of few samples: its source compiled for the CPU, and on a GPU."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor, nn

from escort.cuda.compiler import KERNELS
from escort.cuda.gpu import H200
from escort.layers import FusedLinear
from escort.layers.planes.base import Planes
from escort.layers.planes.linear import ACTIVATIONS, Params
from escort.layers.pool import POOLED_ON_GPU
from escort.problem import Activation
from escort.reference import compare
from tests.host import struct_fields
from tests.test_planes import BOUNDS, emulated

every_type = pytest.mark.parametrize("dtype", POOLED_ON_GPU, ids=str)


def layer(
    columns: int, rows: int, name: Activation, dtype: torch.dtype, *, flattens: bool = False, device: str = "cpu"
) -> FusedLinear:
    torch.manual_seed(columns)
    linear = nn.Linear(columns, rows, device=device).to(dtype).requires_grad_(False)
    return FusedLinear.of(linear, name, flattens=flattens)


def expected(of: FusedLinear, x: Tensor) -> Tensor:
    wide = nn.Linear(of.in_features, of.out_features).requires_grad_(False)
    wide.weight, wide.bias = nn.Parameter(of.weight.double()), nn.Parameter(of.bias.double())
    with torch.no_grad():
        return FusedLinear.of(wide, of.activation, flattens=True)(x.double())


def test_the_struct_is_the_dataclass() -> None:
    in_c = struct_fields((KERNELS / "linear.cu").read_text(), "Params")
    assert in_c == [(field.type, field.name) for field in fields(Params)]


#: As large, with few multiprocessors, so that few blocks have all that there is.
SMALL = replace(H200, multiprocessors=3)
#: Columns, rows and activation: warps that share a row, the last block with rows that are none; a row of a warp.
SHAPES: list[tuple[tuple[int, ...], int, Activation, torch.dtype]] = [
    ((2, 40, 5, 3), 14, "silu", torch.float16),
    ((1, 132, 4, 4), 65, "relu", torch.float32),
    ((4, 7), 50, "relu6", torch.bfloat16),  # one element at a time
]


@pytest.mark.parametrize(("shape", "rows", "name", "dtype"), SHAPES, ids=str)
def test_the_source_computes_what_torch_does(
    shape: tuple[int, ...],
    rows: int,
    name: Activation,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    monkeypatch.setattr("escort.cuda.gpu.Gpu.of", lambda device: SMALL)
    x = torch.randn(*shape, *(1,) * (4 - len(shape))).to(dtype)
    of = layer(x[0].numel(), rows, name, dtype, flattens=True)
    for each in (x, x.to(memory_format=torch.channels_last)):
        y = emulated(of, [each], tmp_path_factory.getbasetemp())
        assert y is not None and compare(y, expected(of, x)) <= BOUNDS[dtype]


def test_what_torch_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("escort.cuda.gpu.Gpu.of", lambda device: H200)
    half = layer(64, 8, "none", torch.float16)
    for x in (
        torch.ones(5, 64, 1, 1),  # so many samples are multiplied faster by tensor cores
        torch.ones(1, 32, 1, 1),
        torch.ones(1, 4, 4, 4).to(memory_format=torch.channels_last),  # vectors of eight
    ):
        assert half.work(half.settings(), Planes.of(x.half())) is None
    large = layer(100_000, 1, "none", torch.float32)
    assert large.work(large.settings(), Planes.of(torch.ones(1, 100_000, 1, 1))) is None
    with pytest.raises(ValueError, match="has an activation of"):
        FusedLinear(4, 4, "gelu")


@every_type
def test_other_shapes_and_gradients_are_those_of_torch(dtype: torch.dtype) -> None:
    of = layer(12, 5, "relu", dtype)
    for shape in ((12,), (2, 12), (2, 3, 12), (2, 3, 4, 12)):
        x = torch.randn(shape).to(dtype)
        assert torch.equal(of(x), nn.functional.linear(x, of.weight, of.bias).relu())
    of.requires_grad_(True)
    of(torch.ones(2, 12, dtype=dtype)).sum().backward()
    assert of.weight.grad is not None


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("shape", "rows"),
    [
        *(((512, 7, 7), 4096), ((4096,), 4096), ((4096,), 1000), ((2048,), 1000), ((256, 6, 6), 4096)),
        *(((520, 3, 3), 77), ((7,), 9), ((40, 5, 3), 150)),
    ],
    ids=str,
)
@every_type
def test_every_shape_on_the_gpu(shape: tuple[int, ...], rows: int, dtype: torch.dtype) -> None:
    columns = torch.Size(shape).numel()
    for name in ("none", "relu"):
        of = layer(columns, rows, name, dtype, flattens=len(shape) > 1, device="cuda")
        for samples in (1, 2, 3, 4, 8, 9, 0):
            x = torch.randn(samples, *shape, device="cuda").to(dtype)
            lying = (
                (x.mT.contiguous().mT, x.to(memory_format=torch.channels_last))
                if len(shape) > 1
                else (x.t().contiguous().t(),)
            )
            for each in (x, *lying):
                y = of(each)
                if samples in (1, 2):
                    assert of.binaries(each), "torch computed it"
                assert y.shape == (samples, rows) and y.is_contiguous()
                assert compare(y, expected(of, each.reshape(samples, columns))) <= BOUNDS[dtype] if samples else True


@pytest.mark.gpu
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation_on_the_gpu(name: Activation) -> None:
    for dtype in (torch.float32, torch.float16):
        of = layer(64, 24, name, dtype, device="cuda")
        x = torch.randn(2, 64, device="cuda").to(dtype)
        assert of.binaries(x) and compare(of(x), expected(of, x)) <= BOUNDS[dtype]
