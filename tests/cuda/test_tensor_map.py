"""Tensor maps, by a driver that records its calls, and what copies by them bring on a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from escort.cuda.kernel import kernel
from escort.cuda.launch import TensorMap
from escort.cuda.tensor_map import im2col, tiled
from tests.cuda.kernels import THREADS, FakeDriver, Status, Tensor, fill_map

pytestmark = pytest.mark.usefixtures("empty_cache")


SIZES = (64, 13, 9, 5)


def tensor_of(dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.zeros(SIZES[::-1], dtype=dtype).as_subclass(Tensor)


def test_a_tensor_map_of_boxes(driver: FakeDriver) -> None:
    x = tensor_of()
    mapping = tiled(x, SIZES, (64, 15, 4, 1))
    assert mapping == fill_map(1)
    box, modes = ([64, 15, 4, 1], [1, 1, 1, 1]), (0, 3, 3, 0)  # plain, 128 bytes, 256 bytes, zeros
    assert driver.maps == [(6, x.data_ptr(), [*SIZES], [128, 13 * 128, 9 * 13 * 128], *box, *modes)]
    x = tensor_of(torch.bfloat16)
    tiled(x, SIZES, (32, 8, 8, 2), (256, 4096, 65536), swizzle=64, promotion=0)
    assert driver.maps[1:] == [(9, x.data_ptr(), [*SIZES], [256, 4096, 65536], [32, 8, 8, 2], [1, 1, 1, 1], 0, 2, 0, 0)]
    x = tensor_of(torch.float32)
    tiled(x, SIZES, (32, 8, 1, 1))
    assert driver.maps[2][:4] == (11, x.data_ptr(), [*SIZES], [256, 13 * 256, 9 * 13 * 256]), "TF32"


def test_a_tensor_map_of_taps(driver: FakeDriver) -> None:
    x = tensor_of()
    assert im2col(x, SIZES, (-1, -2), (-3, 4), 64, 1024, stride=2) == fill_map(1)
    im2col(x, SIZES, (0, 0), (0, 0), 64, 8, (1, 3), swizzle=0, promotion=128)
    head = (6, x.data_ptr(), [*SIZES], [128, 13 * 128, 9 * 13 * 128])
    assert driver.maps == [
        (*head, [-1, -2], [-3, 4], 64, 1024, [1, 2, 2, 1], 0, 3, 3, 0),
        (*head, [0, 0], [0, 0], 64, 8, [1, 1, 3, 1], 0, 0, 2, 0),
    ]


def test_a_tensor_map_is_made_once(driver: FakeDriver) -> None:
    x, y = tensor_of(), tensor_of()
    first = tiled(x, SIZES, (64, 8, 1, 1))
    driver.contexts.clear()  # a thread of its own has none
    driver.contexts.append("primary 1")
    assert tiled(x, SIZES, (64, 8, 1, 1)) is first
    assert tiled(y, SIZES, (64, 8, 1, 1)) == fill_map(2)
    assert tiled(x, (*SIZES[:3], 4), (64, 8, 1, 1)) == fill_map(3)
    assert len(driver.maps) == 3 and driver.contexts == ["primary 1"]


def test_a_refused_tensor_map_says_what_was_asked_for(driver: FakeDriver) -> None:
    x = tensor_of()
    driver.failing["cuTensorMapEncodeTiled"] = Status.CUDA_ERROR_INVALID_VALUE
    with pytest.raises(ValueError) as caught:
        tiled(x, SIZES, (64, 8, 512, 1))
    for part in (
        "float16",
        "sizes (64, 13, 9, 5)",
        "box (64, 8, 512, 1)",
        "INVALID_VALUE, some words; ",
        "at most 256",
    ):
        assert part in str(caught.value)
    driver.failing["cuTensorMapEncodeIm2col"] = Status.CUDA_ERROR_NOT_FOUND
    with pytest.raises(RuntimeError, match=r"lower \(-1, -1\), upper \(-1, -1\), channels 64.*CUDA_ERROR_NOT_FOUND"):
        im2col(x, SIZES, (-1, -1), (-1, -1), 64, 8)
    driver.failing.clear()
    assert tiled(x, SIZES, (64, 8, 512, 1)).opaque  # no failure is remembered


def test_what_no_tensor_map_is_made_of(driver: FakeDriver) -> None:
    with pytest.raises(ValueError, match="torch.float16, torch.bfloat16, torch.float32, not torch.float64"):
        tiled(tensor_of(torch.float64), SIZES, (64, 8, 1, 1))
    with pytest.raises(ValueError, match="a tensor on a GPU; move it there"):
        tiled(torch.zeros(64, dtype=torch.float16), SIZES, (64, 8, 1, 1))
    with pytest.raises(ValueError, match="swizzle 48 .*, promotion 256 .*: choose one of these"):
        tiled(tensor_of(), SIZES, (64, 8, 1, 1), swizzle=48)
    assert not driver.maps


def needs_hopper() -> None:
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs compute capability 9.0")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bound", [False, True])
def test_a_box_is_copied_with_zeros_around_the_tensor(copy: Path, dtype: torch.dtype, bound: bool) -> None:
    needs_hopper()
    compiled = kernel(copy, {"PIXELS": 8 * 4 * 2, "TAP": 0}, torch.device("cuda"), native=True)
    x = torch.randn(2, 5, 7, 128, device="cuda", dtype=dtype)
    mapping = tiled(x, (128, 7, 5, 2), (64, 8, 4, 2))
    kinds = (torch.Tensor, int, int, int, int, 0, 0)
    launch = compiled.bind(THREADS, 0, (mapping if bound else TensorMap, *kinds))
    around = torch.nn.functional.pad(x, (0, 0, 1, 9, 2, 9, 0, 2))
    for c, w, h, n in ((0, -1, -2, 0), (64, 3, 2, 1), (64, 0, 0, 0)):
        y = torch.full((2, 4, 8, 64), 9.0, device="cuda", dtype=dtype)
        launch((1, 1, 1), *([] if bound else [mapping]), y, c, w, h, n)
        assert torch.equal(y, around[n : n + 2, h + 2 : h + 6, w + 1 : w + 9, c : c + 64])


@pytest.mark.gpu
@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_a_tap_is_copied_with_its_padding(copy: Path, stride: int, dilation: int) -> None:
    """3x3 with padding 1: every tap of the first 40 outputs; with a stride of 2 they reach the second sample."""
    needs_hopper()
    compiled = kernel(copy, {"PIXELS": 40, "TAP": 1}, torch.device("cuda"), native=True)
    x = torch.randn(3, 9, 13, 64, device="cuda", dtype=torch.float16)
    upper = 1 - dilation * 2
    mapping = im2col(x, (64, 13, 9, 3), (-1, -1), (upper, upper), 64, 40, stride)
    launch = compiled.bind(THREADS, 0, (mapping, torch.Tensor, 0, -1, -1, 0, int, int))
    around = torch.nn.functional.pad(x, (0, 0, 1, 1, 1, 1))
    out_h, out_w = ((size + upper) // stride + 1 for size in (9, 13))
    for r in range(3):
        for s in range(3):
            y = torch.full((40, 64), 9.0, device="cuda", dtype=torch.float16)
            launch((1, 1, 1), y, s * dilation, r * dilation)
            tap = around[:, r * dilation :: stride, s * dilation :: stride][:, :out_h, :out_w]
            assert torch.equal(y, tap.reshape(-1, 64)[:40])


@pytest.mark.gpu
def test_the_driver_refuses_a_box_that_is_too_large() -> None:
    needs_hopper()
    x = torch.zeros(2, 5, 7, 128, device="cuda", dtype=torch.float16)
    with pytest.raises(ValueError, match=r"box \(128, 8, 4, 2\).*INVALID_VALUE"):
        tiled(x, (128, 7, 5, 2), (128, 8, 4, 2))
