// The sum of a thread's pixels of a plane in NHWC, in float.
#pragma once

#include "elements.cuh"

#define AT_ONCE 8  // pixels whose loads are issued together

// Adds every `step`th pixel from `pixel` on to `sum`, a vector of the channels that begin at `plane`.
__device__ __forceinline__ void add_pixels(float (&sum)[VECTOR], const Element* plane, int pixel, int step, int pixels,
                                           int channels) {
  for (; pixel < pixels; pixel += AT_ONCE * step) {
    Vector here[AT_ONCE] = {};
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++)
      if (pixel + i * step < pixels) here[i] = load(plane + (long long)(pixel + i * step) * channels);
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) {
      float values[VECTOR];
      widen(here[i], values);
#pragma unroll
      for (int j = 0; j < VECTOR; j++) sum[j] += values[j];
    }
  }
}
