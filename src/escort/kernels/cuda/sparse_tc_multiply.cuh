// The products of sparse_tc.cuh: a consumer warpgroup sums weight tiles times pixels in registers.
#pragma once
#include "sparse_tc_ptx.cuh"
#include "sparse_tc_tiles.cuh"

// Matrix descriptors, k innermost: A has rows of 64 bytes in 64-byte swizzle, B rows of 128 in 128-byte swizzle. Starts
// are in units of 16 bytes.
constexpr u32 A_ROWS = 512 / 16 | 2u << 30, B_ROWS = 1024 / 16 | 1u << 30;
constexpr u32 A_HALF = 32 / 16, B_HALF = 64 / 16;  // from the first half of the input channels to the others
__device__ u64 descriptor(u32 start, u32 rows) { return static_cast<u64>(rows) << 32 | 1u << 16 | start; }

// What a step multiplies: bits 0-15: where its tap begins in the group's pixels; from bit 16 two for each warpgroup
// across: which halves of the input channels there are for it; BY_TURNS bits 20-30: of a tap group's last one, how many
// the next tap group has; bit 31: it is the last of its tap group.
struct Step {
  u32 bits;
  __device__ u32 start() const { return bits & 0xffff; }
  __device__ u32 halves(int across) const { return bits >> (16 + 2 * across) & 3; }
  __device__ bool is_last() const { return bits >> 31; }
  __device__ int others() const { return BY_TURNS ? bits >> 20 & 0x7ff : 0; }
};

struct Products {
  float d[M_BLOCKS][PIXELS / 2];

  __device__ Products(const Params& p, u32 base, const Warpgroup& group, bool never)
      : p(p),
        base(base),
        across(group.across),
        lane(threadIdx.x % 32),
        a_first((base + A_BEGIN + group.across * M_BLOCKS * A_BLOCK) / 16),
        b_first((base + B_BEGIN + group.along * PIXELS * PIXEL_BYTES) / 16),
        metadata_first(base + A_BEGIN + TILE_BLOCKS * A_BLOCK + group.across * M_BLOCKS * METADATA_BLOCK +
                       threadIdx.x % WARPGROUP * 4),
        never(kept(never)),
        stage_bytes(b_stage_bytes(p)),
        releases(lane < static_cast<int>(kept(p.cluster))) {}

  // Starts all products of a tile, of which the last one may still run afterwards. BY_TURNS those of every other tap
  // group, of which the first one lies behind so many steps of the other warpgroup's, if any.
  __device__ void start(const u32* steps, int others) {
    // The first step overwrites the sums: they need no registers through the end of the tile before.
#pragma unroll
    for (int i = 0; i < M_BLOCKS; i++)
#pragma unroll
      for (int j = 0; j < PIXELS / 2; j++) forget(d[i][j]);
    int accumulate = 0, groups = p.tap_groups;
    if (BY_TURNS && others) steps += others, ring_a.skip(others), ring_b.skip(1), groups--;
    u32 next = __ldg(steps);
    // Neither loop may be unrolled or peeled: of products in several places the compiler waits for each.
#pragma unroll 1
    while (groups > 0) {
      barrier_wait_opaque(base + FULL_B + 8 * ring_b.stage, ring_b.parity);
      const u32 pixels = b_first + ring_b.stage * (stage_bytes / 16);
      int others = 0;
      bool more = true;
#pragma unroll 1
      for (int tap = 0; more; tap++) {
        const Step step = {__shfl_sync(~0u, next, 0)};
        more = !step.is_last(), others = step.others();
        steps += 1 + others;
        next = __ldg(steps);  // there is one behind the last
        barrier_wait_opaque(base + FULL_A + 8 * ring_a.stage, ring_a.parity);
        const u64 a = descriptor(a_first + ring_a.stage * (A_BYTES / 16), A_ROWS);
        const u64 b = descriptor(pixels + step.start(), B_ROWS);
        const u32 from = metadata_first + ring_a.stage * A_BYTES, halves = step.halves(across);
        if (set == 0)
          issue(metadata[0], from, a, b, halves, accumulate);
        else
          issue(metadata[1], from, a, b, halves, accumulate);
        set ^= 1;
        mma_wait<1>();
        keep_metadata();
        if (accumulate) {  // the step before this one is done with its stages
          release_a();
          if (tap == 0) release_b();
        }
        accumulate = 1;
        ring_a.next();
      }
      ring_b.next();
      groups -= BY_TURNS ? 2 : 1;
      if (BY_TURNS) {
        ring_a.skip(others);
        if (groups >= 0) ring_b.skip(1);
      }
    }
  }

  __device__ void wait() {
    mma_wait<0>();
    keep_metadata();
    release_a();
    release_b();
  }

  // BY_TURNS: sums go to the other warpgroup, thread by thread, through memory in which both stage outputs: no warp
  // may still read what this one has staged, nor stage before all have taken theirs.
  __device__ void give() const {
    const u32 to = base + p.sums_begin + threadIdx.x % WARPGROUP * 16;
#pragma unroll
    for (int i = 0; i < M_BLOCKS; i++)
#pragma unroll
      for (int j = 0; j < PIXELS / 2; j += 4)
        store_shared(to + (i * PIXELS / 2 + j) * WARPGROUP * 4,
                     make_float4(d[i][j], d[i][j + 1], d[i][j + 2], d[i][j + 3]));
    __syncwarp();
    if (lane == 0) barrier_arrive(base + SUMS_HERE);
  }
  __device__ void take(u32 parity) {
    const u32 from = base + p.sums_begin + threadIdx.x % WARPGROUP * 16;
    barrier_wait_opaque(base + SUMS_HERE, parity);
#pragma unroll
    for (int i = 0; i < M_BLOCKS; i++)
#pragma unroll
      for (int j = 0; j < PIXELS / 2; j += 4) add_shared(from + (i * PIXELS / 2 + j) * WARPGROUP * 4, d[i] + j);
  }

 private:
  const Params& p;
  const u32 base;
  const int across, lane;
  const u32 a_first, b_first, metadata_first;
  const u32 never;
  const int stage_bytes;
  const bool releases;  // whether this lane tells a block of the cluster which weight tiles are done
  Ring<A_STAGES> ring_a;
  Ring<B_STAGES> ring_b;
  u32 metadata[2][M_BLOCKS] = {};
  int set = 0;

  // One weight tile times the pixels of its tap. Each way commits for itself: a commit behind the branches would become
  // a group of its own, and one without products would make the compiler wait for every product.
  __device__ void issue(u32 (&words)[M_BLOCKS], u32 from, u64 a, u64 b, u32 halves, int accumulate) {
#pragma unroll
    for (int i = 0; i < M_BLOCKS; i++) load_shared(from + i * METADATA_BLOCK, words[i]);
    if (halves == 3) {
      mma_fence();
#pragma unroll
      for (int i = 0; i < M_BLOCKS; i++) {
        mma<0>(d[i], a + i * (A_BLOCK / 16), b, words[i], accumulate);
        mma<1>(d[i], a + i * (A_BLOCK / 16) + A_HALF, b + B_HALF, words[i], 1);
      }
      mma_commit();
    } else if (halves == 1) {
      mma_fence();
#pragma unroll
      for (int i = 0; i < M_BLOCKS; i++) mma<0>(d[i], a + i * (A_BLOCK / 16), b, words[i], 1);
      mma_commit();
    } else if (halves == 2) {
      mma_fence();
#pragma unroll
      for (int i = 0; i < M_BLOCKS; i++) mma<1>(d[i], a + i * (A_BLOCK / 16) + A_HALF, b + B_HALF, words[i], 1);
      mma_commit();
    } else {
      mma_wait<0>();
    }
  }

  // A sparse wgmma reads its metadata register while it runs, and the assembler takes the register for free as soon as
  // the instruction is issued: with two steps in flight the second's metadata would overwrite that of the first. So
  // steps take turns with two sets of registers, and both are kept alive until behind the wait for what reads them.
  __device__ void keep_metadata() {
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
      for (int j = 0; j < M_BLOCKS; j++) keep(metadata[i][j], never, base + UNUSED);
  }

  // The stages before the next ones are free.
  __device__ void release_a() {
    if (releases) barrier_arrive_at(base + EMPTY_A + 8 * ring_a.previous, lane);
  }
  __device__ void release_b() {
    if (lane == 0) barrier_arrive(base + EMPTY_B + 8 * ring_b.previous);
  }
};
