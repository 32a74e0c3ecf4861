// What a thread block of sparse_tc.cuh works on: its geometry, its shared memory, and the order of its work.
#pragma once
#include "divisor.cuh"
#include "ptx.cuh"

#ifndef SPLIT
#define SPLIT 0
#endif

enum TapGroup { IM2COL, COLUMNS, HALO, FLAT };

// Tiles are whole rows of the output; else any pixels in a row.
constexpr bool WHOLE_ROWS = TAP_GROUP == COLUMNS || TAP_GROUP == HALO;

constexpr int WARPGROUP = 128, CONSUMERS = 2 * WARPGROUP, CONSUMER_WARPS = CONSUMERS / 32;  // threads; warps
constexpr int ALONG = BY_TURNS ? 1 : 2 / ACROSS;                             // warpgroups side by side along the pixels
constexpr int STAGE_WARPS = BY_TURNS ? CONSUMER_WARPS / 2 : CONSUMER_WARPS;  // that read a stage
constexpr int RINGS = BY_TURNS ? 2 : 1, RING_A = A_STAGES / RINGS, RING_B = B_STAGES / RINGS;  // stages of each
constexpr int TILE_BLOCKS = ACROSS * M_BLOCKS, TILE_PIXELS = ALONG * PIXELS;
constexpr int A_BLOCK = 64 * 64, METADATA_BLOCK = 512;  // bytes of 64 channels
constexpr int A_BYTES = TILE_BLOCKS * (A_BLOCK + METADATA_BLOCK);
constexpr int PIXEL_BYTES = 128, K_BLOCK = PIXEL_BYTES / (STORAGE ? 2 : 4);

// The parameters that are the same in every launch; methods/cuda/sparse_tc/params.py has a dataclass of the same fields
// that says what each means. Divisions by them are multiplications (Divisor), and none is in the loop of products.
struct Params {
  int cluster;
  Divisor by_cluster;
  int m_tiles;
  Divisor by_m_tiles;
  int tap_groups, kernel_rows, kernel_columns;
  int stride_down, stride_right, dilation_down, dilation_right, top, left;
  int out_channels, out_height, out_width, out_plane;
  Divisor by_out_height, by_out_width, by_out_plane;
  int tile_rows, tile_samples, tiles_per_sample;
  Divisor by_tiles_per_sample, by_tile_plane;
  int pitch, sample_pitch;
  Divisor by_pitch, by_sample_pitch;
  int load_pixels, zero_pixels, store_pixels;
  int b_stage_bytes;
  u32 staging_begin;
  int staging_bytes, staging_pitch;
  u32 sums_begin;
  int residual, bound;
};

// What all lanes of a warp have, as a register. The compiler does not see through a shuffle of what differs by lane;
// else it would read parameters anew in every step, which takes as long as ten instructions.
__device__ u32 kept(u32 v) { return __shfl_sync(~0u, v + threadIdx.x % 32, 0); }
__device__ const u8* kept(const u8* v) {
  const u64 bits = reinterpret_cast<u64>(v), high = kept(static_cast<u32>(bits >> 32));
  return reinterpret_cast<const u8*>(high << 32 | kept(static_cast<u32>(bits)));
}

// Shared memory: barriers, the stages of weight tiles, those of pixels, the staging of outputs, and BY_TURNS sums.
constexpr u32 FULL_A = 0, EMPTY_A = FULL_A + 8 * A_STAGES, FULL_B = EMPTY_A + 8 * A_STAGES;
constexpr u32 EMPTY_B = FULL_B + 8 * B_STAGES, RESIDUAL_HERE = EMPTY_B + 8 * B_STAGES, SUMS_HERE = RESIDUAL_HERE + 16;
constexpr u32 NO_STAGE = SUMS_HERE + 8;                                         // a barrier that nobody waits for
constexpr u32 ALL_SUMS_HERE = NO_STAGE + 8, ALL_SUMS_READ = ALL_SUMS_HERE + 8;  // SPLIT: those of all blocks
constexpr u32 A_BEGIN = 1024, B_BEGIN = (A_BEGIN + A_STAGES * A_BYTES + 1023) / 1024 * 1024;
static_assert(ALL_SUMS_READ + 8 <= A_BEGIN);

// From a stage of pixels to the next.
__device__ int b_stage_bytes(const Params& p) { return WHOLE_ROWS ? kept(p.b_stage_bytes) : TILE_PIXELS * PIXEL_BYTES; }

// A ring of stages: which one is next, and the parity of its barriers' phase.
template <int STAGES>
struct Ring {
  int stage = 0;
  u32 parity = 0;
  __device__ void advance(int by) {  // 0 or 1
    stage += by;
    if (stage >= STAGES) stage -= STAGES, parity ^= 1;
  }
};

template <class T>
__device__ void swap(T& one, T& other) {
  const T kept = one;
  one = other, other = kept;
}

// Which block of its cluster this is.
__device__ int block_in_cluster(const Params& p) { return blockIdx.x - p.by_cluster.quotient(blockIdx.x) * p.cluster; }

// The tap groups of a tile that a block computes: all of them, or SPLIT its share.
struct Part {
  int begin, count;
  int storing;  // BY_TURNS: of the warpgroup that stores, the first ones; the other warpgroup has the others
  __device__ explicit Part(const Params& p) {
    const int rank = SPLIT ? block_in_cluster(p) : 0;
    begin = SPLIT ? p.by_cluster.quotient(rank * p.tap_groups) : 0;
    count = (SPLIT ? p.by_cluster.quotient((rank + 1) * p.tap_groups) : p.tap_groups) - begin;
    storing = BY_TURNS ? count / 2 : 0;
  }
};

// What a cluster computes, one after the other: a tile of channels for a group of pixel tiles, one for each block; or
// SPLIT for one pixel tile.
struct Work {
  const Params& p;
  int items, item;
  __device__ Work(const Params& p, int tile_groups)
      : p(p), items(p.m_tiles * tile_groups), item(p.by_cluster.quotient(blockIdx.x)) {}
  __device__ bool left() const { return item < items; }
  __device__ void next() { item += p.by_cluster.quotient(gridDim.x); }
  __device__ int m_tile() const { return item - tile_group() * p.m_tiles; }
  __device__ int tile() const {  // may be beyond the last
    return SPLIT ? tile_group() : tile_group() * p.cluster + block_in_cluster(p);
  }

 private:
  __device__ int tile_group() const { return p.by_m_tiles.quotient(item); }
};

// WHOLE_ROWS: a tile's first row of the output and the first sample.
struct Place {
  int row, sample;
  __device__ Place(const Params& p, int tile) {
    const int samples = p.by_tiles_per_sample.quotient(tile);
    row = (tile - samples * p.tiles_per_sample) * p.tile_rows, sample = samples * p.tile_samples;
  }
};

// A consumer warpgroup and its part of a tile.
struct Warpgroup {
  int number;         // 0 or 1
  int across, along;  // its place along the channels, and along the pixels
  int staging, ring;  // which part of the staging it has, and which ring of stages

  // The same in all lanes of a warp, and the compiler knows it.
  __device__ Warpgroup() : number(__shfl_sync(~0u, threadIdx.x / WARPGROUP, 0)) {
    across = ACROSS == 2 ? number : 0, along = ALONG == 2 ? number : 0, staging = BY_TURNS ? number : across;
    ring = BY_TURNS ? number : 0;
  }
};
