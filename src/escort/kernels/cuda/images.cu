// y[n][c][p] = x[n][c][p] * scale[c] + shift[c], of bytes in NHWC or NCHW to elements in NCHW.
//
// A thread has VECTOR pixels of a sample, all their channels.
// VECTOR    pixels that are written at once, a divisor of a sample's
#define THREADS 256

#include "divisor.cuh"
#include "elements.cuh"
#include "ptx.cuh"

// layers/images.py has a dataclass of the same fields: vectors of all samples and of one; channels; and the bytes from
// a channel and a pixel to the next.
struct Params {
  int vectors, sample_vectors, channels, in_channel, in_pixel;
  Divisor by_sample;
};

extern "C" __global__ void __launch_bounds__(THREADS)
    images(const unsigned char* __restrict__ x, Element* __restrict__ y, const float* __restrict__ factors,
           const __grid_constant__ Params p) {
  let_next_kernel_start();
  const u32 number = blockIdx.x * THREADS + threadIdx.x;
  if (number >= (u32)p.vectors) return;
  const u32 sample = p.by_sample.quotient(number);
  const int pixel = (number - sample * p.sample_vectors) * VECTOR, pixels = p.sample_vectors * VECTOR;
  const long long first = (long long)sample * p.channels * pixels;
  wait_for_previous_kernel();
  for (int c = 0; c < p.channels; c++) {
    const float scale = __ldg(factors + c), shift = __ldg(factors + p.channels + c);
    float values[VECTOR];
#pragma unroll
    for (int i = 0; i < VECTOR; i++)
      values[i] = fmaf(__ldg(x + first + c * p.in_channel + (pixel + i) * p.in_pixel), scale, shift);
    *(Vector*)(y + first + c * pixels + pixel) = narrow(values);
  }
}
