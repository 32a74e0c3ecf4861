"""kernels/channels_last.cu without a GPU: the source compiled for the CPU, a thread for each of a block's."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import numpy as np
import pytest

from escort.compiler import KERNELS
from escort.methods.sparse_tc import arrange_pieces

#: What the kernel needs of CUDA, and a loop over its blocks. Loads and stores check that they are aligned.
CUDA_ON_A_CPU = """
#include <pthread.h>
#include <cstdint>
#include <cstdlib>
#include <thread>
#include <vector>
#define __global__
#define __device__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)
#define __restrict__
struct Index { unsigned x, y; };
struct int2 { int x, y; };
struct uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
static Index blockIdx, gridDim;
static thread_local Index threadIdx;
static pthread_barrier_t barrier;
static uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
static int min(int a, int b) { return a < b ? a : b; }
static void __syncthreads() { pthread_barrier_wait(&barrier); }
template <class T> static T __ldg(const T* from) {
  if (reinterpret_cast<std::uintptr_t>(from) % sizeof(T)) std::abort();
  return *from;
}
#include "channels_last.cu"
extern "C" void run(const u16* x, uint4* to, const int2* order, int channels, int plane, int pieces, int piece,
                    unsigned grid_x, unsigned grid_y) {
  gridDim = {grid_x, grid_y};
  pthread_barrier_init(&barrier, nullptr, THREADS);
  for (blockIdx.y = 0; blockIdx.y < grid_y; blockIdx.y++)
    for (blockIdx.x = 0; blockIdx.x < grid_x; blockIdx.x++) {
      std::vector<std::thread> threads;
      for (unsigned thread = 0; thread < THREADS; thread++)
        threads.emplace_back([=] {
          threadIdx.x = thread;
          channels_last(x, to, order, channels, plane, pieces, piece);
        });
      for (std::thread& thread : threads) thread.join();
    }
}
"""


@pytest.mark.parametrize(
    ("images", "channels", "plane"),
    [(2, 64, 49), (1, 100, 196), (2, 8, 150), (1, 130, 12 * 12), (1, 3, 1), (1, 70, 336)],
)
def test_channels_are_laid_out_in_order(images: int, channels: int, plane: int, tmp_path: Path) -> None:
    vector, pieces, piece = arrange_pieces(plane)
    assert plane % vector == 0 and piece % 8 == 0 and piece <= 128 and 0 < plane - (pieces - 1) * piece <= piece
    (tmp_path / "host.cpp").write_text(CUDA_ON_A_CPU)
    command = ["g++", "-std=c++17", "-O1", "-w", "-pthread", "-shared", "-fPIC", f"-I{KERNELS}", f"-DVECTOR={vector}"]
    subprocess.run([*command, "host.cpp", "-o", "host.so"], cwd=tmp_path, check=True)
    generator = np.random.default_rng(0)
    places = -(-channels // 64) * 64
    order = generator.permutation(places).astype(np.int32)
    order[order >= channels] = -1
    x = generator.integers(1, 1 << 16, (images, channels, plane)).astype(np.uint16)
    to = np.full((images, plane, places), 0xDEAD, dtype=np.uint16)
    pointers = (ctypes.c_void_p(array.ctypes.data) for array in (x, to, order))
    grid = images * pieces, places // 64
    ctypes.CDLL(str(tmp_path / "host.so")).run(*pointers, channels, plane, pieces, piece, *grid)
    expected = np.where(order >= 0, x.transpose(0, 2, 1)[..., order], 0)
    assert np.array_equal(to, expected)
