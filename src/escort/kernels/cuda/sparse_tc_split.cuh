// SPLIT: the blocks of a cluster have the same tile. Each sums a share of its tap groups, and adds up, finishes and
// stores a share of its pixels. Its sums lie in its shared memory as Products::put leaves them, where the others read
// them.
#pragma once
#include "sparse_tc_ptx.cuh"
#include "sparse_tc_tiles.cuh"

constexpr int MOST_SPLIT = 8, GROUP_BYTES = WARPGROUP * 16;  // of the sums of 8 pixels, 4 a thread

struct Shares {
  const Params& p;
  const u32 base, sums;
  const int lane, first_group, groups;  // of 8 pixels, in this block's share

  __device__ Shares(const Params& p, u32 base)
      : p(p),
        base(base),
        sums(base + p.sums_begin + threadIdx.x % WARPGROUP * 16),
        lane(threadIdx.x % 32),
        first_group(first_group_of(p, block_in_cluster(p))),
        groups(first_group_of(p, block_in_cluster(p) + 1) - first_group) {}

  // Until all blocks have read this one's sums of the tile before.
  __device__ void wait_until_read(u32 turn) const { barrier_wait_in_cluster(base + ALL_SUMS_READ, turn ^ 1); }

  // A warp's sums are here; waits for those of all blocks.
  __device__ void meet(u32 turn) const {
    tell_all(ALL_SUMS_HERE);
    barrier_wait_in_cluster(base + ALL_SUMS_HERE, turn);
  }
  __device__ void are_read() const {
    __syncwarp();
    tell_all(ALL_SUMS_READ);
  }

  // The sums of all blocks: 64 channels of 8 pixels, or of twice as many, which takes hardly longer.
  __device__ void add_up(int channels, int group, bool twice, float (&d)[8]) const {
    const u32 from = sums + (channels * (PIXELS / 8) + first_group + group) * GROUP_BYTES;
    float4 v[2][MOST_SPLIT] = {};
#pragma unroll
    for (int rank = 0; rank < MOST_SPLIT; rank++)
      if (rank < p.cluster) {
        load_of_block(from, rank, v[0][rank]);
        if (twice) load_of_block(from + GROUP_BYTES, rank, v[1][rank]);
      }
#pragma unroll
    for (int i = 0; i < 2; i++) {
      float* const sum = d + 4 * i;
      sum[0] = v[i][0].x, sum[1] = v[i][0].y, sum[2] = v[i][0].z, sum[3] = v[i][0].w;
#pragma unroll
      for (int rank = 1; rank < MOST_SPLIT; rank++)
        sum[0] += v[i][rank].x, sum[1] += v[i][rank].y, sum[2] += v[i][rank].z, sum[3] += v[i][rank].w;
    }
  }

 private:
  __device__ static int first_group_of(const Params& p, int rank) { return p.by_cluster.quotient(rank * (PIXELS / 8)); }
  __device__ void tell_all(u32 barrier) const {
    if (lane < p.cluster) barrier_arrive_in_cluster(barrier_of(base + barrier, lane));
  }
};
