// The gates of squeeze-excitation: y[n] = gate(w2 * activation(w1 * mean of x[n] over its pixels + b1) + b2), with x in
// NHWC, summed in float.
//
// A cluster of blocks has a sample: each block sums a part of the pixels, and then has a part of the channels, a slice:
// of these it adds up the blocks' sums, multiplies them by its columns of the first weights, and computes their gates
// by its rows of the second. In between the blocks meet and read each other's shared memory. Its weights, which are the
// model's own tensors, are copied while pixels are summed.
// VECTOR    elements of 16 bytes, a divisor of the channels
#define THREADS 256
#define WARPS (THREADS / 32)

#include "cluster.cuh"
#include "pixels.cuh"
#include "ptx.cuh"

// layers/planes/squeeze.py has a dataclass of the same fields that says what each means.
struct Params {
  int channels, hidden, pixels, slice, log_cluster;
  int activation, gate;
  float share;
};

// Those that squeeze-excitation has, by their numbers in layers/planes/squeeze.py. NaN goes through.
__device__ __forceinline__ float activated(float v, int activation) {
  if (activation == 0) return v < 0.f ? 0.f : v;
  if (activation == 3) return v <= -3.f ? 0.f : v >= 3.f ? 1.f : v / 6.f + 0.5f;
  const float sigmoid = 1.f / (1.f + expf(-v));
  return activation == 1 ? v * sigmoid : sigmoid;
}

// The sum of what all blocks of the cluster have at a place of their shared memory.
__device__ __forceinline__ float total(const float* own, int log_cluster) {
  float sum = 0.f;
#pragma unroll 8
  for (int rank = 0; rank < 1 << log_cluster; rank++) sum += of_block(own, rank);
  return sum;
}

// Sums a block's pixels of a sample to `sums`, all channels. `parts` holds a vector of each thread.
__device__ __forceinline__ void add_plane(float* sums, float* parts, const Element* x, int rank, const Params& p) {
  const int vectors = p.channels / VECTOR;
  for (int base = 0; base < vectors; base += THREADS) {
    const int count = min(vectors - base, THREADS), lanes = THREADS / count, lane = threadIdx.x / count;
    const int step = lanes << p.log_cluster;
    float sum[VECTOR] = {};
    if (lane < lanes) {
      const Element* const from = x + (base + threadIdx.x - lane * count) * VECTOR;
      add_pixels(sum, from, (lane << p.log_cluster) + rank, step, p.pixels, p.channels);
    }
#pragma unroll
    for (int j = 0; j < VECTOR; j++) parts[threadIdx.x * VECTOR + j] = sum[j];
    __syncthreads();
    for (int i = threadIdx.x; i < count * VECTOR; i += THREADS) {
      float sum_of_lanes = 0.f;
      for (int other = 0; other < lanes; other++) sum_of_lanes += parts[other * count * VECTOR + i];
      sums[base * VECTOR + i] = sum_of_lanes;
    }
    __syncthreads();
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 3)
    squeeze(const Element* __restrict__ x, Element* __restrict__ y, const Element* __restrict__ w1,
            const Element* __restrict__ b1, const Element* __restrict__ w2, const Element* __restrict__ b2,
            const __grid_constant__ Params p) {
  extern __shared__ uint4 memory[];
  let_next_kernel_start();
  const int sample = blockIdx.x >> p.log_cluster, rank = blockIdx.x - (sample << p.log_cluster);
  const int first = rank * p.slice, own = max(min(p.slice, p.channels - first), 0), own_vectors = own / VECTOR;
  uint4 *const columns = memory, *const rows = columns + p.hidden * own_vectors;
  float* const parts = (float*)(memory + 2 * p.hidden * (p.slice / VECTOR));
  float *const sums = parts + THREADS * VECTOR, *const partial = sums + p.channels, *const hidden = partial + p.hidden;
  wait_for_previous_kernel();
  for (int i = threadIdx.x; i < p.hidden * own_vectors; i += THREADS) {
    const int row = i / own_vectors, vector = i - row * own_vectors;
    copy16(shared_address(columns + i), w1 + row * p.channels + first + vector * VECTOR);
    copy16(shared_address(rows + i), w2 + first * p.hidden + i * VECTOR);
  }
  add_plane(sums, parts, x + (long long)sample * p.pixels * p.channels, rank, p);
  meet_blocks();

  float* const means = parts;
  for (int i = threadIdx.x; i < own; i += THREADS) means[i] = total(sums + first + i, p.log_cluster) * p.share;
  wait_for_copies();
  __syncthreads();
  for (int row = threadIdx.x / 32; row < p.hidden; row += WARPS) {
    float sum = 0.f;
    for (int vector = threadIdx.x % 32; vector < own_vectors; vector += 32) {
      float weights[VECTOR];
      widen(*(const Vector*)(columns + row * own_vectors + vector), weights);
#pragma unroll
      for (int j = 0; j < VECTOR; j++) sum = fmaf(weights[j], means[vector * VECTOR + j], sum);
    }
#pragma unroll
    for (int half = 16; half; half /= 2) sum += __shfl_xor_sync(0xffffffff, sum, half);
    if (threadIdx.x % 32 == 0) partial[row] = sum;
  }
  meet_blocks();

  for (int i = threadIdx.x; i < p.hidden; i += THREADS)
    hidden[i] = activated(total(partial + i, p.log_cluster) + widened(b1[i]), p.activation);
  meet_blocks();  // which also keeps the blocks here until their shared memory was read
  const Element* const own_rows = (const Element*)rows;
  for (int i = threadIdx.x; i < own; i += THREADS) {
    float sum = 0.f;
    for (int j = 0; j < p.hidden; j++) sum = fmaf(widened(own_rows[i * p.hidden + j]), hidden[j], sum);
    y[(long long)sample * p.channels + first + i] = narrowed(activated(sum + widened(b2[first + i]), p.gate));
  }
}
