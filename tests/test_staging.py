"""generated.cuh without a GPU: the ring and its producers, compiled for the CPU, a thread for each of theirs.

Barriers count arrivals and bytes as the GPU's do, so that a mistake in the protocol shows as a wrong stage or as a wait
that does not end. Consumers only look on: what they find in a stage is compared with what the interpreter reads.
"""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from escort.cuda.compiler import KERNELS
from escort.filter import SparseFilter
from escort.methods.cuda.generated import codegen
from escort.methods.cuda.generated.config import GeneratedConfig
from escort.methods.cuda.generated.steps import KernelSteps
from escort.problem import Problem
from tests import generated_interpreter
from tests.host import compiled
from tests.mbarrier import MBARRIER
from tests.test_generated_arrange import arranged

#: What the source needs of CUDA. Shared addresses are offsets into `shared`.
CUDA_ON_A_CPU = """
#include <algorithm>
#include <cstring>
#include <map>
#include <thread>
#include <vector>
#define __device__
#define __global__
#define __constant__ static
#define __shared__
#define __forceinline__ inline
#define __align__(bytes)
#define __launch_bounds__(...)
#define __restrict__
#define NOTHING(...)
struct Index { unsigned x; };
static Index blockIdx, gridDim;
static thread_local Index threadIdx;
template <class A, class B> static auto min(A a, B b) { return a < b ? a : b; }
template <class A, class B> static auto max(A a, B b) { return a > b ? a : b; }
static float __uint_as_float(unsigned bits) { float value; std::memcpy(&value, &bits, 4); return value; }
static unsigned __float_as_uint(float value) { unsigned bits; std::memcpy(&bits, &value, 4); return bits; }
static float __half2float(unsigned short) { return 0.0f; }
static unsigned short __ushort_as_half(unsigned short bits) { return bits; }
static unsigned short __half_as_ushort(unsigned short bits) { return bits; }
static unsigned short __float2half_rn(float) { return 0; }
static void __syncthreads() {}
#define BEYOND_BOUNDS 0
static float activated(float v, float) { return v; }  // of activation.cuh; nothing is computed here
char shared[1 << 20];

"""
#: What ptx.cuh declares, and barriers of warps.
PTX = """
typedef unsigned u32;
static std::map<u32, Barrier> barriers;  // by address; of warps behind all addresses
static void barrier_init(u32 at, u32 count) { barriers[at].all = barriers[at].left = count; }
static void barrier_arrive(u32 at) { barriers.at(at).change(1, 0); }
static void barrier_arrive_after_copies(u32 at) { barrier_arrive(at); }
static void barrier_expect(u32 at, u32 bytes) { barriers.at(at).change(1, bytes); }
static void barrier_wait_opaque(u32 at, u32 parity) { barriers.at(at).wait(parity); }
static u32 shared_address(const void*) { return 0; }
static u32 load4(u32 from) { return 0; }
static void let_next_kernel_start() {}
static void wait_for_previous_kernel() {}
static void __syncwarp() {
  Barrier& warp = barriers.at(~0u - threadIdx.x / 32);
  std::unique_lock<std::mutex> lock(warp.mutex);
  const unsigned phase = warp.phase;
  lock.unlock();
  warp.change(1, 0);
  warp.wait(phase);
}
"""
RUN = """
extern "C" int run(const void* x, int samples, unsigned tiles, unsigned block, unsigned grid, char* to) {
  std::memset(shared, 0xff, sizeof shared);
  barriers.clear();
  stuck = false;
  blockIdx.x = block;
  gridDim.x = grid;
  for (unsigned warp = 0; warp < THREADS / LANES; warp++) barrier_init(~0u - warp, LANES);
  Ring ring;
  for (threadIdx.x = 0; threadIdx.x < LANES; threadIdx.x++) ring = make_ring();
  std::vector<std::thread> threads;
  for (unsigned thread = CONSUMERS * LANES; thread < (CONSUMERS + PRODUCERS) * LANES; thread++)
    threads.emplace_back([=] {
      threadIdx.x = thread;
      produce(ring, static_cast<const Input*>(x), samples, tiles, block % SPLIT);
    });
  for (unsigned warp = 0; warp < CONSUMERS + PREFETCH_WARPS; warp++)
    threads.emplace_back([=] {
      unsigned stage = 0, parity = 0, seen = 0;
      for (Work work(tiles); work.left(); work.next()) {
        if (MULTICAST > 1 && work.tile >= tiles) continue;
        unsigned chunk = work.begin;
        for (unsigned count = 0; count < CHUNKS; count++) {
          barriers.at(ring.full + stage * 8).wait(parity);
          if (warp == seen % CONSUMERS)
            std::memcpy(to + (seen * CHUNKS + chunk) * STAGE_BYTES, shared + stage * STAGE_BYTES, STAGE_BYTES);
          barrier_arrive(ring.empty + stage * 8);
          if (++chunk == CHUNKS) chunk = 0;
          if (++stage == STAGES) {
            stage = 0;
            parity ^= 1;
          }
        }
        seen++;
      }
    });
  for (std::thread& thread : threads) thread.join();
  return stuck;
}
"""
#: The source's other instructions, as patterns, and what they are here. The rest is left out.
INSTRUCTIONS = (
    (
        r'asm volatile\("\{ \.reg \.pred zero;.*?"memory"\);',
        "zero ? std::memset(shared + to, 0, COPY * 4) : std::memcpy(shared + to, from, COPY * 4);",
    ),
    (
        r'asm volatile\("cp\.async\.bulk\.shared::cluster\.global.*?"n"\((.*?)\).*?"memory"\);',
        r"std::memcpy(shared + to, from, \1), barriers.at(barrier).change(0, -(\1));",
    ),
)


def host_source(kernel_steps: KernelSteps) -> str:
    """The kernel's macros and generated.cuh for the CPU."""
    text = (KERNELS / "generated.cuh").read_text()
    for pattern, here in INSTRUCTIONS:
        text, count = re.subn(pattern, here, text, flags=re.DOTALL)
        assert count == 1, pattern
    text = re.sub(r"\basm( volatile)?\(", "NOTHING(", re.sub("#include .*", "", text))
    macros, _ = codegen.text(kernel_steps).split('#include "generated.cuh"')
    return CUDA_ON_A_CPU + MBARRIER + PTX + macros + text + RUN


@pytest.mark.parametrize(
    ("precision", "config"),
    [
        ("fp32", GeneratedConfig(4, 3, 2, 3, copy=1, stages=2)),
        ("fp32", GeneratedConfig(4, 3, 1, 3, copy=2, stages=2)),
        ("fp32", GeneratedConfig(4, 2, 2, 5, copy=4, stages=2, start_points=2)),
        ("fp16", GeneratedConfig(4, 3, 2, 3, copy=1, stages=2)),
        ("fp16", GeneratedConfig(4, 3, 2, 6, copy=2, stages=2)),
        ("fp32", GeneratedConfig(4, 3, 2, 3, copy=4, stages=2, arranged=True)),
        ("fp16", GeneratedConfig(4, 3, 2, 3, copy=4, stages=2, arranged=True)),
        ("fp32", GeneratedConfig(4, 3, 1, 3, copy=0, stages=2, arranged=True)),
        ("fp16", GeneratedConfig(4, 3, 1, 2, copy=0, stages=2, arranged=True, split=2)),
        ("fp32", GeneratedConfig(4, 2, 2, 5, copy=2, stages=2, start_points=2, multicast=2, prefetch_warps=2)),
        ("fp16", GeneratedConfig(4, 3, 1, 3, copy=0, stages=2, arranged=True, multicast=4, prefetch_warps=1)),
    ],
    ids=str,
)
def test_the_ring_holds_what_the_interpreter_reads(precision: str, config: GeneratedConfig, tmp_path: Path) -> None:
    channels = 14 if config.split == 1 else 15  # of a group: the last chunk, and the last part, have fewer
    problem = Problem(3, 2 * channels, 10, 8, 16, (3, 3), padding=(1, 1, 1, 1), groups=2, precision=precision)  # type: ignore[arg-type]
    weight = torch.ones(problem.weight_shape)
    kernel_steps = KernelSteps.of(problem, SparseFilter.from_dense(weight, 2), config)
    x = np.random.default_rng(0).standard_normal(problem.input_shape)
    x = x.astype(np.float32 if precision == "fp32" else np.float16)
    source = arranged(kernel_steps, x, tmp_path) if config.arranged else x
    run = compiled(host_source(kernel_steps), tmp_path).run
    tiles, chunks = kernel_steps.tiles(3), len(kernel_steps.parts[0].slices[0])
    assert chunks > config.stages, "stages are filled several times"
    grid = 3 * config.multicast if config.split == 1 else config.split  # some are left one item more
    groups = -(-tiles // config.multicast)
    for block in range(grid):
        items = range(block // config.cluster, len(kernel_steps.parts) * groups, grid // config.cluster)
        work = [(i // groups, i % groups * config.multicast + block % config.multicast) for i in items]
        work = [(part, tile) for part, tile in work if tile < tiles]
        ring = np.empty((len(work), chunks, config.channel_block, kernel_steps.stage.channel_words), dtype=np.uint32)
        pointers = (ctypes.c_void_p(source.ctypes.data), 3, tiles, block, grid, ctypes.c_void_p(ring.ctypes.data))
        assert run(*pointers) == 0, "a barrier was waited for in vain"
        for (part, tile), stages in zip(work, ring, strict=True):
            own_chunks = kernel_steps.parts[part].slices[block % config.split]
            for stage, chunk in zip(stages, own_chunks, strict=True):
                copied = stage.view(x.dtype).reshape(*stage.shape, -1)[: len(chunk.channels)]
                expected = generated_interpreter.stage(kernel_steps, x.astype(np.float64), chunk, tile * config.tile)
                expected = expected.reshape(*stage.shape, -1)[
                    : len(chunk.channels), : config.tile + kernel_steps.words.reach
                ]
                assert np.array_equal(copied[:, : expected.shape[1]], expected), (part, tile, chunk.channels)
