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
        a_first(kept(LOWER + (base + A_BEGIN + group.across * M_BLOCKS * A_BLOCK) / 16)),
        b_first(kept(LOWER + (base + B_BEGIN + group.along * PIXELS * PIXEL_BYTES) / 16)),
        metadata_first(kept(base + A_BEGIN + TILE_BLOCKS * A_BLOCK + group.across * M_BLOCKS * METADATA_BLOCK +
                            threadIdx.x / 32 % 4 * 128) +
                       lane * 4),
        always{kept(!never), kept(!never)},
        empty_a(barrier_of(base + EMPTY_A, lane < p.cluster ? lane : 0)),
        empty_b(base + EMPTY_B),
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
    if (BY_TURNS && others) steps += others, ring_a.advance(others), ring_b.advance(1), groups--;
    Step step = {__ldg(steps)}, next = {__ldg(steps + 1)};
    u32 freed_a = empty_a + (NO_STAGE - EMPTY_A), freed_b = base + NO_STAGE;  // barriers of the step before
    u32 here;
    // One step, in an order in which nothing waits for what was just begun.
    const auto multiply = [&](u32(&words)[M_BLOCKS]) {
      const u32 from = metadata_first + ring_a.stage * A_BYTES, a = a_first + ring_a.stage * (A_BYTES / 16);
      const u32 b = b_first + ring_b.stage * (stage_bytes / 16) + step.start(), halves = step.halves(across);
#pragma unroll
      for (int i = 0; i < M_BLOCKS; i++) load_shared_if(always[i], from + i * METADATA_BLOCK, words[i]);
      const int closes = step.is_last(), by = 1 + step.others();
      steps += by;
      if (BY_TURNS) next = {__ldg(steps)};
      step = next;
      if (!BY_TURNS) next = {__ldg(steps + 1)};
      groups -= BY_TURNS ? 2 * closes : closes;
      const u32 at_a = empty_a + 8 * ring_a.stage, at_b = empty_b + 8 * ring_b.stage;
      ring_a.advance(by);
      ring_b.advance(BY_TURNS && groups >= 0 ? 2 * closes : closes);
      const u32 full_a = base + FULL_A + 8 * ring_a.stage, full_b = base + FULL_B + 8 * ring_b.stage;
      issue(words, a, b, halves, accumulate);
      here = barrier_test(full_a, ring_a.parity) & barrier_test(full_b, ring_b.parity);
      mma_wait<1>();
      if (releases) barrier_arrive_remotely(freed_a);
      if (lane == 0) barrier_arrive(freed_b);
      accumulate = 1, freed_a = at_a, freed_b = closes ? at_b : base + NO_STAGE;
    };
    const auto wait = [&] {
      barrier_wait_opaque(base + FULL_A + 8 * ring_a.stage, ring_a.parity);
      barrier_wait_opaque(base + FULL_B + 8 * ring_b.stage, ring_b.parity);
    };
    wait();
    // The loop may not be unrolled or peeled: of products in several places the compiler waits for each.
#pragma unroll 1
    for (;;) {
      multiply(metadata[0]);
      if (groups <= 0) break;
      if (!here) wait();
      multiply(metadata[1]);
      if (groups <= 0) break;
      if (!here) wait();
    }
    last_a = freed_a, last_b = freed_b;
  }

  __device__ void wait() {
    mma_wait<0>();
    if (releases) barrier_arrive_remotely(last_a);
    if (lane == 0) barrier_arrive(last_b);
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
      for (int j = 0; j < M_BLOCKS; j++) keep(metadata[i][j], !always[0], base + NO_STAGE), forget(metadata[i][j]);
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
  const u32 always[2];
  const u32 empty_a, empty_b;  // the first of these barriers; empty_a is a lane's, of a block of the cluster
  const int stage_bytes;
  const bool releases;  // whether this lane tells a block of the cluster which weight tiles are done
  u32 last_a, last_b;
  Ring<A_STAGES> ring_a;
  Ring<B_STAGES> ring_b;
  u32 metadata[2][M_BLOCKS] = {};

  // One weight tile times the pixels of its tap. Each way commits for itself: a commit behind the branches would become
  // a group of its own, and one without products would make the compiler wait for every product.
  __device__ void issue(const u32 (&words)[M_BLOCKS], u32 a, u32 b, u32 halves, int accumulate) {
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
};
