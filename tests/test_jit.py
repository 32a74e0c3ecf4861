"""Kernels from source to launch. Without a GPU: compiling, and launching through a driver that records its calls."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import sys
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from enum import IntEnum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from escort.cuda import cache, compiler
from escort.cuda import kernel as jit
from escort.cuda import tensor_map as tensor_maps
from escort.filter import SparseFilter
from escort.methods.cuda import direct as direct_cuda
from escort.methods.cuda.generated.codegen import arrange_defines
from escort.methods.cuda.generated.config import GeneratedConfig
from escort.methods.cuda.generated.steps import KernelSteps
from escort.problem import Problem

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


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ESCORT_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def scale(tmp_path: Path) -> Path:
    (tmp_path / "shift.cuh").write_text("#define SHIFT 0.5f\n")
    path = tmp_path / "scale.cu"
    path.write_text(SCALE)
    return path


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    path = tmp_path / "copy.cu"
    path.write_text(COPY)
    return path


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The architectures that were compiled for, one by one."""
    seen: list[str] = []
    compile = compiler._compile

    def record(path: Path, macros: Any, arch: str, version: str) -> jit.Binary:
        seen.append(arch)
        return compile(path, macros, arch, version)

    monkeypatch.setattr(compiler, "_compile", record)
    return seen


#: Bytes of spill stores and loads together; the kernel keeps its inner loops free of them.
MOST_SPILLED = 96

# Compiling


def arrange_variants() -> list[tuple[str, dict[str, int | str], int]]:
    """Source, defines and budget of registers of what lays out inputs.

    One image or two per word, one plane or four; and channels_last of either size of elements.
    """
    config = GeneratedConfig(8, 4, 1, 4, copy=0, arranged=True)
    variants: list[tuple[str, dict[str, int | str], int]]
    vectors = ((2, 1), (2, 2), (2, 4), (2, 8), (4, 1), (4, 2), (4, 4))
    variants = [("sparse_tc_arrange.cu", {"BYTES": bytes, "VECTOR": vector}, 48) for bytes, vector in vectors]
    for dtype, stride in (("fp32", 1), ("fp16", 1), ("fp32", 2), ("fp16", 2)):
        problem = Problem(2, 8, 13, 13, 8, (3, 3), (stride, stride), (1, 1, 1, 1), precision=dtype)  # type: ignore[arg-type]
        sparse_filter = SparseFilter.from_dense(torch.ones(problem.weight_shape))
        variants.append(
            ("generated_arrange.cu", arrange_defines(KernelSteps.of(problem, sparse_filter, config), 128), 48)
        )
    return variants


def pool_variants() -> list[tuple[str, dict[str, int | str], int]]:
    """The same of max pooling."""
    window: dict[str, int | str] = {"ROWS": 3, "COLUMNS": 3, "DOWN": 2, "RIGHT": 2, "TOP": 1, "LEFT": 1}
    window |= {"DILATION_DOWN": 1, "DILATION_RIGHT": 1}
    vectors = ((0, 1), (0, 4), (1, 1), (1, 8), (2, 2), (2, 8))
    return [("max_pool.cu", {"STORAGE": storage, "VECTOR": vector, **window}, 40) for storage, vector in vectors]


def every_variant() -> list[tuple[str, dict[str, int | str], int]]:
    return direct_cuda.variants() + arrange_variants() + pool_variants()


@pytest.mark.parametrize("arch", ARCHS)
def test_every_kernel_keeps_to_its_budget(arch: str) -> None:
    """Registers are as many as each variant states; at most a few values outside the inner loops are spilled."""
    variants = every_variant()
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        binaries = list(pool.map(lambda variant: jit.compile(*variant[:2], arch), variants))
    for (source, defines, budget), binary in zip(variants, binaries, strict=True):
        used = f"{source} {defines}: {binary.registers} registers of {budget}, {binary.spill_bytes} bytes spilled"
        assert binary.registers <= budget and binary.spill_bytes <= MOST_SPILLED and binary.stack_bytes <= 32, used


def test_every_source_has_a_budget() -> None:
    assert {path.name for path in compiler.KERNELS.glob("*.cu")} == {source for source, _, _ in every_variant()}


@pytest.mark.parametrize("arch", ARCHS)
def test_a_binary_says_what_it_uses(scale: Path, arch: str) -> None:
    binary = jit.compile(scale, {"FACTOR": 3}, arch)
    assert binary.cubin.startswith(b"\x7fELF") and b"scale" in binary.cubin
    assert 0 < binary.registers < 40 and binary.spill_bytes == binary.stack_bytes == 0
    assert binary.shared_bytes == 128
    assert (binary.source, binary.defines, binary.arch) == ("scale.cu", {"FACTOR": "3"}, arch)
    assert binary.compiler == jit.compiler_version()


def test_spills_and_local_memory_are_seen(tmp_path: Path) -> None:
    path = tmp_path / "spill.cu"
    path.write_text("""
extern "C" __global__ void __launch_bounds__(1024, 2) spill(const float* x, float* y, int n) {
  float a[96];
#pragma unroll
  for (int i = 0; i < 96; i++) a[i] = x[i * n];
  __syncthreads();
#pragma unroll
  for (int j = 0; j < 96; j++) y[j * n] = a[j] * a[95 - j];
}
extern "C" __global__ void indexed(const int* x, int* y) {
  int a[64];
  for (int i = 0; i < 64; i++) a[x[i]] = i;
  for (int i = 0; i < 64; i++) y[i] = a[x[64 + i]];
}
""")
    binary = jit.compile(path, {}, "sm_90")
    assert binary.registers == 32 and binary.spill_bytes > 0 and binary.stack_bytes >= 256


def test_a_binary_is_compiled_once(scale: Path, compilations: list[str]) -> None:
    first = jit.compile(scale, {"FACTOR": 2}, "sm_90")
    assert jit.compile(scale, {"FACTOR": "2"}, "sm_90") == first and compilations == ["sm_90"]


def test_whatever_a_binary_is_made_from_makes_another_one(scale: Path, compilations: list[str]) -> None:
    def changed() -> bool:
        before = len(compilations)
        jit.compile(scale, defines, arch)
        return len(compilations) > before

    defines, arch = {"FACTOR": 2}, "sm_90"
    assert changed() and not changed()
    defines = {"FACTOR": 3}
    assert changed() and not changed()
    arch = "sm_80"
    assert changed() and not changed()
    scale.write_text(SCALE + "// more\n")
    assert changed() and not changed()
    scale.with_name("shift.cuh").write_text("#define SHIFT 1.5f\n")
    assert changed() and not changed()


def test_the_compiler_is_part_of_the_key(scale: Path, compilations: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    jit.compile(scale, {"FACTOR": 2}, "sm_90")
    monkeypatch.setattr(compiler, "compiler_version", lambda: "NVRTC 99.0")
    jit.compile(scale, {"FACTOR": 2}, "sm_90")
    assert len(compilations) == 2


@pytest.mark.parametrize("damage", [b"", b"foreign", None])
def test_a_damaged_entry_is_compiled_anew(scale: Path, compilations: list[str], damage: bytes | None) -> None:
    first = jit.compile(scale, {"FACTOR": 2}, "sm_90")
    (entry,) = cache.entries()
    entry.path.write_bytes(entry.path.read_bytes()[:-100] if damage is None else damage)
    assert jit.compile(scale, {"FACTOR": 2}, "sm_90").registers == first.registers
    assert jit.compile(scale, {"FACTOR": 2}, "sm_90").registers == first.registers
    assert len(compilations) == 2


def test_without_a_cache_everything_works(
    scale: Path, compilations: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ESCORT_CACHE_MB", "0")
    for _ in range(2):
        assert jit.compile(scale, {"FACTOR": 2}, "sm_90").cubin
    assert len(compilations) == 2


def _compile_in_a_process(source: Path, barrier: Any, results: Any) -> None:
    barrier.wait()
    results.put(jit.compile(source, {"FACTOR": 2}, "sm_90").cubin)


def test_processes_that_compile_the_same_end_right(scale: Path) -> None:
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(3), context.Queue()
    processes = [context.Process(target=_compile_in_a_process, args=(scale, barrier, results)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
        assert process.exitcode == 0
    cubins = {results.get(timeout=1) for _ in processes}
    (entry,) = cache.entries()
    assert cubins == {jit.compile(scale, {"FACTOR": 2}, "sm_90").cubin} and entry.description["source"] == "scale.cu"
    assert [path.name for path in cache.folder().iterdir()] == [entry.path.name]


def test_an_error_names_file_line_and_defines(scale: Path) -> None:
    line = 1 + SCALE[: SCALE.index("FACTOR")].count("\n")
    with pytest.raises(RuntimeError, match=r"scale\.cu does not compile for sm_90.*-DOTHER=1") as caught:
        jit.compile(scale, {"OTHER": 1}, "sm_90")
    assert f"scale.cu({line}): error" in str(caught.value) and '"FACTOR" is undefined' in str(caught.value)
    assert not cache.entries()


def test_an_error_in_a_header_names_the_header(scale: Path) -> None:
    scale.with_name("shift.cuh").write_text("#define SHIFT 0.5f\nint x = nothing;\n")
    with pytest.raises(RuntimeError, match=r"shift\.cuh\(2\): error"):
        jit.compile(scale, {"FACTOR": 1}, "sm_90")


@pytest.mark.parametrize("arch", ["sm_30", "sm_999", "avx2"])
def test_an_architecture_that_the_compiler_does_not_know(scale: Path, arch: str) -> None:
    with pytest.raises(ValueError, match=f"cannot compile for {arch}, only for .*sm_90"):
        jit.compile(scale, {"FACTOR": 1}, arch)


def test_an_architecture_has_what_no_other_one_has(tmp_path: Path) -> None:
    path = tmp_path / "fence.cu"
    path.write_text('extern "C" __global__ void fence() { asm volatile("wgmma.fence.sync.aligned;"); }')
    assert jit.compile(path, {}, "sm_90a").arch == "sm_90a"
    with pytest.raises(RuntimeError, match=r"fence\.cu does not compile for sm_90 "):
        jit.compile(path, {}, "sm_90")


@pytest.mark.parametrize("tap", [0, 1])
def test_a_copy_by_a_tensor_map_compiles(copy: Path, tap: int) -> None:
    binary = jit.compile(copy, {"PIXELS": 64, "TAP": tap}, "sm_90a")
    assert binary.stack_bytes == 0  # the map is read where it is, and no local copy made


def test_a_missing_source_is_named() -> None:
    with pytest.raises(FileNotFoundError, match="nothing.cu"):
        jit.compile("nothing.cu", {}, "sm_90")


# Generated texts


def test_a_text_is_compiled_like_a_file(scale: Path) -> None:
    """Its errors and its entry in the cache bear its name; headers of `kernels` and of the toolkit are found."""
    text = jit.Text("generated.cu", scale.read_text().replace('#include "shift.cuh"', "#define SHIFT 0.5f"))
    binary, file = jit.compile(text, {"FACTOR": 3}, "sm_90"), jit.compile(scale, {"FACTOR": 3}, "sm_90")
    assert binary.source == "generated.cu" and b"scale" in binary.cubin
    assert (binary.registers, binary.shared_bytes) == (file.registers, file.shared_bytes)
    assert "generated.cu" in {entry.description["source"] for entry in cache.entries()}
    with pytest.raises(RuntimeError) as caught:
        jit.compile(jit.Text("generated.cu", "typedef int x;\nnothing y;\n"), {}, "sm_90")
    version = compiler.compiler_version()
    assert str(caught.value).startswith(f"generated.cu does not compile for sm_90 ({version}): ")
    assert 'generated.cu(2): error: identifier "nothing" is undefined' in str(caught.value)


def test_what_a_text_is_made_from_makes_another_binary(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, compilations: list[str]
) -> None:
    monkeypatch.setattr(compiler, "KERNELS", tmp_path)
    header = tmp_path / "generated.cuh"
    header.write_text("#define WORDS 1\n")
    text = jit.Text(
        "generated.cu", '#include "generated.cuh"\nextern "C" __global__ void generated(int* y) { *y = WORDS; }\n'
    )

    def changed() -> bool:
        before = len(compilations)
        jit.compile(text, {}, "sm_90")
        return len(compilations) > before

    assert changed() and not changed()
    header.write_text("#define WORDS 2\n")
    assert changed() and not changed()
    text = replace(text, text=text.text + "// more\n")
    assert changed() and not changed()
    text = replace(text, name="other.cu")
    assert changed() and not changed()


def test_how_long_compiling_took_is_remembered(scale: Path) -> None:
    first = jit.compile(scale, {"FACTOR": 2}, "sm_90")
    assert 0.0 < first.compile_s < 60.0 and jit.compile(scale, {"FACTOR": 2}, "sm_90").compile_s == first.compile_s


def test_no_error_holds_a_text() -> None:
    text = jit.Text("generated.cu", "much code")
    with pytest.raises(ValueError, match="^generated.cu runs on CUDA devices, not on cpu$"):
        jit.kernel(text, {}, torch.device("cpu"))
    assert "much code" not in f"{text!r} {text}"


# What is missing


@pytest.fixture
def forgetful() -> Any:
    """Nothing is remembered about the compiler, before and after."""
    remembered = compiler.nvrtc_version, compiler._toolkit_headers
    for function in remembered:
        function.cache_clear()
    yield
    for function in remembered:
        function.cache_clear()


@pytest.mark.parametrize("module", ["cuda.core", "cuda.bindings", "cuda.pathfinder"])
@pytest.mark.parametrize(
    ("cuda", "extra"), [(None, "cuda13"), ("11.8", "cuda12"), ("12.8", "cuda12"), ("13.0", "cuda13")]
)
@pytest.mark.usefixtures("forgetful")
def test_a_missing_package_is_named_with_the_extra(
    scale: Path, monkeypatch: pytest.MonkeyPatch, module: str, cuda: str | None, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    with pytest.raises(ImportError, match=rf"pip install escort-sparse\[{extra}\]"):
        jit.compile(scale, {"FACTOR": 1}, "sm_90")


@pytest.mark.usefixtures("forgetful")
def test_a_missing_compiler_library_is_named_with_the_extra(scale: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cuda.bindings import nvrtc
    from cuda.pathfinder import DynamicLibNotFoundError

    def missing() -> None:
        raise DynamicLibNotFoundError("no libnvrtc.so")

    monkeypatch.setattr(nvrtc, "nvrtcVersion", missing)
    with pytest.raises(ImportError, match=r"NVRTC.*escort-sparse\[cuda13\].*no libnvrtc.so"):
        jit.compile(scale, {"FACTOR": 1}, "sm_90")


def test_without_a_gpu(scale: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="no NVIDIA GPU.*escort doctor"):
        jit.kernel(scale, {"FACTOR": 1}, torch.device("cuda:0"))
    with pytest.raises(ValueError, match="not on cpu"):
        jit.kernel(scale, {"FACTOR": 1}, torch.device("cpu"))


# Launching, through a driver that records


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


_HEAD = (  # result; map, type, rank, address, sizes, strides
    *(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32, ctypes.c_void_p),
    *[ctypes.POINTER(ctypes.c_uint64)] * 2,
)
_INTS, _STEPS = ctypes.POINTER(ctypes.c_int), ctypes.POINTER(ctypes.c_uint32)
#: The driver's functions: between head and modes box and steps, or corners, channels, pixels and steps.
ENCODE_TILED = ctypes.CFUNCTYPE(*_HEAD, _STEPS, _STEPS, *[ctypes.c_int] * 4)
ENCODE_IM2COL = ctypes.CFUNCTYPE(*_HEAD, _INTS, _INTS, ctypes.c_uint32, ctypes.c_uint32, _STEPS, *[ctypes.c_int] * 4)


class FakeDriver:
    """The part of cuda.bindings.driver that is called.

    Attributes:
        parameters: of the kernels, at first those of `scale`.
        calls: what was called with what.
        launches: parameters and where they lie, grid, block, shared bytes, stream and attributes of each launch.
        maps: what tensor maps were made from, by the arguments of the driver's function.
        failing: what a function returns instead of success, by its name.
        version: of the driver.
        contexts: of the calling thread, the current one last.
    """

    CUfunction_attribute = SimpleNamespace(
        CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK="threads", CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES="shared"
    )
    CUdevice_attribute = SimpleNamespace(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN="shared")
    CUlaunchAttributeID = SimpleNamespace(CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION="overlap")
    CUlaunchConfig = SimpleNamespace
    CUresult = Status

    def __init__(self) -> None:
        self.parameters: list[Any] = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_float, ctypes.c_int]
        self.calls: list[tuple[Any, ...]] = []
        self.launches: list[SimpleNamespace] = []
        self.maps: list[tuple[Any, ...]] = []
        self._encoders = {
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
            "cuLaunchKernelEx": self._record,
            "cuGetProcAddress": lambda name, version, flags: (
                ctypes.cast(self._encoders[name.decode()], ctypes.c_void_p).value
            ),
        }

    def __getattr__(self, name: str) -> Callable[..., tuple[Any, ...]]:
        def call(*args: Any) -> tuple[Any, ...]:
            self.calls.append((name, *args))
            if name == "cuLaunchKernelEx" and not self.contexts:
                return Status.CUDA_ERROR_INVALID_CONTEXT, None
            result = self._results.get(name, lambda *_: name)(*args)
            return self.failing.get(name, Status.CUDA_SUCCESS), result

        call.__name__ = name
        return call

    def CUlaunchAttribute(self) -> SimpleNamespace:  # noqa: N802
        return SimpleNamespace(value=SimpleNamespace())

    def cuFuncGetParamInfo(self, function: str, index: int) -> tuple[int, int, int]:  # noqa: N802
        return (0, 0, ctypes.sizeof(self.parameters[index])) if index < len(self.parameters) else (1, 0, 0)

    def _record(self, config: Any, function: str, parameters: int, extra: int) -> None:
        addresses = list((ctypes.c_void_p * len(self.parameters)).from_address(parameters))
        launch = SimpleNamespace(
            values=[kind.from_address(address).value for kind, address in zip(self.parameters, addresses, strict=True)],
            addresses=addresses,
            grid=(config.gridDimX, config.gridDimY, config.gridDimZ),
            block=(config.blockDimX, config.blockDimY, config.blockDimZ),
            shared=config.sharedMemBytes,
            stream=config.hStream,
            attributes=[attribute.id for attribute in config.attrs],
        )
        self.launches.append(launch)

    def _encode_tiled(
        self, to: int, type: int, rank: int, x: int, sizes: Any, strides: Any, box: Any, steps: Any, *modes: int
    ) -> int:
        shape = sizes[:rank], strides[: rank - 1], box[:rank], steps[:rank]
        return self._encode("cuTensorMapEncodeTiled", to, type, x, *shape, *modes)

    def _encode_im2col(
        self,
        to: int,
        type: int,
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
        return self._encode("cuTensorMapEncodeIm2col", to, type, x, *shape, *modes)

    def _encode(self, name: str, to: int, *args: Any) -> int:
        """Writes the number of maps so far all over the map."""
        assert self.contexts[-1] == "primary 0"
        if to % 64:
            return Status.CUDA_ERROR_INVALID_VALUE
        self.maps.append(args)
        ctypes.memset(to, len(self.maps), 128)
        return self.failing.get(name, Status.CUDA_SUCCESS)

    def called(self, name: str) -> list[list[Any]]:
        return [args for called, *args in self.calls if called == name]


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    driver = FakeDriver()
    monkeypatch.setattr(jit, "_driver", lambda: driver)
    monkeypatch.setattr(jit, "_kernels", {})
    monkeypatch.setattr(jit, "_device", jit._Device)
    tensor_maps._encode.cache_clear()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    cuda = {"is_available": lambda: True, "init": lambda: None, "current_device": lambda: 0}
    cuda |= {"get_device_capability": lambda device: (9, 0), "get_device_name": lambda device: "NVIDIA X"}
    for name, function in cuda.items():
        monkeypatch.setattr(torch.cuda, name, function)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 0, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 70 + index, raising=False)
    return driver


@pytest.fixture
def kernel(driver: FakeDriver, scale: Path) -> jit.Kernel:
    return jit.kernel(scale, {"FACTOR": 2}, torch.device("cuda:0"))


def tensor() -> torch.Tensor:
    return torch.zeros(4).as_subclass(Tensor)


def bind(kernel: jit.Kernel, block: int = THREADS, shared: int = SHARED) -> jit.Launch:
    """A launch of `scale` that is given all its arguments."""
    return kernel.bind(block, shared, (torch.Tensor, torch.Tensor, float, int))


def test_a_kernel_is_loaded_once(kernel: jit.Kernel, scale: Path) -> None:
    assert jit.kernel(scale, {"FACTOR": 2}, torch.device("cuda")) is kernel
    assert jit.kernel(scale, {"FACTOR": 3}, torch.device("cuda")) is not kernel
    assert kernel.entry == "scale" and kernel.device == torch.device("cuda:0") and kernel.binary.arch == "sm_90"


@pytest.mark.usefixtures("driver")
def test_a_text_is_loaded_once_and_not_kept() -> None:
    def text(value: int) -> jit.Text:
        return jit.Text("some.cu", f'extern "C" __global__ void some(int* y) {{ *y = {value}; }}')

    first = text(1)
    kernel = jit.kernel(first, {}, torch.device("cuda"))
    assert kernel.entry == "some" and jit.kernel(text(1), {}, torch.device("cuda")) is kernel
    assert jit.kernel(text(2), {}, torch.device("cuda")) is not kernel
    kept = weakref.ref(first)
    del first
    gc.collect()
    assert kept() is None


def test_launch_passes_what_it_is_given(kernel: jit.Kernel, driver: FakeDriver) -> None:
    x, y, launch = tensor(), tensor(), bind(kernel)
    launch((3, 2, 1), x, y, 2.5, -7)
    launch((3, 2, 1), None, y, -1.0, 7)
    first, second = driver.launches
    assert first.values == [x.data_ptr(), y.data_ptr(), 2.5, -7] and second.values == [None, y.data_ptr(), -1.0, 7]
    assert (first.grid, first.block, first.shared, first.stream) == ((3, 2, 1), (THREADS, 1, 1), SHARED, 70)
    assert len(driver.called("cuCtxPushCurrent")) == 1  # while it was loaded


def test_a_bound_launch_takes_what_is_left(kernel: jit.Kernel, driver: FakeDriver) -> None:
    x, y = tensor(), tensor()
    kernel.bind(THREADS, SHARED, (torch.Tensor, y, 0.5, int))((1, 1, 1), x, 4)
    kernel.bind(THREADS, SHARED, (None, torch.Tensor, float, 9), overlap=True)((2, 1, 1), y, 3.0)
    assert driver.launches[0].values == [x.data_ptr(), y.data_ptr(), 0.5, 4] and driver.launches[0].attributes == []
    assert driver.launches[1].values == [None, y.data_ptr(), 3.0, 9]
    assert driver.launches[1].attributes == ["overlap"]


def tensor_map(value: int) -> jit.TensorMap:
    return jit.TensorMap(bytes([value]) * 128)


@pytest.fixture
def mapped(driver: FakeDriver, scale: Path) -> jit.Kernel:
    """A kernel with the parameters (pointer, map, int, map, float)."""
    map = ctypes.c_char * 128
    driver.parameters = [ctypes.c_void_p, map, ctypes.c_int, map, ctypes.c_float]
    return jit.kernel(scale, {"FACTOR": 2}, torch.device("cuda:0"))


def test_tensor_maps_are_passed_bound_or_per_launch(mapped: jit.Kernel, driver: FakeDriver) -> None:
    x, first, second = tensor(), tensor_map(1), tensor_map(2)
    kinds = (torch.Tensor, jit.TensorMap, int, jit.TensorMap, float)
    values = (x, first, -3, second, 1.5)
    passed = [x.data_ptr(), first.opaque, -3, second.opaque, 1.5]
    for fixed in ((), (1,), (3,), (1, 3), (0, 2, 4), (0, 1, 2, 3, 4)):
        launch = mapped.bind(THREADS, 0, [values[i] if i in fixed else kinds[i] for i in range(5)])
        for _ in range(2):
            launch((1, 1, 1), *[values[i] for i in range(5) if i not in fixed])
            assert driver.launches[-1].values == passed
            assert all(address % 64 == 0 for address in driver.launches[-1].addresses)


def test_wrong_tensor_maps_are_refused(mapped: jit.Kernel, driver: FakeDriver) -> None:
    map = tensor_map(1)
    with pytest.raises(ValueError, match="a tensor map has 128 bytes, got 64"):
        jit.TensorMap(bytes(64))
    with pytest.raises(TypeError, match=r"parameters of \[8, 128, 4, 128, 4\] bytes, got .*Tensor.*TensorMap"):
        mapped.bind(THREADS, 0, (torch.Tensor, None, 1, map, 1.0))
    launch = mapped.bind(THREADS, 0, (None, jit.TensorMap, 1, map, 1.0))
    for wrong in (tensor(), None, 1, bytes(128)):
        with pytest.raises(TypeError, match=f"takes a tensor map where it got {type(wrong).__name__}"):
            launch((1, 1, 1), wrong)
    assert not driver.launches and "opaque" not in repr(map)


def test_a_native_kernel_is_another_one(kernel: jit.Kernel, scale: Path) -> None:
    native = jit.kernel(scale, {"FACTOR": 2}, torch.device("cuda"), native=True)
    assert (kernel.binary.arch, native.binary.arch) == ("sm_90", "sm_90a")
    assert jit.kernel(scale, {"FACTOR": 2}, torch.device("cuda"), native=True) is native
    assert jit.kernel(scale, {"FACTOR": 2}, torch.device("cuda")) is kernel


@pytest.mark.usefixtures("driver")
def test_no_native_kernels_before_hopper(scale: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    with pytest.raises(RuntimeError, match="NVIDIA X has compute capability 8.6; this kernel needs 9.0 or more"):
        jit.kernel(scale, {"FACTOR": 1}, torch.device("cuda:0"), native=True)


# Tensor maps

SIZES = (64, 13, 9, 5)


def tensor_of(dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.zeros(SIZES[::-1], dtype=dtype).as_subclass(Tensor)


def test_a_tensor_map_of_boxes(driver: FakeDriver) -> None:
    x = tensor_of()
    map = tensor_maps.tiled(x, SIZES, (64, 15, 4, 1))
    assert map == tensor_map(1)
    box, modes = ([64, 15, 4, 1], [1, 1, 1, 1]), (0, 3, 3, 0)  # plain, 128 bytes, 256 bytes, zeros
    assert driver.maps == [(6, x.data_ptr(), [*SIZES], [128, 13 * 128, 9 * 13 * 128], *box, *modes)]
    x = tensor_of(torch.bfloat16)
    tensor_maps.tiled(x, SIZES, (32, 8, 8, 2), (256, 4096, 65536), swizzle=64, promotion=0)
    assert driver.maps[1:] == [(9, x.data_ptr(), [*SIZES], [256, 4096, 65536], [32, 8, 8, 2], [1, 1, 1, 1], 0, 2, 0, 0)]
    x = tensor_of(torch.float32)
    tensor_maps.tiled(x, SIZES, (32, 8, 1, 1))
    assert driver.maps[2][:4] == (11, x.data_ptr(), [*SIZES], [256, 13 * 256, 9 * 13 * 256]), "TF32"


def test_a_tensor_map_of_taps(driver: FakeDriver) -> None:
    x = tensor_of()
    assert tensor_maps.im2col(x, SIZES, (-1, -2), (-3, 4), 64, 1024, stride=2) == tensor_map(1)
    tensor_maps.im2col(x, SIZES, (0, 0), (0, 0), 64, 8, (1, 3), swizzle=0, promotion=128)
    head = (6, x.data_ptr(), [*SIZES], [128, 13 * 128, 9 * 13 * 128])
    assert driver.maps == [
        (*head, [-1, -2], [-3, 4], 64, 1024, [1, 2, 2, 1], 0, 3, 3, 0),
        (*head, [0, 0], [0, 0], 64, 8, [1, 1, 3, 1], 0, 0, 2, 0),
    ]


def test_a_tensor_map_is_made_once(driver: FakeDriver) -> None:
    x, y = tensor_of(), tensor_of()
    first = tensor_maps.tiled(x, SIZES, (64, 8, 1, 1))
    driver.contexts.clear()  # a thread of its own has none
    driver.contexts.append("primary 1")
    assert tensor_maps.tiled(x, SIZES, (64, 8, 1, 1)) is first
    assert tensor_maps.tiled(y, SIZES, (64, 8, 1, 1)) == tensor_map(2)
    assert tensor_maps.tiled(x, (*SIZES[:3], 4), (64, 8, 1, 1)) == tensor_map(3)
    assert len(driver.maps) == 3 and driver.contexts == ["primary 1"]


def test_a_refused_tensor_map_says_what_was_asked_for(driver: FakeDriver) -> None:
    x = tensor_of()
    driver.failing["cuTensorMapEncodeTiled"] = Status.CUDA_ERROR_INVALID_VALUE
    with pytest.raises(ValueError) as caught:
        tensor_maps.tiled(x, SIZES, (64, 8, 512, 1))
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
        tensor_maps.im2col(x, SIZES, (-1, -1), (-1, -1), 64, 8)
    driver.failing.clear()
    assert tensor_maps.tiled(x, SIZES, (64, 8, 512, 1)).opaque  # no failure is remembered


def test_what_no_tensor_map_is_made_of(driver: FakeDriver) -> None:
    with pytest.raises(ValueError, match="torch.float16, torch.bfloat16, torch.float32, not torch.float64"):
        tensor_maps.tiled(tensor_of(torch.float64), SIZES, (64, 8, 1, 1))
    with pytest.raises(ValueError, match="a tensor on a GPU; move it there"):
        tensor_maps.tiled(torch.zeros(64, dtype=torch.float16), SIZES, (64, 8, 1, 1))
    with pytest.raises(ValueError, match="swizzle 48 .*, promotion 256 .*: choose one of these"):
        tensor_maps.tiled(tensor_of(), SIZES, (64, 8, 1, 1), swizzle=48)
    assert not driver.maps


def test_a_bound_tensor_is_kept(kernel: jit.Kernel, driver: FakeDriver) -> None:
    launch = kernel.bind(THREADS, SHARED, (tensor(), torch.Tensor, 1.0, 1))
    assert isinstance(launch._fixed[0], torch.Tensor)


def test_a_grid_without_blocks_is_no_launch(kernel: jit.Kernel, driver: FakeDriver) -> None:
    bind(kernel)((0, 1, 1), None, tensor(), 1.0, 0)
    assert not driver.launches


def test_another_current_device_gives_way(
    kernel: jit.Kernel, driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 1)
    driver.contexts[:] = ["primary 1"]
    bind(kernel)((1, 1, 1), None, tensor(), 1.0, 4)
    assert driver.called("cuCtxPushCurrent")[-1] == ["primary 0"] and driver.contexts == ["primary 1"]
    assert len(driver.launches) == 1


def test_a_thread_without_a_context_gets_one(kernel: jit.Kernel, driver: FakeDriver) -> None:
    driver.contexts.clear()
    bind(kernel)((1, 1, 1), None, tensor(), 1.0, 4)
    assert len(driver.launches) == 1 and not driver.contexts


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((None, None, 1.0), TypeError, r"parameters of \[8, 8, 4, 4\] bytes"),
        ((None, 1.0, None, 1), TypeError, "parameters of"),
        ((None, None, 1.0, 2**31), ValueError, "32-bit"),
        ((None, None, 1.0, "1"), TypeError, "not str"),
        ((None, None, 1.0, True), TypeError, "not bool"),
        ((torch.zeros(1), None, 1.0, 1), ValueError, "tensor on cpu"),
    ],
)
def test_wrong_arguments_are_refused(
    kernel: jit.Kernel, driver: FakeDriver, args: tuple[Any, ...], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        kernel.bind(THREADS, SHARED, args)((1, 1, 1))
    assert not driver.launches


@pytest.mark.parametrize(
    ("args", "message"), [((None, None, 1.0, 2**31), "32-bit"), ((torch.zeros(1), None, 1.0, 1), "tensor on cpu")]
)
def test_wrong_arguments_of_a_launch_are_refused(
    kernel: jit.Kernel, driver: FakeDriver, args: tuple[Any, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        bind(kernel)((1, 1, 1), *args)
    assert not driver.launches


def test_a_bound_launch_counts_its_arguments(kernel: jit.Kernel) -> None:
    with pytest.raises(TypeError, match="takes 2 arguments per launch, got 1"):
        kernel.bind(THREADS, SHARED, (None, torch.Tensor, float, 1))((1, 1, 1), tensor())


def test_much_shared_memory_is_asked_for_once(kernel: jit.Kernel, driver: FakeDriver) -> None:
    for size in (100_000, 90_000, 120_000, 1000):
        kernel.bind(THREADS, size, (None, torch.Tensor, float, 1))
    assert [value for _, _, value in driver.called("cuFuncSetAttribute")] == [100_000, 120_000]


@pytest.mark.parametrize("size", [-1, 232449])
def test_too_much_shared_memory_is_refused(kernel: jit.Kernel, size: int) -> None:
    with pytest.raises(ValueError, match=rf"asks for {size} bytes .*NVIDIA X has 23\d+: choose a config"):
        bind(kernel, shared=size)


@pytest.mark.parametrize("block", [0, 1025])
def test_a_block_of_a_wrong_size_is_refused(kernel: jit.Kernel, block: int) -> None:
    with pytest.raises(ValueError, match=f"a block of {block} threads; .* runs 1 to 1024"):
        bind(kernel, block=block)


def test_a_failed_launch_is_an_error_and_the_next_one_works(kernel: jit.Kernel, driver: FakeDriver) -> None:
    launch = bind(kernel)
    driver.failing["cuLaunchKernelEx"] = Status.CUDA_ERROR_OUT_OF_MEMORY
    with pytest.raises(torch.OutOfMemoryError, match=r"\(7, 1, 1\) blocks of 128 threads.*CUDA_ERROR_OUT_OF_MEMORY"):
        launch((7, 1, 1), None, tensor(), 1.0, 1)
    driver.failing["cuLaunchKernelEx"] = Status.CUDA_ERROR_LAUNCH_FAILED
    with pytest.raises(RuntimeError, match="kernel scale of scale.cu on cuda:0.*CUDA_ERROR_LAUNCH_FAILED, some words"):
        launch((7, 1, 1), None, tensor(), 1.0, 1)
    driver.failing.clear()
    launch((7, 1, 1), None, tensor(), 1.0, 1)


@pytest.mark.parametrize(
    ("version", "message"),
    [(12040, r"supports CUDA 12.4 .* install escort-sparse\[cuda12\], or update the driver"), (99000, "INVALID_IMAGE")],
)
def test_a_driver_that_cannot_load_the_binary(
    driver: FakeDriver, scale: Path, monkeypatch: pytest.MonkeyPatch, version: int, message: str
) -> None:
    monkeypatch.setattr(jit, "nvrtc_version", lambda: (13, 0))
    driver.version = version
    driver.failing["cuLibraryLoadData"] = Status.CUDA_ERROR_INVALID_IMAGE
    with pytest.raises(RuntimeError, match=message) as caught:
        jit.kernel(scale, {"FACTOR": 2}, torch.device("cuda:0"))
    assert ("update the driver" in str(caught.value)) == (version < 13000)


def test_a_driver_that_is_too_old_for_any_binary(driver: FakeDriver, scale: Path) -> None:
    driver.version = 11080
    with pytest.raises(RuntimeError, match="supports CUDA 11.8; CUDA kernels need 12.0: update the driver"):
        jit.kernel(scale, {"FACTOR": 2}, torch.device("cuda:0"))


def test_a_missing_entry_is_named(driver: FakeDriver, scale: Path) -> None:
    driver.failing["cuLibraryGetKernel"] = Status.CUDA_ERROR_NOT_FOUND
    with pytest.raises(RuntimeError, match="kernel other of scale.cu on cuda:0.*NOT_FOUND"):
        jit.kernel(scale, {"FACTOR": 2}, torch.device("cuda:0"), "other")


@pytest.mark.usefixtures("driver")
def test_a_gpu_that_is_too_old(scale: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(RuntimeError, match="NVIDIA X has compute capability 7.5; CUDA kernels need 8.0"):
        jit.kernel(scale, {"FACTOR": 1}, torch.device("cuda:0"))


# On a GPU

gpu = pytest.mark.gpu


def last_device() -> torch.device:
    return torch.device("cuda", torch.cuda.device_count() - 1)


def launch_scale(
    kernel: jit.Kernel, x: torch.Tensor, y: torch.Tensor, factor: float = 3.0, shared: int = SHARED
) -> None:
    bind(kernel, shared=shared)((-(-x.numel() // THREADS), 1, 1), x, y, factor, x.numel())


@gpu
@pytest.mark.parametrize("shared", [SHARED, 100_000])
def test_a_launch_computes(scale: Path, shared: int) -> None:
    kernel = jit.kernel(scale, {"FACTOR": 2}, torch.device("cuda"))
    x, y = torch.randn(1000, device="cuda"), torch.full((1001,), 9.0, device="cuda")
    launch_scale(kernel, x, y, shared=shared)
    torch.testing.assert_close(y[:1000], 6 * x + 0.5)
    assert y[1000] == 9
    bind(kernel, shared=shared)((8, 1, 1), None, y, 1.0, 1000)
    assert (y[:1000] == 2.5).all()


@gpu
def test_a_second_gpu_need_not_be_the_current_one(scale: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    kernel = jit.kernel(scale, {"FACTOR": 2}, last_device())
    x = torch.randn(1000, device=last_device())
    y = torch.empty_like(x)
    with torch.cuda.device(0):
        launch_scale(kernel, x, y)
        assert torch.cuda.current_device() == 0
    torch.testing.assert_close(y, 6 * x + 0.5)
    with pytest.raises(ValueError, match="cuda:0"):
        launch_scale(kernel, x.to("cuda:0"), y)


@gpu
def test_a_launch_runs_on_the_current_stream(scale: Path) -> None:
    kernel = jit.kernel(scale, {"FACTOR": 2}, torch.device("cuda"))
    x, y = torch.zeros(1 << 20, device="cuda"), torch.empty(1 << 20, device="cuda")
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # about 10 ms, in which a launch on another stream would read x too early
        x.fill_(1.0)
        launch_scale(kernel, x, y)
        y.mul_(2.0)
    stream.synchronize()
    assert (y == 13).all()


@gpu
def test_a_launch_is_captured(scale: Path) -> None:
    kernel = jit.kernel(scale, {"FACTOR": 2}, torch.device("cuda"))
    x, y = torch.zeros(1000, device="cuda"), torch.zeros(1000, device="cuda")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # the kernel's first launch
        launch_scale(kernel, x, y)
    assert (y == 0).all()
    for value in (1.0, 2.0):
        x.fill_(value)
        graph.replay()
        torch.testing.assert_close(y, 6 * x + 0.5)


@gpu
def test_threads_share_a_bound_launch(scale: Path) -> None:
    kernel = jit.kernel(scale, {"FACTOR": 2}, torch.device("cuda"))
    launch = kernel.bind(THREADS, SHARED, (torch.Tensor, torch.Tensor, float, 1000))
    x = torch.randn(1000, device="cuda")
    outputs = [torch.empty(1000, device="cuda") for _ in range(8)]
    torch.cuda.synchronize()

    def work(factor: int) -> None:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(200):
                launch((8, 1, 1), x, outputs[factor], float(factor))
        stream.synchronize()

    threads = [threading.Thread(target=work, args=(factor,)) for factor in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for factor, y in enumerate(outputs):
        torch.testing.assert_close(y, 2 * factor * x + 0.5)


@gpu
def test_a_launch_with_an_overlap(scale: Path) -> None:
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs compute capability 9.0")
    kernel = jit.kernel(scale, {"FACTOR": 2}, torch.device("cuda"))
    x, y = torch.randn(1024, device="cuda"), torch.empty(1024, device="cuda")
    torch.cuda.synchronize()  # this kernel does not wait for the one before it
    kernel.bind(THREADS, SHARED, (torch.Tensor, y, 3.0, 1024), overlap=True)((8, 1, 1), x)
    torch.testing.assert_close(y, 6 * x + 0.5)


@gpu
def test_what_the_gpu_has_not_is_refused_and_the_next_launch_works(scale: Path) -> None:
    kernel = jit.kernel(scale, {"FACTOR": 2}, torch.device("cuda"))
    x = torch.randn(1000, device="cuda")
    y = torch.empty_like(x)
    with pytest.raises(ValueError, match="bytes of shared memory per block"):
        launch_scale(kernel, x, y, shared=1 << 20)
    with pytest.raises(RuntimeError, match="cuLaunchKernelEx failed"):
        bind(kernel)((1, 1 << 20, 1), x, y, 3.0, 1000)
    with pytest.raises(TypeError, match="parameters of"):
        kernel.bind(THREADS, SHARED, (x, y, 3.0))
    launch_scale(kernel, x, y)
    torch.testing.assert_close(y, 6 * x + 0.5)


@gpu
def test_a_missing_entry_is_named_on_a_gpu(scale: Path) -> None:
    with pytest.raises(RuntimeError, match="kernel other of scale.cu"):
        jit.kernel(scale, {"FACTOR": 2}, torch.device("cuda"), "other")


def needs_hopper() -> None:
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs compute capability 9.0")


@gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bound", [False, True])
def test_a_box_is_copied_with_zeros_around_the_tensor(copy: Path, dtype: torch.dtype, bound: bool) -> None:
    needs_hopper()
    kernel = jit.kernel(copy, {"PIXELS": 8 * 4 * 2, "TAP": 0}, torch.device("cuda"), native=True)
    x = torch.randn(2, 5, 7, 128, device="cuda", dtype=dtype)
    map = tensor_maps.tiled(x, (128, 7, 5, 2), (64, 8, 4, 2))
    kinds = (torch.Tensor, int, int, int, int, 0, 0)
    launch = kernel.bind(THREADS, 0, (map if bound else jit.TensorMap, *kinds))
    around = torch.nn.functional.pad(x, (0, 0, 1, 9, 2, 9, 0, 2))
    for c, w, h, n in ((0, -1, -2, 0), (64, 3, 2, 1), (64, 0, 0, 0)):
        y = torch.full((2, 4, 8, 64), 9.0, device="cuda", dtype=dtype)
        launch((1, 1, 1), *([] if bound else [map]), y, c, w, h, n)
        assert torch.equal(y, around[n : n + 2, h + 2 : h + 6, w + 1 : w + 9, c : c + 64])


@gpu
@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_a_tap_is_copied_with_its_padding(copy: Path, stride: int, dilation: int) -> None:
    """3x3 with padding 1: every tap of the first 40 outputs; with a stride of 2 they reach the second image."""
    needs_hopper()
    kernel = jit.kernel(copy, {"PIXELS": 40, "TAP": 1}, torch.device("cuda"), native=True)
    x = torch.randn(3, 9, 13, 64, device="cuda", dtype=torch.float16)
    upper = 1 - dilation * 2
    map = tensor_maps.im2col(x, (64, 13, 9, 3), (-1, -1), (upper, upper), 64, 40, stride)
    launch = kernel.bind(THREADS, 0, (map, torch.Tensor, 0, -1, -1, 0, int, int))
    around = torch.nn.functional.pad(x, (0, 0, 1, 1, 1, 1))
    out_h, out_w = ((size + upper) // stride + 1 for size in (9, 13))
    for r in range(3):
        for s in range(3):
            y = torch.full((40, 64), 9.0, device="cuda", dtype=torch.float16)
            launch((1, 1, 1), y, s * dilation, r * dilation)
            tap = around[:, r * dilation :: stride, s * dilation :: stride][:, :out_h, :out_w]
            assert torch.equal(y, tap.reshape(-1, 64)[:40])


@gpu
def test_the_driver_refuses_a_box_that_is_too_large() -> None:
    needs_hopper()
    x = torch.zeros(2, 5, 7, 128, device="cuda", dtype=torch.float16)
    with pytest.raises(ValueError, match=r"box \(128, 8, 4, 2\).*INVALID_VALUE"):
        tensor_maps.tiled(x, (128, 7, 5, 2), (128, 8, 4, 2))
