"""Tensor maps, by a driver that records its calls, and what copies by them bring on a GPU."""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from escort.cuda.kernel import Kernel, kernel
from escort.cuda.tensor_map import TensorMap, im2col, tiled
from tests.cuda.kernels import THREADS, FakeDriver, Status, tensor

pytestmark = pytest.mark.usefixtures("empty_cache")


SAMPLE, SAMPLES = (64, 13, 9, 1), 5
SIZES = [64, 13, 9, SAMPLES]


def tensor_of(dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return tensor(*SIZES[::-1], dtype=dtype)


@pytest.fixture
def mapped(driver: FakeDriver, scale: Path) -> Kernel:
    """A kernel that takes a map."""
    driver.parameters = [ctypes.c_char * 128]
    return kernel(scale, {"FACTOR": 2}, torch.device("cuda:0"))


def launch(mapped: Kernel, mapping: TensorMap, x: torch.Tensor) -> None:
    mapped.bind(THREADS, 0, [mapping])((1, 1, 1), x)


def test_a_tensor_map_of_boxes(mapped: Kernel, driver: FakeDriver) -> None:
    x = tensor_of()
    launch(mapped, tiled(torch.float16, SAMPLE, (64, 15, 4, 1)), x)
    box, modes = ([64, 15, 4, 1], [1, 1, 1, 1]), (0, 3, 3, 0)  # plain, 128 bytes, 256 bytes, zeros
    assert driver.maps == [(6, x.data_ptr(), SIZES, [128, 13 * 128, 9 * 13 * 128], *box, *modes)]
    assert driver.launches[0].values == [b"\1" * 128]
    x = tensor_of(torch.bfloat16)
    launch(mapped, tiled(torch.bfloat16, SAMPLE, (32, 8, 8, 2), swizzle=64, promotion=0), x)
    assert driver.maps[1][:2] == (9, x.data_ptr()) and driver.maps[1][4:] == ([32, 8, 8, 2], [1, 1, 1, 1], 0, 2, 0, 0)
    x = tensor_of(torch.float32)
    launch(mapped, tiled(torch.float32, SAMPLE, (32, 8, 1, 1)), x)
    assert driver.maps[2][:4] == (11, x.data_ptr(), SIZES, [256, 13 * 256, 9 * 13 * 256]), "TF32"
    launch(mapped, tiled(torch.float32, SAMPLE, (32, 8, 1, 1), rounded=False), x)
    launch(mapped, tiled(torch.float16, SAMPLE, (64, 8, 1, 1), rounded=False), tensor_of())
    assert [made[0] for made in driver.maps[3:]] == [7, 6], "what is written must stay what it is"


def test_pixels_of_all_samples_in_a_row(mapped: Kernel, driver: FakeDriver) -> None:
    launch(mapped, tiled(torch.float16, (64, 9 * 13, 1, 1), (64, 128, 1, 1), 1), tensor_of())
    pixels = SAMPLES * 9 * 13
    assert driver.maps[0][2:4] == ([64, pixels, 1, 1], [128, pixels * 128, pixels * 128])


def test_a_tensor_map_of_some_channels(mapped: Kernel, driver: FakeDriver) -> None:
    x, sizes = tensor_of(), (16, *SAMPLE[1:])
    launch(mapped, replace(tiled(torch.float16, sizes, (16, 8, 1, 1)), pitch=64, begin=32), x)
    launch(mapped, replace(tiled(torch.float16, (16, 9 * 13, 1, 1), (16, 128, 1, 1), 1), pitch=64), x)
    pixels = SAMPLES * 9 * 13
    assert [made[1:4] for made in driver.maps] == [
        (x.data_ptr() + 64, [16, *SIZES[1:]], [128, 13 * 128, 9 * 13 * 128]),
        (x.data_ptr(), [16, pixels, 1, 1], [128, pixels * 128, pixels * 128]),
    ]
    with pytest.raises(ValueError, match="of 64 channels those from 56 to 72 are not there"):
        replace(tiled(torch.float16, sizes, (16, 8, 1, 1)), pitch=64, begin=56)


def test_a_tensor_map_of_taps(mapped: Kernel, driver: FakeDriver) -> None:
    x = tensor_of()
    launch(mapped, im2col(torch.float16, SAMPLE, (-1, -2), (-3, 4), 64, 1024, stride=2), x)
    launch(mapped, im2col(torch.float16, SAMPLE, (0, 0), (0, 0), 64, 8, (1, 3), swizzle=0, promotion=128), x)
    head = (6, x.data_ptr(), SIZES, [128, 13 * 128, 9 * 13 * 128])
    assert driver.maps == [
        (*head, [-1, -2], [-3, 4], 64, 1024, [1, 2, 2, 1], 0, 3, 3, 0),
        (*head, [0, 0], [0, 0], 64, 8, [1, 1, 3, 1], 0, 0, 2, 0),
    ]


@pytest.mark.parametrize("context", [None, "primary 1"])
def test_a_tensor_map_is_made_in_the_context_of_its_device(
    mapped: Kernel, driver: FakeDriver, monkeypatch: pytest.MonkeyPatch, context: str | None
) -> None:
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 0 if context is None else 1)
    launch = mapped.bind(THREADS, 0, [tiled(torch.float16, SAMPLE, (64, 8, 1, 1))])
    driver.contexts[:] = [] if context is None else [context]
    launch((1, 1, 1), tensor_of())
    assert len(driver.maps) == len(driver.launches) == 1 and driver.contexts == ([context] if context else [])
    assert driver.map_contexts == ["primary 0"]


def test_a_refused_tensor_map_says_what_was_asked_for(mapped: Kernel, driver: FakeDriver) -> None:
    x, large = tensor_of(), tiled(torch.float16, SAMPLE, (64, 8, 512, 1))
    driver.failing["cuTensorMapEncodeTiled"] = Status.CUDA_ERROR_INVALID_VALUE
    with pytest.raises(ValueError) as caught:
        launch(mapped, large, x)
    for part in (
        "kernel scale of scale.cu on cuda:0: a tensor map of torch.float16 (5, 9, 13, 64) at 0x",
        "of samples of (64, 13, 9, 1)",
        "box (64, 8, 512, 1)",
        "INVALID_VALUE, some words; ",
        "at most 256",
    ):
        assert part in str(caught.value)
    driver.failing["cuTensorMapEncodeIm2col"] = Status.CUDA_ERROR_NOT_FOUND
    with pytest.raises(RuntimeError, match=r"lower \(-1, -1\), upper \(-1, -1\), channels 64.*CUDA_ERROR_NOT_FOUND"):
        launch(mapped, im2col(torch.float16, SAMPLE, (-1, -1), (-1, -1), 64, 8), x)
    assert not driver.launches
    driver.failing.clear()
    launch(mapped, large, x)


def test_what_no_tensor_map_is_made_of() -> None:
    with pytest.raises(ValueError, match="torch.float16, torch.bfloat16, torch.float32, not torch.float64"):
        tiled(torch.float64, SAMPLE, (64, 8, 1, 1))
    with pytest.raises(ValueError, match="swizzle 48 .*, promotion 256 .*: choose one of these"):
        tiled(torch.float16, SAMPLE, (64, 8, 1, 1), swizzle=48)


def needs_hopper() -> None:
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs compute capability 9.0")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_box_is_copied_with_zeros_around_the_tensor(copy: Path, dtype: torch.dtype) -> None:
    needs_hopper()
    compiled = kernel(copy, {"PIXELS": 8 * 4 * 2, "TAP": 0}, torch.device("cuda"), native=True)
    x = torch.randn(2, 5, 7, 128, device="cuda", dtype=dtype)
    mapping = tiled(dtype, (128, 7, 5, 1), (64, 8, 4, 2))
    launch = compiled.bind(THREADS, 0, (mapping, torch.Tensor, int, int, int, int, 0, 0))
    around = torch.nn.functional.pad(x, (0, 0, 1, 9, 2, 9, 0, 2))
    for c, w, h, n in ((0, -1, -2, 0), (64, 3, 2, 1), (64, 0, 0, 0)):
        y = torch.full((2, 4, 8, 64), 9.0, device="cuda", dtype=dtype)
        launch((1, 1, 1), x, y, c, w, h, n)
        assert torch.equal(y, around[n : n + 2, h + 2 : h + 6, w + 1 : w + 9, c : c + 64])


@pytest.mark.gpu
@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_a_tap_is_copied_with_its_padding(copy: Path, stride: int, dilation: int) -> None:
    """3x3 with padding 1: every tap of the first 40 outputs; with a stride of 2 they reach the second sample."""
    needs_hopper()
    compiled = kernel(copy, {"PIXELS": 40, "TAP": 1}, torch.device("cuda"), native=True)
    x = torch.randn(3, 9, 13, 64, device="cuda", dtype=torch.float16)
    upper = 1 - dilation * 2
    mapping = im2col(x.dtype, (64, 13, 9, 1), (-1, -1), (upper, upper), 64, 40, stride)
    launch = compiled.bind(THREADS, 0, (mapping, torch.Tensor, 0, -1, -1, 0, int, int))
    around = torch.nn.functional.pad(x, (0, 0, 1, 1, 1, 1))
    out_h, out_w = ((size + upper) // stride + 1 for size in (9, 13))
    for r in range(3):
        for s in range(3):
            y = torch.full((40, 64), 9.0, device="cuda", dtype=torch.float16)
            launch((1, 1, 1), x, y, s * dilation, r * dilation)
            tap = around[:, r * dilation :: stride, s * dilation :: stride][:, :out_h, :out_w]
            assert torch.equal(y, tap.reshape(-1, 64)[:40])


@pytest.mark.gpu
def test_pixels_of_all_samples_are_copied_in_a_row(copy: Path) -> None:
    needs_hopper()
    compiled = kernel(copy, {"PIXELS": 40, "TAP": 0}, torch.device("cuda"), native=True)
    launch = compiled.bind(
        THREADS, 0, (tiled(torch.float16, (64, 35, 1, 1), (64, 40, 1, 1), 1), torch.Tensor, 0, int, *[0] * 4)
    )
    for samples in (1, 3):
        x = torch.randn(samples, 5, 7, 64, device="cuda", dtype=torch.float16)
        around = torch.nn.functional.pad(x.flatten(0, 2), (0, 0, 4, 40))
        for w in (-4, 0, 20, 34):
            y = torch.full((40, 64), 9.0, device="cuda", dtype=torch.float16)
            launch((1, 1, 1), x, y, w)
            assert torch.equal(y, around[w + 4 : w + 44])


@pytest.mark.gpu
def test_a_thread_that_torch_has_not_used_makes_tensor_maps(copy: Path) -> None:
    needs_hopper()
    compiled = kernel(copy, {"PIXELS": 40, "TAP": 0}, torch.device("cuda"), native=True)
    x = torch.randn(1, 1, 40, 64, device="cuda", dtype=torch.float16)
    y = torch.empty_like(x)
    launch = compiled.bind(THREADS, 0, (tiled(torch.float16, (64, 40, 1, 1), (64, 40, 1, 1)), torch.Tensor, *[0] * 6))
    torch.cuda.synchronize()
    with ThreadPoolExecutor(1) as thread:
        thread.submit(launch, (1, 1, 1), x, y).result()
    torch.cuda.synchronize()
    assert torch.equal(y, x)


@pytest.mark.gpu
def test_the_driver_refuses_a_box_that_is_too_large(copy: Path) -> None:
    needs_hopper()
    compiled = kernel(copy, {"PIXELS": 40, "TAP": 0}, torch.device("cuda"), native=True)
    x = torch.zeros(2, 5, 7, 128, device="cuda", dtype=torch.float16)
    launch = compiled.bind(THREADS, 0, (tiled(x.dtype, (128, 7, 5, 1), (128, 8, 4, 2)), torch.Tensor, *[0] * 6))
    with pytest.raises(ValueError, match=r"kernel copy .*box \(128, 8, 4, 2\).*INVALID_VALUE"):
        launch((1, 1, 1), x, torch.empty_like(x))
