// x (samples, channels, plane) to (samples, plane, 128 bytes * blocks), channels in a given order:
// to[n][p][i] = x[n][order[i]][p], or 0 where order[i] is negative. Floats are rounded to TF32 on the way.
//
// A block takes 32 words of channels and a strip of a sample's plane. A word is two 16-bit channels that lie side by
// side in `to`, or a float. Lanes read VECTOR neighbouring pixels of the channels of a word, a warp runs of 32 pixels;
// rows of shared memory are pixels, 33 words apart, so that neither writing nor reading them meets the same bank twice.
// Stores are 128 bytes of a pixel.
// BYTES    of an element: 2, or 4: floats
// VECTOR   elements of 16 bytes at most, a divisor of the plane
#define THREADS 256
#define MOST_PIXELS 128  // of a strip
#define ROW 33

#include "vectors.cuh"

#if BYTES == 2
typedef int2 Channels;  // of a word
#else
typedef int Channels;
#endif

struct Elements {
  union {
    Vector vector;
    Element at[VECTOR];
  };
};

__device__ __forceinline__ Elements load(const Element* __restrict__ sample, int channel, int plane, int pixel) {
  Elements e = {};
  if (channel >= 0) e.vector = __ldg((const Vector*)(sample + channel * (long long)plane + pixel));
  return e;
}

// VECTOR words: pixels of the channels that they hold.
struct Words {
#if BYTES == 2
  Elements low, high;
  __device__ void load_from(const Element* sample, int2 channels, int plane, int pixel) {
    low = load(sample, channels.x, plane, pixel), high = load(sample, channels.y, plane, pixel);
  }
  __device__ u32 word(int j) const { return low.at[j] | (u32)high.at[j] << 16; }
#else
  Elements elements;
  __device__ void load_from(const Element* sample, int channel, int plane, int pixel) {
    elements = load(sample, channel, plane, pixel);
  }
  __device__ u32 word(int j) const {
    u32 rounded;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "r"(elements.at[j]));
    return rounded;
  }
#endif
};

extern "C" __global__ void __launch_bounds__(THREADS, 5)
    sparse_tc_arrange(const Element* __restrict__ x, uint4* __restrict__ to, const Channels* __restrict__ order,
                      int channels, int plane, int strips, int strip) {
  __shared__ u32 tile[MOST_PIXELS * ROW];
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents; griddepcontrol.wait;" ::: "memory");
#endif
  constexpr int LANES = 32 / VECTOR;  // of a warp along the pixels; the others take other words
  constexpr int RUNS = 32 / VECTOR;   // of a warp that all words take for 32 pixels
  constexpr int AT_ONCE = VECTOR == 8 ? 2 : 4;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int n = blockIdx.x / strips, first = (blockIdx.x - n * strips) * strip, count = min(strip, plane - first);
  const Element* const sample = x + n * (long long)channels * plane;
  const Channels* const channels_of = order + blockIdx.y * 32;
  for (int i = warp; i < (count + 31) / 32 * RUNS; i += THREADS / 32 * AT_ONCE) {
    Words words[AT_ONCE];
    int place[AT_ONCE], pixel[AT_ONCE];
#pragma unroll
    for (int u = 0; u < AT_ONCE; u++) {
      const int run = i + u * (THREADS / 32);
      place[u] = run % RUNS * VECTOR + lane / LANES, pixel[u] = run / RUNS * 32 + lane % LANES * VECTOR;
      if (pixel[u] < count) words[u].load_from(sample, __ldg(channels_of + place[u]), plane, first + pixel[u]);
    }
#pragma unroll
    for (int u = 0; u < AT_ONCE; u++) {
      if (pixel[u] >= count) continue;
#pragma unroll
      for (int j = 0; j < VECTOR; j++) tile[(pixel[u] + j) * ROW + place[u]] = words[u].word(j);
    }
  }
  __syncthreads();
  const int blocks = gridDim.y;
  uint4* const out = to + ((n * (long long)plane + first) * blocks + blockIdx.y) * 8;
#pragma unroll 2
  for (int i = threadIdx.x; i < count * 8; i += THREADS) {
    const u32* const v = tile + i / 8 * ROW + i % 8 * 4;
    out[i / 8 * (long long)blocks * 8 + i % 8] = make_uint4(v[0], v[1], v[2], v[3]);
  }
}
