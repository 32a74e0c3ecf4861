// y[n][c][p] = x[n][c][p] * gates[n][c], of one size of elements. In NHWC a thread has a vector of a pixel's channels,
// in NCHW one of a channel's pixels. LAST      1: x is in NHWC, 0: in NCHW VECTOR    elements of 16 bytes at most, a
// divisor of the channels or of the plane
#define THREADS 256

#include "divisor.cuh"
#include "elements.cuh"
#include "ptx.cuh"

// layers/planes/gate.py has a dataclass of the same fields: vectors of x, of a pixel or a plane, and of a sample.
struct Params {
  int vectors, row_vectors, sample_vectors;
  Divisor by_row, by_sample;
};

extern "C" __global__ void __launch_bounds__(THREADS)
    gate(const Element* __restrict__ x, const Element* __restrict__ gates, Element* __restrict__ y,
         const __grid_constant__ Params p) {
  let_next_kernel_start();
  const u32 number = blockIdx.x * THREADS + threadIdx.x;
  if (number >= (u32)p.vectors) return;
  const u32 row = p.by_row.quotient(number);
  wait_for_previous_kernel();
  float values[VECTOR], factors[VECTOR];
  widen(load(x + number * (long long)VECTOR), values);
#if LAST
  const u32 sample = p.by_sample.quotient(number), vector = number - row * p.row_vectors;
  widen(load(gates + (long long)(sample * p.row_vectors + vector) * VECTOR), factors);
#else
  const float factor = widened(gates[row]);
#pragma unroll
  for (int i = 0; i < VECTOR; i++) factors[i] = factor;
#endif
#pragma unroll
  for (int i = 0; i < VECTOR; i++) values[i] *= factors[i];
  *(Vector*)(y + number * (long long)VECTOR) = narrow(values);
}
