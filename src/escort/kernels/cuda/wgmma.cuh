// Products of a warpgroup, of compute capability 9.0 alone. Tensor cores read the weights out of shared memory, and the
// rest is as in mma.cuh.
//
// STORAGE   0: float multiplied as TF32, 1: fp16, 2: bf16
// TILES     of 8 columns
#pragma once
#include "ptx.cuh"

typedef unsigned long long u64;

#if STORAGE == 0
#define WGMMA(n) "wgmma.mma_async.sync.aligned.m64n" n "k8.f32.tf32.tf32"
#define NOT_TRANSPOSED ""
#elif STORAGE == 1
#define WGMMA(n) "wgmma.mma_async.sync.aligned.m64n" n "k16.f32.f16.f16"
#define NOT_TRANSPOSED ", 0"
#else
#define WGMMA(n) "wgmma.mma_async.sync.aligned.m64n" n "k16.f32.bf16.bf16"
#define NOT_TRANSPOSED ", 0"
#endif
#define SUMS(j) "+f"(sum[j][0]), "+f"(sum[j][1]), "+f"(sum[j][2]), "+f"(sum[j][3])
#define ISSUE(n, sums, rest) WGMMA(n) " {" sums "}, " rest ", 1, 1, 1" NOT_TRANSPOSED ";"

// What was written to shared memory before is seen by the products behind the next barrier of the block.
__device__ __forceinline__ void show_to_products() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void end_products() {
  asm volatile("wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;" ::: "memory");
}

// sum += a b for 16 rows of each of the four warps. a and sum are those of mma.cuh, for TILES times 8 columns. b lies
// in shared memory: for each tile words 0 to 3 of its columns, then words 4 to 7, each 128 bytes. It runs until the
// end.
__device__ __forceinline__ void start_product(float (*sum)[4], u32 a0, u32 a1, u32 a2, u32 a3, const uint4* b) {
  const u64 descriptor = (u64)(256 / 16) << 32 | 128 / 16 << 16 | shared_address(b) / 16;
#define OPERANDS "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(descriptor)
#if TILES == 2
  asm volatile(ISSUE("16", "%0, %1, %2, %3, %4, %5, %6, %7", "{%8, %9, %10, %11}, %12")
               : SUMS(0), SUMS(1)
               : OPERANDS
               : "memory");
#elif TILES == 4
  asm volatile(
      ISSUE("32", "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15", "{%16, %17, %18, %19}, %20")
      : SUMS(0), SUMS(1), SUMS(2), SUMS(3)
      : OPERANDS
      : "memory");
#elif TILES == 6
  asm volatile(ISSUE("48",
                     "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                     "%16, %17, %18, %19, %20, %21, %22, %23",
                     "{%24, %25, %26, %27}, %28")
               : SUMS(0), SUMS(1), SUMS(2), SUMS(3), SUMS(4), SUMS(5)
               : OPERANDS
               : "memory");
#else
  asm volatile(ISSUE("64",
                     "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                     "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31",
                     "{%32, %33, %34, %35}, %36")
               : SUMS(0), SUMS(1), SUMS(2), SUMS(3), SUMS(4), SUMS(5), SUMS(6), SUMS(7)
               : OPERANDS
               : "memory");
#endif
}
