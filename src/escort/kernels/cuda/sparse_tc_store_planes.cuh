// 16-bit elements reach y in NCHW through a staging of 64 channels, whose rows are channels. A lane stores VECTOR
// neighbouring pixels, so that a store of the warp writes neighbours in a plane.
#pragma once

// As many neighbouring elements as divide a row (or plane) of y.
#if VECTOR == 8
using Vector = uint4;
#elif VECTOR == 4
using Vector = uint2;
#elif VECTOR == 2
using Vector = u32;
#else
using Vector = u16;
#endif

__device__ Vector load_vector(u32 from) {
  Vector v;
#if VECTOR == 2 && UNALIGNED
  u16 low, high;
  load_shared(from, low), load_shared(from + 2, high);
  v = low | static_cast<u32>(high) << 16;
#else
  load_shared(from, v);
#endif
  return v;
}

__device__ u32 add_pair(u32 pair, u32 residual) {
  const float2 v = unpack(pair), r = unpack(residual);
  return pack(activate(v.x + r.x), activate(v.y + r.y));
}

__device__ Vector add(Vector v, Vector residual) {
#if VECTOR == 8
  return make_uint4(add_pair(v.x, residual.x), add_pair(v.y, residual.y), add_pair(v.z, residual.z),
                    add_pair(v.w, residual.w));
#elif VECTOR == 4
  return make_uint2(add_pair(v.x, residual.x), add_pair(v.y, residual.y));
#else
  return static_cast<Vector>(add_pair(v, residual));
#endif
}

// Sums to staging, as rows of channels.
__device__ void stage(const float (&d)[PIXELS / 2], u32 staging, float bias_low, float bias_high) {
  const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  // Lanes 0-7 address channels 0-7 of the warp's 16, lanes 8-15 channels 8-15, the others 8 pixels on.
  const u32 at = staging + (warp * 16 + lane % 16) * STAGING_PITCH + lane / 16 * 16;
#pragma unroll
  for (int j = 0; j + 2 <= PIXELS / 8; j += 2) {
    u32 v[4];
    finish(d + 4 * j, bias_low, bias_high, false, nullptr, v);
    finish(d + 4 * j + 4, bias_low, bias_high, false, nullptr, v + 2);
    store_matrices<4, false>(at + j * 16, v);
  }
  if constexpr (PIXELS / 8 % 2) {
    constexpr int j = PIXELS / 8 - 1;
    u32 v[2];
    finish(d + 4 * j, bias_low, bias_high, false, nullptr, v);
    store_matrices<2, false>(at + j * 16, v);
  }
}

// Which outputs a tile has, and where.
struct TileOutputs {
  int tile;
  int rows = 1;  // of each sample
  int count;

  __device__ TileOutputs(int tile, int samples) : tile(tile) {
    if constexpr (WHOLE_ROWS) {
      const Place at(tile);
      rows = min(TILE_ROWS, OUT_HEIGHT - at.row);
      count = rows * OUT_WIDTH * min(TILE_SAMPLES, samples - at.sample);
    } else {
      count = min(TILE_PIXELS, samples * OUT_PLANE - tile * TILE_PIXELS);
    }
  }

  // Where an output lies: its column of staging, and its place in y in the first channel.
  __device__ void find(int output, int& column, u32& place) const {
    int sample, pixel;  // of y, in its plane
    if constexpr (WHOLE_ROWS) {
      const Place at(tile);
      const int sample_in_tile = output / (rows * OUT_WIDTH), rest = output - sample_in_tile * rows * OUT_WIDTH,
                row = rest / OUT_WIDTH;
      sample = at.sample + sample_in_tile, pixel = at.row * OUT_WIDTH + rest;
      column = sample_in_tile * SAMPLE_PITCH + row * PITCH + rest - row * OUT_WIDTH;
    } else {
      const int whole = tile * TILE_PIXELS + output;
      sample = whole / OUT_PLANE, pixel = whole - sample * OUT_PLANE, column = output;
    }
    place = static_cast<u32>(sample) * (OUT_CHANNELS * OUT_PLANE) + pixel;  // the host sees that it fits
  }
};

// A warp's CHANNELS rows of staging to y; pixels that are no outputs are passed over. Sums are rounded before the
// residual is added.
template <int CHANNELS>
__device__ void store_channels(u32 staging, const int* __restrict__ channels, const TileOutputs& outputs,
                               u16* __restrict__ y, const u16* __restrict__ residual) {
  const int lane = threadIdx.x % 32, channel = __ldg(channels + lane % CHANNELS);
  for (int unit = lane * VECTOR; unit - lane * VECTOR < outputs.count; unit += 32 * VECTOR) {
    const bool inside = unit < outputs.count;
    int column;
    u32 first;
    outputs.find(unit, column, first);
    constexpr int AT_ONCE = VECTOR == 8 ? 4 : 8;
#pragma unroll 1
    for (int row = 0; row < CHANNELS; row += AT_ONCE) {
      [[maybe_unused]] Vector residuals[AT_ONCE];
      if constexpr (RESIDUAL) {
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
          const int to = __shfl_sync(~0u, channel, row + i);
          if (to >= 0 && inside)
            residuals[i] =
                __ldg(reinterpret_cast<const Vector*>(residual + (first + static_cast<u32>(to) * OUT_PLANE)));
        }
      }
#pragma unroll
      for (int i = 0; i < AT_ONCE; i++) {
        const int to = __shfl_sync(~0u, channel, row + i);
        if (to < 0 || !inside) continue;
        Vector v = load_vector(staging + (row + i) * STAGING_PITCH + column * 2);
        if constexpr (RESIDUAL) v = add(v, residuals[i]);
        *reinterpret_cast<Vector*>(y + (first + static_cast<u32>(to) * OUT_PLANE)) = v;
      }
    }
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

  // A warp stores what it has staged itself; but warpgroups that have the same channels store half of them each.
  __device__ void store(const Sums& d, const Bias& bias, int first_channel, int tile) {
    constexpr int CHANNELS = 16 / ALONG;
    if (ALONG == 2) sync(1, CONSUMERS);
    const u32 staging = base + STAGING + group.across * M_BLOCKS * STAGING_BYTES;
#pragma unroll
    for (int i = 0; i < M_BLOCKS; i++)
      stage(d[i], staging + i * STAGING_BYTES + group.along * PIXELS * 2, bias.low[i], bias.high[i]);
    if (ALONG == 2) sync(1, CONSUMERS);
    __syncwarp();
    const int of_warp = threadIdx.x / 32 % 4 * 16 + group.along * CHANNELS;
#pragma unroll 1
    for (int i = 0; i < M_BLOCKS; i++)
      store_channels<CHANNELS>(staging + i * STAGING_BYTES + of_warp * STAGING_PITCH,
                               out.out_order + first_channel + i * 64 + of_warp, TileOutputs(tile, samples), out.y,
                               out.residual);
    __syncwarp();
  }
};
