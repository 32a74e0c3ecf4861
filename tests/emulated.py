"""Kernels of kernels/cuda without a GPU: their sources compiled for the CPU, launched with the same arguments.

A block's threads run one after the other, until each waits for the others of its block or warp; that they wait for the
same is checked. Loads check that they are aligned. Dynamic shared memory is NaN at first and checks its bounds. What
depends on the architecture is left out, as for compute capability 8.0. The blocks of a cluster run together, each with
dynamic shared memory of its own.
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
static Index blockIdx, blockDim, gridDim;
static Index threadIdx;
using std::max, std::min;
enum State { READY, AT_WARP, AT_BLOCK, AT_CLUSTER, DONE };
struct Thread {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(1 << 17);
  State state;
};
static std::vector<Thread> threads;  // of all blocks of a cluster
static std::size_t current, block_threads;
static ucontext_t scheduler;
static void pause_at(State state) {
  Thread& self = threads[current];
  self.state = state;
  swapcontext(&self.context, &scheduler);
}
static void __syncthreads() { pause_at(AT_BLOCK); }
static void __syncwarp() { pause_at(AT_WARP); }
// What each lane of the warp gives, for as long as nobody gives anything else.
template <class T> static const T* of_warp(T value) {
  static std::vector<T> values;
  values.resize(threads.size());
  __syncwarp();
  values[current] = value;
  __syncwarp();
  return &values[current / 32 * 32];
}
static float __shfl_xor_sync(unsigned, float value, unsigned by) { return of_warp(value)[threadIdx.x % 32 ^ by]; }
static float __uint_as_float(unsigned bits) { float v; std::memcpy(&v, &bits, 4); return v; }
static unsigned __float_as_uint(float v) { unsigned bits; std::memcpy(&bits, &v, 4); return bits; }
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
// In place of ptx.cuh and mma.cuh.
typedef unsigned u32;
static uint4 shared_of_blocks[8][1 << 14];
#define dynamic_shared shared_of_blocks[current / block_threads]
static std::size_t dynamic_bytes;
template <class T> static T& shared(u32 address) {
  if (address % sizeof(T) || address + sizeof(T) > dynamic_bytes) std::abort();
  return *(T*)((char*)dynamic_shared + address);
}
static u32 shared_address(const void* p) { return (const char*)p - (const char*)dynamic_shared; }
static uint4 load16(u32 from) { return shared<uint4>(from); }
static void store16(u32 to, uint4 words) { shared<uint4>(to) = words; }
static void store4(u32 to, u32 word) { shared<u32>(to) = word; }
static void copy16(u32 to, const void* from) { store16(to, __ldg((const uint4*)from)); }
static void copy16_or_zeros(u32 to, const void* from, bool is_read) {
  store16(to, is_read ? __ldg((const uint4*)from) : uint4());
}
static uint4 load16_once(const void* from) { return __ldg((const uint4*)from); }
static void meet_blocks() { pause_at(AT_CLUSTER); }
static float of_block(const float* own, unsigned rank) {
  return *(const float*)((const char*)shared_of_blocks[rank] + shared_address(own));
}
static void wait_for_copies() {}
static void wait_for_previous_kernel() {}
static void let_next_kernel_start() {}
static float element(u32 word, int i) {
  const std::uint16_t bits = word >> 16 * i;
#if STORAGE == 1
  _Float16 half;
  std::memcpy(&half, &bits, 2);
  return half;
#else
  return __uint_as_float(bits << 16);
#endif
}
static u32 max_nan(u32 a, u32 b) {
  u32 result = 0;
  for (int i = 0; i < 2; i++) {
    const bool is_first = std::isnan(element(a, i)) || element(a, i) > element(b, i);
    result |= (is_first ? a : b) & 0xffffu << 16 * i;
  }
  return result;
}
static u32 min_nan(u32 a, u32 b) {
  u32 result = 0;
  for (int i = 0; i < 2; i++) {
    const bool is_first = std::isnan(element(a, i)) || element(a, i) < element(b, i);
    result |= (is_first ? a : b) & 0xffffu << 16 * i;
  }
  return result;
}
template <int WORDS> static void load_matrices(u32 (&words)[WORDS], u32 address) {
  const u32* const rows = of_warp(address);
  for (int i = 0; i < WORDS; i++)
    words[i] = (&shared<uint4>(rows[8 * i + threadIdx.x % 32 / 4]).x)[threadIdx.x % 4];
}
static void load_words(u32 (&words)[4], u32 address) { load_matrices(words, address); }
static void load_words8(u32 (&words)[2], u32 address) { load_matrices(words, address); }
static float product(u32 a, u32 b) {
#if STORAGE == 0
  return __uint_as_float(a & 0xffffe000) * __uint_as_float(b & 0xffffe000);
#else
  return element(a, 0) * element(b, 0) + element(a, 1) * element(b, 1);
#endif
}
template <int WORDS> struct Factors { u32 a[WORDS], b[WORDS / 2]; };
template <int WORDS> static void multiply(float (&sum)[4], const Factors<WORDS>& own) {
  const Factors<WORDS>* const lanes = of_warp(own);
  for (int i = 0; i < 4; i++)
    for (int k = 0; k < 2 * WORDS; k++) {
      const u32 a = lanes[threadIdx.x % 32 / 4 * 4 + k % 4].a[k / 4 * 2 + i / 2];
      sum[i] += product(a, lanes[(threadIdx.x % 4 * 2 + i % 2) * 4 + k % 4].b[k / 4]);
    }
}
static void multiply_add(float (&sum)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  multiply<4>(sum, {{a0, a1, a2, a3}, {b0, b1}});
}
static void multiply_add8(float (&sum)[4], u32 a0, u32 a1, u32 b) { multiply<2>(sum, {{a0, a1}, {b}}); }
// In place of wgmma.cuh, with weights where tensor cores find them.
#if GROUP
static void show_to_products() {}
static void begin_products() {}
static void end_products() {}
static void start_product(float (*sum)[4], u32 a0, u32 a1, u32 a2, u32 a3, const uint4* weights) {
  const u32(*const b)[2][8][4] = (const u32(*)[2][8][4])weights;
  const int t = threadIdx.x % 4, column = threadIdx.x % 32 / 4;  // those of which the lane gives the weights
  for (int j = 0; j < TILES; j++) multiply_add(sum[j], a0, a1, a2, a3, b[j][0][column][t], b[j][1][column][t]);
}
#endif
static u32 rounded_to_tf32(u32 bits) { return bits + 0x1000 & 0xffffe000; }
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
static void** arguments;
static void start() {
  call(NAME, arguments);
  threads[current].state = DONE;
}
// Lets threads go on that wait where all others of their warp or block do.
static void release() {
  bool is_ready = false;
  auto pass = [&](auto begin, auto end, State state) {
    auto waits = [&](const Thread& thread) { return thread.state == state || thread.state == DONE; };
    if (!std::all_of(begin, end, waits)) return;
    for (auto thread = begin; thread != end; thread++)
      if (thread->state == state) thread->state = READY, is_ready = true;
  };
  for (std::size_t warp = 0; warp < threads.size(); warp += 32)
    pass(threads.begin() + warp, threads.begin() + min(warp + 32, threads.size()), AT_WARP);
  for (std::size_t block = 0; !is_ready && block < threads.size(); block += block_threads)
    pass(threads.begin() + block, threads.begin() + block + block_threads, AT_BLOCK);
  if (!is_ready) pass(threads.begin(), threads.end(), AT_CLUSTER);
  if (!is_ready && std::any_of(threads.begin(), threads.end(), [](auto& thread) { return thread.state != DONE; }))
    std::abort();
}
static void run_cluster() {
  const unsigned first = blockIdx.x;
  auto is_done = [](const Thread& thread) { return thread.state == DONE; };
  for (Thread& thread : threads) {
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.data(), thread.context.uc_stack.ss_size = thread.stack.size();
    thread.context.uc_link = &scheduler;
    makecontext(&thread.context, start, 0);
    thread.state = READY;
  }
  while (!std::all_of(threads.begin(), threads.end(), is_done)) {
    for (current = 0; current < threads.size(); current++) {
      threadIdx.x = current % block_threads, blockIdx.x = first + current / block_threads;
      if (threads[current].state == READY) swapcontext(&scheduler, &threads[current].context);
    }
    release();
  }
  blockIdx.x = first;
}
extern "C" void run(void** args, unsigned x, unsigned y, unsigned z, unsigned block, unsigned shared_bytes,
                    unsigned cluster) {
  arguments = args, gridDim = {x, y, z}, blockDim = {block, 1, 1}, dynamic_bytes = shared_bytes, block_threads = block;
  threads.resize(cluster * block);
  for (blockIdx.z = 0; blockIdx.z < z; blockIdx.z++)
    for (blockIdx.y = 0; blockIdx.y < y; blockIdx.y++)
      for (blockIdx.x = 0; blockIdx.x < x; blockIdx.x += cluster) {
        for (unsigned rank = 0; rank < cluster; rank++) std::memset(shared_of_blocks[rank], 0xff, shared_bytes);
        run_cluster();
      }
}
"""


def launch(
    variant: Variant,
    grid: Sequence[int],
    block: int,
    args: Sequence[Any],
    folder: Path,
    shared_bytes: int = 0,
    cluster: int = 1,
) -> None:
    """Runs a kernel on tensors of the CPU, with arguments as `Kernel.bind` and a launch take them."""
    assert isinstance(variant.source, str)
    values = [_bytes(arg) for arg in args]
    buffers = [ctypes.create_string_buffer(value, len(value)) for value in values]
    addresses = (ctypes.c_void_p * len(buffers))(*(ctypes.addressof(buffer) for buffer in buffers))
    library = _library(variant.source, tuple(sorted(variant.defines.items())), folder)
    library.run(addresses, *grid, block, shared_bytes, cluster)


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


_BOUNDING = r'asm\("(max|min)\.NaN\.(?:f32|" PAIR ") %0, %0, %1;" : "\+[fr]"\((\w+)\) : "[fr]"\((\w+)\)\);'
_REPLACED = "activation.cuh", "cluster.cuh", "mma.cuh", "ptx.cuh", "wgmma.cuh"


def _text(name: str, seen: tuple[str, ...] = _REPLACED) -> str:
    """A source with our own headers in it and without the toolkit's."""
    text = (KERNELS / name).read_text()
    for header in re.findall(r'#include "(.*)"', text):
        text = text.replace(f'#include "{header}"', "" if header in seen else _text(header, seen))
        seen = (*seen, header)
    text = re.sub(_BOUNDING, r"\2 = \1_nan(\2, \3);", text)
    text = re.sub(r"extern __shared__ (\w+) (\w+)\[\];", r"\1* const \2 = dynamic_shared;", text)
    return re.sub(r"#include <.*>|#pragma (?:once|unroll.*)", "", text)
