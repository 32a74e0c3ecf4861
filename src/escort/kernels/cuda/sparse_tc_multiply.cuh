// The products of sparse_tc.cuh: a consumer warpgroup sums weight tiles times pixels in registers.
#pragma once
#include "sparse_tc_ptx.cuh"
#include "sparse_tc_tiles.cuh"

// Matrix descriptors, k innermost: A has rows of 64 bytes in 64-byte swizzle, B rows of 128 in 128-byte swizzle. Their
// lower words begin with where the matrix does, in units of 16 bytes: it is added to, which never carries.
constexpr u32 A_ROWS = 512 / 16 | 2u << 30, B_ROWS = 1024 / 16 | 1u << 30, LOWER = 1u << 16;
constexpr u32 A_HALF = 32 / 16, B_HALF = 64 / 16;  // from the first half of the input channels to the others
__device__ u64 descriptor(u32 lower, u32 rows) { return static_cast<u64>(rows) << 32 | lower; }

// What a step multiplies: bits 0-15: where its tap begins in the group's pixels; from bit 16 two for each warpgroup
// across: which halves of the input channels there are for it; BY_TURNS bits 20-30: of a tap group's
// last one, how many the next tap group has; bit 31: it is the last of its tap group.
struct Step {
  u32 bits;
  __device__ u32 start() const { return bits & 0xffff; }
  __device__ u32 halves(int across) const { return bits >> (16 + 2 * across) & 3; }
  __device__ int is_last() const { return bits >> 31; }
  __device__ int others() const { return bits >> 20 & 0x7ff; }
};

// The steps of a tile. Lanes hold 32 of them, and the next 32 come meanwhile: no step waits for its own.
struct StepList {
  const u32* from;  // a lane's first one
  u32 words, later;
  int at = 0;
  __device__ explicit StepList(const u32* from) : from(from), words(__ldg(from)), later(__ldg(from + 32)) {}
  __device__ Step next(int skipped) {
    at += skipped;
    if (at >= 32) {
      at -= 32, from += 32;
      words = later, later = __ldg(from + 32);
    }
    return {__shfl_sync(~0u, words, at++)};
  }
};

// Whether a step waits for the stages of the next one before it frees those of the step before: there must be others.
// BY_TURNS the next one lies behind the other warpgroup's tap group, which is two steps where a group is one tap.
constexpr bool WAITS_EARLY =
    BY_TURNS ? TAP_GROUP != COLUMNS && A_STAGES >= 5 && B_STAGES >= 5 : A_STAGES >= 4 && B_STAGES >= 4;

struct Products {
  float d[M_BLOCKS][PIXELS / 2];

  __device__ Products(const Params& p, u32 base, const Warpgroup& group, bool never)
      : p(p),
        base(base),
        across(group.across),
        lane(threadIdx.x % 32),
        a_first(kept(LOWER + (base + A_BEGIN + group.across * M_BLOCKS * A_BLOCK) / 16)),
        b_first(kept(LOWER + (base + B_BEGIN + group.along * PIXELS * PIXEL_BYTES) / 16)),
        metadata_first(kept(base + A_BEGIN + TILE_BLOCKS * A_BLOCK + group.across * M_BLOCKS * METADATA_BLOCK +
                            threadIdx.x / 32 % 4 * 128) +
                       lane * 4),
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
    StepList list(steps + lane);
    Step step = list.next(others);
    int accumulate = 0, groups = p.tap_groups;
    if (BY_TURNS && others) ring_a.skip(others), ring_b.skip(1), groups--;
    wait_for_pixels();
    wait_for_weights();
    int opens = 0;  // whether this step is the first of its tap group, and there is one before
    // The loop may not be unrolled or peeled: of products in several places the compiler waits for each.
#pragma unroll 1
    do {
      const u32 from = metadata_first + ring_a.stage * A_BYTES, a = a_first + ring_a.stage * (A_BYTES / 16);
      const u32 b = b_first + ring_b.stage * (stage_bytes / 16) + step.start(), halves = step.halves(across);
      if (set == 0)
        issue(metadata[0], from, a, b, halves, accumulate);
      else
        issue(metadata[1], from, a, b, halves, accumulate);
      // While these products run all is made ready for the next ones, which are late otherwise.
      const int closes = step.is_last();
      groups -= BY_TURNS ? 2 * closes : closes;
      const int skipped = BY_TURNS && closes ? step.others() : 0;
      step = list.next(skipped);
      set ^= 1;
      const int done_a = ring_a.previous, done_b = ring_b.previous;
      ring_a.next();
      if (BY_TURNS) ring_a.skip(skipped);
      if (closes) ring_b.next();
      if (BY_TURNS && closes && groups >= 0) ring_b.skip(1);
      if (WAITS_EARLY && groups > 0) {
        wait_for_weights();
        if (closes) wait_for_pixels();
      }
      mma_wait<1>();
      keep_metadata();
      if (accumulate) {  // the step before this one is done with its stages
        release_a(done_a);
        if (opens) release_b(done_b);
      }
      if (!WAITS_EARLY && groups > 0) {
        wait_for_weights();
        if (closes) wait_for_pixels();
      }
      accumulate = 1, opens = closes;
    } while (groups > 0);
  }

  __device__ void wait() {
    mma_wait<0>();
    keep_metadata();
    release_a(ring_a.previous);
    release_b(ring_b.previous);
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

  __device__ void wait_for_weights() const { barrier_wait_opaque(base + FULL_A + 8 * ring_a.stage, ring_a.parity); }
  __device__ void wait_for_pixels() const { barrier_wait_opaque(base + FULL_B + 8 * ring_b.stage, ring_b.parity); }

  // One weight tile times the pixels of its tap. Each way commits for itself: a commit behind the branches would become
  // a group of its own, and one without products would make the compiler wait for every product.
  __device__ void issue(u32 (&words)[M_BLOCKS], u32 from, u32 a, u32 b, u32 halves, int accumulate) {
#pragma unroll
    for (int i = 0; i < M_BLOCKS; i++) load_shared(from + i * METADATA_BLOCK, words[i]);
    if (halves == 3) {
      mma_fence();
#pragma unroll
      for (int i = 0; i < M_BLOCKS; i++) {
        product<0>(i, a, b, words[i], accumulate);
        product<1>(i, a, b, words[i], 1);
      }
      mma_commit();
    } else if (halves == 1) {
      mma_fence();
#pragma unroll
      for (int i = 0; i < M_BLOCKS; i++) product<0>(i, a, b, words[i], 1);
      mma_commit();
    } else if (halves == 2) {
      mma_fence();
#pragma unroll
      for (int i = 0; i < M_BLOCKS; i++) product<1>(i, a, b, words[i], 1);
      mma_commit();
    } else {
      mma_wait<0>();
    }
  }

  // Of a half of the input channels.
  template <int HALF>
  __device__ void product(int i, u32 a, u32 b, u32 metadata, int accumulate) {
    mma<HALF>(d[i], descriptor(a + i * (A_BLOCK / 16) + HALF * A_HALF, A_ROWS), descriptor(b + HALF * B_HALF, B_ROWS),
              metadata, accumulate);
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

  // Stages are free.
  __device__ void release_a(int stage) {
    if (releases) barrier_arrive_at(base + EMPTY_A + 8 * stage, lane);
  }
  __device__ void release_b(int stage) {
    if (lane == 0) barrier_arrive(base + EMPTY_B + 8 * stage);
  }
};
