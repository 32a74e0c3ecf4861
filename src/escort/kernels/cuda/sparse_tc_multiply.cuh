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
// across: which halves of the input channels there are for it; bit 31: it is the last of its tap group.
struct Step {
  u32 bits;
  __device__ u32 start() const { return bits & 0xffff; }
  __device__ u32 halves(int across) const { return bits >> (16 + 2 * across) & 3; }
  __device__ bool is_last() const { return bits >> 31; }
};

struct Products {
  float d[M_BLOCKS][PIXELS / 2];

  __device__ Products(const Params& p, u32 base, const Warpgroup& group, bool never)
      : base(base),
        sums(base + p.sums_begin + threadIdx.x % WARPGROUP * 16),
        across(group.across),
        lane(threadIdx.x % 32),
        stage_bytes(b_stage_bytes(p)),
        a_first(
            kept(LOWER + (base + A_BEGIN + group.ring * RING_A * A_BYTES + group.across * M_BLOCKS * A_BLOCK) / 16)),
        b_first(kept(LOWER +
                     (base + B_BEGIN + group.ring * RING_B * stage_bytes + group.along * PIXELS * PIXEL_BYTES) / 16)),
        metadata_first(kept(base + A_BEGIN + group.ring * RING_A * A_BYTES + TILE_BLOCKS * A_BLOCK +
                            group.across * M_BLOCKS * METADATA_BLOCK + threadIdx.x / 32 % 4 * 128) +
                       lane * 4),
        full_a(base + FULL_A + 8 * RING_A * group.ring),
        full_b(base + FULL_B + 8 * RING_B * group.ring),
        empty_a(barrier_of(base + EMPTY_A + 8 * RING_A * group.ring, reader(p))),
        empty_b(base + EMPTY_B + 8 * RING_B * group.ring),
        no_stage_of_cluster(barrier_of(base + NO_STAGE, reader(p))),
        releases(lane < (SPLIT ? 1 : static_cast<int>(kept(p.cluster)))),
        always{kept(!never), kept(!never)} {}

  // Starts all products of so many tap groups, of which the last one may still run afterwards.
  __device__ void start(const u32* steps, int groups) {
    // The first step overwrites the sums: they need no registers through the end of the tile before.
#pragma unroll
    for (int i = 0; i < M_BLOCKS; i++)
#pragma unroll
      for (int j = 0; j < PIXELS / 2; j++) forget(d[i][j]);
    Step step = {__ldg(steps)}, next = {__ldg(steps + 1)};
    u32 freed_a = no_stage_of_cluster, freed_b = base + NO_STAGE;  // barriers of the step before
    u32 here;
    int accumulate = 0;
    // One step. What takes long is begun early, and whatever fits between comes there: a step takes as long as one warp
    // takes to run through it. Weight tile and pixels are here.
    const auto multiply = [&](u32(&words)[M_BLOCKS]) {
      const u32 from = metadata_first + ring_a.stage * A_BYTES, a = a_first + ring_a.stage * (A_BYTES / 16);
      const u32 b = b_first + ring_b.stage * (stage_bytes / 16) + step.start(), halves = step.halves(across);
#pragma unroll
      for (int i = 0; i < M_BLOCKS; i++) load_shared_if(always[i], from + i * METADATA_BLOCK, words[i]);
      const int closes = step.is_last();
      step = next, next = {__ldg(++steps + 1)};
      const u32 at_a = empty_a + 8 * ring_a.stage, at_b = empty_b + 8 * ring_b.stage;
      ring_a.advance(1), ring_b.advance(closes), groups -= closes;
      issue(words, a, b, halves, accumulate);
      // Of a tap group's next step the pixels are those of this one, and no copy is in their place before they are
      // freed.
      here = barrier_test(full_a + 8 * ring_a.stage, ring_a.parity);
      here &= barrier_test(full_b + 8 * ring_b.stage, ring_b.parity);
      mma_wait<1>();
      if (releases) barrier_arrive_remotely(freed_a);
      if (lane == 0) barrier_arrive(freed_b);
      accumulate = 1, freed_a = at_a, freed_b = closes ? at_b : base + NO_STAGE;
    };
    wait_for_step();
    // The loop may not be unrolled or peeled: of products in more places the compiler waits for each.
#pragma unroll 1
    for (;;) {
      multiply(metadata[0]);
      if (groups <= 0) break;
      if (!here) wait_for_step();
      multiply(metadata[1]);
      if (groups <= 0) break;
      if (!here) wait_for_step();
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
    put();
    if (lane == 0) barrier_arrive(base + SUMS_HERE);
  }
  __device__ void take(u32 parity) {
    barrier_wait_opaque(base + SUMS_HERE, parity);
#pragma unroll
    for (int i = 0; i < M_BLOCKS; i++)
#pragma unroll
      for (int j = 0; j < PIXELS / 2; j += 4) add_shared(sums + (i * PIXELS / 2 + j) * WARPGROUP * 4, d[i] + j);
  }
  // A warp's sums to memory.
  __device__ void put() const {
#pragma unroll
    for (int i = 0; i < M_BLOCKS; i++)
#pragma unroll
      for (int j = 0; j < PIXELS / 2; j += 4)
        store_shared(sums + (i * PIXELS / 2 + j) * WARPGROUP * 4,
                     make_float4(d[i][j], d[i][j + 1], d[i][j + 2], d[i][j + 3]));
    __syncwarp();
  }

 private:
  const u32 base, sums;
  const int across, lane, stage_bytes;
  const u32 a_first, b_first, metadata_first;
  const u32 full_a, full_b, empty_b;       // the first of these barriers
  const u32 empty_a, no_stage_of_cluster;  // a lane's, of a block of the cluster
  const bool releases;                     // whether this lane tells a block of the cluster which weight tiles are done
  // A sparse wgmma reads its metadata register while it runs, and the assembler takes the register for free as soon as
  // the instruction is issued: with two steps in flight the second's metadata would overwrite that of the first. So
  // steps take turns with two sets of registers, and each is loaded on a condition that always holds, so that the
  // assembler keeps what is in it until then.
  const u32 always[2];
  u32 metadata[2][M_BLOCKS] = {};
  u32 last_a, last_b;
  Ring<RING_A> ring_a;
  Ring<RING_B> ring_b;

  // The block of the cluster that this lane tells which weight tiles are done.
  __device__ int reader(const Params& p) const { return SPLIT ? block_in_cluster(p) : lane < p.cluster ? lane : 0; }

  __device__ void wait_for_step() const {
    barrier_wait_opaque(full_a + 8 * ring_a.stage, ring_a.parity);
    barrier_wait_opaque(full_b + 8 * ring_b.stage, ring_b.parity);
  }

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
