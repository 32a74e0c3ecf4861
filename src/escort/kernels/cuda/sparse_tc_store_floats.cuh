// Floats reach y through a staging of each warp, 32 pixels of its 16 channels at a time (SPLIT 16): in NCHW a lane
// stores a pixel, so that the warp writes neighbouring pixels of a plane, in NHWC four channels of a pixel.
#pragma once

#if OUT_NCHW
using Vector = float;
constexpr int CHANNEL_BYTES = 160, NEXT_BYTES = 4;  // from a channel, and a pixel, to the next in staging
#else
using Vector = float4;
constexpr int CHANNEL_BYTES = 4, NEXT_BYTES = 80;
#endif
constexpr int STAGED = SPLIT ? 16 : 32,
              VECTORS = 16 * STAGED * sizeof(float) / sizeof(Vector) / 32;  // pixels; of a lane
constexpr int PLACES = OUT_NCHW ? 1 : VECTORS;                              // pixels of a lane

__device__ float add(float v, float w) { return v + w; }
__device__ float4 add(float4 v, float4 w) { return make_float4(v.x + w.x, v.y + w.y, v.z + w.z, v.w + w.w); }
__device__ float4 at_least_0(float4 v) {
  return make_float4(at_least_0(v.x), at_least_0(v.y), at_least_0(v.z), at_least_0(v.w));
}
__device__ float4 at_most_6(float4 v) {
  return make_float4(at_most_6(v.x), at_most_6(v.y), at_most_6(v.z), at_most_6(v.w));
}
__device__ float4 activated(float4 v, float4 slope) {
  return make_float4(activated(v.x, slope.x), activated(v.y, slope.y), activated(v.z, slope.z),
                     activated(v.w, slope.w));
}
// Of the channels of a vector.
__device__ Vector slope_of(const float* __restrict__ slopes) {
  return SLOPED ? __ldg(reinterpret_cast<const Vector*>(slopes)) : Vector{};
}

// Where the first channel of a tile's pixel lies in y; -1: it is no output.
__device__ int place_of(const Params& p, int pixel, int tile, int samples) {
  int sample, pixel_of_sample;
  if constexpr (WHOLE_ROWS) {
    const Place at(p, tile);
    const int sample_in_tile = p.by_sample_pitch.quotient(pixel), rest = pixel - sample_in_tile * p.sample_pitch;
    const int row_in_sample = p.by_pitch.quotient(rest), column = rest - row_in_sample * p.pitch;
    const int row = at.row + row_in_sample;
    sample = at.sample + sample_in_tile, pixel_of_sample = row * p.out_width + column;
    if (sample_in_tile >= p.tile_samples || row_in_sample >= p.tile_rows || row >= p.out_height ||
        column >= p.out_width)
      return -1;
  } else {
    const int whole = tile * TILE_PIXELS + pixel;
    sample = p.by_out_plane.quotient(whole), pixel_of_sample = whole - sample * p.out_plane;
  }
  if (sample >= samples) return -1;
  return sample * p.out_channels * p.out_plane + pixel_of_sample * (OUT_NCHW ? 1 : p.out_channels);
}

// What a lane stores of up to STAGED pixels of its warp's 16 channels.
struct Chunk {
  int row[VECTORS], pixel[VECTORS], place[VECTORS];  // in staging, and in y; -1: it is no output
  Vector residuals[VECTORS] = {};

  // channel: one of the 16, by lane.
  __device__ Chunk(const Params& p, const Outputs& out, int channel, int begin_in_tile, int count, int tile,
                   int samples) {
    const int lane = threadIdx.x % 32;
    obscure(begin_in_tile);  // else the compiler computes all places beforehand, for which there are no registers
    int first[PLACES];
#pragma unroll
    for (int i = 0; i < PLACES; i++) {
      const int in_chunk = OUT_NCHW ? lane : i * 8 + lane / 4;
      first[i] = in_chunk < count ? place_of(p, begin_in_tile + in_chunk, tile, samples) : -1;
    }
#pragma unroll
    for (int i = 0; i < VECTORS; i++) {
      row[i] = OUT_NCHW ? i : lane % 4 * 4, pixel[i] = OUT_NCHW ? lane : i * 8 + lane / 4;
      const int of = __shfl_sync(~0u, channel, row[i]), pixel_place = first[OUT_NCHW ? 0 : i];
      place[i] = of >= 0 && pixel_place >= 0 ? pixel_place + of * (OUT_NCHW ? p.out_plane : 1) : -1;
    }
    if (p.residual) {
#pragma unroll
      for (int i = 0; i < VECTORS; i++)
        if (place[i] >= 0) residuals[i] = __ldg(reinterpret_cast<const Vector*>(out.residual + place[i]));
    }
  }

  // d: a warp's sums. Of each 8 pixels lane l has those from 2 (l % 4) on, of channel l / 4 and of channel l / 4 + 8.
  __device__ void store(const Params& p, const Outputs& out, u32 staging, const float* d, int count, float bias_low,
                        float bias_high, const float* slopes) const {
    const int lane = threadIdx.x % 32;
    const u32 to = staging + lane / 4 * CHANNEL_BYTES + lane % 4 * 2 * NEXT_BYTES;
    __syncwarp();  // what was staged before has been read
#pragma unroll
    for (int j = 0; j < count; j += 8) {
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const float bias = half ? bias_high : bias_low, *const sums = d + j / 2 + 2 * half;
        const u32 at = to + half * 8 * CHANNEL_BYTES + j * NEXT_BYTES;
        if constexpr (OUT_NCHW)
          store_shared(at, make_float2(sums[0] + bias, sums[1] + bias));
        else
          store_shared(at, sums[0] + bias), store_shared(at + NEXT_BYTES, sums[1] + bias);
      }
    }
    __syncwarp();
    Vector sums[VECTORS];
#pragma unroll
    for (int i = 0; i < VECTORS; i++) {
      load_shared(staging + row[i] * CHANNEL_BYTES + pixel[i] * NEXT_BYTES, sums[i]);
      sums[i] = add(sums[i], residuals[i]);
    }
    if (BEYOND_BOUNDS) {
#pragma unroll
      for (int i = 0; i < VECTORS; i++) sums[i] = activated(sums[i], slope_of(slopes + row[i]));
    }
    if (p.bound) {
#pragma unroll
      for (int i = 0; i < VECTORS; i++) sums[i] = at_least_0(sums[i]);
    }
    if (p.bound == 2) {
#pragma unroll
      for (int i = 0; i < VECTORS; i++) sums[i] = at_most_6(sums[i]);
    }
#pragma unroll
    for (int i = 0; i < VECTORS; i++)
      if (place[i] >= 0) *reinterpret_cast<Vector*>(out.y + place[i]) = sums[i];
  }
};

struct Store {
  const Params& p;
  u32 base;
  Warpgroup group;
  const Outputs& out;
  int samples;

  __device__ Store(const Params& p, u32 base, const Warpgroup& group, const Outputs& out, int samples)
      : p(p), base(base), group(group), out(out), samples(samples) {}
  __device__ void begin(int, int) {}
  __device__ void end() {}

  // d: the sums, or SPLIT the shares of them.
  template <class D>
  __device__ void store(const D& d, const Bias& bias, int first_channel, int tile) {
#pragma unroll
    for (int i = 0; i < M_BLOCKS; i++)
      store_block(d, i, bias, first_channel + i * 64 + threadIdx.x / 32 % 4 * 16, tile);
  }

 private:
  __device__ u32 staging() const { return base + p.staging_begin + threadIdx.x / 32 * p.staging_bytes; }

  // 16 channels, of block i.
  __device__ void store_block(const Sums& d, int i, const Bias& bias, int first_channel, int tile) {
    const int channel = __ldg(out.out_order + first_channel + threadIdx.x % 16);
#pragma unroll
    for (int begin = 0; begin < PIXELS; begin += STAGED) {
      const int count = PIXELS - begin < STAGED ? PIXELS - begin : STAGED;
      const Chunk chunk(p, out, channel, group.along * PIXELS + begin, count, tile, samples);
      chunk.store(p, out, staging(), d[i] + begin / 2, count, bias.low[i], bias.high[i], out.slopes + first_channel);
    }
  }

  // The same of this block's share of the pixels.
  __device__ void store_block(const Shares& shares, int i, const Bias& bias, int first_channel, int tile) {
    const int channel = __ldg(out.out_order + first_channel + threadIdx.x % 16);
#pragma unroll 1
    for (int j = 0; j < shares.groups; j += 2) {
      const bool twice = j + 1 < shares.groups;
      const Chunk chunk(p, out, channel, (shares.first_group + j) * 8, twice ? 16 : 8, tile, samples);
      float d[8];
      shares.add_up(i, j, twice, d);
      chunk.store(p, out, staging(), d, 16, bias.low[i], bias.high[i], out.slopes + first_channel);
    }
  }
};
