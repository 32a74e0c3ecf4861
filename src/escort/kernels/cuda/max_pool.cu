// The largest element of each window of x (outer, height, width, pitch), NaN where one is NaN, as torch pools. NHWC has
// samples outside and channels as pitch, NCHW planes outside and a pitch of 1.
//
// A thread computes VECTOR neighbouring outputs. Nothing is shared: windows overlap in the first-level cache.
// STORAGE   0: float, 1: fp16, 2: bf16
// VECTOR    elements of 16 bytes at most, a divisor of the pitch
// ROWS, COLUMNS   of a window, whose loads are issued together, row by row at least
#define THREADS 256

#if STORAGE == 0
#define BYTES 4
#define LOWEST 0xff800000u  // minus infinity
#define LARGER "max.NaN.f32"
#elif STORAGE == 1
#define BYTES 2
#define LOWEST 0xfc00fc00u
#define LARGER "max.NaN.f16x2"
#else
#define BYTES 2
#define LOWEST 0xff80ff80u
#define LARGER "max.NaN.bf16x2"
#endif

#include "ptx.cuh"
#include "vectors.cuh"

#define WORDS ((BYTES * VECTOR + 3) / 4)
union Elements {
  u32 words[WORDS];
  Vector vector;
};

__device__ __forceinline__ void take_larger(u32& word, u32 other) {
#if STORAGE == 0
  float larger = __uint_as_float(word);
  asm(LARGER " %0, %0, %1;" : "+f"(larger) : "f"(__uint_as_float(other)));
  word = __float_as_uint(larger);
#else
  asm(LARGER " %0, %0, %1;" : "+r"(word) : "r"(other));
#endif
}

// Its stride, padding and dilation; layers/pool.py has a dataclass of the same fields.
struct Params {
  int down, right, top, left, dilation_down, dilation_right;
};

// vectors: how many there are in y, which fit 32 bits.
extern "C" __global__ void __launch_bounds__(THREADS, 4)
    max_pool(const Element* __restrict__ x, Element* __restrict__ y, int vectors, int pitch, int height, int width,
             int out_height, int out_width, const __grid_constant__ Params params) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  const u32 number = blockIdx.x * THREADS + threadIdx.x;
  if (number >= (u32)vectors) return;
  const u32 of_pixel = pitch / VECTOR, pixel = number / of_pixel, line = pixel / out_width, outer = line / out_height;
  const int top = (int)(line - outer * out_height) * params.down - params.top,
            left = (int)(pixel - line * out_width) * params.right - params.left;
  const Element* const from = x + (long long)outer * height * width * pitch + (number - pixel * of_pixel) * VECTOR;
  Elements lowest, largest;
#pragma unroll
  for (int i = 0; i < WORDS; i++) lowest.words[i] = LOWEST;
  largest = lowest;
#pragma unroll(ROWS > 3 ? 1 : ROWS)
  for (int r = 0; r < ROWS; r++) {
    const int row = top + r * params.dilation_down;
    const Element* const line = from + (long long)row * width * pitch;
    Elements here[COLUMNS];
#pragma unroll
    for (int s = 0; s < COLUMNS; s++) {
      const int column = left + s * params.dilation_right;
      here[s] = lowest;
      if ((u32)row < (u32)height && (u32)column < (u32)width)
        here[s].vector = __ldg((const Vector*)(line + column * pitch));
    }
#pragma unroll
    for (int s = 0; s < COLUMNS; s++)
#pragma unroll
      for (int i = 0; i < WORDS; i++) take_larger(largest.words[i], here[s].words[i]);
  }
  *(Vector*)(y + (long long)number * VECTOR) = largest.vector;
}
