// Floats reach y through a staging of each warp, 32 pixels of its 16 channels at a time: in NCHW a lane stores a pixel,
// so that the warp writes neighbouring pixels of a plane, in NHWC four channels of a pixel.
#pragma once

#if OUT_NCHW
using Vector = float;
constexpr int CHANNEL_STRIDE = OUT_PLANE, PIXEL_STRIDE = 1;  // in y
constexpr int CHANNEL_BYTES = 160, NEXT_BYTES = 4;           // from a channel, and a pixel, to the next in staging
#else
using Vector = float4;
constexpr int CHANNEL_STRIDE = 1, PIXEL_STRIDE = OUT_CHANNELS;
constexpr int CHANNEL_BYTES = 4, NEXT_BYTES = 80;
#endif
constexpr int STAGED = 32, VECTORS = 16 * STAGED * sizeof(float) / sizeof(Vector) / 32;  // pixels; of a lane
static_assert(15 * CHANNEL_BYTES + (STAGED - 1) * NEXT_BYTES + sizeof(float) <= STAGING_BYTES);

__device__ float finish(float sum, float residual) { return activate(RESIDUAL ? sum + residual : sum); }
__device__ float4 finish(float4 sum, float4 residual) {
  return make_float4(finish(sum.x, residual.x), finish(sum.y, residual.y), finish(sum.z, residual.z),
                     finish(sum.w, residual.w));
}

// Where the first channel of a tile's pixel lies in y; -1: it is no output.
__device__ int place_of(int pixel, int tile, int samples) {
  if constexpr (WHOLE_ROWS) {
    const Place at(tile);
    const int sample_in_tile = pixel / SAMPLE_PITCH, rest = pixel % SAMPLE_PITCH, row_in_sample = rest / PITCH;
    const int sample = at.sample + sample_in_tile, row = at.row + row_in_sample, column = rest % PITCH;
    if (sample_in_tile >= TILE_SAMPLES || sample >= samples || row_in_sample >= TILE_ROWS || row >= OUT_HEIGHT ||
        column >= OUT_WIDTH)
      return -1;
    return sample * (OUT_CHANNELS * OUT_PLANE) + (row * OUT_WIDTH + column) * PIXEL_STRIDE;
  } else {
    const int whole = tile * TILE_PIXELS + pixel, sample = whole / OUT_PLANE;
    return sample < samples ? sample * (OUT_CHANNELS * OUT_PLANE) + whole % OUT_PLANE * PIXEL_STRIDE : -1;
  }
}

struct Store {
  u32 base;
  Warpgroup group;
  const Outputs& out;
  int samples;

  __device__ Store(u32 base, const Warpgroup& group, const Outputs& out, int samples)
      : base(base), group(group), out(out), samples(samples) {}
  __device__ void begin(int, int) {}
  __device__ void end() {}

  __device__ void store(const Sums& d, const Bias& bias, int first_channel, int tile) {
#pragma unroll
    for (int i = 0; i < M_BLOCKS; i++) {
      const int* const channels = out.out_order + first_channel + i * 64 + threadIdx.x / 32 % 4 * 16;
      store_block(d[i], bias.low[i], bias.high[i], channels, tile);
    }
  }

  // A warp's sums: of each 8 pixels lane l has those from 2 (l % 4) on, of channel l / 4 and of channel l / 4 + 8.
  __device__ void store_block(const float (&d)[PIXELS / 2], float bias_low, float bias_high,
                              const int* __restrict__ channels, int tile) {
    const u32 staging = base + STAGING + threadIdx.x / 32 * STAGING_BYTES;
    const int lane = threadIdx.x % 32, channel = __ldg(channels + lane % 16);
    const u32 to = staging + lane / 4 * CHANNEL_BYTES + lane % 4 * 2 * NEXT_BYTES;
#pragma unroll
    for (int begin = 0; begin < PIXELS; begin += STAGED) {
      int begin_in_tile = group.along * PIXELS + begin;
      obscure(begin_in_tile);  // else the compiler computes all places beforehand, for which there are no registers
      int row[VECTORS], pixel[VECTORS], place[VECTORS];
      Vector residuals[VECTORS] = {};
#pragma unroll
      for (int i = 0; i < VECTORS; i++) {
        row[i] = OUT_NCHW ? i : lane % 4 * 4, pixel[i] = OUT_NCHW ? lane : i * 8 + lane / 4;
        const int of = __shfl_sync(~0u, channel, row[i]), first = place_of(begin_in_tile + pixel[i], tile, samples);
        place[i] = of >= 0 && first >= 0 && begin + pixel[i] < PIXELS ? first + of * CHANNEL_STRIDE : -1;
        if (RESIDUAL && place[i] >= 0) residuals[i] = __ldg(reinterpret_cast<const Vector*>(out.residual + place[i]));
      }
      __syncwarp();  // what was staged before has been read
#pragma unroll
      for (int j = begin; j < begin + STAGED && j < PIXELS; j += 8) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
          const float bias = half ? bias_high : bias_low, *const sums = d + j / 2 + 2 * half;
          const u32 at = to + half * 8 * CHANNEL_BYTES + (j - begin) * NEXT_BYTES;
          if constexpr (OUT_NCHW)
            store_shared(at, make_float2(sums[0] + bias, sums[1] + bias));
          else
            store_shared(at, sums[0] + bias), store_shared(at + NEXT_BYTES, sums[1] + bias);
        }
      }
      __syncwarp();
#pragma unroll
      for (int i = 0; i < VECTORS; i++) {
        Vector sums;
        load_shared(staging + row[i] * CHANNEL_BYTES + pixel[i] * NEXT_BYTES, sums);
        if (place[i] >= 0) *reinterpret_cast<Vector*>(out.y + place[i]) = finish(sums, residuals[i]);
      }
    }
  }
};
