"""kernels/cuda/sparse_tc_arrange.cu without a GPU: the source compiled for the CPU, a thread for each of a block's."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import numpy as np
import pytest

from escort.cuda.compiler import KERNELS
from escort.methods.cuda.sparse_tc.arrange import cut_into_strips
from escort.methods.cuda.sparse_tc.config import ELEMENTS
from tests.host import compiled

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
// To TF32, the nearest, those in the middle away from zero.
static unsigned rounded(unsigned bits) {
  const bool nan = (bits & 0x7fffffff) > 0x7f800000;
  return nan ? 0x7fffffff : (bits + 0x1000) & ~0x1fffu;
}
KERNEL
extern "C" void run(const Element* x, uint4* to, const Channels* order, int channels, int plane, int strips, int strip,
                    unsigned grid_x, unsigned grid_y) {
  gridDim = {grid_x, grid_y};
  pthread_barrier_init(&barrier, nullptr, THREADS);
  for (blockIdx.y = 0; blockIdx.y < grid_y; blockIdx.y++)
    for (blockIdx.x = 0; blockIdx.x < grid_x; blockIdx.x++) {
      std::vector<std::thread> threads;
      for (unsigned thread = 0; thread < THREADS; thread++)
        threads.emplace_back([=] {
          threadIdx.x = thread;
          sparse_tc_arrange(x, to, order, channels, plane, strips, strip);
        });
      for (std::thread& thread : threads) thread.join();
    }
}
"""


def host_source() -> str:
    text, asm = (KERNELS / "sparse_tc_arrange.cu").read_text(), r"asm\(\"cvt\.rna\.tf32\.f32 .*?\"r\"\((.*?)\)\);\n"
    return CUDA_ON_A_CPU.replace("KERNEL", re.sub(asm, r"rounded = ::rounded(\1);\n", text))


@pytest.mark.parametrize("precision", ["fp16", "tf32"])
@pytest.mark.parametrize(
    ("samples", "channels", "plane"),
    [(2, 64, 49), (1, 100, 196), (2, 8, 150), (1, 130, 12 * 12), (1, 3, 1), (1, 70, 336)],
)
def test_channels_are_laid_out_in_order(
    samples: int, channels: int, plane: int, precision: str, tmp_path: Path
) -> None:
    element = ELEMENTS[precision]
    vector, strips, strip = cut_into_strips(plane, element)
    assert vector * element.bytes <= 16 and plane % vector == 0
    assert strip % 8 == 0 and strip <= 128 and 0 < plane - (strips - 1) * strip <= strip
    library = compiled(host_source(), tmp_path, {"BYTES": element.bytes, "VECTOR": vector})
    generator = np.random.default_rng(0)
    places = -(-channels // element.k_block) * element.k_block
    order = generator.permutation(places).astype(np.int32)
    order[order >= channels] = -1
    x = generator.integers(1, 1 << 8 * element.bytes, (samples, channels, plane)).astype(f"u{element.bytes}")
    if precision == "tf32":
        special = np.array([0x7F800000, 0xFF800000, 0x7FFFFFFF, 0x7F800001, 0x3F801000], dtype=np.uint32)
        x.flat[: len(special)] = special[: x.size]
    to = np.full((samples, plane, places), 0xDEAD, dtype=x.dtype)
    pointers = (ctypes.c_void_p(array.ctypes.data) for array in (x, to, order))
    grid = samples * strips, places // element.k_block
    library.run(*pointers, channels, plane, strips, strip, *grid)
    expected = np.where(order >= 0, x.transpose(0, 2, 1)[..., order], x.dtype.type(0))
    if precision == "tf32":
        check_rounded(to, expected)
    else:
        assert np.array_equal(to, expected)


def check_rounded(stored: np.ndarray, exact: np.ndarray) -> None:
    """That floats, as bits, are the nearest TF32, which has 13 bits less; infinity and NaN stay what they are."""
    with np.errstate(invalid="ignore"):
        y, x = (np.ascontiguousarray(bits).view(np.float32).astype(np.float64) for bits in (stored, exact))
    finite = np.abs(x) < 2.0**127
    assert np.array_equal(np.isnan(y), np.isnan(x)) and np.array_equal(y[np.isinf(x)], x[np.isinf(x)])
    half = np.spacing(np.abs(x[finite]).astype(np.float32)) * 2.0**12
    assert (np.abs(y[finite] - x[finite]) <= half).all()
    assert not (stored[finite] & 0x1FFF).any()
