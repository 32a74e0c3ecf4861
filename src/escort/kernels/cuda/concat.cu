// Up to eight x (pixels, channels) side by side as a slice of y (pixels, pitch), where a pixel has all its channels
// side by side. A thread copies VECTOR elements. NORM    1: what is copied is normalised by its channel's mean and
// variance, scaled, shifted and bounded; 0: as it is
#define THREADS 256

#include "divisor.cuh"
#include "elements.cuh"
#include "ptx.cuh"

// layers/planes/concat.py has a dataclass of the same fields that says what each means.
struct Params {
  int vectors, slice, pitch, offset;
  Divisor by_slice;
  int end0, end1, end2, end3, end4, end5, end6, end7;
  float epsilon;
  int bound;
};

// The tables have an element for each channel of y, and are null where nothing is normalised.
extern "C" __global__ void __launch_bounds__(THREADS)
    concat(const Element* __restrict__ x0, const Element* __restrict__ x1, const Element* __restrict__ x2,
           const Element* __restrict__ x3, const Element* __restrict__ x4, const Element* __restrict__ x5,
           const Element* __restrict__ x6, const Element* __restrict__ x7, Element* __restrict__ y,
           const Element* __restrict__ means, const Element* __restrict__ variances,
           const Element* __restrict__ weights, const Element* __restrict__ biases, const __grid_constant__ Params p) {
  let_next_kernel_start();
  const u32 number = blockIdx.x * THREADS + threadIdx.x;
  if (number >= (u32)p.vectors) return;
  const u32 pixel = p.by_slice.quotient(number);
  const int at = number - pixel * p.slice;
  const Element* from = x0;
  int begin = 0, end = p.end0;
#define NEXT(x, its_end) \
  if (at >= end) from = x, begin = end, end = its_end;
  NEXT(x1, p.end1)
  NEXT(x2, p.end2)
  NEXT(x3, p.end3)
  NEXT(x4, p.end4)
  NEXT(x5, p.end5)
  NEXT(x6, p.end6)
  NEXT(x7, p.end7)
  wait_for_previous_kernel();
  Vector moved = load(from + ((long long)pixel * (end - begin) + at - begin) * VECTOR);
#if NORM
  const int channel = (p.offset + at) * VECTOR;
  float values[VECTOR], mean[VECTOR], variance[VECTOR], weight[VECTOR], bias[VECTOR];
  widen(moved, values);
  widen(load(means + channel), mean), widen(load(variances + channel), variance);
  widen(load(weights + channel), weight), widen(load(biases + channel), bias);
#pragma unroll
  for (int i = 0; i < VECTOR; i++) {
    const float scale = weight[i] * rsqrtf(variance[i] + p.epsilon);
    values[i] = bounded(fmaf(values[i] - mean[i], scale, bias[i]), p.bound);
  }
  moved = narrow(values);
#endif
  *(Vector*)(y + ((long long)pixel * p.pitch + p.offset + at) * VECTOR) = moved;
}
