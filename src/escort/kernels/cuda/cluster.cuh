// What the blocks of a cluster do together. Before sm_90 each block is one by itself.
#pragma once

#include "ptx.cuh"

// Waits until all are here, whose shared memory may then be read.
__device__ __forceinline__ void meet_blocks() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release; barrier.cluster.wait.acquire;" ::: "memory");
#else
  __syncthreads();
#endif
}

// What another one has at a place of its shared memory.
__device__ __forceinline__ float of_block(const float* own, u32 rank) {
#if __CUDA_ARCH__ >= 900
  float value;
  asm volatile("{ .reg .b32 at; mapa.shared::cluster.u32 at, %1, %2; ld.shared::cluster.f32 %0, [at]; }"
               : "=f"(value)
               : "r"(shared_address(own)), "r"(rank)
               : "memory");
  return value;
#else
  return *own;
#endif
}
