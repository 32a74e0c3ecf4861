// Products of small matrices on tensor cores, by all lanes of a warp at once: sum += a b, 16 rows and 8 columns, in
// float.
//
// A lane of sums has columns 2 (lane % 4) and the next of rows lane / 4 (sum 0, 1) and lane / 4 + 8 (sum 2, 3). A word
// is two neighbours along the reduction, 2 (lane % 4) and the next: of a in row lane / 4 or 8 further, of b in column
// lane / 4.
#pragma once

#include "ptx.cuh"

#if STORAGE == 1
#define MMA_TYPES ".row.col.f32.f16.f16.f32 "
#else
#define MMA_TYPES ".row.col.f32.bf16.bf16.f32 "
#endif

// Over 16, of which a has two words of those below 8 before the others; low and high are b's.
__device__ __forceinline__ void multiply16(float (&sum)[4], const u32 (&a)[4], u32 low, u32 high) {
  asm("mma.sync.aligned.m16n8k16" MMA_TYPES "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(low), "r"(high));
}

// Over 8.
__device__ __forceinline__ void multiply8(float (&sum)[4], const u32 (&a)[2], u32 b) {
  asm("mma.sync.aligned.m16n8k8" MMA_TYPES "{%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(b));
}

// Words of a as products take them: lane / 8 says whose row of 16 bytes the lane's address is, lane % 8 which one.
__device__ __forceinline__ void load_matrices4(u32 (&words)[4], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(address)
               : "memory");
}

// The first two of them, by the addresses of the first 16 lanes.
__device__ __forceinline__ void load_matrices2(u32 (&words)[2], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(words[0]), "=r"(words[1])
               : "r"(address)
               : "memory");
}
