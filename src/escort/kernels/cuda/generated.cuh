// What generated kernels have in common: the ring of stages, its producers, and where a consumer's outputs go.
// codegen.py defines the capitals and writes the kernel, whose consumers run the code made for the filter. Planes of
// strided inputs count as channels here. Of the capitals:
//   STORAGE            0: float, 1: half
//   COLUMNS            elements of a word that are neighbouring columns of a row
//   SAMPLES            elements of a word that are the same position of neighbouring samples
//   PITCH              words from row to row
//   SAMPLE_ROWS        rows from sample to sample, or from pair to pair
//   TOP, LEFT          rows above and columns in front of the input's first
//   ARRANGED           the input was laid out by generated_arrange.cu, words of all samples channel by channel
//   BULK               one thread copies a channel of a stage at a time; else each copies COPY words
//   PREFETCH_WARPS     warps that run ahead through the code, behind CONSUMERS and PRODUCERS
//   PARTS              of the code, each with some output channels
//   SPLIT              blocks of a cluster that share part and tile, each for a slice of the input channels
//   MULTICAST          blocks of a cluster that run the same part for neighbouring tiles
//   GROUP_CHANNELS     input channels of a group; there are SLICE_CHANNELS in a slice, CHANNEL_BLOCK in a stage
//   CHUNKS             stages that a slice fills; at START_POINTS of them tiles begin
//   STAGE_WORDS        words of a channel that TILE_WORDS positions read; a stage has room for CHANNEL_WORDS
//   PART_OUT_CHANNELS  output channels of the largest part, where input channels are split
//   BOUND              0: none, 1: at least 0, 2: and at most 6, where input channels are split
//   ACTIVATION         the activation, where it does more than bound (activation.cuh)
//   CHANNEL_OF, BIAS, SLOPES   then tables: the output channels of each part, what is added to each, and its slope
#include "activation.cuh"
#include "ptx.cuh"

#if STORAGE == 0
typedef float Element;
#else
#if SPLIT > 1
#include <cuda_fp16.h>  // takes long to compile, and only sums of slices need it
#endif
typedef unsigned short Element;
#endif
#if ARRANGED
typedef u32 Input;
#else
typedef Element Input;
#endif

#define LANES 32
#define PLANE (HEIGHT * WIDTH)
#define OUT_PLANE (OUT_HEIGHT * OUT_WIDTH)
#define SLOTS \
  ((STAGE_WORDS + PRODUCERS * LANES * COPY - 1) / (PRODUCERS * LANES * COPY))  // copies per channel and thread
#if SPLIT > 1
#define SHARE ((PART_OUT_CHANNELS + SPLIT - 1) / SPLIT)  // output channels that a block of a cluster finishes
#else
#define RING_BYTES (STAGES * STAGE_BYTES)
#endif

#define SIDE_BY_SIDE 4  // channels, whose copies then need one address

extern __shared__ __align__(128) char shared[];

// Shared addresses: the stages, then a barrier per stage that says it is full, and one that says it is empty.
// Where channels are split, the sums of all output channels take the place of the stages in the end. A further barrier
// says that those of the other blocks have landed, behind it.
struct Ring {
  u32 stages, full, empty, landed, others;
};

// Sets up the ring. What the kernel before this one wrote may be read afterwards.
__device__ __forceinline__ Ring make_ring() {
  Ring ring;
  ring.stages = shared_address(shared);
  ring.full = ring.stages + RING_BYTES;
  ring.empty = ring.full + STAGES * 8;
  ring.landed = ring.empty + STAGES * 8;
  ring.others = ring.landed + 16;
  if (threadIdx.x < STAGES) {
    barrier_init(ring.full + threadIdx.x * 8, BULK ? 1 : PRODUCERS * LANES);
    barrier_init(ring.empty + threadIdx.x * 8, CONSUMERS + PREFETCH_WARPS);
  }
#if SPLIT > 1
  if (threadIdx.x == 0) {
    barrier_init(ring.landed, 1);
    barrier_expect(ring.landed, (SPLIT - 1) * SHARE * TILE_WORDS * 4);
  }
#endif
#if BULK || SPLIT > 1
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
  __syncthreads();
#if SPLIT > 1
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
  let_next_kernel_start();
  wait_for_previous_kernel();
  return ring;
}

// What a block does, one after the other: a part of the code (or a slice of it) for a tile of the words, and the chunk
// to begin with. The blocks of a cluster go through the same part at the same time.
struct Work {
  u32 tiles, item, part, tile, begin;
  __device__ __forceinline__ Work(u32 tiles) : tiles(tiles), item(blockIdx.x / (SPLIT * MULTICAST)) { find(); }
  __device__ __forceinline__ bool left() const { return item < PARTS * groups(); }
  __device__ __forceinline__ void next() {
    item += gridDim.x / (SPLIT * MULTICAST);
    find();
  }

 private:
  __device__ __forceinline__ u32 groups() const { return (tiles + MULTICAST - 1) / MULTICAST; }
  __device__ __forceinline__ void find() {
    part = item / groups();
    const u32 group = item - part * groups();
    tile = group * MULTICAST + blockIdx.x % MULTICAST;  // may lie behind the last one
    begin = group % START_POINTS * (CHUNKS / STAGES) / START_POINTS * STAGES;
  }
};

// The first input channel of a slice of a part, and how many there are.
__device__ __forceinline__ u32 first_channel(u32 part, u32 slice) {
  return part / PARTS_PER_GROUP * GROUP_CHANNELS + slice * SLICE_CHANNELS;
}

__device__ __forceinline__ int slice_channels(u32 slice) {
  return min(SLICE_CHANNELS, GROUP_CHANNELS - (int)slice * SLICE_CHANNELS);
}

// Words of a channel of an arranged input.
__device__ __forceinline__ long long arranged_words(u32 tiles) {
  return tiles * (long long)TILE_WORDS + CHANNEL_WORDS - TILE_WORDS;
}

#if BULK
// Copies a channel of a stage; the barrier counts the bytes.
__device__ __forceinline__ void copy_channel(u32 to, const Input* from, u32 barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "l"(from), "n"(CHANNEL_WORDS * 4), "r"(barrier)
               : "memory");
}

// Fills the ring with the input of one tile after the other. The first thread does it all.
__device__ __forceinline__ void produce(const Ring ring, const Input* x, int samples, u32 tiles, u32 slice) {
  if (threadIdx.x != CONSUMERS * LANES) return;
  const long long words = arranged_words(tiles);
  u32 stage = 0, parity = 1;
  for (Work work(tiles); work.left(); work.next()) {
    if (MULTICAST > 1 && work.tile >= tiles) continue;
    const Input* const first = x + first_channel(work.part, slice) * words + work.tile * TILE_WORDS;
    u32 chunk = work.begin;
    for (u32 count = 0; count < CHUNKS; count++) {
      const int channels = max(0, min(CHANNEL_BLOCK, slice_channels(slice) - (int)chunk * CHANNEL_BLOCK));
      const u32 full = ring.full + stage * 8;
      barrier_wait_opaque(ring.empty + stage * 8, parity);
      barrier_expect(full, channels * CHANNEL_WORDS * 4);
      for (int c = 0; c < channels; c++)
        copy_channel(ring.stages + stage * STAGE_BYTES + c * CHANNEL_WORDS * 4,
                     first + (chunk * CHANNEL_BLOCK + c) * words, full);
      if (++chunk == CHUNKS) chunk = 0;
      if (++stage == STAGES) {
        stage = 0;
        parity ^= 1;
      }
    }
  }
}
#else
// Copies COPY words, or writes zeros where there is nothing to copy.
__device__ __forceinline__ void copy_or_zero(u32 to, const Input* from, bool zero) {
#if COPY == 4
#define MODE "cg"
#else
#define MODE "ca"
#endif
  asm volatile("{ .reg .pred zero; setp.ne.u32 zero, %2, 0; cp.async." MODE
               ".shared.global [%0], [%1], %3, zero; }" ::"r"(to),
               "l"(from), "r"((u32)zero), "n"(COPY * 4)
               : "memory");
}

// This thread's copies of a channel that lies `ahead` of where `from` points.
__device__ __forceinline__ void copy_channel(u32 to, const Input* const* from, long long ahead, const bool* inside) {
  const u32 thread = threadIdx.x - CONSUMERS * LANES;
#pragma unroll
  for (int i = 0; i < SLOTS; i++) {
    if ((i + 1) * PRODUCERS * LANES * COPY <= STAGE_WORDS || (i * PRODUCERS * LANES + thread) * COPY < STAGE_WORDS)
      copy_or_zero(to + i * PRODUCERS * LANES * COPY * 4, from[i] + ahead, !inside[i]);
  }
}

// Fills the ring with the input of one tile after the other.
__device__ __forceinline__ void produce(const Ring ring, const Input* x, int samples, u32 tiles, u32 slice) {
  const u32 thread = threadIdx.x - CONSUMERS * LANES;
#if ARRANGED
  const long long channel_step = arranged_words(tiles);
#else
  const int channel_step = PLANE;
#endif
  u32 stage = 0, parity = 1;
  for (Work work(tiles); work.left(); work.next()) {
    if (MULTICAST > 1 && work.tile >= tiles) continue;
    const Input* const first = x + first_channel(work.part, slice) * (long long)channel_step;
    const Input* from[SLOTS];
    bool inside[SLOTS];
#pragma unroll
    for (int i = 0; i < SLOTS; i++) {
      const u32 position = work.tile * TILE_WORDS + (i * PRODUCERS * LANES + thread) * COPY;
#if ARRANGED
      inside[i] = true;
      from[i] = first + position;
#else
      const u32 line = position / PITCH, sample = line / SAMPLE_ROWS;
      const int row = (int)(line - sample * SAMPLE_ROWS) - TOP;
      const int column = (int)(position - line * PITCH) * COLUMNS - LEFT;
      inside[i] = row >= 0 && row < HEIGHT && sample < samples && column >= 0 && column < WIDTH;
      from[i] = inside[i] ? first + sample * (long long)(CHANNELS * PLANE) + row * WIDTH + column : first;
#endif
      from[i] += work.begin * CHANNEL_BLOCK * (long long)channel_step;
    }
    u32 chunk = work.begin;
    for (u32 count = 0; count < CHUNKS; count++) {
      const int channels = min(CHANNEL_BLOCK, slice_channels(slice) - (int)chunk * CHANNEL_BLOCK);
      u32 to = ring.stages + stage * STAGE_BYTES + thread * COPY * 4;
      barrier_wait_opaque(ring.empty + stage * 8, parity);
      int c = 0;
#pragma unroll 1
      for (; c + SIDE_BY_SIDE <= channels; c += SIDE_BY_SIDE) {
#pragma unroll
        for (int b = 0; b < SIDE_BY_SIDE; b++) copy_channel(to + b * CHANNEL_WORDS * 4, from, b * channel_step, inside);
#pragma unroll
        for (int i = 0; i < SLOTS; i++) from[i] += SIDE_BY_SIDE * channel_step;
        to += SIDE_BY_SIDE * CHANNEL_WORDS * 4;
      }
#pragma unroll 1
      for (; c < channels; c++) {
        copy_channel(to, from, 0, inside);
#pragma unroll
        for (int i = 0; i < SLOTS; i++) from[i] += channel_step;
        to += CHANNEL_WORDS * 4;
      }
      barrier_arrive_after_copies(ring.full + stage * 8);
      if (++chunk == CHUNKS) {
        chunk = 0;
#pragma unroll
        for (int i = 0; i < SLOTS; i++) from[i] -= slice_channels(slice) * (long long)channel_step;
      }
      if (++stage == STAGES) {
        stage = 0;
        parity ^= 1;
      }
    }
  }
}
#endif

// Where a consumer's word goes.
struct Output {
  Element* to;  // in the first output channel
  u32 inside;   // a bit per element
};

__device__ __forceinline__ Output output(Element* y, int samples, u32 tile) {
  const u32 position = tile * TILE_WORDS + threadIdx.x;
  const u32 line = position / PITCH, sample = line / SAMPLE_ROWS * SAMPLES;
  const u32 row = line % SAMPLE_ROWS, column = (position - line * PITCH) * COLUMNS;
  const bool first = row < OUT_HEIGHT && column < OUT_WIDTH && sample < samples;
  Output out;
  out.to = y + sample * (long long)(OUT_CHANNELS * OUT_PLANE) + row * OUT_WIDTH + column;
  out.inside = (u32)first | (u32)(first && column + COLUMNS - 1 < OUT_WIDTH && sample + SAMPLES - 1 < samples) << 1;
  return out;
}

#if SPLIT > 1
__device__ __forceinline__ float activate(float sum, float slope) {
  if (BEYOND_BOUNDS) return activated(sum, slope);
  if (BOUND > 0) asm("max.NaN.f32 %0, %0, 0f00000000;" : "+f"(sum));
  if (BOUND > 1) asm("min.NaN.f32 %0, %0, 0f40C00000;" : "+f"(sum));
  return sum;
}

// The address of the same place in another block of the cluster.
__device__ __forceinline__ u32 in_block(u32 other, u32 address) {
  u32 mapped;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(address), "r"(other));
  return mapped;
}

// Sends a share of this block's sums to another; the barrier, which is the other's, counts the bytes.
__device__ __forceinline__ void send_share(u32 to, u32 from, u32 barrier) {
  asm volatile("cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "r"(from), "n"(SHARE * TILE_WORDS * 4), "r"(barrier)
               : "memory");
}

// Sends each block of the cluster the sums of its share of the output channels, adds those that came, and writes the
// outputs.
__device__ __forceinline__ void finish(const Ring ring, u32 slice, u32 part, const Output out,
                                       const long long to_residual) {
  asm volatile("fence.proxy.async; bar.sync 1, %0;" ::"n"(CONSUMERS * LANES) : "memory");
  if (threadIdx.x == 0) {
#pragma unroll 1
    for (u32 i = 1; i < SPLIT; i++) {
      const u32 other = (slice + i) % SPLIT, slot = SPLIT - 1 - i;
      const u32 to = in_block(other, ring.others), landed = in_block(other, ring.landed);
      send_share(to + slot * SHARE * TILE_WORDS * 4, ring.stages + other * SHARE * TILE_WORDS * 4, landed);
    }
  }
  barrier_wait_opaque(ring.landed, 0);
  const long long second = SAMPLES > 1 ? (long long)OUT_CHANNELS * OUT_PLANE : 1;  // from a word's first element
#pragma unroll 2
  for (u32 i = 0; i < SHARE; i++) {
    const int channel = CHANNEL_OF[part * (SHARE * SPLIT) + slice * SHARE + i];
    if (channel < 0) break;
    const float slope = SLOPES[channel];
    float sum[COLUMNS * SAMPLES];
#pragma unroll
    for (int e = 0; e < COLUMNS * SAMPLES; e++) sum[e] = BIAS[channel];
#pragma unroll
    for (u32 k = 0; k < SPLIT; k++) {  // in the order of the slices, whichever block adds them
      // That of slice k came with i = slice - k (mod SPLIT), so its slot is SPLIT - 1 - i.
      const u32 slot = SPLIT - 1 - (slice + SPLIT - k) % SPLIT;
      const u32 from =
          k == slice ? ring.stages + slice * SHARE * TILE_WORDS * 4 : ring.others + slot * SHARE * TILE_WORDS * 4;
      const u32 word = load4(from + (i * TILE_WORDS + threadIdx.x) * 4);
#if STORAGE == 0
      sum[0] += __uint_as_float(word);
#else
      sum[0] += __half2float(__ushort_as_half(word & 0xffff));
      sum[1] += __half2float(__ushort_as_half(word >> 16));
#endif
    }
    Element* const to = out.to + channel * OUT_PLANE;
#pragma unroll
    for (int e = 0; e < COLUMNS * SAMPLES; e++) {
      if (!(out.inside >> e & 1)) continue;
      Element* const y = to + (e ? second : 0);
      const Element* const residual = (const Element*)((const char*)y + to_residual);
#if STORAGE == 0
      *y = activate(RESIDUAL ? sum[e] + *residual : sum[e], slope);
#else
      *y = __half_as_ushort(
          __float2half_rn(activate(RESIDUAL ? sum[e] + __half2float(__ushort_as_half(*residual)) : sum[e], slope)));
#endif
    }
  }
}

// No block may leave before its sums have been read.
__device__ __forceinline__ void leave() {
  asm volatile("barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// All blocks of the cluster have begun, and set up their barriers.
__device__ __forceinline__ void meet() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
#endif

// A generated kernel is GENERATED { BEGIN case 0: asm volatile(code OPERANDS); break; ... END }, with a case for each
// slice of each part. Blocks (clusters, where there are any) take one pair of part and tile after the other, all tiles
// of a part first.
#if SPLIT > 1
#define CLUSTER __cluster_dims__(SPLIT, 1, 1)
#define FINISH                                                             \
  meet();                                                                  \
  if (prefetch_warp < 0) finish(ring, slice, work.part, out, to_residual); \
  leave();                                                                 \
  return;
#define PRODUCED \
  __syncwarp();  \
  meet();        \
  leave();
#else
#if MULTICAST > 1
#define CLUSTER __cluster_dims__(MULTICAST, 1, 1)
#else
#define CLUSTER
#endif
#define FINISH
#define PRODUCED
#endif
#define GENERATED                                                                                           \
  extern "C" __global__ void CLUSTER __launch_bounds__(THREADS, OCCUPANCY)                                  \
      generated(const Input* __restrict__ x, Element* __restrict__ y, const Element* __restrict__ residual, \
                int samples, u32 tiles)
#define BEGIN                                                                                                 \
  const Ring ring = make_ring();                                                                              \
  const u32 slice = blockIdx.x % SPLIT;                                                                       \
  const int prefetch_warp = (int)(threadIdx.x / LANES) - (CONSUMERS + PRODUCERS); /* of others less than 0 */ \
  if (prefetch_warp < 0 && threadIdx.x >= CONSUMERS * LANES) {                                                \
    produce(ring, x, samples, tiles, slice);                                                                  \
    PRODUCED                                                                                                  \
    return;                                                                                                   \
  }                                                                                                           \
  const u32 words = ring.stages + threadIdx.x * 4;                                                            \
  const long long to_residual = (const char*)residual - (const char*)y;                                       \
  u32 parity = 0;                                                                                             \
  for (Work work(tiles); work.left(); work.next()) {                                                          \
    if (MULTICAST > 1 && work.tile >= tiles) continue;                                                        \
    const Output out = output(y, samples, work.tile);                                                         \
    switch (work.part * SPLIT + slice) {
#define END \
  }         \
  FINISH    \
  }
#define OPERANDS \
  : "+r"(parity) : "r"(words), "r"(ring.full), "r"(out.inside), "r"(work.begin), "l"(to_residual), "l"(out.to), "r"(prefetch_warp) : "memory"
