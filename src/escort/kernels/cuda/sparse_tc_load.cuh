// The producer of sparse_tc.cuh: one thread that copies pixels and weight tiles to shared memory, stage by stage.
#pragma once
#include "sparse_tc_ptx.cuh"
#include "sparse_tc_tiles.cuh"

// A tile's copies of pixels, one for each tap group.
struct PixelCopies {
  int c = 0, r = 0, s = 0;  // the next one's first input channel and tap

  __device__ void copy(u32 to, const TensorMap& x_map, int tile, u32 barrier) {
    if constexpr (TAP_GROUP == IM2COL) {
#pragma unroll
      for (int i = 0; i < ALONG; i++) {
        const int pixel = tile * TILE_PIXELS + i * PIXELS, row = pixel / OUT_WIDTH;
        load_im2col(to + i * PIXELS * PIXEL_BYTES, x_map, c, pixel % OUT_WIDTH * STRIDE_RIGHT - LEFT,
                    row % OUT_HEIGHT * STRIDE_DOWN - TOP, row / OUT_HEIGHT, s * DILATION_RIGHT, r * DILATION_DOWN,
                    barrier);
      }
      if (++s == KERNEL_COLUMNS) s = 0, r++;
      if (r == KERNEL_ROWS) r = 0, c += K_BLOCK;
    } else if constexpr (TAP_GROUP == FLAT) {
      load_box(to, x_map, c, tile * TILE_PIXELS, 0, 0, barrier);
      c += K_BLOCK;
    } else {
      const Place at(tile);
      load_box(to, x_map, c, s * DILATION_RIGHT - LEFT, at.row - TOP, at.sample, barrier);
      if (TAP_GROUP == HALO || ++s == KERNEL_COLUMNS) s = 0, c += K_BLOCK;
    }
  }
};

__device__ void produce(u32 base, const TensorMap& x_map, const u8* __restrict__ a, const int* __restrict__ first,
                        int tile_groups) {
  Ring<A_STAGES> ring_a;
  Ring<B_STAGES> ring_b;
  constexpr int PART = A_BYTES / CLUSTER;
  const int part = blockIdx.x % CLUSTER * PART;
  for (Work work(tile_groups); work.left(); work.next()) {
    const int* const firsts = first + work.m_tile() * TAP_GROUPS;
    int weight_tile = __ldg(firsts);
    PixelCopies pixels;
    for (int tap_group = 0; tap_group < TAP_GROUPS; tap_group++) {
      barrier_wait_opaque(base + EMPTY_B + 8 * ring_b.stage, ring_b.parity ^ 1);
      const u32 barrier = base + FULL_B + 8 * ring_b.stage;
      barrier_expect(barrier, LOAD_PIXELS * PIXEL_BYTES);
      pixels.copy(base + B + ring_b.stage * B_STAGE_BYTES, x_map, work.tile(), barrier);
      ring_b.next();
      for (const int end = __ldg(firsts + tap_group + 1); weight_tile < end; weight_tile++) {
        // Empty when the consumers of all blocks are done with it, as every block writes a part of everyone's.
        barrier_wait_opaque(base + EMPTY_A + 8 * ring_a.stage, ring_a.parity ^ 1);
        const u32 barrier = base + FULL_A + 8 * ring_a.stage;
        barrier_expect(barrier, A_BYTES);
        load_to_cluster<PART, CLUSTER>(base + A + ring_a.stage * A_BYTES + part,
                                       a + static_cast<long long>(weight_tile) * A_BYTES + part, barrier);
        ring_a.next();
      }
    }
  }
}
