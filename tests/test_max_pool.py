"""kernels/cuda/max_pool.cu: its source compiled for the CPU, a loop in place of the threads; and on a GPU."""

from __future__ import annotations

import ctypes
import math
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from escort.cuda.compiler import KERNELS
from escort.layers import MaxPool2d, pool
from tests.host import compiled, struct_fields

#: What the kernel needs of CUDA, and a loop over its threads. Loads check that they are aligned.
CUDA_ON_A_CPU = """
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __restrict__
struct Index { unsigned x; };
struct uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
static Index blockIdx, threadIdx;
static float __uint_as_float(unsigned bits) { float v; std::memcpy(&v, &bits, 4); return v; }
static unsigned __float_as_uint(float v) { unsigned bits; std::memcpy(&bits, &v, 4); return bits; }
static unsigned __cvta_generic_to_shared(const void*) { return 0; }
template <class T> static T __ldg(const T* from) {
  if (reinterpret_cast<std::uintptr_t>(from) % sizeof(T)) std::abort();
  return *from;
}
static float larger(float a, float b) { return std::isnan(a) || std::isnan(b) ? NAN : a > b ? a : b; }
// Of the 16-bit numbers in either half: ordered as integers are, once negative ones are turned round.
static unsigned larger_pair(unsigned a, unsigned b, unsigned infinity) {
  unsigned found = 0;
  for (int shift = 0; shift < 32; shift += 16) {
    const unsigned v = a >> shift & 0xffff, w = b >> shift & 0xffff;
    const int left = v & 0x8000 ? -int(v & 0x7fff) : int(v), right = w & 0x8000 ? -int(w & 0x7fff) : int(w);
    const bool nan = (v & 0x7fff) > infinity || (w & 0x7fff) > infinity;
    found |= (nan ? 0x7fff : left > right ? v : w) << shift;
  }
  return found;
}
KERNEL
extern "C" void run(const Element* x, Element* y, int vectors, int pitch, int height, int width, int out_height,
                    int out_width, const Params* params, int blocks) {
  for (blockIdx.x = 0; blockIdx.x < unsigned(blocks); blockIdx.x++)
    for (threadIdx.x = 0; threadIdx.x < THREADS; threadIdx.x++)
      max_pool(x, y, vectors, pitch, height, width, out_height, out_width, *params);
}
"""
INFINITY = {torch.float16: "0x7c00", torch.bfloat16: "0x7f80"}


def host_source(dtype: torch.dtype) -> str:
    text = (KERNELS / "max_pool.cu").read_text()
    text = re.sub(r"asm\(LARGER .*\"f\"\((.*)\)\);\n", r"larger = ::larger(larger, \1);\n", text)
    pairs = rf"word = larger_pair(word, \1, {INFINITY.get(dtype, 0)});\n"
    return CUDA_ON_A_CPU.replace("KERNEL", re.sub(r"asm\(LARGER .*\"r\"\((.*)\)\);\n", pairs, text))


@pytest.fixture
def on_the_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """CUDA's max_pool2d runs for tensors of the CPU, by the kernel's source."""

    class Kernel:
        def __init__(self, source: str, defines: dict[str, Any], device: torch.device) -> None:
            assert source == "max_pool.cu"
            self.run = compiled(host_source(pool.POOLED_ON_GPU[defines["STORAGE"]]), tmp_path, defines).run

        def bind(self, block: int, shared_bytes: int, args: Any, *, overlap: bool) -> Any:
            assert (block, shared_bytes, len(args)) == (256, 0, 9) and overlap

            def launch(grid: tuple[int, int, int], x: torch.Tensor, y: torch.Tensor, *sizes: int) -> None:
                assert math.prod(grid) == grid[0]
                self.run(ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(y.data_ptr()), *sizes, args[-1], grid[0])

            return launch

    monkeypatch.setattr("escort.cuda.kernel.kernel", Kernel)
    monkeypatch.setattr(pool, "_check_pool", lambda *args: None)
    monkeypatch.setattr(pool, "_in_channels_last", lies_in_channels_last)
    pool._pool_launch.cache_clear()
    pool._pooling.cache_clear()


def lies_in_channels_last(x: torch.Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


#: Kernel, stride, padding, dilation, ceil_mode, channels, height, width
WINDOWS = (
    ((3, 3), (2, 2), (1, 1), (1, 1), False, 64, 12, 12),
    ((3, 3), (2, 2), (0, 0), (1, 1), True, 12, 13, 9),
    ((3, 3), (1, 1), (1, 1), (1, 1), False, 20, 7, 7),
    ((2, 2), (2, 2), (0, 0), (1, 1), False, 7, 8, 10),
    ((3, 2), (1, 3), (1, 0), (2, 3), True, 10, 9, 14),
    ((3, 3), (2, 2), (1, 1), (3, 3), False, 4, 5, 5),
)


def example(window: Any, dtype: torch.dtype, memory_format: torch.memory_format, samples: int = 2) -> torch.Tensor:
    *_, channels, height, width = window
    x = torch.randn(samples, channels, height, width).to(dtype)
    x[0, 0, 2, 2], x[-1, -1, 3, 1], x[-1, 0] = float("nan"), float("inf"), float("-inf")
    return x.contiguous(memory_format=memory_format)


def check(y: torch.Tensor, x: torch.Tensor, window: Any) -> None:
    expected = F.max_pool2d(x.float(), *window[:4], ceil_mode=window[4]).to(x.dtype)
    assert torch.equal(y.nan_to_num(nan=1e4), expected.nan_to_num(nan=1e4))
    memory_format = torch.channels_last if lies_in_channels_last(x) else torch.contiguous_format
    assert y.is_contiguous(memory_format=memory_format)


both_memory_formats = pytest.mark.parametrize(
    "memory_format", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"]
)


def test_the_struct_is_the_dataclass() -> None:
    in_c = struct_fields((KERNELS / "max_pool.cu").read_text(), "Params")
    assert in_c == [(field.type, field.name) for field in fields(pool.Params)]


any_type = pytest.mark.parametrize("dtype", pool.POOLED_ON_GPU, ids=str)


@pytest.mark.usefixtures("on_the_cpu")
@both_memory_formats
@any_type
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_the_source_pools_as_torch_does(window: Any, dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    x = example(window, dtype, memory_format)
    check(pool._max_pool2d_on_gpu(x, *window[:5]), x, window)


@pytest.mark.usefixtures("on_the_cpu")
@both_memory_formats
def test_more_outputs_than_are_numbered_are_torchs(
    memory_format: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "_MOST_VECTORS", 7)
    monkeypatch.setattr("escort.cuda.kernel.kernel", None)  # none is made
    x = example(WINDOWS[1], torch.float32, memory_format)
    check(pool._max_pool2d_on_gpu(x, *WINDOWS[1][:5]), x, WINDOWS[1])


@pytest.mark.gpu
@both_memory_formats
@any_type
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_pools_as_torch_does_on_the_gpu(window: Any, dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    layer = MaxPool2d(*window[:4], ceil_mode=window[4])
    for samples in (0, 1, 5):
        x = (
            example(window, dtype, memory_format, max(samples, 1))[:samples]
            .cuda()
            .contiguous(memory_format=memory_format)
        )
        y = layer(x)
        assert y.device == x.device
        if samples:
            check(y.cpu(), x.cpu(), window)
    torch.library.opcheck(pool.max_pool2d, (x.nan_to_num(), *map(list, window[:4]), window[4]))  # NaN is not NaN to it


@pytest.mark.gpu
def test_what_the_kernel_does_not_take_is_torchs_on_the_gpu() -> None:
    x = torch.randn(2, 3, 8, 8, device="cuda")
    for unusual in (x.double(), x[0]):
        assert torch.equal(MaxPool2d(2)(unusual), nn.MaxPool2d(2)(unusual))
    odd = torch.randn(x.numel() + 1, device="cuda")[1:].view(x.shape)
    assert torch.equal(MaxPool2d(2)(odd), nn.MaxPool2d(2)(odd))


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="takes float32 .N, C, H, W., got torch.float64"):
        pool.max_pool2d(torch.zeros(1, 1, 4, 4, dtype=torch.float64), [2, 2], [2, 2], [0, 0], [1, 1], False)
