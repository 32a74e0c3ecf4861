// What a thread block of sparse_tc.cuh works on: its geometry, its shared memory, and the order of its work.
#pragma once
#include "divisor.cuh"
#include "ptx.cuh"

constexpr int WARPGROUP = 128, CONSUMERS = 2 * WARPGROUP, CONSUMER_WARPS = CONSUMERS / 32;  // threads; warps
constexpr int A_BLOCK = 64 * 64, METADATA_BLOCK = 512;                                      // bytes of 64 channels
constexpr int PIXEL_BYTES = 128, K_BLOCK = PIXEL_BYTES / (STORAGE ? 2 : 4);

// The parameters that are the same in every launch; methods/cuda/sparse_tc/params.py has a dataclass of the same fields
// that says what each means. Divisions by them are multiplications (Divisor), and none is in the loop of products.
struct Params {
  int cluster;
  Divisor by_cluster;
  int across, along;
  int m_tiles;
  Divisor by_m_tiles;
  int tap_groups, groups_down, groups_right;
  int im2col, whole_rows;
  int stride_down, stride_right, dilation_down, dilation_right, top, left;
  int out_channels, out_height, out_width, out_plane;
  Divisor by_out_height, by_out_width, by_out_plane;
  int tile_rows, tile_samples, tiles_per_sample;
  Divisor by_tiles_per_sample, by_tile_plane;
  int pitch, sample_pitch;
  Divisor by_pitch, by_sample_pitch;
  int load_pixels, zero_pixels, store_pixels;
  int a_stages, a_stage_bytes, b_stages, b_stage_bytes;
  u32 a_begin, staging_begin;
  int staging_bytes, staging_pitch;
  int residual, activation;
};

// Shared memory: barriers, the stages of pixels, those of weight tiles from a_begin on, and the staging of outputs.
constexpr int MOST_STAGES = 8;
constexpr u32 FULL_A = 0, EMPTY_A = FULL_A + 8 * MOST_STAGES, FULL_B = EMPTY_A + 8 * MOST_STAGES;
constexpr u32 EMPTY_B = FULL_B + 8 * MOST_STAGES, RESIDUAL_HERE = EMPTY_B + 8 * MOST_STAGES;
constexpr u32 UNUSED = RESIDUAL_HERE + 16, B_BEGIN = 1024;

// A ring of stages: which one is next, the one before it, and the parity of the next one's barriers' phase.
struct Ring {
  int stages;
  int stage = 0, previous = 0;
  u32 parity = 0;
  __device__ explicit Ring(int stages) : stages(stages) {}
  __device__ void next() {
    previous = stage;
    if (++stage == stages) stage = 0, parity ^= 1;
  }
};

// Which block of its cluster this is.
__device__ int block_in_cluster(const Params& p) { return blockIdx.x - p.by_cluster.quotient(blockIdx.x) * p.cluster; }

// What a cluster computes, one after the other: a tile of channels for a group of pixel tiles, one for each block.
struct Work {
  const Params& p;
  int items, item;
  __device__ Work(const Params& p, int tile_groups)
      : p(p), items(p.m_tiles * tile_groups), item(p.by_cluster.quotient(blockIdx.x)) {}
  __device__ bool left() const { return item < items; }
  __device__ void next() { item += p.by_cluster.quotient(gridDim.x); }
  __device__ int m_tile() const { return item - tile_group() * p.m_tiles; }
  __device__ int tile() const { return tile_group() * p.cluster + block_in_cluster(p); }  // may be beyond the last

 private:
  __device__ int tile_group() const { return p.by_m_tiles.quotient(item); }
};

// Of tiles of whole rows: the first row of the output and the first sample.
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

  // The same in all lanes of a warp, and the compiler knows it.
  __device__ explicit Warpgroup(const Params& p) : number(__shfl_sync(~0u, threadIdx.x / WARPGROUP, 0)) {
    across = p.across == 2 ? number : 0, along = p.across == 2 ? 0 : number;
  }
};
