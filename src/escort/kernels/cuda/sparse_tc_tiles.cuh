// What a thread block of sparse_tc.cuh works on: sizes of its tiles, its shared memory, and the order of its work.
#pragma once
#include "ptx.cuh"

enum TapGroup { IM2COL, COLUMNS, HALO, FLAT };

// Tiles are whole rows of the output; else any pixels in a row.
constexpr bool WHOLE_ROWS = TAP_GROUP == COLUMNS || TAP_GROUP == HALO;
constexpr int OUT_PLANE = OUT_HEIGHT * OUT_WIDTH;

constexpr int WARPGROUP = 128, CONSUMERS = 2 * WARPGROUP, CONSUMER_WARPS = CONSUMERS / 32;  // threads; warps
constexpr int ALONG = 2 / ACROSS;  // warpgroups side by side along the pixels
constexpr int TILE_BLOCKS = ACROSS * M_BLOCKS, M_TILE = 64 * TILE_BLOCKS, TILE_PIXELS = ALONG * PIXELS;
constexpr int A_BLOCK = 64 * 64, METADATA_BLOCK = 512;  // bytes of 64 channels
constexpr int A_BYTES = TILE_BLOCKS * (A_BLOCK + METADATA_BLOCK);
constexpr int PIXEL_BYTES = 128, K_BLOCK = PIXEL_BYTES / (STORAGE ? 2 : 4);
constexpr int STAGINGS = STORAGE ? TILE_BLOCKS : CONSUMER_WARPS;

// Shared memory: barriers, then these.
constexpr u32 FULL_A = 0, EMPTY_A = FULL_A + 8 * A_STAGES, FULL_B = EMPTY_A + 8 * A_STAGES;
constexpr u32 EMPTY_B = FULL_B + 8 * B_STAGES, RESIDUAL_HERE = EMPTY_B + 8 * B_STAGES, UNUSED = RESIDUAL_HERE + 16;
constexpr u32 B = 1024, A = B + B_STAGES * B_STAGE_BYTES, STAGING = (A + A_STAGES * A_BYTES + 1023) / 1024 * 1024;
static_assert(UNUSED + 8 <= B && STAGING + STAGINGS * STAGING_BYTES == SHARED_BYTES);

// A ring of stages: which one is next, and the parity of its barriers' phase.
template <int STAGES>
struct Ring {
  int stage = 0;
  u32 parity = 0;
  __device__ void next() {
    if (++stage == STAGES) stage = 0, parity ^= 1;
  }
  __device__ int previous() const { return stage == 0 ? STAGES - 1 : stage - 1; }
};

// What a cluster computes, one after the other: a tile of channels for a group of pixel tiles, one for each block.
struct Work {
  int items, item;
  __device__ explicit Work(int tile_groups) : items(M_TILES * tile_groups), item(blockIdx.x / CLUSTER) {}
  __device__ bool left() const { return item < items; }
  __device__ void next() { item += gridDim.x / CLUSTER; }
  __device__ int m_tile() const { return item % M_TILES; }
  __device__ int tile() const { return item / M_TILES * CLUSTER + blockIdx.x % CLUSTER; }  // may be beyond the last
};

// WHOLE_ROWS: a tile's first row of the output and its first sample.
struct Place {
  int row, sample;
  __device__ explicit Place(int tile)
      : row(tile % TILES_PER_SAMPLE * TILE_ROWS), sample(tile / TILES_PER_SAMPLE * TILE_SAMPLES) {}
};

// A consumer warpgroup and its part of a tile.
struct Warpgroup {
  int number;         // 0 or 1
  int across, along;  // its place along the channels, and along the pixels

  // The same in all lanes of a warp, and the compiler knows it.
  __device__ Warpgroup() : number(__shfl_sync(~0u, threadIdx.x / WARPGROUP, 0)) {
    across = ACROSS == 2 ? number : 0, along = ACROSS == 2 ? 0 : number;
  }
};
