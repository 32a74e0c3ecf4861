"""From a source to a Kernel on a device, by a driver that records its calls."""

from __future__ import annotations

import gc
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from escort.cuda import carried, compiler
from escort.cuda.binary import Binary
from escort.cuda.compiler import Text, compile_source
from escort.cuda.kernel import Kernel, kernel, unavailable
from tests.cuda.kernels import THREADS, FakeDriver, Status, bind

pytestmark = pytest.mark.usefixtures("empty_cache")


def test_without_a_gpu(scale: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="no NVIDIA GPU.*escort doctor"):
        kernel(scale, {"FACTOR": 1}, torch.device("cuda:0"))
    with pytest.raises(ValueError, match="not on cpu"):
        kernel(scale, {"FACTOR": 1}, torch.device("cpu"))


def test_no_error_holds_a_text() -> None:
    text = Text("generated.cu", "much code")
    with pytest.raises(ValueError, match="^generated.cu runs on CUDA devices, not on cpu$"):
        kernel(text, {}, torch.device("cpu"))
    assert "much code" not in f"{text!r} {text}"


def test_a_kernel_is_loaded_once(compiled: Kernel, scale: Path) -> None:
    assert kernel(scale, {"FACTOR": 2}, torch.device("cuda")) is compiled
    assert kernel(scale, {"FACTOR": 3}, torch.device("cuda")) is not compiled
    assert compiled.entry == "scale" and compiled.device == torch.device("cuda:0") and compiled.binary.arch == "sm_90"


def test_threads_that_ask_for_the_same_kernel_compile_it_once(
    driver: FakeDriver, scale: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[int] = []

    def compile_slowly(*args: Any) -> Binary:
        begun.append(0)
        time.sleep(0.2)
        if len(begun) == 1:
            raise RuntimeError("no memory, say")
        return compile_source(*args)

    monkeypatch.setattr("escort.cuda.kernel.compile_source", compile_slowly)
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(kernel, scale, {"FACTOR": 3}, torch.device("cuda:0")) for _ in range(8)]
    failed = [future for future in asked if future.exception() is not None]
    assert len(failed) == 1 and "no memory" in str(failed[0].exception()), "the next one tries anew"
    assert len({future.result() for future in asked if future not in failed}) == 1 and len(begun) == 2


@pytest.mark.usefixtures("driver")
def test_a_text_is_loaded_once_and_not_kept() -> None:
    def text(value: int) -> Text:
        return Text("some.cu", f'extern "C" __global__ void some(int* y) {{ *y = {value}; }}')

    first = text(1)
    compiled = kernel(first, {}, torch.device("cuda"))
    assert compiled.entry == "some" and kernel(text(1), {}, torch.device("cuda")) is compiled
    assert kernel(text(2), {}, torch.device("cuda")) is not compiled
    kept = weakref.ref(first)
    del first
    gc.collect()
    assert kept() is None


def test_a_native_kernel_is_another_one(compiled: Kernel, scale: Path) -> None:
    native = kernel(scale, {"FACTOR": 2}, torch.device("cuda"), native=True)
    assert (compiled.binary.arch, native.binary.arch) == ("sm_90", "sm_90a")
    assert kernel(scale, {"FACTOR": 2}, torch.device("cuda"), native=True) is native
    assert kernel(scale, {"FACTOR": 2}, torch.device("cuda")) is compiled


@pytest.mark.usefixtures("driver")
def test_no_native_kernels_before_hopper(scale: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    with pytest.raises(RuntimeError, match="NVIDIA X has compute capability 8.6; this kernel needs 9.0 or more"):
        kernel(scale, {"FACTOR": 1}, torch.device("cuda:0"), native=True)


def test_much_shared_memory_is_asked_for_once(compiled: Kernel, driver: FakeDriver) -> None:
    for size in (100_000, 90_000, 120_000, 1000):
        compiled.bind(THREADS, size, (None, torch.Tensor, float, 1))
    assert [value for _, _, value in driver.called("cuFuncSetAttribute")] == [100_000, 120_000]


@pytest.mark.parametrize("size", [-1, 232449])
def test_too_much_shared_memory_is_refused(compiled: Kernel, size: int) -> None:
    with pytest.raises(ValueError, match=rf"asks for {size} bytes .*NVIDIA X has 23\d+: choose a config"):
        bind(compiled, shared=size)


@pytest.mark.parametrize("block", [0, 1025])
def test_a_block_of_a_wrong_size_is_refused(compiled: Kernel, block: int) -> None:
    with pytest.raises(ValueError, match=f"a block of {block} threads; .* runs 1 to 1024"):
        bind(compiled, block=block)


@pytest.mark.parametrize(
    ("version", "message"),
    [(12040, r"supports CUDA 12.4 .* install escort-sparse\[cuda12\], or update the driver"), (99000, "INVALID_IMAGE")],
)
def test_a_driver_that_cannot_load_the_binary(driver: FakeDriver, scale: Path, version: int, message: str) -> None:
    driver.version = version
    driver.failing["cuLibraryLoadData"] = Status.CUDA_ERROR_INVALID_IMAGE
    with pytest.raises(RuntimeError, match=message) as caught:
        kernel(scale, {"FACTOR": 2}, torch.device("cuda:0"))
    assert ("update the driver" in str(caught.value)) == (version < 13000)


def test_a_driver_that_is_too_old_for_any_binary(driver: FakeDriver, scale: Path) -> None:
    driver.version = 11080
    with pytest.raises(RuntimeError, match="supports CUDA 11.8; CUDA kernels need 12.0: update the driver"):
        kernel(scale, {"FACTOR": 2}, torch.device("cuda:0"))


def test_a_missing_entry_is_named(driver: FakeDriver, scale: Path) -> None:
    driver.failing["cuLibraryGetKernel"] = Status.CUDA_ERROR_NOT_FOUND
    with pytest.raises(RuntimeError, match="kernel other of scale.cu on cuda:0.*NOT_FOUND"):
        kernel(scale, {"FACTOR": 2}, torch.device("cuda:0"), "other")


@pytest.mark.usefixtures("driver")
def test_a_gpu_that_is_too_old(scale: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(RuntimeError, match="NVIDIA X has compute capability 7.5; CUDA kernels need 8.0"):
        kernel(scale, {"FACTOR": 1}, torch.device("cuda:0"))


def test_kernels_can_be_had_without_a_compiler_where_some_are_carried(
    driver: FakeDriver, scale: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = torch.device("cuda:0")
    binary = compiler.compile_source(scale, {"FACTOR": 7}, "sm_90")
    monkeypatch.setattr(carried, "_binaries", {})
    monkeypatch.setattr(compiler, "_find_nvrtc", lambda: ImportError("no libnvrtc.so"))
    assert "CUDA kernels need NVRTC" in (unavailable(device) or "")
    carried.carry([binary])
    assert unavailable(device) is None
    assert "CUDA kernels need NVRTC" in (unavailable(device, native=True) or "")
    assert kernel(scale, {"FACTOR": 7}, device).binary is binary
    with pytest.raises(ImportError, match="scale.cu is not compiled for sm_90 yet"):
        kernel(scale, {"FACTOR": 8}, device)

    def missing() -> None:
        raise compiler.missing("cuda.bindings", ImportError("no module"))

    monkeypatch.setattr("escort.cuda.driver.api", missing)
    assert "CUDA kernels need cuda.bindings" in (unavailable(device) or "")


@pytest.mark.gpu
def test_a_missing_entry_is_named_on_a_gpu(scale: Path) -> None:
    with pytest.raises(RuntimeError, match="kernel other of scale.cu"):
        kernel(scale, {"FACTOR": 2}, torch.device("cuda"), "other")
