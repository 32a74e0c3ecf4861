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

// A vector of outputs that were rounded before, and the residual; activated.
struct Adder {
  u32 least, most;
  float slope = 0.f;
  __device__ explicit Adder(int bound) : least(bound ? 0 : INFINITE | 0x80008000), most(bound == 2 ? SIX : INFINITE) {}
  __device__ u32 add(u32 pair, u32 residual) const {
    const float2 v = unpack(pair), r = unpack(residual);
    if constexpr (BEYOND_BOUNDS) return pack<false>(activated(v.x + r.x, slope), activated(v.y + r.y, slope));
    return smaller(larger(pack<false>(v.x + r.x, v.y + r.y), least), most);
  }
  __device__ u16 add(u16 v, u16 residual) const { return add(u32{v}, u32{residual}); }
  __device__ uint2 add(uint2 v, uint2 residual) const { return make_uint2(add(v.x, residual.x), add(v.y, residual.y)); }
  __device__ uint4 add(uint4 v, uint4 residual) const {
    return make_uint4(add(v.x, residual.x), add(v.y, residual.y), add(v.z, residual.z), add(v.w, residual.w));
  }
};

// Sums to staging, as rows of channels.
template <bool ACTIVATED>
__device__ void stage(const float (&d)[PIXELS / 2], u32 staging, u32 pitch, float bias_low, float bias_high,
                      const Slopes& slopes, u32 most) {
  const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  // Lanes 0-7 address channels 0-7 of the warp's 16, lanes 8-15 channels 8-15, the others 8 pixels on.
  const u32 at = staging + (warp * 16 + lane % 16) * pitch + lane / 16 * 16;
#pragma unroll
  for (int j = 0; j + 2 <= PIXELS / 8; j += 2) {
    u32 v[4];
    finish<false, ACTIVATED>(d + 4 * j, bias_low, bias_high, slopes, nullptr, most, v);
    finish<false, ACTIVATED>(d + 4 * j + 4, bias_low, bias_high, slopes, nullptr, most, v + 2);
    store_matrices<4, false>(at + j * 16, v);
  }
  if constexpr (PIXELS / 8 % 2) {
    constexpr int j = PIXELS / 8 - 1;
    u32 v[2];
    finish<false, ACTIVATED>(d + 4 * j, bias_low, bias_high, slopes, nullptr, most, v);
    store_matrices<2, false>(at + j * 16, v);
  }
}

// Which outputs a tile has, and where.
struct TileOutputs {
  const Params& p;
  int tile, count;

  __device__ TileOutputs(const Params& p, int tile, int samples) : p(p), tile(tile) {
    if constexpr (WHOLE_ROWS) {
      const Place at(p, tile);
      count = min(p.tile_rows, p.out_height - at.row) * p.out_width * min(p.tile_samples, samples - at.sample);
    } else {
      count = min(TILE_PIXELS, samples * p.out_plane - tile * TILE_PIXELS);
    }
  }

  // Where an output lies: its column of staging, and its place in y in the first channel.
  __device__ void find(int output, int& column, u32& place) const {
    int sample, pixel;  // of y, in its plane
    if constexpr (WHOLE_ROWS) {
      // Only tiles of all rows have several samples, and a last tile with fewer rows has one.
      const Place at(p, tile);
      const int sample_in_tile = p.by_tile_plane.quotient(output);
      const int rest = output - sample_in_tile * p.tile_rows * p.out_width, row = p.by_out_width.quotient(rest);
      sample = at.sample + sample_in_tile, pixel = at.row * p.out_width + rest;
      column = sample_in_tile * p.sample_pitch + row * (p.pitch - p.out_width) + rest;
    } else {
      const int whole = tile * TILE_PIXELS + output;
      sample = p.by_out_plane.quotient(whole), pixel = whole - sample * p.out_plane, column = output;
    }
    place = static_cast<u32>(sample) * (p.out_channels * p.out_plane) + pixel;  // the host sees that it fits
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

  // A warp stores what it has staged itself; but warpgroups that have the same channels store half of them each.
  __device__ void store(const Sums& d, const Bias& bias, int first_channel, int tile) {
    if (ALONG == 2) sync(1, CONSUMERS);
    const u32 staging = base + p.staging_begin + group.staging * M_BLOCKS * p.staging_bytes;
    const u32 columns = staging + group.along * PIXELS * 2;
    const float* const slopes = out.slopes + first_channel;
    if (activates(p) && !p.residual)
      stage_all<true>(d, bias, slopes, columns);
    else
      stage_all<false>(d, bias, slopes, columns);
    if (ALONG == 2) sync(1, CONSUMERS);
    __syncwarp();
    const TileOutputs outputs(p, tile, samples);
#pragma unroll 1
    for (int i = 0; i < M_BLOCKS; i++) {
      if (p.residual)
        store_channels<true>(staging + i * p.staging_bytes, out.out_order + first_channel + i * 64, outputs);
      else
        store_channels<false>(staging + i * p.staging_bytes, out.out_order + first_channel + i * 64, outputs);
    }
    __syncwarp();
  }

 private:
  template <bool ACTIVATED>
  __device__ void stage_all(const Sums& d, const Bias& bias, const float* slopes, u32 columns) {
#pragma unroll
    for (int i = 0; i < M_BLOCKS; i++)
      stage<ACTIVATED>(d[i], columns + i * p.staging_bytes, p.staging_pitch, bias.low[i], bias.high[i],
                       Slopes(slopes + i * 64), most_of(p.bound));
  }

  // A warp's rows of staging to y; pixels that are no outputs are passed over. Sums are rounded before the residual is
  // added.
  template <bool RESIDUAL>
  __device__ void store_channels(u32 staging, const int* __restrict__ order, const TileOutputs& outputs) {
    const int count = 16 / ALONG, of_warp = threadIdx.x / 32 % 4 * 16 + group.along * count;
    const int lane = threadIdx.x % 32, channel = __ldg(order + of_warp + (lane & (count - 1)));
    Adder adder(p.bound);
    staging += of_warp * p.staging_pitch;
    // All lanes go round as often, and the compiler must see it: else it takes the next products for divergent.
    for (int begin = 0; begin < outputs.count; begin += 32 * VECTOR) {
      const int unit = begin + lane * VECTOR;
      const bool inside = unit < outputs.count;
      int column;
      u32 first;
      outputs.find(unit, column, first);
      constexpr int AT_ONCE = VECTOR == 8 ? 4 : 8;
#pragma unroll 1
      for (int row = 0; row < count; row += AT_ONCE) {
        [[maybe_unused]] Vector residuals[AT_ONCE];
        if constexpr (RESIDUAL) {
#pragma unroll
          for (int i = 0; i < AT_ONCE; i++) {
            const int to = __shfl_sync(~0u, channel, row + i);
            if (to >= 0 && inside)
              residuals[i] =
                  __ldg(reinterpret_cast<const Vector*>(out.residual + (first + static_cast<u32>(to) * p.out_plane)));
          }
        }
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
          const int to = __shfl_sync(~0u, channel, row + i);
          if (to < 0 || !inside) continue;
          Vector v = load_vector(staging + (row + i) * p.staging_pitch + column * 2);
          if constexpr (RESIDUAL) {
            if (SLOPED) adder.slope = __ldg(out.slopes + (order - out.out_order) + of_warp + row + i);
            v = adder.add(v, residuals[i]);
          }
          *reinterpret_cast<Vector*>(out.y + (first + static_cast<u32>(to) * p.out_plane)) = v;
        }
      }
    }
  }
};
