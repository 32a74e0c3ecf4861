// The producer of sparse_tc.cuh: one thread that copies pixels and weight tiles to shared memory, stage by stage.
#pragma once
#include "sparse_tc_ptx.cuh"
#include "sparse_tc_tiles.cuh"

// A tile's copies of pixels, one for each tap group: block of channels by block of channels, and in each of them so
// many groups down and to the right as there are taps that begin a group.
struct PixelCopies {
  const Params& p;
  int tile;
  int column, row, sample;  // where the first box begins
  int c = 0, r = 0, s = 0;  // the next one's first input channel, and its place among the groups

  __device__ PixelCopies(const Params& p, int tile) : p(p), tile(tile) {
    const Place at(p, tile);
    column = p.whole_rows ? -p.left : tile * p.along * PIXELS;
    row = p.whole_rows ? at.row - p.top : 0, sample = p.whole_rows ? at.sample : 0;
  }

  __device__ void copy(u32 to, const TensorMap& x_map, u32 barrier) {
    if (p.im2col) {
#pragma unroll 1
      for (int i = 0; i < p.along; i++) {
        const int pixel = (tile * p.along + i) * PIXELS, line = p.by_out_width.quotient(pixel);
        const int sample = p.by_out_height.quotient(line);
        load_im2col(to + i * PIXELS * PIXEL_BYTES, x_map, c, (pixel - line * p.out_width) * p.stride_right - p.left,
                    (line - sample * p.out_height) * p.stride_down - p.top, sample, s * p.dilation_right,
                    r * p.dilation_down, barrier);
      }
    } else {
      load_box(to, x_map, c, column + s * p.dilation_right, row, sample, barrier);
    }
    if (++s == p.groups_right) s = 0, r++;
    if (r == p.groups_down) r = 0, c += K_BLOCK;
  }
};

__device__ void produce(const Params& p, u32 base, const TensorMap& x_map, const u8* __restrict__ a,
                        const int* __restrict__ first, int tile_groups) {
  Ring ring_a(p.a_stages), ring_b(p.b_stages);
  const int part_bytes = p.by_cluster.quotient(p.a_stage_bytes), part = block_in_cluster(p) * part_bytes;
  for (Work work(p, tile_groups); work.left(); work.next()) {
    const int* const firsts = first + work.m_tile() * p.tap_groups;
    int weight_tile = __ldg(firsts);
    PixelCopies pixels(p, work.tile());
    for (int tap_group = 0; tap_group < p.tap_groups; tap_group++) {
      barrier_wait_opaque(base + EMPTY_B + 8 * ring_b.stage, ring_b.parity ^ 1);
      const u32 barrier = base + FULL_B + 8 * ring_b.stage;
      barrier_expect(barrier, p.load_pixels * PIXEL_BYTES);
      pixels.copy(base + B_BEGIN + ring_b.stage * p.b_stage_bytes, x_map, barrier);
      ring_b.next();
#pragma unroll 1
      for (const int end = __ldg(firsts + tap_group + 1); weight_tile < end; weight_tile++) {
        // Empty when the consumers of all blocks are done with it, as every block writes a part of everyone's.
        barrier_wait_opaque(base + EMPTY_A + 8 * ring_a.stage, ring_a.parity ^ 1);
        const u32 barrier = base + FULL_A + 8 * ring_a.stage;
        barrier_expect(barrier, p.a_stage_bytes);
        load_to_cluster(base + p.a_begin + ring_a.stage * p.a_stage_bytes + part,
                        a + static_cast<long long>(weight_tile) * p.a_stage_bytes + part, part_bytes, p.cluster,
                        barrier);
        ring_a.next();
      }
    }
  }
}
