// The mean of each plane of x (samples, pixels, channels), summed in float, in NHWC.
//
// A warp has four neighbouring vectors of channels of a sample, and eight pixels at a time, whose sums its lanes add up
// by exchanging halves. `1 << log_warps` warps of each block of a cluster share the pixels; what they have meets in
// shared memory.
// VECTOR    elements of 16 bytes at most, a divisor of the channels
#define THREADS 256
#define WARPS (THREADS / 32)
#define VECTORS 4  // of a warp

#include "divisor.cuh"
#include "pixels.cuh"
#include "ptx.cuh"

// layers/planes/average.py has a dataclass of the same fields that says what each means.
struct Params {
  int channels, pixels, groups, sample_groups;
  int log_warps, log_cluster;
  float share;
  Divisor by_sample;
};

// Adds up what the eight lanes of a vector have. Of its channels each keeps those from `sum` on, and says which.
__device__ __forceinline__ int add_lanes(float (&sum)[VECTOR]) {
  const int lane = threadIdx.x % 32;
  int first = 0;
#pragma unroll
  for (int by = VECTORS, half = VECTOR / 2; by < 32; by *= 2, half /= 2) {
    if (half == 0) {
      sum[0] += __shfl_xor_sync(0xffffffff, sum[0], by);
      continue;
    }
    const bool is_upper = lane & by;
    first += is_upper ? half : 0;
#pragma unroll
    for (int i = 0; i < VECTOR / 2; i++) {
      if (i >= half) continue;
      const float given = is_upper ? sum[i] : sum[half + i], kept = is_upper ? sum[half + i] : sum[i];
      sum[i] = kept + __shfl_xor_sync(0xffffffff, given, by);
    }
  }
  return first;
}

extern "C" __global__ void __launch_bounds__(THREADS, 4)
    mean(const Element* __restrict__ x, Element* __restrict__ y, const __grid_constant__ Params p) {
  __shared__ float sums[WARPS][VECTORS * VECTOR];
  let_next_kernel_start();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, block = blockIdx.x >> p.log_cluster;
  const int block_groups = WARPS >> p.log_warps, group = block * block_groups + (warp >> p.log_warps);
  const int sample = p.by_sample.quotient(group);
  const int channel = ((group - sample * p.sample_groups) * VECTORS + lane % VECTORS) * VECTOR;
  const int rank = blockIdx.x - (block << p.log_cluster), part = (rank << p.log_warps) + warp % (1 << p.log_warps);
  const int step = 32 / VECTORS << p.log_warps + p.log_cluster;
  float sum[VECTOR] = {};
  wait_for_previous_kernel();
  if (group < p.groups && channel < p.channels) {
    const Element* const plane = x + (long long)sample * p.pixels * p.channels + channel;
    add_pixels(sum, plane, part * (32 / VECTORS) + lane / VECTORS, step, p.pixels, p.channels);
  }
  const int first = add_lanes(sum);
  sums[warp][lane % VECTORS * VECTOR + first] = sum[0];
  __syncthreads();
  const int own = threadIdx.x / (VECTORS * VECTOR), number = threadIdx.x % (VECTORS * VECTOR);
  float total = 0.f;
  if (own < block_groups)
    for (int i = 0; i < 1 << p.log_warps; i++) total += sums[(own << p.log_warps) + i][number];
#if __CUDA_ARCH__ >= 900
  if (p.log_cluster > 0) {
    __shared__ float totals[THREADS];
    totals[threadIdx.x] = total;
    asm volatile("barrier.cluster.arrive.release; barrier.cluster.wait.acquire;" ::: "memory");
    if (rank == 0)
      for (int other = 1; other < 1 << p.log_cluster; other++) {
        float added;
        asm volatile("{ .reg .b32 at; mapa.shared::cluster.u32 at, %1, %2; ld.shared::cluster.f32 %0, [at]; }"
                     : "=f"(added)
                     : "r"(shared_address(totals + threadIdx.x)), "r"(other)
                     : "memory");
        total += added;
      }
    asm volatile("barrier.cluster.arrive; barrier.cluster.wait;" ::: "memory");
  }
#endif
  const int of = block * block_groups + own, of_sample = p.by_sample.quotient(of);
  const int at = (of - of_sample * p.sample_groups) * VECTORS * VECTOR + number;
  if (own < block_groups && of < p.groups && at < p.channels && rank == 0)
    y[(long long)of_sample * p.channels + at] = narrowed(total * p.share);
}
