// Elements and the floats that they stand for: as many neighbours as a thread moves at once, VECTOR of a type.
// STORAGE   0: float, 1: fp16, 2: bf16
// VECTOR    1, or elements of 4, 8 or 16 bytes
#pragma once

#if STORAGE == 0
#define BYTES 4
#elif STORAGE == 1
#define BYTES 2
#include <cuda_fp16.h>
#else
#define BYTES 2
#include <cuda_bf16.h>
#endif

#include "vectors.cuh"

#if STORAGE == 1
__device__ __forceinline__ float2 pair_of(u32 word) { return __half22float2(reinterpret_cast<const __half2&>(word)); }
__device__ __forceinline__ u32 word_of(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return reinterpret_cast<const u32&>(pair);
}
#elif STORAGE == 2
__device__ __forceinline__ float2 pair_of(u32 word) {
  return __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(word));
}
__device__ __forceinline__ u32 word_of(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const u32&>(pair);
}
#endif

union Elements {
  u32 words[(BYTES * VECTOR + 3) / 4];
  Vector vector;
};

__device__ __forceinline__ Vector load(const Element* from) { return __ldg((const Vector*)from); }

__device__ __forceinline__ void widen(Vector vector, float (&values)[VECTOR]) {
  Elements elements = {};
  elements.vector = vector;
#if STORAGE == 0
#pragma unroll
  for (int i = 0; i < VECTOR; i++) values[i] = __uint_as_float(elements.words[i]);
#elif VECTOR == 1
  values[0] = pair_of(elements.words[0]).x;
#else
#pragma unroll
  for (int i = 0; i < VECTOR; i += 2) {
    const float2 pair = pair_of(elements.words[i / 2]);
    values[i] = pair.x, values[i + 1] = pair.y;
  }
#endif
}

__device__ __forceinline__ float widened(Element element) {
#if STORAGE == 0
  return __uint_as_float(element);
#else
  return pair_of(element).x;
#endif
}

__device__ __forceinline__ Element narrowed(float value) {
#if STORAGE == 0
  return __float_as_uint(value);
#else
  return word_of(value, 0.f);
#endif
}

// What a bound (1: 0 from below, 2: also 6 from above) leaves of a value. NaN goes through, as in torch.
__device__ __forceinline__ float bounded(float value, int bound) {
  const float infinity = __int_as_float(0x7f800000), least = bound >= 1 ? 0.f : -infinity,
              most = bound == 2 ? 6.f : infinity;
  asm("max.NaN.f32 %0, %0, %1;" : "+f"(value) : "f"(least));
  asm("min.NaN.f32 %0, %0, %1;" : "+f"(value) : "f"(most));
  return value;
}

// Rounds to the nearest element.
__device__ __forceinline__ Vector narrow(const float (&values)[VECTOR]) {
  Elements elements = {};
#if STORAGE == 0
#pragma unroll
  for (int i = 0; i < VECTOR; i++) elements.words[i] = __float_as_uint(values[i]);
#elif VECTOR == 1
  elements.words[0] = word_of(values[0], 0.f);
#else
#pragma unroll
  for (int i = 0; i < VECTOR; i += 2) elements.words[i / 2] = word_of(values[i], values[i + 1]);
#endif
  return elements.vector;
}

#if STORAGE && VECTOR > 1
#if STORAGE == 1
#define PAIR "f16x2"
#else
#define PAIR "bf16x2"
#endif
// The same for vectors: rounding keeps the order.
struct Bounds {
  u32 least, most;

  __device__ explicit Bounds(int bound) {
    const float infinity = __int_as_float(0x7f800000), low = bound >= 1 ? 0.f : -infinity,
                high = bound == 2 ? 6.f : infinity;
    least = word_of(low, low), most = word_of(high, high);
  }

  __device__ __forceinline__ Vector of(Vector vector) const {
    Elements elements = {};
    elements.vector = vector;
#pragma unroll
    for (int i = 0; i < VECTOR / 2; i++) {
      u32 word = elements.words[i];
      asm("max.NaN." PAIR " %0, %0, %1;" : "+r"(word) : "r"(least));
      asm("min.NaN." PAIR " %0, %0, %1;" : "+r"(word) : "r"(most));
      elements.words[i] = word;
    }
    return elements.vector;
  }
};
#endif
