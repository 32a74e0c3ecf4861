// What generated kernels have in common: the ring of stages, its producers, and where a consumer's outputs go.
// codegen.py defines the capitals and writes the kernel, whose consumers run the code made for the filter.
#if STORAGE == 0
typedef float Element;
#define PER_WORD 1
#else
typedef unsigned short Element;
#define PER_WORD 2  // neighbouring columns of a row
#endif
typedef unsigned int u32;

#if __CUDA_ARCH__ >= 900
#define WAIT "try_wait"  // sleeps for a while
#else
#define WAIT "test_wait"
#endif

#define LANES 32
#define PLANE (HEIGHT * WIDTH)
#define OUT_PLANE (OUT_HEIGHT * OUT_WIDTH)
#define STAGE_BYTES (CHANNEL_BLOCK * CHANNEL_WORDS * 4)
#define SLOTS \
  ((STAGE_WORDS + PRODUCERS * LANES * COPY - 1) / (PRODUCERS * LANES * COPY))  // copies per channel and thread
#define BATCH (SLOTS < 8 ? 8 / SLOTS : 1)  // channels that are loaded together where elements are gathered

extern __shared__ __align__(128) char shared[];

// Shared addresses: the stages, then a barrier per stage that says it is full, and one that says it is empty.
struct Ring {
  u32 stages, full, empty;
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

// Sets up the ring. What the kernel before this one wrote may be read afterwards.
__device__ __forceinline__ Ring make_ring() {
  Ring ring;
  ring.stages = (u32)__cvta_generic_to_shared(shared);
  ring.full = ring.stages + STAGES * STAGE_BYTES;
  ring.empty = ring.full + STAGES * 8;
  if (threadIdx.x < STAGES) {
    barrier_init(ring.full + threadIdx.x * 8, PRODUCERS * LANES);
    barrier_init(ring.empty + threadIdx.x * 8, CONSUMERS);
  }
  __syncthreads();
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents; griddepcontrol.wait;" ::: "memory");
#endif
  return ring;
}

// The chunk with which a tile begins.
__device__ __forceinline__ u32 first_chunk(u32 tile) { return tile % ENTRIES * (CHUNKS / STAGES) / ENTRIES * STAGES; }

// Copies COPY words, or writes zeros where there is nothing to copy.
__device__ __forceinline__ void copy_or_zero(u32 to, const Element* from, bool zero) {
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

// Fills the ring with the input of one tile after the other.
__device__ __forceinline__ void produce(const Ring ring, const Element* x, int images, u32 tiles) {
  const u32 thread = threadIdx.x - CONSUMERS * LANES;
  u32 stage = 0, parity = 1;
  for (u32 work = blockIdx.x; work < PIECES * tiles; work += gridDim.x) {
    const u32 piece = work / tiles, tile = work - piece * tiles, first_word = tile * TILE_WORDS;
    const Element* const first = x + piece / PIECES_PER_GROUP * GROUP_CHANNELS * (long long)PLANE;
    const Element* from[SLOTS];
    bool inside[SLOTS][GATHER ? 2 : 1];
#pragma unroll
    for (int i = 0; i < SLOTS; i++) {
      const u32 position = first_word + (i * PRODUCERS * LANES + thread) * COPY;
      const u32 line = position / PITCH, image = line / IMAGE_ROWS;
      const int row = (int)(line - image * IMAGE_ROWS) - TOP;
      const int column = (int)(position - line * PITCH) * PER_WORD - LEFT;
      const bool in_rows = row >= 0 && row < HEIGHT && image < images;
      inside[i][0] = in_rows && column >= 0 && column < WIDTH;
      from[i] = first + image * (long long)(CHANNELS * PLANE) + row * WIDTH + column;
#if GATHER
      inside[i][1] = in_rows && column + 1 >= 0 && column + 1 < WIDTH;
#else
      if (!inside[i][0]) from[i] = first;
#endif
    }
    const u32 begin = first_chunk(tile);
#pragma unroll
    for (int i = 0; i < SLOTS; i++) from[i] += begin * CHANNEL_BLOCK * PLANE;
    u32 chunk = begin;
    for (u32 count = 0; count < CHUNKS; count++) {
      const int channels = min(CHANNEL_BLOCK, GROUP_CHANNELS - (int)chunk * CHANNEL_BLOCK);
      u32 to = ring.stages + stage * STAGE_BYTES + thread * COPY * 4;
#if GATHER
      bool waited = false;
      for (int c = 0; c < channels; c += BATCH) {
        u32 low[BATCH][SLOTS], high[BATCH][SLOTS];
#pragma unroll
        for (int b = 0; b < BATCH; b++) {
#pragma unroll
          for (int i = 0; i < SLOTS; i++) {
            low[b][i] = inside[i][0] && c + b < channels ? __ldg(from[i] + b * PLANE) : 0;
            high[b][i] = inside[i][1] && c + b < channels ? __ldg(from[i] + b * PLANE + 1) : 0;
          }
        }
#pragma unroll
        for (int i = 0; i < SLOTS; i++) from[i] += min(BATCH, channels - c) * PLANE;
        if (!waited) barrier_wait(ring.empty + stage * 8, parity);
        waited = true;
#pragma unroll
        for (int b = 0; b < BATCH; b++) {
#pragma unroll
          for (int i = 0; i < SLOTS; i++) {
            if (c + b < channels && i * PRODUCERS * LANES + thread < STAGE_WORDS)
              asm volatile("st.shared.b32 [%0], %1;" ::"r"(to + (b * CHANNEL_WORDS + i * PRODUCERS * LANES) * 4),
                           "r"(low[b][i] | high[b][i] << 16)
                           : "memory");
          }
        }
        to += BATCH * CHANNEL_WORDS * 4;
      }
      if (!waited) barrier_wait(ring.empty + stage * 8, parity);
      asm volatile("{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [%0]; }" ::"r"(ring.full + stage * 8)
                   : "memory");
#else
      barrier_wait(ring.empty + stage * 8, parity);
#pragma unroll 1
      for (int c = 0; c < channels; c++) {
#pragma unroll
        for (int i = 0; i < SLOTS; i++) {
          if ((i + 1) * PRODUCERS * LANES * COPY <= STAGE_WORDS ||
              (i * PRODUCERS * LANES + thread) * COPY < STAGE_WORDS)
            copy_or_zero(to + i * PRODUCERS * LANES * COPY * 4, from[i], !inside[i][0]);
          from[i] += PLANE;
        }
        to += CHANNEL_WORDS * 4;
      }
      asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(ring.full + stage * 8) : "memory");
#endif
      if (++chunk == CHUNKS) {
        chunk = 0;
#pragma unroll
        for (int i = 0; i < SLOTS; i++) from[i] -= GROUP_CHANNELS * PLANE;
      }
      if (++stage == STAGES) {
        stage = 0;
        parity ^= 1;
      }
    }
  }
}

// Where a consumer's word goes.
struct Output {
  Element* to;  // in the first output channel
  u32 inside;   // a bit per element
};

__device__ __forceinline__ Output output(Element* y, int images, u32 tile) {
  const u32 position = tile * TILE_WORDS + threadIdx.x;
  const u32 line = position / PITCH, image = line / IMAGE_ROWS;
  const u32 row = line - image * IMAGE_ROWS, column = (position - line * PITCH) * PER_WORD;
  const bool in_rows = row < OUT_HEIGHT && image < images;
  Output out;
  out.to = y + image * (long long)(OUT_CHANNELS * OUT_PLANE) + row * OUT_WIDTH + column;
  out.inside = (u32)(in_rows && column < OUT_WIDTH) | (u32)(in_rows && column + 1 < OUT_WIDTH) << 1;
  return out;
}

// A generated kernel is GENERATED { BEGIN case 0: asm volatile(code OPERANDS); break; ... END }. Blocks take one pair
// of piece and tile after the other, all tiles of a piece first.
#define GENERATED                                                                                             \
  extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)                                               \
      generated(const Element* __restrict__ x, Element* __restrict__ y, const Element* __restrict__ residual, \
                int images, u32 tiles)
#define BEGIN                                                                   \
  const Ring ring = make_ring();                                                \
  if (threadIdx.x >= CONSUMERS * LANES) return produce(ring, x, images, tiles); \
  const u32 words = ring.stages + threadIdx.x * 4;                              \
  const long long to_residual = (const char*)residual - (const char*)y;         \
  u32 parity = 0;                                                               \
  for (u32 work = blockIdx.x; work < PIECES * tiles; work += gridDim.x) {       \
    const u32 piece = work / tiles, tile = work - piece * tiles;                \
    const u32 begin = first_chunk(tile);                                        \
    const Output out = output(y, images, tile);                                 \
    switch (piece) {
#define END \
  }         \
  }
#define OPERANDS \
  : "+r"(parity) : "r"(words), "r"(ring.full), "r"(out.inside), "r"(begin), "l"(to_residual), "l"(out.to) : "memory"
