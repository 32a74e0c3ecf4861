// y[n][k] = activation(sum over c of w[k][c] * x[n][c] + bias[k]), dense, for few samples, summed in float: the linear
// layers of a classifier. Weights and bias are the model's own tensors.
//
// Reading the weights bounds it. Each warp has a row of them, or shares it with others of its block, and keeps AHEAD
// vectors of each lane on their way, the first of them while x is copied. It waits for the kernel before with all of
// that: the weights are the model's own, and may have just been written. x lies in shared memory, in the order of the
// weights' columns: maps in NHWC, which are flattened as NCHW, are transposed on their way there.
// VECTOR     elements of 16 bytes at most, a divisor of the columns, and of the channels of maps in NHWC
// SAMPLES    of x
// ACTIVATION as in activation.cuh
#define AHEAD 8

#include "activation.cuh"
#include "elements.cuh"
#include "ptx.cuh"

// The same in every launch; layers/planes/linear.py has a dataclass of the same fields that says what each means.
struct Params {
  int columns, rows, pixels, block_rows, split, bound;
};

#define LANE_VECTORS 4  // of a pixel, that neighbouring threads read: whole sectors, and no bank conflicts when stored

__device__ __forceinline__ Vector load_weights(const Element* from) {
#if BYTES * VECTOR == 16
  return load16_once(from);
#else
  return load(from);
#endif
}

// Copies x to shared memory.
__device__ __forceinline__ void stage(Element* to, const Element* x, const Params& p) {
  if (p.pixels == 1) {
#pragma unroll 4
    for (int i = threadIdx.x * VECTOR; i < SAMPLES * p.columns; i += blockDim.x * VECTOR)
      *(Vector*)(to + i) = load(x + i);
    return;
  }
  const int channels = p.columns / p.pixels, slab = LANE_VECTORS * p.pixels;
  const int count =
      (channels / VECTOR + LANE_VECTORS - 1) / LANE_VECTORS * slab;  // some of the last beyond the channels
#pragma unroll
  for (int n = 0; n < SAMPLES; n++) {
#pragma unroll 4
    for (int i = threadIdx.x; i < count; i += blockDim.x) {
      const int pixel = i % slab / LANE_VECTORS;
      const int channel = (i / slab * LANE_VECTORS + i % LANE_VECTORS) * VECTOR;
      if (channel >= channels) continue;
      union {
        Vector vector;
        Element elements[VECTOR];
      } here;
      here.vector = load(x + (long long)n * p.columns + pixel * channels + channel);
#pragma unroll
      for (int j = 0; j < VECTOR; j++) to[n * p.columns + (channel + j) * p.pixels + pixel] = here.elements[j];
    }
  }
}

// Adds a vector of weights times those of the samples.
__device__ __forceinline__ void add_products(float (&sum)[SAMPLES], Vector weights, const Element* x, int columns) {
  float w[VECTOR];
  widen(weights, w);
#pragma unroll
  for (int n = 0; n < SAMPLES; n++) {
    float values[VECTOR];
    widen(*(const Vector*)(x + n * columns), values);
#pragma unroll
    for (int i = 0; i < VECTOR; i++) sum[n] = fmaf(w[i], values[i], sum[n]);
  }
}

extern "C" __global__ void __launch_bounds__(1024)
    linear(const Element* __restrict__ x, Element* __restrict__ y, const Element* __restrict__ weights,
           const Element* __restrict__ bias, const __grid_constant__ Params p) {
  extern __shared__ uint4 memory[];
  let_next_kernel_start();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int first_row = blockIdx.x * p.block_rows, row = min(first_row + warp / p.split, p.rows - 1);
  const int first = (warp % p.split * 32 + lane) * VECTOR, step = p.split * 32 * VECTOR;
  const Element* const from = weights + (long long)row * p.columns;
  Element* const staged = (Element*)memory;
  float* const sums = (float*)(memory + (SAMPLES * p.columns * BYTES + 15) / 16);
  Vector ahead[AHEAD] = {};
  wait_for_previous_kernel();
#pragma unroll
  for (int i = 0; i < AHEAD; i++)
    if (first + i * step < p.columns) ahead[i] = load_weights(from + first + i * step);
  stage(staged, x, p);
  __syncthreads();

  float sum[SAMPLES] = {};
  for (int base = first; base < p.columns; base += AHEAD * step) {
#pragma unroll
    for (int i = 0; i < AHEAD; i++) {
      const int c = base + i * step, next = c + AHEAD * step;
      const Vector here = ahead[i];
      if (next < p.columns) ahead[i] = load_weights(from + next);
      if (c < p.columns) add_products(sum, here, staged + c, p.columns);
    }
  }
#pragma unroll
  for (int n = 0; n < SAMPLES; n++) {
#pragma unroll
    for (int half = 16; half; half /= 2) sum[n] += __shfl_xor_sync(0xffffffff, sum[n], half);
    if (lane == 0) sums[warp * SAMPLES + n] = sum[n];
  }
  __syncthreads();
  const int k = first_row + threadIdx.x / SAMPLES, n = threadIdx.x % SAMPLES;
  if (threadIdx.x >= p.block_rows * SAMPLES || k >= p.rows) return;
  float total = widened(bias[k]);
  for (int part = 0; part < p.split; part++) total += sums[(threadIdx.x / SAMPLES * p.split + part) * SAMPLES + n];
  y[(long long)n * p.rows + k] = narrowed(BEYOND_BOUNDS ? activated(total, 0.f) : bounded(total, p.bound));
}
