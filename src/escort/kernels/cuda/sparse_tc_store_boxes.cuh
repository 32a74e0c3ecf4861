// 16-bit elements reach y in NHWC through a staging of 64 channels, which the copy engine stores box by box. It loads
// the residual to the same place before.
#pragma once

// Sums to staging, as rows of pixels (64 channels each, 128-byte swizzle), in place of the residual that lies there.
template <bool RESIDUAL, bool ACTIVATED>
__device__ void stage(const float (&d)[PIXELS / 2], u32 staging, float bias_low, float bias_high, const Slopes& slopes,
                      u32 most) {
  const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  // Lanes 0-7 address 8 pixels of channels 0-7 of the warp's 16, lanes 8-15 of channels 8-15, the others 8 pixels on.
  const int pixel = lane % 8 + lane / 16 * 8, chunk = (warp * 2 + lane / 8 % 2) ^ lane % 8;
  const u32 at = staging + pixel * PIXEL_BYTES + chunk * 16;
#pragma unroll
  for (int j = 0; j + 2 <= PIXELS / 8; j += 2) {
    u32 r[4] = {}, v[4];
    if constexpr (RESIDUAL) load_transposed<4>(at + j * 8 * PIXEL_BYTES, r);
    finish<RESIDUAL, ACTIVATED>(d + 4 * j, bias_low, bias_high, slopes, r, most, v);
    finish<RESIDUAL, ACTIVATED>(d + 4 * j + 4, bias_low, bias_high, slopes, r + 2, most, v + 2);
    store_matrices<4, true>(at + j * 8 * PIXEL_BYTES, v);
  }
  if constexpr (PIXELS / 8 % 2) {
    constexpr int j = PIXELS / 8 - 1;
    u32 r[2] = {}, v[2];
    if constexpr (RESIDUAL) load_transposed<2>(at + j * 8 * PIXEL_BYTES, r);
    finish<RESIDUAL, ACTIVATED>(d + 4 * j, bias_low, bias_high, slopes, r, most, v);
    store_matrices<2, true>(at + j * 8 * PIXEL_BYTES, v);
  }
}

// SPLIT: the same of this block's share of the pixels.
template <bool RESIDUAL, bool ACTIVATED>
__device__ void stage_share(const Shares& shares, int channels, u32 staging, float bias_low, float bias_high,
                            const Slopes& slopes, u32 most) {
  const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  const u32 at = staging + lane % 8 * PIXEL_BYTES + ((warp * 2 + lane / 8 % 2) ^ lane % 8) * 16;
#pragma unroll 1
  for (int j = 0; j < shares.groups; j += 2) {
    const bool twice = j + 1 < shares.groups;
    float d[8];
    shares.add_up(channels, j, twice, d);
#pragma unroll
    for (int i = 0; i < 2; i++) {
      if (i && !twice) break;
      u32 r[2] = {}, v[2];
      if constexpr (RESIDUAL) load_transposed<2>(at + (j + i) * 8 * PIXEL_BYTES, r);
      finish<RESIDUAL, ACTIVATED>(d + 4 * i, bias_low, bias_high, slopes, r, most, v);
      store_matrices<2, true>(at + (j + i) * 8 * PIXEL_BYTES, v);
    }
  }
}

// Whether a box of pixels belongs to both warpgroups, which store it as one.
constexpr bool JOINT = ALONG == 2 && TAP_GROUP != IM2COL;

struct Store {
  const Params& p;
  const Outputs& out;
  const int along, rank;        // rank: SPLIT, of the block's share
  const int store_id, threads;  // of the warpgroups that share a box
  const bool leads;             // whether this thread issues their copies
  const u32 residual_here, staging, box;
  u32 residual_parity = 0;

  __device__ Store(const Params& p, u32 base, const Warpgroup& group, const Outputs& out, int)
      : p(p),
        out(out),
        along(group.along),
        rank(SPLIT ? block_in_cluster(p) : 0),
        store_id(JOINT ? 1 : 1 + group.number),
        threads(JOINT ? CONSUMERS : WARPGROUP),
        leads(threadIdx.x == (JOINT ? 0 : group.number * WARPGROUP)),
        residual_here(base + RESIDUAL_HERE + (JOINT ? 0 : 8 * group.number)),
        staging(base + p.staging_begin + group.staging * M_BLOCKS * p.staging_bytes + along * PIXELS * PIXEL_BYTES),
        box(JOINT ? base + p.staging_begin : staging) {}

  // Lets the residual come, while the products are computed.
  __device__ void begin(int first_channel, int tile) {
    if (p.residual && leads) {
      wait_for_previous_kernel();  // which may have written it
      store_wait();
      barrier_expect(residual_here, M_BLOCKS * p.store_pixels * PIXEL_BYTES);
      copy_boxes(true, out.residual_map, first_channel, tile);
    }
  }

  // d: the sums, or SPLIT the shares of them.
  template <class D>
  __device__ void store(const D& d, const Bias& bias, int first_channel, int tile) {
    const float* const slopes = out.slopes + first_channel;
    if (p.residual) {
      barrier_wait_opaque(residual_here, residual_parity);
      residual_parity ^= 1;
      if (activates(p))
        stage_all<true, true>(d, bias, slopes);
      else
        stage_all<true, false>(d, bias, slopes);
    } else {
      if (leads) store_wait();  // the tile before has left staging
      sync(store_id, threads);
      if (activates(p))
        stage_all<false, true>(d, bias, slopes);
      else
        stage_all<false, false>(d, bias, slopes);
    }
    async_fence();
    sync(store_id, threads);
    if (leads) {
      copy_boxes(false, out.y_map, first_channel, tile);
      store_commit();
    }
  }

  __device__ void end() {
    if (leads) store_wait();
  }

 private:
  template <bool RESIDUAL, bool ACTIVATED>
  __device__ void stage_all(const Sums& d, const Bias& bias, const float* slopes) {
#pragma unroll
    for (int i = 0; i < M_BLOCKS; i++)
      stage<RESIDUAL, ACTIVATED>(d[i], staging + i * p.staging_bytes, bias.low[i], bias.high[i],
                                 Slopes(slopes + i * 64), most_of(p.bound));
  }

  template <bool RESIDUAL, bool ACTIVATED>
  __device__ void stage_all(const Shares& shares, const Bias& bias, const float* slopes) {
#pragma unroll
    for (int i = 0; i < M_BLOCKS; i++)
      stage_share<RESIDUAL, ACTIVATED>(shares, i, staging + i * p.staging_bytes, bias.low[i], bias.high[i],
                                       Slopes(slopes + i * 64), most_of(p.bound));
  }

  __device__ void copy_boxes(bool load, const TensorMap& map, int c, int tile) {
    const Place at(p, tile);
    const int w = WHOLE_ROWS ? 0 : tile * TILE_PIXELS + along * PIXELS + rank * p.store_pixels;
    const int h = WHOLE_ROWS ? at.row + p.by_pitch.quotient(rank * p.store_pixels) : 0, n = WHOLE_ROWS ? at.sample : 0;
#pragma unroll
    for (int i = 0; i < M_BLOCKS; i++) {
      if (load)
        load_box(box + i * p.staging_bytes, map, c + i * 64, w, h, n, residual_here);
      else
        store_box(map, c + i * 64, w, h, n, box + i * p.staging_bytes);
    }
  }
};
