// x (outer, height, width, pitch) resized to y, as torch does it: the nearest element, or a mean of four by distance.
// NHWC has samples outside and channels as pitch, NCHW planes outside and a pitch of 1. A thread computes VECTOR
// outputs. VECTOR    elements of 16 bytes at most, a divisor of the pitch
#define THREADS 256

#include "elements.cuh"
#include "ptx.cuh"

// layers/planes/resize.py has a dataclass of the same fields that says what each means.
struct Params {
  int vectors, pitch, height, width, out_height, out_width;
  int is_linear;
  float scale_down, scale_right, centre, shift;
};

// Along one axis: the elements that an output is made of, and the share of the second.
struct Source {
  int first, second;
  float share;

  __device__ Source(int i, int size, float scale, const Params& p) {
    const float at = fmaxf((i + p.centre) * scale - p.shift, 0.f);
    first = min((int)at, size - 1), second = min(first + 1, size - 1);
    share = at - first;
  }
};

extern "C" __global__ void __launch_bounds__(THREADS)
    resize(const Element* __restrict__ x, Element* __restrict__ y, const __grid_constant__ Params p) {
  let_next_kernel_start();
  const u32 number = blockIdx.x * THREADS + threadIdx.x;
  if (number >= (u32)p.vectors) return;
  const u32 of_pixel = p.pitch / VECTOR, pixel = number / of_pixel, line = pixel / p.out_width,
            outer = line / p.out_height;
  const Source down(line - outer * p.out_height, p.height, p.scale_down, p),
      right(pixel - line * p.out_width, p.width, p.scale_right, p);
  const Element* const plane =
      x + (long long)outer * p.height * p.width * p.pitch + (number - pixel * of_pixel) * VECTOR;
  const Element *const above = plane + (long long)down.first * p.width * p.pitch, *const below =
                                                                                      plane + (long long)down.second *
                                                                                                  p.width * p.pitch;
  wait_for_previous_kernel();
  Vector result = load(above + (long long)right.first * p.pitch);
  if (p.is_linear) {
    float corners[4][VECTOR], mean[VECTOR];
    const Vector others[3] = {load(above + (long long)right.second * p.pitch),
                              load(below + (long long)right.first * p.pitch),
                              load(below + (long long)right.second * p.pitch)};
    widen(result, corners[0]);
#pragma unroll
    for (int i = 0; i < 3; i++) widen(others[i], corners[i + 1]);
#pragma unroll
    for (int i = 0; i < VECTOR; i++) {
      const float upper = (1.f - right.share) * corners[0][i] + right.share * corners[1][i],
                  lower = (1.f - right.share) * corners[2][i] + right.share * corners[3][i];
      mean[i] = (1.f - down.share) * upper + down.share * lower;
    }
    result = narrow(mean);
  }
  *(Vector*)(y + number * (long long)VECTOR) = result;
}
