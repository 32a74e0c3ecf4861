"""Structs of kernel parameters: dataclasses as bytes, and bytes as an argument of a launch."""

from __future__ import annotations

import ctypes
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from escort.cuda.kernel import Kernel, kernel
from escort.cuda.params import pack
from tests.cuda.kernels import FakeDriver, tensor

#: y = divisor.magic * factor + first + last, of the struct that is Params here.
STRUCT = """
struct Divisor { unsigned magic, shift; };
struct Params { int first; Divisor by; float factor; int flag, last; };

extern "C" __global__ void fill(float* y, const __grid_constant__ Params p, int count) {
  if (threadIdx.x < count) y[threadIdx.x] = p.flag && p.by.magic == 0xffffffffu ? p.factor + p.first + p.last : -1.0f;
}
"""


@dataclass(frozen=True)
class Divisor:
    magic: Any
    shift: int = 7


@dataclass(frozen=True)
class Params:
    first: int
    by: Divisor
    factor: float
    flag: bool
    last: int


@pytest.fixture
def compiled(driver: FakeDriver, scale: Path) -> Kernel:
    """A kernel with the parameters (pointer, struct, int)."""
    driver.parameters = [ctypes.c_void_p, ctypes.c_char * 24, ctypes.c_int]
    return kernel(scale, {"FACTOR": 2}, torch.device("cuda:0"))


PARAMS = Params(-3, Divisor(2**32 - 1), 0.5, True, 9)


pytestmark = pytest.mark.usefixtures("empty_cache")


def test_a_dataclass_is_packed_as_c_lays_it_out() -> None:
    assert pack(PARAMS) == struct.pack("iIIfii", -3, 2**32 - 1, 7, 0.5, 1, 9)


@pytest.mark.parametrize("value", [np.int32(1), np.float32(1), "1", None, torch.tensor(1)])
def test_other_types_are_refused(value: Any) -> None:
    with pytest.raises(TypeError, match="Divisor.magic is .*int, bool, float and dataclasses"):
        pack(Divisor(value))


@pytest.mark.parametrize("value", [2**32, -(2**31) - 1])
def test_what_does_not_fit_is_refused(value: int) -> None:
    with pytest.raises(ValueError, match=f"Divisor.magic is {value}, which does not fit 32 bits"):
        pack(Divisor(value))


def test_a_struct_is_passed_as_it_is(compiled: Kernel, driver: FakeDriver) -> None:
    y, packed = tensor(), bytes(range(1, 25))
    launch = compiled.bind(128, 0, (torch.Tensor, packed, int))
    for count in (4, 5):
        launch((1, 1, 1), y, count)
        assert driver.launches[-1].values == [y.data_ptr(), packed, count]


@pytest.mark.parametrize("packed", [bytes(20), bytes(28), b""])
def test_a_struct_of_another_size_is_refused(compiled: Kernel, packed: bytes) -> None:
    with pytest.raises(TypeError, match=rf"parameters of \[8, 24, 4\] bytes, got \(Tensor, {len(packed)} bytes, int\)"):
        compiled.bind(128, 0, (torch.Tensor, packed, int))


def test_a_struct_is_the_same_in_all_launches(compiled: Kernel) -> None:
    with pytest.raises(TypeError, match="where it is bound, bytes, not bytes"):
        compiled.bind(128, 0, (torch.Tensor, bytes, int))


@pytest.mark.gpu
def test_a_kernel_reads_the_struct(tmp_path: Path) -> None:
    (tmp_path / "fill.cu").write_text(STRUCT)
    y = torch.zeros(5, device="cuda")
    launch = kernel(tmp_path / "fill.cu", {}, torch.device("cuda")).bind(32, 0, (torch.Tensor, pack(PARAMS), int))
    launch((1, 1, 1), y, 4)
    assert y.tolist() == [6.5] * 4 + [0.0]
