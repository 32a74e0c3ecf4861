"""What tests of escort.cuda share: two kernels, and a driver that records its calls."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from escort.cuda import driver
from escort.cuda.kernel import Kernel
from escort.cuda.launch import Launch

ARCHS = ("sm_80", "sm_90", "sm_100")
#: y[i] = factor * FACTOR * x[i] + shift for i < count; x may be null, then it counts as ones.
SCALE = """
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include "shift.cuh"

extern "C" __global__ void scale(const float* x, float* y, float factor, int count) {
  __shared__ float fixed[32];
  extern __shared__ float stage[];
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  fixed[threadIdx.x % 32] = SHIFT;
  if (i < count) stage[threadIdx.x] = x ? x[i] : 1.0f;
  __syncthreads();
  if (i < count) y[i] = factor * FACTOR * stage[threadIdx.x] + fixed[(threadIdx.x + 1) % 32];
}
"""
THREADS, SHARED = 128, 512
#: y (PIXELS, 64): what one copy brings from (c, w, h, n) on; with TAP, of the tap at (right, down).
COPY = """
struct __align__(64) TensorMap { unsigned long long opaque[16]; };
#define BYTES (PIXELS * 128)

extern "C" __global__ void copy(const __grid_constant__ TensorMap map, uint4* y, int c, int w, int h, int n, int right,
                                int down) {
  __shared__ __align__(1024) uint4 stage[BYTES / 16];
  __shared__ unsigned long long barrier;
  const unsigned to = (unsigned)__cvta_generic_to_shared(stage), full = (unsigned)__cvta_generic_to_shared(&barrier);
  if (threadIdx.x == 0) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1; fence.mbarrier_init.release.cluster;" ::"r"(full) : "memory");
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(full), "n"(BYTES) : "memory");
#if TAP
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%3, %4, %5, %6}], [%2], {%7, %8};" ::"r"(to), "l"(&map), "r"(full), "r"(c), "r"(w),
                 "r"(h), "r"(n), "h"((unsigned short)right), "h"((unsigned short)down) : "memory");
#else
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(to), "l"(&map), "r"(full), "r"(c), "r"(w), "r"(h), "r"(n)
                 : "memory");
#endif
  }
  __syncthreads();
  for (unsigned done = 0; !done;)
    asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], 0; selp.u32 %0, 1, 0, p; }"
                 : "=r"(done) : "r"(full) : "memory");
  for (int i = threadIdx.x; i < BYTES / 16; i += blockDim.x) y[i] = stage[i ^ i / 8 % 8];
}
"""


class Status(IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_INVALID_IMAGE = 200
    CUDA_ERROR_INVALID_CONTEXT = 201
    CUDA_ERROR_NOT_FOUND = 500
    CUDA_ERROR_LAUNCH_FAILED = 719


class Tensor(torch.Tensor):
    """A tensor on the host that says it is on the first GPU."""

    def get_device(self) -> int:
        return 0


class LaunchAttribute(ctypes.Structure):
    """CUlaunchAttribute of cuda.h, with a value of so many ints."""

    _fields_ = (("id", ctypes.c_int), ("padding", ctypes.c_int), ("value", ctypes.c_int * 16))


class LaunchConfig(ctypes.Structure):
    """CUlaunchConfig of cuda.h."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(LaunchAttribute)),
        ("attribute_count", ctypes.c_uint),
    )

    def attribute_values(self) -> list[tuple[int, list[int]]]:
        """The number of each attribute and its value, without the zeros behind it."""
        return [(one.id, [value for value in one.value if value]) for one in self.attributes[: self.attribute_count]]


#: The driver's functions, which are called by their addresses.
LAUNCH = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(LaunchConfig), ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
FUNCTION = 0xF00  # what the driver loaded

_HEAD = (  # result; map, type, rank, address, sizes, strides
    *(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32, ctypes.c_void_p),
    *[ctypes.POINTER(ctypes.c_uint64)] * 2,
)
_INTS, _STEPS = ctypes.POINTER(ctypes.c_int), ctypes.POINTER(ctypes.c_uint32)
#: Between head and modes box and steps, or corners, channels, pixels and steps.
ENCODE_TILED = ctypes.CFUNCTYPE(*_HEAD, _STEPS, _STEPS, *[ctypes.c_int] * 4)
ENCODE_IM2COL = ctypes.CFUNCTYPE(*_HEAD, _INTS, _INTS, ctypes.c_uint32, ctypes.c_uint32, _STEPS, *[ctypes.c_int] * 4)


class FakeDriver:
    """The part of cuda.bindings.driver that is called.

    Attributes:
        parameters: of the kernels, at first those of `scale`.
        calls: what was called with what.
        launches: function, parameters and where they lie, grid, block, shared bytes, stream and attributes of each.
        maps: what tensor maps were made from, by the arguments of the driver's function.
        map_contexts: in which contexts they were made.
        failing: what a function returns instead of success, by its name.
        version: of the driver.
        contexts: of the calling thread, the current one last.
    """

    CUfunction_attribute = SimpleNamespace(
        CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK="threads", CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES="shared"
    )
    CUdevice_attribute = SimpleNamespace(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN="shared")
    CUresult = Status

    def __init__(self) -> None:
        self.parameters: list[Any] = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_float, ctypes.c_int]
        self.calls: list[tuple[Any, ...]] = []
        self.launches: list[SimpleNamespace] = []
        self.maps: list[tuple[Any, ...]] = []
        self.map_contexts: list[str] = []
        self._by_address = {
            "cuLaunchKernelEx": LAUNCH(self._launch),
            "cuTensorMapEncodeTiled": ENCODE_TILED(self._encode_tiled),
            "cuTensorMapEncodeIm2col": ENCODE_IM2COL(self._encode_im2col),
        }
        self.failing: dict[str, Status] = {}
        self.version = 13000
        self.contexts = ["primary 0"]
        self._results: dict[str, Callable[..., Any]] = {
            "cuDriverGetVersion": lambda: self.version,
            "cuGetErrorString": lambda status: b"some words",
            "cuDevicePrimaryCtxRetain": lambda number: "primary 0",
            "cuDeviceGetAttribute": lambda attribute, number: 232448,
            "cuFuncGetAttribute": lambda attribute, function: 1024,
            "cuCtxPushCurrent": self.contexts.append,
            "cuCtxPopCurrent": self.contexts.pop,
            "cuKernelGetFunction": lambda handle: FUNCTION,
            "cuGetProcAddress": lambda name, version, flags: (
                ctypes.cast(self._by_address.get(name.decode()), ctypes.c_void_p).value
            ),
        }

    def __getattr__(self, name: str) -> Callable[..., tuple[Any, ...]]:
        def call(*args: Any) -> tuple[Any, ...]:
            self.calls.append((name, *args))
            result = self._results.get(name, lambda *_: name)(*args)
            return self.failing.get(name, Status.CUDA_SUCCESS), result

        call.__name__ = name
        return call

    def cuFuncGetParamInfo(self, function: str, index: int) -> tuple[int, int, int]:  # noqa: N802
        return (0, 0, ctypes.sizeof(self.parameters[index])) if index < len(self.parameters) else (1, 0, 0)

    def _launch(self, config: Any, function: int, parameters: int, _: int | None) -> int:
        """Notes a launch, also one that fails."""
        if not self.contexts:
            return Status.CUDA_ERROR_INVALID_CONTEXT
        config = config.contents
        addresses = list((ctypes.c_void_p * len(self.parameters)).from_address(parameters))
        values = [kind.from_address(at) for kind, at in zip(self.parameters, addresses, strict=True)]
        launch = SimpleNamespace(
            function=function,
            values=[bytes(value) if isinstance(value, ctypes.Array) else value.value for value in values],
            addresses=addresses,
            grid=tuple(config.grid),
            block=tuple(config.block),
            shared=config.shared_bytes,
            stream=config.stream,
            attributes=config.attribute_values(),
        )
        self.launches.append(launch)
        return self.failing.get("cuLaunchKernelEx", Status.CUDA_SUCCESS)

    def _encode_tiled(
        self, to: int, element: int, rank: int, x: int, sizes: Any, strides: Any, box: Any, steps: Any, *modes: int
    ) -> int:
        shape = sizes[:rank], strides[: rank - 1], box[:rank], steps[:rank]
        return self._encode("cuTensorMapEncodeTiled", to, element, x, *shape, *modes)

    def _encode_im2col(
        self,
        to: int,
        element: int,
        rank: int,
        x: int,
        sizes: Any,
        strides: Any,
        lower: Any,
        upper: Any,
        channels: int,
        pixels: int,
        steps: Any,
        *modes: int,
    ) -> int:
        shape = sizes[:rank], strides[: rank - 1], lower[: rank - 2], upper[: rank - 2], channels, pixels, steps[:rank]
        return self._encode("cuTensorMapEncodeIm2col", to, element, x, *shape, *modes)

    def _encode(self, name: str, to: int, *args: Any) -> int:
        """Writes the number of maps so far all over the map."""
        if not self.contexts:
            return Status.CUDA_ERROR_INVALID_CONTEXT
        if to % 64:
            return Status.CUDA_ERROR_INVALID_VALUE
        self.maps.append(args)
        self.map_contexts.append(self.contexts[-1])
        ctypes.memset(to, len(self.maps), 128)
        return self.failing.get(name, Status.CUDA_SUCCESS)

    def called(self, name: str) -> list[list[Any]]:
        return [args for called, *args in self.calls if called == name]


def install(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    """A driver of that kind in place of the machine's, and a GPU that torch sees."""
    fake = FakeDriver()
    monkeypatch.setattr(driver, "api", lambda: fake)
    monkeypatch.setattr(driver, "device", driver.Device)
    monkeypatch.setattr("escort.cuda.kernel._kernels", {})
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    cuda = {"is_available": lambda: True, "init": lambda: None, "current_device": lambda: 0}
    cuda |= {"get_device_capability": lambda device: (9, 0), "get_device_name": lambda device: "NVIDIA X"}
    for name, function in cuda.items():
        monkeypatch.setattr(torch.cuda, name, function)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 0, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 70 + index, raising=False)
    return fake


def write_scale(folder: Path) -> Path:
    """The source of `scale` and its header."""
    (folder / "shift.cuh").write_text("#define SHIFT 0.5f\n")
    path = folder / "scale.cu"
    path.write_text(SCALE)
    return path


def write_copy(folder: Path) -> Path:
    path = folder / "copy.cu"
    path.write_text(COPY)
    return path


def tensor(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape or (4,), dtype=dtype).as_subclass(Tensor)


def bind(compiled: Kernel, block: int = THREADS, shared: int = SHARED) -> Launch:
    """A launch of `scale` that is given all its arguments."""
    return compiled.bind(block, shared, (torch.Tensor, torch.Tensor, float, int))
