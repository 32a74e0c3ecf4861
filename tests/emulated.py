"""Kernels of kernels/cuda without a GPU: their sources compiled for the CPU, launched with the same arguments.

A block's threads run one after the other on one thread of the CPU, each until it waits at a barrier. Loads check that
they are aligned. What depends on the architecture is left out, as for compute capability 8.0.
"""

from __future__ import annotations

import ctypes
import re
import struct
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from escort.cuda.compiler import KERNELS, Variant
from tests.host import compiled

_PRELUDE = """
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <ucontext.h>
#include <utility>
#include <vector>
#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __restrict__
#define __shared__ static
#define __align__(n) alignas(n)
struct Index { unsigned x, y, z; };
struct float2 { float x, y; };
struct uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
static Index blockIdx, gridDim;
static Index threadIdx;
using std::max, std::min;
// A thread that waits lets the others run until all have come.
struct Thread {
  ucontext_t context;
  std::vector<char> stack;
  bool is_done;
};
static ucontext_t scheduler;
static std::vector<Thread> threads;
struct Barrier {
  unsigned expected, arrived, passed;
  void wait() {
    const unsigned own = passed;
    if (++arrived == expected) arrived = 0, passed++;
    while (passed == own) swapcontext(&threads[threadIdx.x].context, &scheduler);
  }
};
static Barrier barrier, warp_barriers[32];
static void __syncthreads() { barrier.wait(); }
static float __shfl_xor_sync(unsigned, float value, unsigned by) {
  static float lanes[1024];
  lanes[threadIdx.x] = value;
  __syncthreads();
  const float other = lanes[threadIdx.x ^ by];
  __syncthreads();
  return other;
}
static float __uint_as_float(unsigned bits) { float v; std::memcpy(&v, &bits, 4); return v; }
static unsigned __float_as_uint(float v) { unsigned bits; std::memcpy(&bits, &v, 4); return bits; }
static void __syncwarp() {}
static unsigned __cvta_generic_to_shared(const void*) { return 0; }
static unsigned __umulhi(unsigned a, unsigned b) { return (std::uint64_t)a * b >> 32; }
#define __powf(x, y) std::pow(x, y)
static float rsqrtf(float x) { return 1.f / std::sqrt(x); }
template <class T> static T __ldg(const T* from) {
  if (reinterpret_cast<std::uintptr_t>(from) % sizeof(T)) std::abort();
  return *from;
}
struct __half2 { _Float16 low, high; };
static float2 __half22float2(__half2 pair) { return {(float)pair.low, (float)pair.high}; }
static __half2 __floats2half2_rn(float low, float high) { return {(_Float16)low, (_Float16)high}; }
struct __nv_bfloat162 { std::uint16_t low, high; };
static float2 __bfloat1622float2(__nv_bfloat162 pair) {
  return {__uint_as_float(pair.low << 16), __uint_as_float(pair.high << 16)};
}
static std::uint16_t nearest(float v) {
  const unsigned bits = __float_as_uint(v);
  return std::isnan(v) ? 0x7fff : bits + 0x7fff + (bits >> 16 & 1) >> 16;
}
static __nv_bfloat162 __floats2bfloat162_rn(float low, float high) { return {nearest(low), nearest(high)}; }
static float __int_as_float(int bits) { return __uint_as_float(bits); }
static float max_nan(float a, float b) { return std::isnan(a) || std::isnan(b) ? NAN : a > b ? a : b; }
static float min_nan(float a, float b) { return std::isnan(a) || std::isnan(b) ? NAN : a < b ? a : b; }
static void start_copy(uint4* to, const uint4* from) { *to = __ldg(from); }
static void end_copies() {}
// In place of mma.cuh, which is PTX: lanes show one another what they have, and each sums its own part.
static float product(unsigned a, unsigned b) {
#if STORAGE == 0
  return __uint_as_float(a & 0xffffe000) * __uint_as_float(b & 0xffffe000);
#else
  unsigned both[2] = {a, b};
  float2 pairs[2];
  for (int i = 0; i < 2; i++) {
#if STORAGE == 1
    __half2 halves;
    std::memcpy(&halves, both + i, 4);
    pairs[i] = __half22float2(halves);
#else
    __nv_bfloat162 halves;
    std::memcpy(&halves, both + i, 4);
    pairs[i] = __bfloat1622float2(halves);
#endif
  }
  return pairs[0].x * pairs[1].x + pairs[0].y * pairs[1].y;
#endif
}
static void multiply_add(float (&sum)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0,
                         unsigned b1) {
  static unsigned shown[32][32][6];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const unsigned own[6] = {a0, a1, a2, a3, b0, b1};
  std::copy(own, own + 6, shown[warp][lane]);
  warp_barriers[warp].wait();
  for (int i = 0; i < 4; i++)
    for (int word = 0; word < 8; word++) {
      const unsigned(*const a)[6] = shown[warp] + lane / 4 * 4;
      const unsigned(*const b)[6] = shown[warp] + (lane % 4 * 2 + i % 2) * 4;
      sum[i] += product(a[word % 4][word / 4 * 2 + i / 2], b[word % 4][4 + word / 4]);
    }
  warp_barriers[warp].wait();
}
// The same in place of wgmma.cuh, with weights as tensor cores find them.
#if GROUP
static void show_to_products() {}
static void begin_products() {}
static void end_products() {}
static void start_product(float (*sum)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, const uint4* weights) {
  const unsigned(*const b)[2][8][4] = (const unsigned(*)[2][8][4])weights;
  const int t = threadIdx.x % 4;
  for (int j = 0; j < TILES; j++) {
    const int column = threadIdx.x % 32 / 4;  // that of which the lane shows the weights
    multiply_add(sum[j], a0, a1, a2, a3, b[j][0][column][t], b[j][1][column][t]);
  }
}
#endif
static unsigned rounded_to_tf32(unsigned bits) { return bits + 0x1000 & 0xffffe000; }
// Two activations in place of activation.cuh, which is PTX.
#define leaky_relu 1
#define silu 2
#ifdef ACTIVATION
#define BEYOND_BOUNDS 1
#define SLOPED (ACTIVATION == leaky_relu)
#else
#define BEYOND_BOUNDS 0
#define SLOPED 0
#endif
static float activated(float v, float slope) { return SLOPED ? v < 0.f ? v * slope : v : v / (1.f + std::exp(-v)); }
KERNEL
template <class... Args, std::size_t... I>
static void call(void (*kernel)(Args...), void** args, std::index_sequence<I...>) {
  kernel(*(std::remove_const_t<Args>*)args[I]...);
}
template <class... Args> static void call(void (*kernel)(Args...), void** args) {
  call(kernel, args, std::index_sequence_for<Args...>());
}
static void** kernel_args;
static void start() {
  call(NAME, kernel_args);
  threads[threadIdx.x].is_done = true;
}
extern "C" void run(void** args, unsigned x, unsigned y, unsigned z, unsigned block) {
  gridDim = {x, y, z};
  kernel_args = args;
  threads.resize(block);
  barrier = {block, 0, 0};
  for (Barrier& warp : warp_barriers) warp = {32, 0, 0};
  for (blockIdx.z = 0; blockIdx.z < z; blockIdx.z++)
    for (blockIdx.y = 0; blockIdx.y < y; blockIdx.y++)
      for (blockIdx.x = 0; blockIdx.x < x; blockIdx.x++) {
        for (Thread& thread : threads) {
          thread.stack.resize(1 << 16), thread.is_done = false;
          getcontext(&thread.context);
          thread.context.uc_stack.ss_sp = thread.stack.data(), thread.context.uc_stack.ss_size = thread.stack.size();
          thread.context.uc_link = &scheduler;
          makecontext(&thread.context, start, 0);
        }
        for (unsigned running = block; running;) {
          running = 0;
          for (threadIdx = {0, 0, 0}; threadIdx.x < block; threadIdx.x++) {
            if (threads[threadIdx.x].is_done) continue;
            swapcontext(&scheduler, &threads[threadIdx.x].context);
            running += !threads[threadIdx.x].is_done;
          }
        }
      }
}
"""


def launch(variant: Variant, grid: Sequence[int], block: int, args: Sequence[Any], folder: Path) -> None:
    """Runs a kernel on tensors of the CPU, with arguments as `Kernel.bind` and a launch take them."""
    assert isinstance(variant.source, str)
    values = [_bytes(arg) for arg in args]
    buffers = [ctypes.create_string_buffer(value, len(value)) for value in values]
    addresses = (ctypes.c_void_p * len(buffers))(*(ctypes.addressof(buffer) for buffer in buffers))
    _library(variant.source, tuple(sorted(variant.defines.items())), folder).run(addresses, *grid, block)


def _bytes(arg: Any) -> bytes:
    if isinstance(arg, bytes):
        return arg
    if isinstance(arg, torch.Tensor) or arg is None:
        return struct.pack("P", 0 if arg is None else arg.data_ptr())
    return struct.pack("f" if isinstance(arg, float) else "i", arg)


@lru_cache
def _library(source: str, defines: tuple[tuple[str, object], ...], folder: Path) -> ctypes.CDLL:
    text = _PRELUDE.replace("KERNEL", _text(source)).replace("NAME", Path(source).stem)
    return compiled(text, folder, dict(defines))


_BOUNDING = r'asm\("(max|min)\.NaN\.f32 %0, %0, %1;" : "\+f"\((\w+)\) : "f"\((\w+)\)\);'


def _text(name: str, seen: tuple[str, ...] = ("activation.cuh", "copies.cuh", "mma.cuh", "wgmma.cuh")) -> str:
    """A source with our own headers in it and without the toolkit's."""
    text = (KERNELS / name).read_text()
    for header in re.findall(r'#include "(.*)"', text):
        text = text.replace(f'#include "{header}"', "" if header in seen else _text(header, seen))
        seen = (*seen, header)
    text = text.replace("extern __shared__ uint4 shared[];", "static uint4 shared[1 << 14];")
    text = re.sub(_BOUNDING, r"\2 = \1_nan(\2, \3);", text)
    return re.sub(r"#include <.*>|#pragma (?:once|unroll.*)", "", text)
