"""kernels/cuda/sparse_tc.cuh without a GPU: the source compiled for the CPU, a thread for each of a cluster's.

Products, copies and barriers do what the documents of the hardware say, in byte addresses of a shared memory; copies
arrive in any order. Whether instructions in flight are waited for tests/test_sparse_tc.py reads in the machine code.
"""

from __future__ import annotations

import ctypes
import itertools
import re
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from escort import reference
from escort.cuda.compiler import KERNELS
from escort.cuda.gpu import H200
from escort.cuda.params import Divisor
from escort.cuda.params import pack as pack_params
from escort.filter import SparseFilter
from escort.methods.cuda.sparse_tc.config import SparseTcConfig
from escort.methods.cuda.sparse_tc.orders import order_filter
from escort.methods.cuda.sparse_tc.packing import pack
from escort.methods.cuda.sparse_tc.params import Params
from escort.methods.cuda.sparse_tc.tiling import Tiling, im2col_corners
from escort.problem import Activation, Epilogue, MemoryFormat, Precision, Problem
from tests.cases import FULL
from tests.host import compiled, struct_fields
from tests.mbarrier import MBARRIER
from tests.sparse_tc_model import laid_out
from tests.test_sparse_tc_layout import CASES, integers

CUDA_ON_A_CPU = """
#include <pthread.h>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <thread>
#include <vector>
using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __restrict__
struct Index { unsigned x; };
struct uint2 { u32 x, y; };
struct alignas(16) uint4 { u32 x, y, z, w; };
struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
static float2 make_float2(float x, float y) { return {x, y}; }
static float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
static uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
static int min(int a, int b) { return a < b ? a : b; }
static u32 __umulhi(u32 a, u32 b) { return u64(a) * b >> 32; }
template <class T> static T __ldg(const T* from) {
  if (reinterpret_cast<std::uintptr_t>(from) % sizeof(T)) std::abort();
  return *from;
}

struct __nv_bfloat162 { u16 x, y; };
static float widened(u16 bits) { const u32 word = u32(bits) << 16; float v; std::memcpy(&v, &word, 4); return v; }
static u16 rounded(float v) {
  u32 word;
  std::memcpy(&word, &v, 4);
  return (word + 0x7fff + (word >> 16 & 1)) >> 16;
}
static float2 __bfloat1622float2(__nv_bfloat162 v) { return {widened(v.x), widened(v.y)}; }

// Threads that meet.
struct Meeting {
  pthread_barrier_t barrier;
  u32 words[128];
  void of(int threads) { pthread_barrier_init(&barrier, nullptr, threads); }
  void wait() { pthread_barrier_wait(&barrier); }
};
"""
BLOCKS = """
struct Block {
  alignas(1024) u8 shared[SHARED_BYTES];
  std::map<u32, Barrier> barriers;
  Meeting all, warps[12], warpgroups[3], named[3];
};
static Block* blocks;
static Meeting cluster;
static Index gridDim;
static thread_local Index blockIdx, threadIdx;
static thread_local Block* block;
static void __syncthreads() { block->all.wait(); }
static void __syncwarp() { block->warps[threadIdx.x / 32].wait(); }
template <class T> static T __shfl_sync(u32, T value, int lane) {
  Meeting& warp = block->warps[threadIdx.x / 32];
  warp.words[threadIdx.x % 32] = value;
  warp.wait();
  const T v = warp.words[lane];
  warp.wait();
  return v;
}
// What tensor cores see: bf16, or TF32, which is the upper 19 bits of a float.
static float multiplied(const u8* from) {
  u32 bits = 0;
  std::memcpy(STORAGE ? (u8*)&bits + 2 : (u8*)&bits, from, STORAGE ? 2 : 4);
  bits &= ~0x1fffu;
  float v;
  std::memcpy(&v, &bits, 4);
  return v;
}
template <int SELECTOR>
void mma(float (&d)[PIXELS / 2], u64 a, u64 b, u32 metadata, int accumulate) {
  Meeting& group = block->warpgroups[threadIdx.x / 128];
  const int thread = threadIdx.x % 128, lane = thread % 32;
  group.words[thread] = metadata;
  group.wait();
  if (a >> 32 != (512 / 16 | 2u << 30) || b >> 32 != (1024 / 16 | 1u << 30)) std::abort();
  constexpr int BYTES = STORAGE ? 2 : 4;
  for (int i = 0; i < PIXELS / 2; i++) {
    const int row = thread / 32 * 16 + lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
    float sum = accumulate ? d[i] : 0.0f;
    for (int k = 0; k < 32 / BYTES; k++) {
      const int kept = 4 / BYTES, group_of = k / kept;
      const u32 word = group.words[thread / 32 * 32 + row % 8 * 4 + SELECTOR * 2 + group_of / 4];
      const u32 nibble = word >> (row % 16 >= 8 ? 16 : 0) >> group_of % 4 * 4 & 15;
      if (BYTES == 4 && nibble != 0b0100 && nibble != 0b1110) std::abort();
      const int channel = BYTES == 4 ? k * 2 + (nibble == 0b1110) : group_of * 4 + (k % 2 ? nibble >> 2 : nibble & 3);
      u32 at = (a & 0x3fff) * 16 + row * 64 + k * BYTES, from = (b & 0x3fff) * 16 + column * 128 + channel * BYTES;
      at ^= (at >> 7 & 3) << 4;
      from ^= (from >> 7 & 7) << 4;
      sum += multiplied(block->shared + at) * multiplied(block->shared + from);
    }
    d[i] = sum;
  }
  group.wait();
}
"""
#: In place of sparse_tc_ptx.cuh.
INSTRUCTIONS = """
#if STORAGE
using Element = u16;
#else
using Element = float;
#endif
struct TensorMap {
  Element* tensor;  // channels innermost
  int sizes[4], box[4], lower[2], upper[2], stride[2], pixels;
  Element zero;
  Element* at(int c, int w, int h, int n) const {
    const bool inside = c < sizes[0] && 0 <= w && w < sizes[1] && 0 <= h && h < sizes[2] && n < sizes[3];
    return inside ? tensor + ((n * (long long)sizes[2] + h) * sizes[1] + w) * sizes[0] + c : nullptr;
  }
};
void barrier_init(u32 barrier, int count) { block->barriers[barrier].all = block->barriers[barrier].left = count; }
void barrier_expect(u32 barrier, int bytes) { block->barriers.at(barrier).change(1, bytes); }
void barrier_arrive(u32 barrier) { block->barriers.at(barrier).change(1, 0); }
u32 barrier_of(u32 barrier, u32 other) { return barrier | other << 24; }
void barrier_arrive_remotely(u32 remote) { blocks[remote >> 24].barriers.at(remote & 0xffffff).change(1, 0); }
void barrier_arrive_in_cluster(u32 remote) { barrier_arrive_remotely(remote); }
u32 barrier_test(u32 barrier, u32 parity) { return block->barriers.at(barrier).has_ended(parity); }
bool is_elected() { return threadIdx.x % 32 == 0; }
void barrier_wait_opaque(u32 barrier, u32 parity) { block->barriers.at(barrier).wait(parity); }
void barrier_wait_in_cluster(u32 barrier, u32 parity) { barrier_wait_opaque(barrier, parity); }
void load_of_block(u32 own, u32 other, float4& v) { std::memcpy(&v, blocks[other].shared + own, sizeof v); }
void barriers_are_ready() {}
// Copies arrive later, and not in the order in which they were begun; the first of its kind when a test says.
static std::atomic<int> copies;
template <class Copy> void later(Copy copy) {
  static std::atomic<u32> number;
  const u32 n = number++;
  const std::chrono::microseconds delay(n == 0 ? FIRST_COPY_US : n * 2654435761u >> 22);
  copies++;
  std::thread([=, own = block]() mutable {
    std::this_thread::sleep_for(delay);
    block = own;
    copy();
    copies--;
  }).detach();
}
template <bool CLUSTERED>
void load_to_cluster(u32 to, const u8* from, int bytes, int count, u32 barrier) {
  for (int other = 0; other < (CLUSTERED ? count : 1); other++)
    later([=, of = CLUSTERED ? blocks + other : block] {
      std::memcpy(of->shared + to, from, bytes);
      of->barriers.at(barrier).change(0, -bytes);
    });
}
// A block of channels of a pixel, or zeros, in 128-byte swizzle.
u8* swizzled(u32 at, int byte) { return block->shared + ((at + byte) ^ ((at >> 7 & 7) << 4)); }
void load_pixel(u32 to, const TensorMap& map, int c, int w, int h, int n) {
  for (int i = 0; i < 128 / int(sizeof(Element)); i++) {
    const Element* const from = map.at(c + i, w, h, n);
    std::memcpy(swizzled(to, i * sizeof(Element)), from ? from : &map.zero, sizeof(Element));
  }
}
void load_box(u32 to, const TensorMap& map, int c, int w, int h, int n, u32 barrier) {
  later([=, &map] {
    u32 at = to;
    for (int i = 0; i < map.box[3]; i++)
      for (int j = 0; j < map.box[2]; j++)
        for (int k = 0; k < map.box[1]; k++, at += 128) load_pixel(at, map, c, w + k, h + j, n + i);
    block->barriers.at(barrier).change(0, -int(at - to));
  });
}
void load_im2col(u32 to, const TensorMap& map, int c, int w, int h, int n, u32 tap, u32 barrier) {
  const int right = tap & 0xffff, down = tap >> 16;
  later([=, &map]() mutable {
    for (int i = 0; i < map.pixels; i++) {
      load_pixel(to + i * 128, map, c, w + right, h + down, n);
      w += map.stride[0];
      if (w < map.sizes[1] + map.upper[0]) continue;
      w = map.lower[0], h += map.stride[1];
      if (h >= map.sizes[2] + map.upper[1]) h = map.lower[1], n++;
    }
    block->barriers.at(barrier).change(0, -map.pixels * 128);
  });
}
void store_box(const TensorMap& map, int c, int w, int h, int n, u32 from) {
  for (int i = 0; i < map.box[3]; i++)
    for (int j = 0; j < map.box[2]; j++)
      for (int k = 0; k < map.box[1]; k++, from += 128)
        for (int e = 0; e < 64; e++)
          if (Element* const to = map.at(c + e, w + k, h + j, n + i)) std::memcpy(to, swizzled(from, e * 2), 2);
}
void store_commit() {}
void store_wait() {}
void async_fence() {}
void meet() { cluster.wait(); }
void sync(int id, int threads) { (threads == 256 ? block->named[0] : block->named[id]).wait(); }
void mma_fence() {}
void mma_commit() {}
template <int IN_FLIGHT> void mma_wait() { __syncwarp(); }  // as it says: .sync
template <int REGISTERS> void give_registers_up() {}
template <int REGISTERS> void take_registers() {}
void let_next_kernel_start() {}
void wait_for_previous_kernel() {}
u32 shared_address(const void*) { return 0; }
void forget(float& v) { v = NAN; }
void forget(u32& v) { v = ~0u; }
void obscure(int&) {}
template <bool NOT_NEGATIVE> u32 pack(float low, float high) {
  if (NOT_NEGATIVE) low = std::fmax(low, 0.0f), high = std::fmax(high, 0.0f);
  return rounded(low) | u32(rounded(high)) << 16;
}
template <class Choose> u32 of_halves(u32 pair, u32 other, Choose choose) {
  return rounded(choose(widened(pair), widened(other))) |
         u32(rounded(choose(widened(pair >> 16), widened(other >> 16)))) << 16;
}
u32 larger(u32 pair, u32 other) { return of_halves(pair, other, [](float a, float b) { return std::fmax(a, b); }); }
u32 smaller(u32 pair, u32 other) { return of_halves(pair, other, [](float a, float b) { return std::fmin(a, b); }); }
float at_least_0(float v) { return std::fmax(v, 0.0f); }
float at_most_6(float v) { return std::fmin(v, 6.0f); }
template <class T> void load_shared(u32 address, T& v) {
  if (address % sizeof v) std::abort();
  std::memcpy(&v, block->shared + address, sizeof v);
}
template <class T> void store_shared(u32 address, T v) {
  if (address % sizeof v) std::abort();
  std::memcpy(block->shared + address, &v, sizeof v);
}
void add_shared(u32 address, float* d) {
  float4 v;
  load_shared(address, v);
  d[0] += v.x, d[1] += v.y, d[2] += v.z, d[3] += v.w;
}
void keep(u32, u32, u32) {}
void load_shared_if(u32 condition, u32 address, u32& v) { condition ? load_shared(address, v) : std::abort(); }
// Matrices of 8 x 8 between registers and shared memory; a lane has the address of a row.
void addresses(u32 address, u32* rows) {
  Meeting& warp = block->warps[threadIdx.x / 32];
  warp.words[threadIdx.x % 32] = address;
  warp.wait();
  for (int i = 0; i < 32; i++) rows[i] = warp.words[i];
  warp.wait();
}
template <int COUNT, bool TRANSPOSED> void store_matrices(u32 address, const u32* v) {
  u32 row[32];
  addresses(address, row);
  const int lane = threadIdx.x % 32;
  for (int i = 0; i < COUNT; i++)
    for (int e = 0; e < 2; e++) {
      const u16 half = v[i] >> 16 * e;
      const int r = TRANSPOSED ? lane % 4 * 2 + e : lane / 4, c = TRANSPOSED ? lane / 4 : lane % 4 * 2 + e;
      std::memcpy(block->shared + row[i * 8 + r] + c * 2, &half, 2);
    }
  __syncwarp();
}
template <int COUNT> void load_transposed(u32 address, u32* v) {
  u32 row[32];
  addresses(address, row);
  const int lane = threadIdx.x % 32;
  for (int i = 0; i < COUNT; i++) {
    u16 half[2];
    for (int e = 0; e < 2; e++) std::memcpy(half + e, block->shared + row[i * 8 + lane % 4 * 2 + e] + lane / 4 * 2, 2);
    v[i] = half[0] | u32(half[1]) << 16;
  }
  __syncwarp();
}
"""
#: As kernels/cuda/activation.cuh has it; what its text makes of numbers is tested in test_gpu_activations.py.
ACTIVATION = """
#ifdef ACTIVATION
#define BEYOND_BOUNDS 1
#define SLOPED 1
#else
#define BEYOND_BOUNDS 0
#define SLOPED 0
#endif
float activated(float v, float slope) { return v < 0 ? v * slope : v; }
"""
RUN = """
extern "C" int run(const TensorMap* x, const u8* a, const float* bias, const int* first, const u32* steps,
                   const int* out_order, TensorMap* y, TensorMap* residual, const Params* params, int samples,
                   int tile_groups, int clusters) {
  stuck = false;
  const int blocks_of_cluster = params->cluster;
  gridDim.x = clusters * blocks_of_cluster;
  for (int number = 0; number < clusters; number++) {
    std::vector<Block> memory(blocks_of_cluster);
    blocks = memory.data();
    cluster.of(384 * blocks_of_cluster);
    std::vector<std::thread> threads;
    for (int rank = 0; rank < blocks_of_cluster; rank++) {
      Block& of = memory[rank];
      std::memset(of.shared, 0xff, sizeof of.shared);
      of.all.of(384);
      for (Meeting& warp : of.warps) warp.of(32);
      for (Meeting& group : of.warpgroups) group.of(128);
      of.named[0].of(256), of.named[1].of(128), of.named[2].of(128);
      for (unsigned thread = 0; thread < 384; thread++)
        threads.emplace_back([=, &of] {
          block = &of;
          blockIdx.x = number * blocks_of_cluster + rank;
          threadIdx.x = thread;
#if BOXES_OUT
          sparse_tc(*x, a, bias, first, steps, *y, *residual, *params, samples, tile_groups);
#else
          sparse_tc(*x, a, bias, first, steps, out_order, y->tensor, residual->tensor, *params, samples, tile_groups);
#endif
        });
    }
    for (std::thread& thread : threads) thread.join();
    while (copies) std::this_thread::yield();
  }
  return stuck;
}
"""


class TensorMap(ctypes.Structure):
    _fields_ = (
        ("tensor", ctypes.c_void_p),
        ("sizes", ctypes.c_int * 4),
        ("box", ctypes.c_int * 4),
        ("lower", ctypes.c_int * 2),
        ("upper", ctypes.c_int * 2),
        ("stride", ctypes.c_int * 2),
        ("pixels", ctypes.c_int),
        ("zero", ctypes.c_uint32),  # of 16 bits or of 32
    )


def host_source() -> str:
    included: set[str] = set()

    def include(match: re.Match[str]) -> str:
        name = match[1]
        if name in included or name == "ptx.cuh":
            return ""
        included.add(name)
        return {"sparse_tc_ptx.cuh": INSTRUCTIONS, "activation.cuh": ACTIVATION}.get(name) or expanded(name)

    def expanded(name: str) -> str:
        return re.sub(r'#include "(.*)"\n', include, (KERNELS / name).read_text().replace("#pragma once\n", ""))

    text = re.sub(r"#include <cuda_\w+\.h>", "", expanded("sparse_tc.cuh"))
    assert "asm" not in text, "instructions belong to sparse_tc_ptx.cuh"
    text = text.replace("extern __shared__ __align__(1024) u8 memory[];", "u8* const memory = block->shared;")
    return CUDA_ON_A_CPU + MBARRIER + BLOCKS + text + RUN


#: A case, a config, and the memory format that comes with an epilogue.
KINDS = {
    "halo": ("3x3", SparseTcConfig("halo", 112, rows=7, cluster=2), "contiguous"),
    "halo along": ("3x3", SparseTcConfig("halo", 56, across=1, m_blocks=2, rows=7), "channels_last"),
    "columns": ("even kernel, uneven padding", SparseTcConfig("columns", 80, rows=5), "contiguous"),
    "columns of samples": (
        "dilation",
        SparseTcConfig("columns", 208, across=1, rows=11, samples=2, cluster=2),
        "channels_last",
    ),
    "im2col": ("stride 1 by 3, uneven padding", SparseTcConfig("im2col", 24, across=1, m_blocks=1), "channels_last"),
    "im2col across": ("dilation and stride", SparseTcConfig("im2col", 40), "contiguous"),
    "flat": ("pointwise", SparseTcConfig("flat", 48, m_blocks=2, cluster=2), "contiguous"),
    "flat along": ("pointwise, even plane", SparseTcConfig("flat", 24, across=1), "channels_last"),
}


def test_the_struct_is_the_dataclass() -> None:
    """Host and device name the kernel's parameters alike, in the same order."""
    text, types = (KERNELS / "sparse_tc_tiles.cuh").read_text(), {"int": ("int", "bool"), "u32": ("int",)}
    in_c = struct_fields(text, "Params")
    assert [name for _, name in in_c] == [field.name for field in fields(Params)]
    assert all(field.type in types.get(kind, (kind,)) for (kind, _), field in zip(in_c, fields(Params), strict=True))


@pytest.mark.parametrize("divisor", [1, 2, 3, 7, 196, 225, 1000, 12544, 2**20 + 1])
def test_divisors_divide(divisor: int) -> None:
    by = Divisor.of(divisor)
    for n in (0, 1, divisor - 1, divisor, divisor + 1, 12345678, 2**31 // divisor * divisor - 1, 2**31 - 1):
        assert (2 * n * by.magic >> 32) >> by.shift == n // divisor


@pytest.mark.parametrize("precision", ["bf16", "tf32"])
@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_source_computes_the_convolution(
    kind: str, memory_format: str, precision: Precision, tmp_path: Path
) -> None:
    name, config, with_epilogue = KINDS[kind]
    problem, density = CASES[name]
    epilogue = FULL if memory_format == with_epilogue else problem.epilogue
    config = replace(config, memory_format=memory_format)  # type: ignore[arg-type]
    tiling = Tiling.of(replace(problem, precision=precision, epilogue=epilogue), config, H200.shared_bytes)
    check(tiling, density, host_kernel(tiling, tmp_path))


@pytest.mark.parametrize(
    ("memory_format", "precision"), [("contiguous", "bf16"), ("channels_last", "bf16"), ("channels_last", "tf32")]
)
def test_one_kernel_computes_every_epilogue(memory_format: MemoryFormat, precision: Precision, tmp_path: Path) -> None:
    problem, density = CASES["pointwise, even plane"]
    config = SparseTcConfig("flat", 24, across=1, memory_format=memory_format)
    tiling = Tiling.of(replace(problem, precision=precision), config, H200.shared_bytes)
    run = host_kernel(tiling, tmp_path)
    activations: tuple[Activation, ...] = ("none", "relu", "relu6")
    for residual, activation in itertools.product((False, True), activations):
        epilogue = Epilogue(bias=True, residual=residual, activation=activation)
        check(replace(tiling, problem=replace(tiling.problem, epilogue=epilogue)), density, run)


@pytest.mark.parametrize("precision", ["bf16", "tf32"])
@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
@pytest.mark.parametrize("kind", ["flat", "flat along", "im2col across"])
def test_slopes_reach_their_channels(
    kind: str, memory_format: MemoryFormat, precision: Precision, tmp_path: Path
) -> None:
    """The activation comes last, and is compiled in."""
    name, config, _ = KINDS[kind]
    problem, density = CASES[name]
    epilogue = Epilogue(bias=True, activation="prelu")
    config = replace(config, memory_format=memory_format)
    tiling = Tiling.of(replace(problem, precision=precision, epilogue=epilogue), config, H200.shared_bytes)
    assert tiling.defines["ACTIVATION"] == "leaky_relu"
    run = host_kernel(tiling, tmp_path)
    for residual in (False, True):
        check(
            replace(tiling, problem=replace(tiling.problem, epilogue=replace(epilogue, residual=residual))),
            density,
            run,
        )


@pytest.mark.parametrize(
    ("name", "config", "memory_format", "precision"),
    [
        ("dilation", SparseTcConfig("columns", 176, across=1, rows=11, by_turns=True), "channels_last", "tf32"),
        ("dilation and stride", SparseTcConfig("im2col", 40, across=1, by_turns=True), "contiguous", "bf16"),
        (
            "pointwise",
            SparseTcConfig("flat", 48, across=1, m_blocks=2, cluster=2, by_turns=True),
            "channels_last",
            "bf16",
        ),
    ],
)
def test_warpgroups_take_turns(
    name: str, config: SparseTcConfig, memory_format: MemoryFormat, precision: Precision, tmp_path: Path
) -> None:
    problem, density = CASES[name]
    problem = replace(problem, precision=precision, epilogue=FULL)
    tiling = Tiling.of(problem, replace(config, memory_format=memory_format), H200.shared_bytes)
    check(tiling, density, host_kernel(tiling, tmp_path))


@pytest.mark.parametrize(
    ("name", "config", "precision"),
    [
        ("dilation and stride", SparseTcConfig("im2col", 32, across=1, m_blocks=2, by_turns=True, split=4), "bf16"),
        (
            "even kernel, uneven padding",
            SparseTcConfig("columns", 64, across=1, rows=4, by_turns=True, split=2),
            "bf16",
        ),
        # Shares of two and of three groups of eight pixels.
        ("dilation and stride", SparseTcConfig("im2col", 40, across=1, m_blocks=2, by_turns=True, split=2), "tf32"),
    ],
)
def test_thread_blocks_share_tiles(name: str, config: SparseTcConfig, precision: Precision, tmp_path: Path) -> None:
    problem, density = CASES[name]
    problem = replace(problem, in_channels=136, precision=precision, epilogue=FULL)
    tiling = Tiling.of(problem, replace(config, memory_format="channels_last"), H200.shared_bytes)
    check(tiling, density, host_kernel(tiling, tmp_path))


def test_warpgroups_by_turns_wait_for_a_copy_that_comes_late(tmp_path: Path) -> None:
    """Behind later ones that they do not share, where stages are few."""
    problem = Problem(1, 256, 16, 32, 64, (1, 1), precision="bf16")
    config = SparseTcConfig("flat", 256, across=1, memory_format="channels_last", by_turns=True)
    tiling = Tiling.of(problem, config, H200.shared_bytes)
    check(tiling, 0.1, host_kernel(tiling, tmp_path, first_copy_us=300_000))


def host_kernel(tiling: Tiling, folder: Path, first_copy_us: int = 1000) -> Callable[..., int]:
    defines = tiling.defines | {"SHARED_BYTES": tiling.memory.bytes, "FIRST_COPY_US": first_copy_us}
    run: Callable[..., int] = compiled(host_source(), folder, defines).run
    return run


def check(tiling: Tiling, density: float, run: Callable[..., int]) -> None:
    """The kernel's results are the reference's, for small integers as input."""
    problem, config, epilogue = tiling.problem, tiling.config, tiling.problem.epilogue
    weight = integers(problem.weight_shape, density)
    ordered = order_filter(SparseFilter.from_dense(weight), config.memory_format, tiling.element)
    packed = pack(ordered, tiling)
    generator = np.random.default_rng(1)
    x = generator.integers(-3, 4, problem.input_shape).astype(np.float64)
    bias = np.where(packed.out_order >= 0, packed.out_order % 5, 0).astype(np.float32) * epilogue.bias
    slopes = torch.arange(problem.out_channels) % 4 / 2 - 0.5 if epilogue.activation == "prelu" else None
    if slopes is not None:
        of_places = slopes.numpy()[np.maximum(packed.out_order, 0)]
        bias = np.concatenate([bias, of_places.astype(np.float32)])
    last = config.takes_channels_last
    shape = problem.output_shape if not last else tuple(problem.output_shape[i] for i in (0, 2, 3, 1))
    residual = torch.from_numpy(generator.integers(-9, 9, shape)).to(problem.storage)
    y = torch.full(shape, float("nan"), dtype=problem.storage)
    nhwc = torch.from_numpy(laid_out(x, ordered, tiling)).to(problem.storage).contiguous()
    samples, height, width, channels = nhwc.shape
    x_map = TensorMap(nhwc.data_ptr(), (channels, width, height, samples), tiling.load)
    whole_rows = config.tap_group in ("columns", "halo")
    plane = problem.out_height * problem.out_width
    sizes = (problem.out_width, problem.out_height, samples) if whole_rows else (samples * plane, 1, 1)
    y_map, residual_map = (TensorMap(t.data_ptr(), (problem.out_channels, *sizes), tiling.store) for t in (y, residual))
    if config.tap_group == "im2col":
        x_map.lower, x_map.upper = im2col_corners(problem)
        x_map.stride, x_map.pixels = problem.stride[::-1], config.pixels
    elif config.tap_group == "flat":
        x_map.sizes = channels, samples * height * width, 1, 1
    params = pack_params(Params.of(tiling))
    tables = (packed.weight_tiles, bias, packed.first, packed.steps, packed.out_order)
    pointers = [ctypes.c_void_p(np.ascontiguousarray(table).ctypes.data) for table in tables]
    maps = [ctypes.byref(one) for one in (y_map, residual_map)]
    tile_groups = tiling.tile_groups(samples)
    clusters = max(tile_groups * tiling.channel_tiles // 2, 1)  # some compute several tiles
    assert run(ctypes.byref(x_map), *pointers, *maps, params, samples, tile_groups, clusters) == 0, (
        "a barrier was waited for in vain"
    )
    by_channel = torch.arange(problem.out_channels) % 5.0 * epilogue.bias
    added = (residual.permute(0, 3, 1, 2) if last else residual) if epilogue.residual else None
    expected = reference.conv2d(problem, torch.from_numpy(x), torch.from_numpy(weight), by_channel, added, slopes)
    computed = (y.permute(0, 3, 1, 2) if last else y).double()
    assert reference.compare(computed, expected) <= 2**-8
    exact = expected.abs() < (128 if problem.precision == "bf16" else 2**24)
    assert torch.equal(computed[exact], expected[exact]), "small integers are exact"
