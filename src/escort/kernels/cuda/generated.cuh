// What generated kernels have in common: the ring of stages, its producers, and where a consumer's outputs go.
// codegen.py defines the capitals and writes the kernel, whose consumers run the code made for the filter.
//   STORAGE   0: float, 1: half
//   COLUMNS, SAMPLES   elements of a word: neighbouring columns of a row, or the same position of neighbouring samples
//   ARRANGED  the input was laid out by generated_arrange.cu, words of all samples channel by channel
//   BULK      one thread copies a channel of a stage at a time
//   SPLIT     blocks of a cluster that run the same rows for the same tile, each for a part of the channels
//   MULTICAST  blocks of a cluster that run the same rows for neighbouring tiles
//   PREFETCH_WARPS    warps that run ahead through the code, behind consumers and producers
#if STORAGE == 0
typedef float Element;
#else
#if SPLIT > 1
#include <cuda_fp16.h>  // takes long to compile, and only sums of parts need it
#endif
typedef unsigned short Element;
#endif
typedef unsigned int u32;
#if ARRANGED
typedef u32 Input;
#else
typedef Element Input;
#endif

#if __CUDA_ARCH__ >= 900
#define WAIT "try_wait"  // sleeps for a while
#else
#define WAIT "test_wait"
#endif

#define LANES 32
#define PLANE (HEIGHT * WIDTH)
#define OUT_PLANE (OUT_HEIGHT * OUT_WIDTH)
#define SLOTS \
  ((STAGE_WORDS + PRODUCERS * LANES * COPY - 1) / (PRODUCERS * LANES * COPY))  // copies per channel and thread
#if SPLIT > 1
#define SHARE ((PART_OUT_CHANNELS + SPLIT - 1) / SPLIT)  // rows that a block of a cluster finishes
#else
#define RING_BYTES (STAGES * STAGE_BYTES)
#endif

#define SIDE_BY_SIDE 4  // channels, whose copies then need one address

extern __shared__ __align__(128) char shared[];

// Shared addresses: the stages, then a barrier per stage that says it is full, and one that says it is empty.
// Where channels are split the sums of all rows take the place of the stages in the end; a further barrier says that
// those of the other blocks have landed, behind it.
struct Ring {
  u32 stages, full, empty, landed, others;
};

__device__ __forceinline__ void barrier_init(u32 barrier, u32 count) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

__device__ __forceinline__ void barrier_wait(u32 barrier, u32 parity) {
  asm volatile("{ .reg .pred done; WAIT: mbarrier." WAIT
               ".parity.shared.b64 done, [%0], %1; @!done bra WAIT; }" ::"r"(barrier),
               "r"(parity)
               : "memory");
}

#if BULK || SPLIT > 1
// Arrives, and says how many bytes bulk copies will bring.
__device__ __forceinline__ void barrier_expect(u32 barrier, u32 bytes) {
  asm volatile("{ .reg .b64 state; mbarrier.arrive.expect_tx.shared.b64 state, [%0], %1; }" ::"r"(barrier), "r"(bytes)
               : "memory");
}
#endif

// Sets up the ring. What the kernel before this one wrote may be read afterwards.
__device__ __forceinline__ Ring make_ring() {
  Ring ring;
  ring.stages = (u32)__cvta_generic_to_shared(shared);
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
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents; griddepcontrol.wait;" ::: "memory");
#endif
  return ring;
}

// What a block does, one after the other: some rows (and channels) of the filter for a tile of the words, and the chunk
// to begin with. The blocks of a cluster go through the same rows at the same time.
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

// The first channel of a part, and how many there are.
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
      barrier_wait(ring.empty + stage * 8, parity);
      barrier_expect(full, channels * CHANNEL_WORDS * 4);
      for (int c = 0; c < channels; c++)
        asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                         ring.stages + stage * STAGE_BYTES + c * CHANNEL_WORDS * 4),
                     "l"(first + (chunk * CHANNEL_BLOCK + c) * words), "n"(CHANNEL_WORDS * 4), "r"(full)
                     : "memory");
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
      barrier_wait(ring.empty + stage * 8, parity);
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
      asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(ring.full + stage * 8) : "memory");
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
__device__ __forceinline__ float activate(float sum) {
  if (ACTIVATION > 0) asm("max.NaN.f32 %0, %0, 0f00000000;" : "+f"(sum));
  if (ACTIVATION > 1) asm("min.NaN.f32 %0, %0, 0f40C00000;" : "+f"(sum));
  return sum;
}

// Sends each block of the cluster its share of the rows' sums, adds those that came, and writes the outputs.
__device__ __forceinline__ void finish(const Ring ring, u32 slice, u32 part, const Output out,
                                       const long long to_residual) {
  asm volatile("fence.proxy.async; bar.sync 1, %0;" ::"n"(CONSUMERS * LANES) : "memory");
  if (threadIdx.x == 0) {
#pragma unroll 1
    for (u32 i = 1; i < SPLIT; i++) {
      const u32 other = (slice + i) % SPLIT, slot = SPLIT - 1 - i;
      u32 to, landed;
      asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(to) : "r"(ring.others), "r"(other));
      asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(landed) : "r"(ring.landed), "r"(other));
      asm volatile("cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                       to + slot * SHARE * TILE_WORDS * 4),
                   "r"(ring.stages + other * SHARE * TILE_WORDS * 4), "n"(SHARE * TILE_WORDS * 4), "r"(landed)
                   : "memory");
    }
  }
  barrier_wait(ring.landed, 0);
  const long long second = SAMPLES > 1 ? (long long)OUT_CHANNELS * OUT_PLANE : 1;  // from a word's first element
#pragma unroll 2
  for (u32 i = 0; i < SHARE; i++) {
    const int channel = CHANNEL_OF[part * (SHARE * SPLIT) + slice * SHARE + i];
    if (channel < 0) break;
    float sum[COLUMNS * SAMPLES];
#pragma unroll
    for (int e = 0; e < COLUMNS * SAMPLES; e++) sum[e] = BIAS[channel];
#pragma unroll
    for (u32 k = 0; k < SPLIT; k++) {  // in the order of the parts, whichever block adds them
      // That of part k came with i = part - k (mod SPLIT), so its slot is SPLIT - 1 - i.
      const u32 slot = SPLIT - 1 - (slice + SPLIT - k) % SPLIT;
      const u32 from =
          k == slice ? ring.stages + slice * SHARE * TILE_WORDS * 4 : ring.others + slot * SHARE * TILE_WORDS * 4;
      u32 word;
      asm volatile("ld.shared.b32 %0, [%1];" : "=r"(word) : "r"(from + (i * TILE_WORDS + threadIdx.x) * 4));
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
      *y = activate(RESIDUAL ? sum[e] + *residual : sum[e]);
#else
      *y = __half_as_ushort(
          __float2half_rn(activate(RESIDUAL ? sum[e] + __half2float(__ushort_as_half(*residual)) : sum[e])));
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

// A generated kernel is GENERATED { BEGIN case 0: asm volatile(code OPERANDS); break; ... END }. Blocks (clusters,
// where there are any) take one pair of part and tile after the other, all tiles of a part first.
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
