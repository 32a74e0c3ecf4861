"""kernels/generated.cuh without a GPU: how producers fill a stage, compiled for the CPU, against the interpreter.

Copies are carried out when they are issued, and barriers do nothing: a ring with room for all chunks of a tile needs
none.
"""

from __future__ import annotations

import ctypes
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from escort.codegen import GeneratedConfig, Program
from escort.compiler import KERNELS
from escort.problem import Problem
from escort.sparse import StretchedCSR
from tests.test_arrange import arranged

#: What the source needs of CUDA. Shared addresses are offsets into `shared`.
CUDA_ON_A_CPU = """
#include <algorithm>
#include <cstring>
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
static Index blockIdx, threadIdx, gridDim;
template <class A, class B> static auto min(A a, B b) { return a < b ? a : b; }
template <class A, class B> static auto max(A a, B b) { return a > b ? a : b; }
static void __syncthreads() {}
static void __syncwarp() {}
static unsigned __cvta_generic_to_shared(const void*) { return 0; }
static float __uint_as_float(unsigned bits) { float value; std::memcpy(&value, &bits, 4); return value; }
static unsigned __float_as_uint(float value) { unsigned bits; std::memcpy(&bits, &value, 4); return bits; }
static float __half2float(unsigned short) { return 0.0f; }
static unsigned short __ushort_as_half(unsigned short bits) { return bits; }
static unsigned short __half_as_ushort(unsigned short bits) { return bits; }
static unsigned short __float2half_rn(float) { return 0; }
char shared[1 << 20];
"""
RUN = """
extern "C" void run(const void* x, int images, unsigned tiles, unsigned block, void* to) {
  std::memset(shared, 0xff, sizeof shared);
  blockIdx.x = block;
  gridDim.x = PIECES * tiles * SPLIT;
  for (threadIdx.x = CONSUMERS * LANES; threadIdx.x < THREADS; threadIdx.x++)
    produce(make_ring(), static_cast<const Input*>(x), images, tiles, block % SPLIT);
  std::memcpy(to, shared, STAGES * STAGE_BYTES);
}
"""


def host_source(program: Program) -> str:
    """The program's macros and generated.cuh, its copies as memcpy and its other instructions left out."""
    text = (KERNELS / "generated.cuh").read_text()
    text, copies = re.subn(
        r'asm volatile\("\{ \.reg \.pred zero;.*?: "memory"\);',
        "zero ? std::memset(shared + to, 0, COPY * 4) : std::memcpy(shared + to, from, COPY * 4);",
        text,
        flags=re.DOTALL,
    )
    text, bulk_copies = re.subn(
        r'asm volatile\("cp\.async\.bulk\.shared::cluster\.global.*?'
        r'"r"\(\s*(.*?)\),\s*"l"\((.*?)\), "n"\((.*?)\), "r".*?;',
        r"std::memcpy(shared + (\1), \2, \3);",
        text,
        flags=re.DOTALL,
    )
    assert (copies, bulk_copies) == (1, 1)
    text = re.sub(r"\basm( volatile)?\(", "NOTHING(", text.replace("#include <cuda_fp16.h>", ""))
    macros, _ = program.text().split('#include "generated.cuh"')
    return CUDA_ON_A_CPU + macros + text + RUN


@pytest.mark.parametrize(
    ("dtype", "config"),
    [
        ("fp32", GeneratedConfig(4, 3, 2, 3, copy=1, stages=2)),
        ("fp32", GeneratedConfig(4, 3, 1, 3, copy=2, stages=2)),
        ("fp32", GeneratedConfig(4, 2, 2, 5, copy=4, stages=2)),
        ("fp16", GeneratedConfig(4, 3, 2, 3, copy=1, stages=2)),
        ("fp16", GeneratedConfig(4, 3, 2, 6, copy=2, stages=2)),
        ("fp32", GeneratedConfig(4, 3, 2, 3, copy=4, stages=2, arranged=True)),
        ("fp16", GeneratedConfig(4, 3, 2, 3, copy=4, stages=2, arranged=True)),
        ("fp32", GeneratedConfig(4, 3, 1, 3, copy=0, stages=2, arranged=True)),
        ("fp16", GeneratedConfig(4, 3, 1, 2, copy=0, stages=2, arranged=True, split=2)),
    ],
    ids=str,
)
def test_producers_fill_stages_as_the_interpreter_reads_them(
    dtype: str, config: GeneratedConfig, tmp_path: Path
) -> None:
    channels = 5 if config.split == 1 else 7  # of a group: the last chunk, and the last part, have fewer
    problem = Problem(3, 2 * channels, 10, 8, 16, (3, 3), padding=(1, 1, 1, 1), groups=2, dtype=dtype)  # type: ignore[arg-type]
    weight = torch.ones(problem.weight_shape)
    program = Program.of(problem, StretchedCSR.from_dense(weight, 2), config)
    assert all(len(piece.chunks) == config.stages for piece in program.pieces)
    x = np.random.default_rng(0).standard_normal(problem.input_shape)
    x = x.astype(np.float32 if dtype == "fp32" else np.float16)
    source = arranged(program, x, tmp_path) if config.arranged else x
    (tmp_path / "staging.cpp").write_text(host_source(program))
    command = ["g++", "-std=c++17", "-w", "-shared", "-fPIC", "staging.cpp", "-o", "staging.so"]
    subprocess.run(command, cwd=tmp_path, check=True)
    run = ctypes.CDLL(str(tmp_path / "staging.so")).run
    tiles, planes = program.tiles(3), config.channel_block * program.channel_words
    to = np.empty((config.stages, planes), dtype=np.uint32)
    for tile in (0, tiles // 2, tiles - 1):
        for place, piece in enumerate(program.pieces):
            block = (place // config.split * tiles + tile) * config.split + place % config.split
            pointers = (ctypes.c_void_p(source.ctypes.data), 3, tiles, block, ctypes.c_void_p(to.ctypes.data))
            run(*pointers)
            for stage, chunk in zip(to, piece.chunks, strict=True):
                filled = stage.view(x.dtype).reshape(config.channel_block, program.channel_words, -1)
                expected = program._stage(x.astype(np.float64), chunk, tile * config.tile)
                expected = expected.reshape(*filled.shape)[: len(chunk.channels), : config.tile + program.words.reach]
                assert np.array_equal(filled[: len(chunk.channels), : expected.shape[1]], expected), (tile, place)
