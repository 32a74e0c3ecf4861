// Copies of 16 bytes to shared memory, which a thread starts and goes on, from compute capability 8.0 on.
#pragma once
#include "ptx.cuh"

__device__ __forceinline__ void start_copy(uint4* to, const uint4* from) { copy16(shared_address(to), from); }

// Waits for those that this thread has started.
__device__ __forceinline__ void end_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }
