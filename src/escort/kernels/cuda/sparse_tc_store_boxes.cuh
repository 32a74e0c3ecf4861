// 16-bit elements reach y in NHWC through a staging of 64 channels, which the copy engine stores box by box. It loads
// the residual to the same place before.
#pragma once

// A box of pixels may belong to both warpgroups, which then store it as one.
constexpr bool JOINT = ALONG == 2 && TAP_GROUP != IM2COL;

// Sums to staging, as rows of pixels (64 channels each, 128-byte swizzle), in place of the residual that lies there.
__device__ void stage(const float (&d)[PIXELS / 2], u32 staging, float bias_low, float bias_high) {
  const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  // Lanes 0-7 address 8 pixels of channels 0-7 of the warp's 16, lanes 8-15 of channels 8-15, the others 8 pixels on.
  const int pixel = lane % 8 + lane / 16 * 8, chunk = (warp * 2 + lane / 8 % 2) ^ lane % 8;
  const u32 at = staging + pixel * PIXEL_BYTES + chunk * 16;
#pragma unroll
  for (int j = 0; j + 2 <= PIXELS / 8; j += 2) {
    u32 r[4] = {}, v[4];
    if constexpr (RESIDUAL) load_transposed<4>(at + j * 8 * PIXEL_BYTES, r);
    finish(d + 4 * j, bias_low, bias_high, RESIDUAL, r, v);
    finish(d + 4 * j + 4, bias_low, bias_high, RESIDUAL, r + 2, v + 2);
    store_matrices<4, true>(at + j * 8 * PIXEL_BYTES, v);
  }
  if constexpr (PIXELS / 8 % 2) {
    constexpr int j = PIXELS / 8 - 1;
    u32 r[2] = {}, v[2];
    if constexpr (RESIDUAL) load_transposed<2>(at + j * 8 * PIXEL_BYTES, r);
    finish(d + 4 * j, bias_low, bias_high, RESIDUAL, r, v);
    store_matrices<2, true>(at + j * 8 * PIXEL_BYTES, v);
  }
}

struct Store {
  const Outputs& out;
  const int along;
  const int store_id, threads;  // of the warpgroups that share a box
  const bool leads;             // whether this thread issues their copies
  const u32 residual_here, staging, box;
  [[maybe_unused]] u32 residual_parity = 0;

  __device__ Store(u32 base, const Warpgroup& group, const Outputs& out, int)
      : out(out),
        along(group.along),
        store_id(JOINT ? 1 : 1 + group.number),
        threads(JOINT ? CONSUMERS : WARPGROUP),
        leads(threadIdx.x == (JOINT ? 0 : group.number * WARPGROUP)),
        residual_here(base + RESIDUAL_HERE + (JOINT ? 0 : 8 * group.number)),
        staging(base + STAGING + group.across * M_BLOCKS * STAGING_BYTES + group.along * PIXELS * PIXEL_BYTES),
        box(JOINT ? base + STAGING : staging) {}

  // Lets the residual come, while the products are computed.
  __device__ void begin([[maybe_unused]] int first_channel, [[maybe_unused]] int tile) {
#if RESIDUAL
    if (leads) {
      store_wait();
      barrier_expect(residual_here, M_BLOCKS * BOX_PIXELS * PIXEL_BYTES);
      copy_boxes(true, out.residual_map, first_channel, tile);
    }
#endif
  }

  __device__ void store(const Sums& d, const Bias& bias, int first_channel, int tile) {
#if RESIDUAL
    barrier_wait_opaque(residual_here, residual_parity);
    residual_parity ^= 1;
#else
    if (leads) store_wait();  // the tile before has left staging
    sync(store_id, threads);
#endif
#pragma unroll
    for (int i = 0; i < M_BLOCKS; i++) stage(d[i], staging + i * STAGING_BYTES, bias.low[i], bias.high[i]);
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

  __device__ void copy_boxes(bool load, const TensorMap& map, int c, int tile) {
    const Place at(tile);
    const int w = WHOLE_ROWS ? 0 : tile * TILE_PIXELS + along * PIXELS;
    const int h = WHOLE_ROWS ? at.row : 0, n = WHOLE_ROWS ? at.sample : 0;
#pragma unroll
    for (int i = 0; i < M_BLOCKS; i++) {
      if (load)
        load_box(box + i * STAGING_BYTES, map, c + i * 64, w, h, n, residual_here);
      else
        store_box(map, c + i * 64, w, h, n, box + i * STAGING_BYTES);
    }
  }
};
