"""generated_arrange.cu without a GPU: the source compiled for the CPU, against what the interpreter reads."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import pytest
import torch

from escort.filter import SparseFilter
from escort.methods.cuda.generated.codegen import arrange_defines
from escort.methods.cuda.generated.config import GeneratedConfig
from escort.methods.cuda.generated.steps import Chunk, KernelSteps
from escort.problem import Problem
from tests import generated_interpreter
from tests.host import compiled

THREADS = 32
#: What the kernel needs of CUDA, and a loop over its blocks and threads.
CUDA_ON_A_CPU = """
#include <cstring>
#define __device__
#define __forceinline__ inline
#define __global__
#define __constant__ static
#define __launch_bounds__(threads)
#define __restrict__
struct Index { unsigned x, y; };
struct uint4 { unsigned x, y, z, w; };
static Index blockIdx, threadIdx, gridDim;
static uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
template <class T> static T __ldg(const T* from) { return *from; }
static unsigned __cvta_generic_to_shared(const void*) { return 0; }
static unsigned __float_as_uint(float value) { unsigned bits; std::memcpy(&bits, &value, 4); return bits; }
#include "generated_arrange.cu"
extern "C" void run(const void* x, void* to, int samples, unsigned words, unsigned blocks_x, unsigned blocks_y) {
  gridDim = {blocks_x, blocks_y};
  for (blockIdx.y = 0; blockIdx.y < blocks_y; blockIdx.y++)
    for (blockIdx.x = 0; blockIdx.x < blocks_x; blockIdx.x++)
      for (threadIdx.x = 0; threadIdx.x < THREADS; threadIdx.x++)
        generated_arrange(static_cast<const Element*>(x), static_cast<uint4*>(to), samples, words);
}
"""


def arranged(kernel_steps: KernelSteps, x: np.ndarray, folder: Path) -> np.ndarray:
    """What the kernel makes of x (N, C, H, W), as (planes, words) of 32 bits."""
    run = compiled(CUDA_ON_A_CPU, folder, arrange_defines(kernel_steps, THREADS)).run
    words = kernel_steps.arranged_words(len(x))
    to = np.full((x.shape[1] * len(kernel_steps.words.phases), words), 0xDEADBEEF, dtype=np.uint32)
    pointers = (ctypes.c_void_p(x.ctypes.data), ctypes.c_void_p(to.ctypes.data))
    run(*pointers, len(x), words, -(-words // (4 * THREADS)), max(len(to) // 2, 1))  # some blocks take several planes
    return to


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize(
    ("kernel_size", "stride", "dilation", "padding", "planes"),
    [
        ((3, 3), (1, 1), (1, 1), (1, 1, 1, 1), 1),
        ((3, 3), (2, 2), (1, 1), (1, 1, 1, 1), 4),
        ((1, 1), (2, 2), (1, 1), (0, 0, 0, 0), 1),
        ((3, 2), (2, 1), (2, 1), (0, 2, 1, 0), 1),
        ((5, 3), (3, 2), (1, 1), (2, 1, 0, 1), 6),
    ],
)
def test_the_input_is_laid_out_as_the_interpreter_reads_it(
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    dilation: tuple[int, int],
    padding: tuple[int, int, int, int],
    planes: int,
    precision: str,
    tmp_path: Path,
) -> None:
    problem = Problem(3, 2, 9, 8, 4, kernel_size, stride, padding, dilation, precision=precision)  # type: ignore[arg-type]
    sparse_filter = SparseFilter.from_dense(torch.ones(problem.weight_shape))
    kernel_steps = KernelSteps.of(problem, sparse_filter, GeneratedConfig(4, 12, 1, 2, copy=0, arranged=True))
    assert kernel_steps.tiles(3) == 1 and len(kernel_steps.words.phases) == planes
    x = (
        np.random.default_rng(0)
        .standard_normal(problem.input_shape)
        .astype(np.float32 if precision == "fp32" else np.float16)
    )
    to = arranged(kernel_steps, x, tmp_path)
    stage = generated_interpreter.stage(kernel_steps, x.astype(np.float64), Chunk(range(2), ()), 0)
    elements = to.view(x.dtype).reshape(*to.shape, -1)
    expected = stage.reshape(len(to), -1, elements.shape[-1])
    read = kernel_steps.config.tile + kernel_steps.words.reach
    assert np.array_equal(elements[:, :read], expected[:, :read])
