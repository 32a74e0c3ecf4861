// Up to eight x (pixels, channels) side by side as a slice of y (pixels, pitch), where a pixel has all its channels
// side by side. A thread copies VECTOR elements of BYTES bytes.
#define THREADS 256

#include "divisor.cuh"
#include "ptx.cuh"
#include "vectors.cuh"

// layers/planes/concat.py has a dataclass of the same fields that says what each means. All are counted in vectors.
struct Params {
  int vectors, slice, pitch, offset;
  Divisor by_slice;
  int end0, end1, end2, end3, end4, end5, end6, end7;
};

extern "C" __global__ void __launch_bounds__(THREADS)
    concat(const Vector* __restrict__ x0, const Vector* __restrict__ x1, const Vector* __restrict__ x2,
           const Vector* __restrict__ x3, const Vector* __restrict__ x4, const Vector* __restrict__ x5,
           const Vector* __restrict__ x6, const Vector* __restrict__ x7, Vector* __restrict__ y,
           const __grid_constant__ Params p) {
  let_next_kernel_start();
  const u32 number = blockIdx.x * THREADS + threadIdx.x;
  if (number >= (u32)p.vectors) return;
  const u32 pixel = p.by_slice.quotient(number);
  const int at = number - pixel * p.slice;
  const Vector* from = x0;
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
  y[(long long)pixel * p.pitch + p.offset + at] = __ldg(from + (long long)pixel * (end - begin) + at - begin);
}
