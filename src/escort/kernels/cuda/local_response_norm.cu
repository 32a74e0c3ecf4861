// y = x * (k + alpha * sum of x^2 over SIZE neighbouring channels)^-beta, computed in float, where the sum reaches from
// SIZE / 2 channels before the element to (SIZE - 1) / 2 behind it and torch's alpha was divided by SIZE.
//
// The result is read and written once. In NHWC a thread has a vector of a pixel's channels, and finds those around it
// in the vectors before and behind, which its neighbours have brought into the first-level cache. In NCHW a thread has
// a vector of pixels, and walks along some channels with what the next ones need in registers. LAST      1: x is in
// NHWC, 0: in NCHW SIZE      channels of a sum
#define THREADS 256
#define BEFORE (SIZE / 2)
#define BEHIND ((SIZE - 1) / 2)

#include "elements.cuh"
#include "ptx.cuh"

// layers/planes/norm.py has a dataclass of the same fields.
struct Params {
  float alpha, beta, k;
};

__device__ __forceinline__ float scaled(float x, float sum, const Params& p) {
  return x * __powf(fmaf(sum, p.alpha, p.k), -p.beta);
}

#if LAST

// vectors: of all pixels of all samples, which fit 32 bits.
extern "C" __global__ void __launch_bounds__(THREADS)
    local_response_norm(const Element* __restrict__ x, Element* __restrict__ y, int vectors, int channels,
                        const __grid_constant__ Params p) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  const u32 number = blockIdx.x * THREADS + threadIdx.x;
  if (number >= (u32)vectors) return;
  constexpr int AROUND = (BEFORE + VECTOR - 1) / VECTOR;  // vectors on either side
  const u32 of_pixel = channels / VECTOR, at = number % of_pixel;
  float squares[(2 * AROUND + 1) * VECTOR], own[VECTOR];
#pragma unroll
  for (int i = -AROUND; i <= AROUND; i++) {
    float values[VECTOR] = {};
    if (i == 0 || (i < 0 ? at >= (u32)-i : at + i < of_pixel))
      widen(load(x + (number + i) * (long long)VECTOR), values);
#pragma unroll
    for (int j = 0; j < VECTOR; j++) {
      if (i == 0) own[j] = values[j];
      squares[(i + AROUND) * VECTOR + j] = values[j] * values[j];
    }
  }
#pragma unroll
  for (int j = 0; j < VECTOR; j++) {
    float sum = 0.f;
#pragma unroll
    for (int i = -BEFORE; i <= BEHIND; i++) sum += squares[AROUND * VECTOR + j + i];
    own[j] = scaled(own[j], sum, p);
  }
  *(Vector*)(y + number * (long long)VECTOR) = narrow(own);
}

#else

#define AT_ONCE (VECTOR >= 4 ? 4 : 8)  // channels that are loaded before the first is used

// plane: elements from channel to channel. A block has pixels of a sample, and `walk` channels of `walks` times as
// many.
extern "C" __global__ void __launch_bounds__(THREADS)
    local_response_norm(const Element* __restrict__ x, Element* __restrict__ y, int plane, int channels, int walk,
                        int walks, const __grid_constant__ Params p) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  const int pixel = (blockIdx.y * THREADS + threadIdx.x) * VECTOR;
  if (pixel >= plane) return;
  const int sample = blockIdx.x / walks, first = (blockIdx.x - sample * walks) * walk,
            end = min(first + walk, channels);
  const Element* const from = x + (long long)sample * channels * plane + pixel;
  Element* const to = y + (long long)sample * channels * plane + pixel;
  // Of the channels from BEFORE before those at hand on; what lies beyond the first and the last counts as 0.
  float values[SIZE - 1 + AT_ONCE][VECTOR];
#pragma unroll
  for (int i = 0; i < SIZE - 1; i++) {
    const int channel = first - BEFORE + i;
    if (channel >= 0 && channel < channels)
      widen(load(from + channel * (long long)plane), values[i]);
    else
#pragma unroll
      for (int j = 0; j < VECTOR; j++) values[i][j] = 0.f;
  }
  for (int begin = first; begin < end; begin += AT_ONCE) {
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) {
      const int channel = begin + BEHIND + i;
      if (channel < channels)
        widen(load(from + channel * (long long)plane), values[SIZE - 1 + i]);
      else
#pragma unroll
        for (int j = 0; j < VECTOR; j++) values[SIZE - 1 + i][j] = 0.f;
    }
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) {
      if (begin + i >= end) break;
      float out[VECTOR];
#pragma unroll
      for (int j = 0; j < VECTOR; j++) {
        float sum = 0.f;
#pragma unroll
        for (int s = 0; s < SIZE; s++) sum = fmaf(values[i + s][j], values[i + s][j], sum);
        out[j] = scaled(values[i + BEFORE][j], sum, p);
      }
      *(Vector*)(to + (begin + i) * (long long)plane) = narrow(out);
    }
#pragma unroll
    for (int i = 0; i < SIZE - 1; i++)
#pragma unroll
      for (int j = 0; j < VECTOR; j++) values[i][j] = values[i + AT_ONCE][j];
  }
}

#endif
