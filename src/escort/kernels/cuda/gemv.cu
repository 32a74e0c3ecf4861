// y[n][k] = activation(sum over c of w[k][c] * x[n][c] + bias[k] + residual[n][k]), dense, summed in float: a
// convolution of one pixel, such as those of squeeze-excitation and classifiers.
//
// Reading the weights bounds it. A warp has one k and SAMPLES neighbouring n; its lanes have vectors of channels. The
// first of its weights come while the kernel before this one still runs, which did not write them.
// VECTOR        elements of 16 bytes at most, a divisor of the input channels
// SAMPLES       that a warp computes
// ACTIVATION    as in activation.cuh
#define THREADS 256
#define WARPS (THREADS / 32)
#define AHEAD 2  // vectors of a lane that come ahead

#include "activation.cuh"
#include "elements.cuh"
#include "ptx.cuh"

// The same in every launch; methods/cuda/gemv.py has a dataclass of the same fields.
struct Params {
  int in_channels, out_channels, bound;
};

// Adds a vector of weights times those of the samples.
__device__ __forceinline__ void add_products(float (&sum)[SAMPLES], Vector weights, const Element* x, int in_channels,
                                             int count) {
  float w[VECTOR];
  widen(weights, w);
#pragma unroll
  for (int n = 0; n < SAMPLES; n++) {
    float values[VECTOR];
    widen(load(x + (long long)min(n, count - 1) * in_channels), values);
#pragma unroll
    for (int i = 0; i < VECTOR; i++) sum[n] = fmaf(w[i], values[i], sum[n]);
  }
}

// bias may be null, and has the activation's slopes behind it; residual may be null.
extern "C" __global__ void __launch_bounds__(THREADS)
    gemv(const Element* __restrict__ x, Element* __restrict__ y, const Element* __restrict__ residual,
         const Element* __restrict__ weights, const float* __restrict__ bias, const __grid_constant__ Params p,
         int samples) {
  let_next_kernel_start();
  const int lane = threadIdx.x % 32, k = blockIdx.x * WARPS + threadIdx.x / 32, first = blockIdx.y * SAMPLES;
  const int count = min(SAMPLES, samples - first);
  const Element* const row = weights + (long long)min(k, p.out_channels - 1) * p.in_channels;
  const Element* const from = x + (long long)first * p.in_channels;
  float sum[SAMPLES] = {};
  Vector ahead[AHEAD] = {};
#pragma unroll
  for (int i = 0; i < AHEAD; i++)
    if ((i * 32 + lane) * VECTOR < p.in_channels) ahead[i] = load(row + (i * 32 + lane) * VECTOR);
  wait_for_previous_kernel();
#pragma unroll
  for (int i = 0; i < AHEAD; i++) {
    const int c = (i * 32 + lane) * VECTOR;
    if (c < p.in_channels) add_products(sum, ahead[i], from + c, p.in_channels, count);
  }
#pragma unroll(SAMPLES == 1 ? 4 : 1)
  for (int c = (AHEAD * 32 + lane) * VECTOR; c < p.in_channels; c += 32 * VECTOR)
    add_products(sum, load(row + c), from + c, p.in_channels, count);
  float own = 0.f;
#pragma unroll
  for (int n = 0; n < SAMPLES; n++) {
#pragma unroll
    for (int half = 16; half; half /= 2) sum[n] += __shfl_xor_sync(0xffffffff, sum[n], half);
    if (lane == n) own = sum[n];
  }
  if (k >= p.out_channels || lane >= count) return;
  const long long at = (long long)(first + lane) * p.out_channels + k;
  if (bias) own += __ldg(bias + k);
  if (residual) own += widened(residual[at]);
  float slope = 0.f;
#if SLOPED
  slope = __ldg(bias + p.out_channels + k);
#endif
  y[at] = narrowed(BEYOND_BOUNDS ? activated(own, slope) : bounded(own, p.bound));
}
