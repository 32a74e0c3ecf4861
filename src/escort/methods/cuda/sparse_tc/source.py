"""The text of a kernel: the instruction that multiplies, whose registers are named one by one, and sparse_tc.cuh."""

from __future__ import annotations

from functools import lru_cache

from escort.cuda.compiler import Text
from escort.methods.cuda.sparse_tc.config import Element


@lru_cache
def kernel_source(pixels: int, element: Element) -> Text:
    """The kernel for products of so many pixels, whose registers are named one by one."""
    sums, depth, kind = pixels // 2, element.k_block // 2, element.type
    transposed = ", 0, 0" if element.bytes == 2 else ""  # matrices of other types cannot be
    registers = ", ".join(f"%{i}" for i in range(sums))
    outputs = ", ".join(f'"+f"(d[{i}])' for i in range(sums))
    return Text(
        "sparse_tc.cu",
        f"""using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

// d (64 x {pixels}) = a (64 x {depth}, compressed) * b, or += a * b.
template <int SELECTOR>
__device__ __forceinline__ void mma(float (&d)[{sums}], u64 a, u64 b, u32 metadata, int accumulate) {{
  asm volatile(
      "{{ .reg .pred p; setp.ne.b32 p, %{sums + 3}, 0; "
      "wgmma.mma_async.sp.sync.aligned.m64n{pixels}k{depth}.f32.{kind}.{kind} {{{registers}}}, "
      "%{sums}, %{sums + 1}, %{sums + 2}, %{sums + 4}, p, 1, 1{transposed}; }}"
      : {outputs}
      : "l"(a), "l"(b), "r"(metadata), "r"(accumulate), "n"(SELECTOR));
}}
#include "sparse_tc.cuh"
""",
    )
