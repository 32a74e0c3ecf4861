// x (images, channels, plane) of 16-bit elements to (images, plane, 64 * blocks), channels in a given order:
// to[n][p][i] = x[n][order[i]][p], or 0 where order[i] is negative.
//
// A block takes 64 channels and a piece of an image's plane. Lanes read VECTOR neighbouring pixels of two channels that
// lie side by side in `to`, a warp runs of 32 pixels; rows of shared memory are pixels, 33 words apart, so that neither
// writing nor reading them meets the same bank twice. Stores are 128 bytes of a pixel.
// VECTOR   8, 4, 2 or 1, a divisor of the plane
typedef unsigned short u16;
typedef unsigned int u32;

#define THREADS 256
#define MOST_PIXELS 128  // of a piece
#define ROW 33

#if VECTOR == 8
typedef uint4 Vector;
#elif VECTOR == 4
typedef uint2 Vector;
#elif VECTOR == 2
typedef u32 Vector;
#else
typedef u16 Vector;
#endif

struct Elements {
  union {
    Vector vector;
    u16 at[VECTOR];
  };
};

__device__ __forceinline__ Elements load(const u16* __restrict__ image, int channel, int plane, int pixel) {
  Elements e = {};
  if (channel >= 0) e.vector = __ldg((const Vector*)(image + channel * (long long)plane + pixel));
  return e;
}

extern "C" __global__ void __launch_bounds__(THREADS, 5)
    channels_last(const u16* __restrict__ x, uint4* __restrict__ to, const int2* __restrict__ order, int channels,
                  int plane, int pieces, int piece) {
  __shared__ u32 tile[MOST_PIXELS * ROW];
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents; griddepcontrol.wait;" ::: "memory");
#endif
  constexpr int LANES = 32 / VECTOR;  // of a warp along the pixels; the others take other channels
  constexpr int RUNS = 32 / VECTOR;   // of a warp that all channels take for 32 pixels
  constexpr int AT_ONCE = VECTOR == 8 ? 2 : 4;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int n = blockIdx.x / pieces, first = (blockIdx.x - n * pieces) * piece, count = min(piece, plane - first);
  const u16* const image = x + n * (long long)channels * plane;
  const int2* const pairs = order + blockIdx.y * 32;
  for (int i = warp; i < (count + 31) / 32 * RUNS; i += THREADS / 32 * AT_ONCE) {
    Elements low[AT_ONCE], high[AT_ONCE];
    int pair[AT_ONCE], pixel[AT_ONCE];
#pragma unroll
    for (int u = 0; u < AT_ONCE; u++) {
      const int run = i + u * (THREADS / 32);
      pair[u] = run % RUNS * VECTOR + lane / LANES, pixel[u] = run / RUNS * 32 + lane % LANES * VECTOR;
      if (pixel[u] >= count) continue;
      const int2 both = __ldg(pairs + pair[u]);
      low[u] = load(image, both.x, plane, first + pixel[u]);
      high[u] = load(image, both.y, plane, first + pixel[u]);
    }
#pragma unroll
    for (int u = 0; u < AT_ONCE; u++) {
      if (pixel[u] >= count) continue;
#pragma unroll
      for (int j = 0; j < VECTOR; j++) tile[(pixel[u] + j) * ROW + pair[u]] = low[u].at[j] | (u32)high[u].at[j] << 16;
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
