// The producers of sparse_tc.cuh: one thread copies pixels to shared memory, one weight tiles, stage by stage.
#pragma once
#include "sparse_tc_ptx.cuh"
#include "sparse_tc_tiles.cuh"

// The copies of pixels, one for each tap group. Where blocks have few tiles their steps wait for it: what the copies of
// a tile share is computed once, and the rest counts on.
struct PixelCopies {
  static constexpr bool GOES_RIGHT = TAP_GROUP == IM2COL || TAP_GROUP == COLUMNS;  // from tap to tap within a k block
  static constexpr bool GOES_DOWN = TAP_GROUP == IM2COL;

  const Params& p;
  const u32 right, row_end, next_row, end;  // a tap to the right; behind a row; from there to the next; behind all
  const int first_column;
  int c;                                         // the next one's first input channel
  u32 tap;                                       // and its tap: columns to the right, in the upper half rows down
  int column[ALONG], row[ALONG], sample[ALONG];  // where it begins for the first tap

  __device__ explicit PixelCopies(const Params& p)
      : p(p),
        right(GOES_RIGHT ? kept(p.dilation_right) : 0),
        row_end(GOES_RIGHT ? kept(p.kernel_columns * p.dilation_right) : 0),
        next_row(GOES_DOWN ? kept((p.dilation_down << 16) - p.kernel_columns * p.dilation_right) : 0),
        end(GOES_DOWN ? kept(p.kernel_rows * p.dilation_down << 16) : 0),
        first_column(WHOLE_ROWS ? kept(-p.left) : 0) {}

  // From a tap group of the tile on.
  __device__ void begin(int tile, int tap_group) {
    int k_block = tap_group;
    tap = 0;
    if (GOES_RIGHT && tap_group) {
      const int line = tap_group / p.kernel_columns;
      k_block = GOES_DOWN ? line / p.kernel_rows : line;
      tap = (tap_group - line * p.kernel_columns) * p.dilation_right;
      if (GOES_DOWN) tap += (line - k_block * p.kernel_rows) * p.dilation_down << 16;
    }
    c = k_block * K_BLOCK;
    const Place at(p, tile);
#pragma unroll
    for (int i = 0; i < ALONG; i++) {
      column[i] = WHOLE_ROWS ? first_column : tile * TILE_PIXELS + i * PIXELS;
      row[i] = WHOLE_ROWS ? at.row - p.top : 0, sample[i] = WHOLE_ROWS ? at.sample : 0;
      if constexpr (TAP_GROUP == IM2COL) {
        const int line = p.by_out_width.quotient(column[i]);
        sample[i] = p.by_out_height.quotient(line);
        column[i] = (column[i] - line * p.out_width) * p.stride_right - p.left;
        row[i] = (line - sample[i] * p.out_height) * p.stride_down - p.top;
      }
    }
  }

  __device__ void copy(u32 to, const TensorMap& x_map, u32 barrier) {
    if constexpr (TAP_GROUP == IM2COL) {
#pragma unroll
      for (int i = 0; i < ALONG; i++)
        load_im2col(to + i * PIXELS * PIXEL_BYTES, x_map, c, column[i], row[i], sample[i], tap, barrier);
    } else {
      load_box(to, x_map, c, column[0] + tap, row[0], sample[0], barrier);
    }
    tap += right;
    if constexpr (GOES_DOWN) {
      if ((tap & 0xffff) == row_end) tap += next_row;
    }
    if (tap != (GOES_DOWN ? end : row_end)) return;
    tap = 0, c += K_BLOCK;
  }
};

// All lanes of a warp come to these, and one copies. Neither ring waits for the other. BY_TURNS each warpgroup has
// rings of its own: as it passes over none of their stages, the parity of a phase tells enough.
__device__ void copy_pixels(const Params& p, u32 base, const TensorMap& x_map, int tile_groups) {
  base = kept(base);
  const int stage_bytes = b_stage_bytes(p);
  const Part part(p);
  const int load_bytes = WHOLE_ROWS ? kept(p.load_pixels * PIXEL_BYTES) : TILE_PIXELS * PIXEL_BYTES;
  Ring<RING_B> ring, others_ring;
  PixelCopies pixels(p), others(p);
  int first_stage = 0;
  if (!is_elected()) return;
  const auto copy = [&](PixelCopies& pixels, Ring<RING_B>& ring, int first_stage) {
    const int stage = first_stage + ring.stage;
    barrier_wait_opaque(base + EMPTY_B + 8 * stage, ring.parity ^ 1);
    const u32 barrier = base + FULL_B + 8 * stage;
    barrier_expect(barrier, load_bytes);
    pixels.copy(base + B_BEGIN + stage * stage_bytes, x_map, barrier);
    ring.advance(1);
  };
  for (Work work(p, tile_groups); work.left(); work.next()) {
    pixels.begin(work.tile(), part.begin);
    if (BY_TURNS) others.begin(work.tile(), part.begin + part.storing);
    wait_for_previous_kernel();  // which may have written x; it is done when this comes here again
#pragma unroll 1
    for (int group = part.storing; group < part.count; group++) {
      if (!BY_TURNS || group < 2 * part.storing) copy(pixels, ring, first_stage);
      if (BY_TURNS) copy(others, others_ring, RING_B - first_stage);
    }
    if (BY_TURNS) swap(ring, others_ring), first_stage = RING_B - first_stage;
  }
}

// The previous kernel wrote no weight tiles: they come while it still runs.
template <bool CLUSTERED>
__device__ void copy_weight_tiles(const Params& p, u32 base, const u8* __restrict__ a, const int* __restrict__ first,
                                  int tile_groups) {
  base = kept(base);
  const int piece_bytes = CLUSTERED ? p.by_cluster.quotient(A_BYTES) : A_BYTES;
  const int piece = CLUSTERED ? block_in_cluster(p) * piece_bytes : 0;
  const Part part(p);
  Ring<RING_A> ring, others_ring;
  int first_stage = 0;
  a = kept(a + piece);
  if (!is_elected()) return;
  const auto copy = [&](int weight_tile, int end, Ring<RING_A>& ring, int first_stage) {
#pragma unroll 1
    do {
      // Empty when the consumers of all blocks are done with it, as every block writes a part of everyone's.
      const int stage = first_stage + ring.stage;
      barrier_wait_opaque(base + EMPTY_A + 8 * stage, ring.parity ^ 1);
      const u32 barrier = base + FULL_A + 8 * stage;
      barrier_expect(barrier, A_BYTES);
      load_to_cluster<CLUSTERED>(base + A_BEGIN + stage * A_BYTES + piece,
                                 a + static_cast<long long>(weight_tile) * A_BYTES, piece_bytes, p.cluster, barrier);
      ring.advance(1);
    } while (++weight_tile < end);
  };
  for (Work work(p, tile_groups); work.left(); work.next()) {
    const int* const firsts = first + work.m_tile() * p.tap_groups + part.begin;
    if constexpr (!BY_TURNS) {
      copy(__ldg(firsts), __ldg(firsts + part.count), ring, 0);
    } else {
      int begin = __ldg(firsts), others_begin = __ldg(firsts + part.storing);
#pragma unroll 1
      for (int group = part.storing; group < part.count; group++) {
        const int end = __ldg(firsts + group - part.storing + 1), others_end = __ldg(firsts + group + 1);
        if (group < 2 * part.storing) copy(begin, end, ring, first_stage);
        copy(others_begin, others_end, others_ring, RING_A - first_stage);
        begin = end, others_begin = others_end;
      }
      swap(ring, others_ring), first_stage = RING_A - first_stage;
    }
  }
}
