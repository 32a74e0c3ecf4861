// The producer of sparse_tc.cuh: one thread that copies pixels and weight tiles to shared memory, stage by stage.
#pragma once
#include "sparse_tc_ptx.cuh"
#include "sparse_tc_tiles.cuh"

// A tile's copies of pixels, one for each tap group. Few tiles leave it little time for one: what a tile's copies share
// is computed before, and the rest counts on.
struct PixelCopies {
  int c = 0;                                       // the next one's first input channel
  int column[ALONG], row[ALONG], sample[ALONG];    // where it begins; IM2COL: for its first tap
  int right = 0, down = 0;                         // its tap, in columns and rows of x
  int next_right, next_down, end_right, end_down;  // from a tap to the next, and behind the last one

  __device__ PixelCopies(const Params& p, int tile)
      : next_right(kept(p.dilation_right)),
        next_down(kept(p.dilation_down)),
        end_right(kept(p.kernel_columns * p.dilation_right)),
        end_down(kept(p.kernel_rows * p.dilation_down)) {
    const Place at(p, tile);
#pragma unroll
    for (int i = 0; i < ALONG; i++) {
      const int pixel = tile * TILE_PIXELS + i * PIXELS;
      if constexpr (TAP_GROUP == IM2COL) {
        const int line = p.by_out_width.quotient(pixel), of = p.by_out_height.quotient(line);
        column[i] = kept((pixel - line * p.out_width) * p.stride_right - p.left);
        row[i] = kept((line - of * p.out_height) * p.stride_down - p.top), sample[i] = kept(of);
      } else {
        column[i] = WHOLE_ROWS ? -p.left : pixel, row[i] = WHOLE_ROWS ? kept(at.row - p.top) : 0;
        sample[i] = WHOLE_ROWS ? kept(at.sample) : 0;
      }
    }
  }

  __device__ void copy(u32 to, const TensorMap& x_map, u32 barrier) {
    if constexpr (TAP_GROUP == IM2COL) {
#pragma unroll
      for (int i = 0; i < ALONG; i++)
        load_im2col(to + i * PIXELS * PIXEL_BYTES, x_map, c, column[i], row[i], sample[i], right, down, barrier);
    } else {
      load_box(to, x_map, c, column[0] + right, row[0], sample[0], barrier);
    }
    if constexpr (TAP_GROUP == IM2COL || TAP_GROUP == COLUMNS) {
      right += next_right;
      if (right < end_right) return;
      right = 0;
    }
    if constexpr (TAP_GROUP == IM2COL) {
      down += next_down;
      if (down < end_down) return;
      down = 0;
    }
    c += K_BLOCK;
  }
};

template <bool CLUSTERED>
__device__ void produce(const Params& p, u32 base, const TensorMap& x_map, const u8* __restrict__ a,
                        const int* __restrict__ first, int tile_groups) {
  Ring<A_STAGES> ring_a;
  Ring<B_STAGES> ring_b;
  const int stage_bytes = b_stage_bytes(p), load_bytes = b_load_bytes(p);
  const int blocks = CLUSTERED ? kept(p.cluster) : 1;
  const int part_bytes = CLUSTERED ? kept(p.by_cluster.quotient(A_BYTES)) : A_BYTES;
  const int part = CLUSTERED ? kept(block_in_cluster(p) * part_bytes) : 0;
  for (Work work(p, tile_groups); work.left(); work.next()) {
    const int* firsts = first + work.m_tile() * p.tap_groups;
    int weight_tile = __ldg(firsts), end = __ldg(++firsts);
    PixelCopies pixels(p, work.tile());
    for (int groups = kept(p.tap_groups); groups > 0; groups--) {
      barrier_wait_opaque(base + EMPTY_B + 8 * ring_b.stage, ring_b.parity ^ 1);
      const u32 barrier = base + FULL_B + 8 * ring_b.stage;
      barrier_expect(barrier, load_bytes);
      pixels.copy(base + B_BEGIN + ring_b.stage * stage_bytes, x_map, barrier);
      ring_b.next();
      const int group_end = end;
      if (groups > 1) end = __ldg(++firsts);  // comes while weight tiles are copied
#pragma unroll 1
      do {
        // Empty when the consumers of all blocks are done with it, as every block writes a part of everyone's.
        barrier_wait_opaque(base + EMPTY_A + 8 * ring_a.stage, ring_a.parity ^ 1);
        const u32 barrier = base + FULL_A + 8 * ring_a.stage;
        barrier_expect(barrier, A_BYTES);
        load_to_cluster<CLUSTERED>(base + A_BEGIN + ring_a.stage * A_BYTES + part,
                                   a + static_cast<long long>(weight_tile) * A_BYTES + part, part_bytes, blocks,
                                   barrier);
        ring_a.next();
      } while (++weight_tile < group_end);
    }
  }
}
