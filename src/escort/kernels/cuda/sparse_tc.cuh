// y = activation(conv2d(x, w) + bias + residual) on the sparse tensor cores of compute capability 9.0, as an implicit
// matrix product D[channel, pixel] = A[channel, k] * B[k, pixel] with sums in float.
//
//   A  The filter. A weight tile of it is M_TILE channels x K_BLOCK input channels of one tap, compressed to two of
//   each
//      four (TF32: one of two), with metadata that say which: packed by packing.py just as the tensor cores read shared
//      memory. What a filter has beyond that is further weight tiles, the remainder. Blocks of a cluster compute
//      different pixels of the same channels, and each copies a part of every weight tile to all of them.
//   B  x in NHWC, K_BLOCK channels (128 bytes, in 128-byte swizzle) of many pixels: those that a tap group reads,
//      brought by the copy engine at once. A list says which weight tiles multiply them, and at which pixel they begin:
//        IM2COL   the pixels that one tap of the tile reads (any stride): one tap per group;
//        COLUMNS  the tile's input rows from one column of taps on: the taps of that column, rows apart;
//        HALO     the tile's input rows: all taps. A row's padding is the next row's padding, too, so columns of the
//                 output beyond its width are computed and dropped;
//        FLAT     pixels in a row (pointwise): its only tap.
//
// Two consumer warpgroups multiply, ACROSS of them side by side along the channels, each M_BLOCKS x 64 channels and
// PIXELS pixels; one thread of the producer warpgroup copies. Blocks are persistent. tiling.py defines the capitals,
// and puts the integers' short names and mma<SELECTOR>(d, a, b, metadata, accumulate) before this file.
// STORAGE 0 is float, multiplied in TF32, 1 fp16, 2 bf16.
#if STORAGE == 1
#include <cuda_fp16.h>
#elif STORAGE == 2
#include <cuda_bf16.h>
#endif
#define BOXES_OUT (STORAGE && !OUT_NCHW)  // the copy engine stores y and loads the residual; else warps do

enum TapGroup { IM2COL, COLUMNS, HALO, FLAT };

constexpr int ALONG = 2 / ACROSS;  // warpgroups side by side along the pixels
constexpr int TILE_BLOCKS = ACROSS * M_BLOCKS, M_TILE = 64 * TILE_BLOCKS, TILE_PIXELS = ALONG * PIXELS;
constexpr int A_BLOCK = 64 * 64, METADATA_BLOCK = 512;  // bytes of 64 channels
constexpr int A_BYTES = TILE_BLOCKS * (A_BLOCK + METADATA_BLOCK);
constexpr int PIXEL_BYTES = 128, K_BLOCK = PIXEL_BYTES / (STORAGE ? 2 : 4);
constexpr int WARPGROUP = 128, CONSUMERS = 2 * WARPGROUP, CONSUMER_WARPS = CONSUMERS / 32;
constexpr int CONSUMER_REGISTERS = 232, PRODUCER_REGISTERS = 40;
constexpr int STAGINGS = STORAGE ? TILE_BLOCKS : CONSUMER_WARPS;
constexpr int OUT_PLANE = OUT_HEIGHT * OUT_WIDTH;
constexpr bool WHOLE_ROWS =
    TAP_GROUP == COLUMNS || TAP_GROUP == HALO;  // tiles are rows of the output; else any pixels in a row

// Shared memory: barriers, then these.
constexpr u32 FULL_A = 0, EMPTY_A = FULL_A + 8 * A_STAGES, FULL_B = EMPTY_A + 8 * A_STAGES;
constexpr u32 EMPTY_B = FULL_B + 8 * B_STAGES, RESIDUAL_HERE = EMPTY_B + 8 * B_STAGES, UNUSED = RESIDUAL_HERE + 16;
constexpr u32 B = 1024, A = B + B_STAGES * B_STAGE_BYTES, STAGING = (A + A_STAGES * A_BYTES + 1023) / 1024 * 1024;
static_assert(UNUSED + 8 <= B && STAGING + STAGINGS * STAGING_BYTES == SHARED_BYTES);

struct __align__(64) TensorMap {
  u64 opaque[16];
};

// ---------------------------------------------------------------------------------------------------------- PTX ----
__device__ void barrier_init(u32 barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count));
}
__device__ void barrier_expect(u32 barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ void barrier_arrive(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Arrives at the same barrier of another block of the cluster.
__device__ void barrier_arrive_at(u32 barrier, u32 block) {
  asm volatile(
      "{ .reg .b32 remote; mapa.shared::cluster.u32 remote, %0, %1; "
      "mbarrier.arrive.shared::cluster.b64 _, [remote]; }" ::"r"(barrier),
      "r"(block)
      : "memory");
}
__device__ void barrier_wait(u32 barrier, u32 parity) {
  asm volatile(
      "{ .reg .pred done; WAIT: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1; @!done bra WAIT; }" ::"r"(
          barrier),
      "r"(parity)
      : "memory");
}

// A block's part of a weight tile, to all blocks of the cluster.
__device__ void load_part(u32 to, const u8* from, u32 barrier) {
  if constexpr (CLUSTER == 1)
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
                 "l"(from), "n"(A_BYTES), "r"(barrier)
                 : "memory");
  else
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
        "[%0], [%1], %2, [%3], %4;" ::"r"(to),
        "l"(from), "n"(A_BYTES / CLUSTER), "r"(barrier), "h"(static_cast<u16>((1 << CLUSTER) - 1))
        : "memory");
}
__device__ void load_box(u32 to, const TensorMap& map, int c, int w, int h, int n, u32 barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(to),
      "l"(&map), "r"(barrier), "r"(c), "r"(w), "r"(h), "r"(n)
      : "memory");
}
__device__ void load_im2col(u32 to, const TensorMap& map, int c, int w, int h, int n, int right, int down,
                            u32 barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6}], [%2], {%7, %8};" ::"r"(to),
      "l"(&map), "r"(barrier), "r"(c), "r"(w), "r"(h), "r"(n), "h"(static_cast<u16>(right)), "h"(static_cast<u16>(down))
      : "memory");
}
__device__ void store_box(const TensorMap& map, int c, int w, int h, int n, u32 from) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(&map),
               "r"(from), "r"(c), "r"(w), "r"(h), "r"(n)
               : "memory");
}
__device__ void store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
__device__ void store_wait() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
__device__ void async_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Blocks of a cluster have all come this far; memory is ordered by barriers and fences of its own.
__device__ void meet() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned; barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
__device__ void sync(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

__device__ void mma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ void mma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int IN_FLIGHT>
__device__ void mma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(IN_FLIGHT) : "memory");
}

__device__ u32 load_word(u32 address) {
  u32 v;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(v) : "r"(address) : "memory");
  return v;
}

__device__ void load_shared(u32 address, float& v) {
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(address) : "memory");
}
__device__ void load_shared(u32 address, float4& v) {
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "r"(address)
               : "memory");
}
__device__ void store_shared(u32 address, float v) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(v) : "memory");
}
__device__ void store_shared(u32 address, float2 v) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(address), "f"(v.x), "f"(v.y) : "memory");
}

// A use of a register, so that it holds its value until here. It is a store that is never done, since the compiler may
// move calculations to before a wait for the tensor cores.
__device__ void keep(u32 value, u32 never, u32 unused) {
  asm volatile("{ .reg .pred p; setp.ne.u32 p, %1, 0; @p st.volatile.shared.b32 [%2], %0; }" ::"r"(value), "r"(never),
               "r"(unused)
               : "memory");
}

// Matrix descriptors, k innermost: A has rows of 64 bytes in 64-byte swizzle, B rows of 128 in 128-byte swizzle. Starts
// are in units of 16 bytes.
constexpr u32 A_ROWS = 512 / 16 | 2u << 30, B_ROWS = 1024 / 16 | 1u << 30;
constexpr u32 A_HALF = 32 / 16, B_HALF = 64 / 16;  // from the first half of the input channels to the others
__device__ u64 descriptor(u32 start, u32 rows) { return static_cast<u64>(rows) << 32 | 1u << 16 | start; }

// ------------------------------------------------------------------------------------------------------ elements ----
#if STORAGE == 0
using Element = float;
#else
using Element = u16;
#endif

#if STORAGE == 1
__device__ float2 unpack(u32 pair) { return __half22float2(reinterpret_cast<const __half2&>(pair)); }
__device__ u32 pack(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return reinterpret_cast<const u32&>(pair);
}
#elif STORAGE == 2
__device__ float2 unpack(u32 pair) { return __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(pair)); }
__device__ u32 pack(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const u32&>(pair);
}
#endif

__device__ float activate(float sum) {  // a NaN stays one
  if (ACTIVATION > 0) asm("max.NaN.f32 %0, %0, 0f00000000;" : "+f"(sum));
  if (ACTIVATION > 1) asm("min.NaN.f32 %0, %0, 0f40C00000;" : "+f"(sum));
  return sum;
}

// --------------------------------------------------------------------------------------------------------- tiles ----
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

__device__ void produce(u32 base, const TensorMap& x_map, const u8* __restrict__ a, const int* __restrict__ first,
                        int tile_groups) {
  Ring<A_STAGES> ring_a;
  Ring<B_STAGES> ring_b;
  constexpr int PART = A_BYTES / CLUSTER;
  const int part = blockIdx.x % CLUSTER * PART;
  for (Work work(tile_groups); work.left(); work.next()) {
    const int* const firsts = first + work.m_tile() * TAP_GROUPS;
    int weight_tile = __ldg(firsts);
    int c = 0, r = 0, s = 0;
    for (int tap_group = 0; tap_group < TAP_GROUPS; tap_group++) {
      barrier_wait(base + EMPTY_B + 8 * ring_b.stage, ring_b.parity ^ 1);
      const u32 barrier = base + FULL_B + 8 * ring_b.stage, to = base + B + ring_b.stage * B_STAGE_BYTES;
      barrier_expect(barrier, LOAD_PIXELS * PIXEL_BYTES);
      if constexpr (TAP_GROUP == IM2COL) {
#pragma unroll
        for (int i = 0; i < ALONG; i++) {
          const int pixel = work.tile() * TILE_PIXELS + i * PIXELS, row = pixel / OUT_WIDTH;
          load_im2col(to + i * PIXELS * PIXEL_BYTES, x_map, c, pixel % OUT_WIDTH * STRIDE_RIGHT - LEFT,
                      row % OUT_HEIGHT * STRIDE_DOWN - TOP, row / OUT_HEIGHT, s * DILATION_RIGHT, r * DILATION_DOWN,
                      barrier);
        }
        if (++s == KERNEL_COLUMNS) s = 0, r++;
        if (r == KERNEL_ROWS) r = 0, c += K_BLOCK;
      } else if constexpr (TAP_GROUP == FLAT) {
        load_box(to, x_map, c, work.tile() * TILE_PIXELS, 0, 0, barrier);
        c += K_BLOCK;
      } else {
        const Place at(work.tile());
        load_box(to, x_map, c, s * DILATION_RIGHT - LEFT, at.row - TOP, at.sample, barrier);
        if (TAP_GROUP == HALO || ++s == KERNEL_COLUMNS) s = 0, c += K_BLOCK;
      }
      ring_b.next();
      for (const int end = __ldg(firsts + tap_group + 1); weight_tile < end; weight_tile++) {
        // Empty when the consumers of all blocks are done with it, as every block writes a part of everyone's.
        barrier_wait(base + EMPTY_A + 8 * ring_a.stage, ring_a.parity ^ 1);
        const u32 barrier = base + FULL_A + 8 * ring_a.stage;
        barrier_expect(barrier, A_BYTES);
        load_part(base + A + ring_a.stage * A_BYTES + part, a + static_cast<long long>(weight_tile) * A_BYTES + part,
                  barrier);
        ring_a.next();
      }
    }
  }
}

// ------------------------------------------------------------------------------------------------------ epilogue ----
// Where y goes, and where the residual is.
#if BOXES_OUT
#define OUTPUTS const __grid_constant__ TensorMap y_map, const __grid_constant__ TensorMap residual_map
struct Outputs {
  const TensorMap &y_map, &residual_map;
};
#define MAKE_OUTPUTS y_map, residual_map
#else
#define OUTPUTS const int* __restrict__ out_order, Element* __restrict__ y, const Element* __restrict__ residual
struct Outputs {
  const int* out_order;  // which output channel stands at each place of all tiles; -1: none
  Element* y;
  const Element* residual;
};
#define MAKE_OUTPUTS out_order, y, residual
#endif

#if STORAGE == 0
// Floats reach y through a staging of each warp, 32 pixels of its 16 channels at a time: in NCHW a lane stores a pixel,
// so that the warp writes a piece of a plane, in NHWC four channels of one.
#if OUT_NCHW
using Vector = float;
constexpr int CHANNEL_STRIDE = OUT_PLANE, PIXEL_STRIDE = 1;  // in y
constexpr int CHANNEL_BYTES = 160, NEXT_BYTES = 4;           // from a channel, and a pixel, to the next in staging
#else
using Vector = float4;
constexpr int CHANNEL_STRIDE = 1, PIXEL_STRIDE = OUT_CHANNELS;
constexpr int CHANNEL_BYTES = 4, NEXT_BYTES = 80;
#endif
constexpr int STAGED = 32, VECTORS = 16 * STAGED * sizeof(float) / sizeof(Vector) / 32;  // pixels; of a lane
static_assert(15 * CHANNEL_BYTES + (STAGED - 1) * NEXT_BYTES + sizeof(float) <= STAGING_BYTES);

__device__ float finish(float sum, float residual) { return activate(RESIDUAL ? sum + residual : sum); }
__device__ float4 finish(float4 sum, float4 residual) {
  return make_float4(finish(sum.x, residual.x), finish(sum.y, residual.y), finish(sum.z, residual.z),
                     finish(sum.w, residual.w));
}

// Where the first channel of a tile's pixel lies in y; -1: it is no output.
__device__ int place_of(int pixel, int tile, int samples) {
  if constexpr (WHOLE_ROWS) {
    const Place at(tile);
    const int sample_in_tile = pixel / SAMPLE_PITCH, rest = pixel % SAMPLE_PITCH, row_in_sample = rest / PITCH;
    const int sample = at.sample + sample_in_tile, row = at.row + row_in_sample, column = rest % PITCH;
    if (sample_in_tile >= TILE_SAMPLES || sample >= samples || row_in_sample >= TILE_ROWS || row >= OUT_HEIGHT ||
        column >= OUT_WIDTH)
      return -1;
    return sample * (OUT_CHANNELS * OUT_PLANE) + (row * OUT_WIDTH + column) * PIXEL_STRIDE;
  } else {
    const int whole = tile * TILE_PIXELS + pixel, sample = whole / OUT_PLANE;
    return sample < samples ? sample * (OUT_CHANNELS * OUT_PLANE) + whole % OUT_PLANE * PIXEL_STRIDE : -1;
  }
}

// A warp's sums: of each 8 pixels lane l has those from 2 (l % 4) on, of channel l / 4 and of channel l / 4 + 8.
__device__ void store(const float (&d)[PIXELS / 2], u32 staging, float bias_low, float bias_high,
                      const int* __restrict__ channels, int tile, int first_pixel, int samples, const Outputs& out) {
  const int lane = threadIdx.x % 32, channel = __ldg(channels + lane % 16);
  const u32 to = staging + lane / 4 * CHANNEL_BYTES + lane % 4 * 2 * NEXT_BYTES;
#pragma unroll
  for (int begin = 0; begin < PIXELS; begin += STAGED) {
    // Without this the compiler finds all places beforehand and has no registers for them.
    int begin_in_tile = first_pixel + begin;
    asm volatile("" : "+r"(begin_in_tile));
    int row[VECTORS], pixel[VECTORS], place[VECTORS];
    Vector residuals[VECTORS] = {};
#pragma unroll
    for (int i = 0; i < VECTORS; i++) {
      row[i] = OUT_NCHW ? i : lane % 4 * 4, pixel[i] = OUT_NCHW ? lane : i * 8 + lane / 4;
      const int of = __shfl_sync(~0u, channel, row[i]), first = place_of(begin_in_tile + pixel[i], tile, samples);
      place[i] = of >= 0 && first >= 0 && begin + pixel[i] < PIXELS ? first + of * CHANNEL_STRIDE : -1;
      if (RESIDUAL && place[i] >= 0) residuals[i] = __ldg(reinterpret_cast<const Vector*>(out.residual + place[i]));
    }
    __syncwarp();  // what was staged before has been read
#pragma unroll
    for (int j = begin; j < begin + STAGED && j < PIXELS; j += 8) {
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const float bias = half ? bias_high : bias_low, *const sums = d + j / 2 + 2 * half;
        const u32 at = to + half * 8 * CHANNEL_BYTES + (j - begin) * NEXT_BYTES;
        if constexpr (OUT_NCHW)
          store_shared(at, make_float2(sums[0] + bias, sums[1] + bias));
        else
          store_shared(at, sums[0] + bias), store_shared(at + NEXT_BYTES, sums[1] + bias);
      }
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < VECTORS; i++) {
      Vector sums;
      load_shared(staging + row[i] * CHANNEL_BYTES + pixel[i] * NEXT_BYTES, sums);
      if (place[i] >= 0) *reinterpret_cast<Vector*>(out.y + place[i]) = finish(sums, residuals[i]);
    }
  }
}
#else
// 8 channels twice x 8 pixels of sums, 4 a lane, with bias as two words of outputs.
__device__ void finish(const float* d, float bias_low, float bias_high, bool residual, const u32* residuals, u32* out) {
  float v[4] = {d[0] + bias_low, d[1] + bias_low, d[2] + bias_high, d[3] + bias_high};
  if (residual) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const float2 r = unpack(residuals[i]);
      v[2 * i] += r.x, v[2 * i + 1] += r.y;
    }
  }
  if (residual || !RESIDUAL) {
#pragma unroll
    for (int i = 0; i < 4; i++) v[i] = activate(v[i]);
  }
  out[0] = pack(v[0], v[1]), out[1] = pack(v[2], v[3]);
}

#if OUT_NCHW
// Sums to staging, as rows of channels.
__device__ void stage(const float (&d)[PIXELS / 2], u32 staging, float bias_low, float bias_high) {
  const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  // Lanes 0-7 address channels 0-7 of the warp's 16, lanes 8-15 channels 8-15, the others 8 pixels on.
  const u32 at = staging + (warp * 16 + lane % 16) * STAGING_PITCH + lane / 16 * 16;
#pragma unroll
  for (int j = 0; j + 2 <= PIXELS / 8; j += 2) {
    u32 v[4];
    finish(d + 4 * j, bias_low, bias_high, false, nullptr, v);
    finish(d + 4 * j + 4, bias_low, bias_high, false, nullptr, v + 2);
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(at + j * 16), "r"(v[0]),
                 "r"(v[1]), "r"(v[2]), "r"(v[3])
                 : "memory");
  }
  if constexpr (PIXELS / 8 % 2) {
    constexpr int j = PIXELS / 8 - 1;
    u32 v[2];
    finish(d + 4 * j, bias_low, bias_high, false, nullptr, v);
    asm volatile("stmatrix.sync.aligned.m8n8.x2.shared.b16 [%0], {%1, %2};" ::"r"(at + j * 16), "r"(v[0]), "r"(v[1])
                 : "memory");
  }
}

// As many neighbouring elements as divide a row (or plane) of y.
#if VECTOR == 8
using Vector = uint4;
#elif VECTOR == 4
using Vector = uint2;
#elif VECTOR == 2
using Vector = u32;
#else
using Vector = u16;
#endif

__device__ Vector load_vector(u32 from) {
  Vector v;
#if VECTOR == 8
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(from)
               : "memory");
#elif VECTOR == 4
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(from) : "memory");
#elif VECTOR == 2 && UNALIGNED
  u16 low, high;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(low) : "r"(from) : "memory");
  asm volatile("ld.shared.u16 %0, [%1 + 2];" : "=h"(high) : "r"(from) : "memory");
  v = low | static_cast<u32>(high) << 16;
#elif VECTOR == 2
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(from) : "memory");
#else
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(v) : "r"(from) : "memory");
#endif
  return v;
}

__device__ u32 add_pair(u32 pair, u32 residual) {
  const float2 v = unpack(pair), r = unpack(residual);
  return pack(activate(v.x + r.x), activate(v.y + r.y));
}

__device__ Vector add(Vector v, Vector residual) {
#if VECTOR == 8
  return make_uint4(add_pair(v.x, residual.x), add_pair(v.y, residual.y), add_pair(v.z, residual.z),
                    add_pair(v.w, residual.w));
#elif VECTOR == 4
  return make_uint2(add_pair(v.x, residual.x), add_pair(v.y, residual.y));
#else
  return static_cast<Vector>(add_pair(v, residual));
#endif
}

// A warp's ROWS channels of staging to y. Each lane takes VECTOR neighbouring pixels, so that a store of the warp
// writes one piece of a plane; pixels that are no outputs are passed over. Sums are rounded before the residual is
// added.
template <int ROWS>
__device__ void store_rows(u32 staging, const int* __restrict__ channels, int tile, int samples, u16* __restrict__ y,
                           const u16* __restrict__ residual) {
  const int lane = threadIdx.x % 32;
  int count, rows = 1;  // of outputs in this tile, and rows in each of its samples
  if constexpr (WHOLE_ROWS) {
    const Place at(tile);
    rows = min(TILE_ROWS, OUT_HEIGHT - at.row);
    count = rows * OUT_WIDTH * min(TILE_SAMPLES, samples - at.sample);
  } else {
    count = min(TILE_PIXELS, samples * OUT_PLANE - tile * TILE_PIXELS);
  }
  const int channel = __ldg(channels + lane % ROWS);
  for (int unit = lane * VECTOR; unit - lane * VECTOR < count; unit += 32 * VECTOR) {
    const bool inside = unit < count;
    int sample, pixel, column;  // of y, in its plane, of staging
    if constexpr (WHOLE_ROWS) {
      const Place at(tile);
      const int sample_in_tile = unit / (rows * OUT_WIDTH), rest = unit - sample_in_tile * rows * OUT_WIDTH,
                row = rest / OUT_WIDTH;
      sample = at.sample + sample_in_tile, pixel = at.row * OUT_WIDTH + rest;
      column = sample_in_tile * SAMPLE_PITCH + row * PITCH + rest - row * OUT_WIDTH;
    } else {
      const int whole = tile * TILE_PIXELS + unit;
      sample = whole / OUT_PLANE, pixel = whole - sample * OUT_PLANE, column = unit;
    }
    const u32 first = static_cast<u32>(sample) * (OUT_CHANNELS * OUT_PLANE) + pixel;  // the host sees that it fits
    constexpr int AT_ONCE = VECTOR == 8 ? 4 : 8;
#pragma unroll 1
    for (int row = 0; row < ROWS; row += AT_ONCE) {
      [[maybe_unused]] Vector residuals[AT_ONCE];
      if constexpr (RESIDUAL) {
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
          const int to = __shfl_sync(~0u, channel, row + i);
          if (to >= 0 && inside)
            residuals[i] =
                __ldg(reinterpret_cast<const Vector*>(residual + (first + static_cast<u32>(to) * OUT_PLANE)));
        }
      }
#pragma unroll
      for (int i = 0; i < AT_ONCE; i++) {
        const int to = __shfl_sync(~0u, channel, row + i);
        if (to < 0 || !inside) continue;
        Vector v = load_vector(staging + (row + i) * STAGING_PITCH + column * 2);
        if constexpr (RESIDUAL) v = add(v, residuals[i]);
        *reinterpret_cast<Vector*>(y + (first + static_cast<u32>(to) * OUT_PLANE)) = v;
      }
    }
  }
}
#else
// Sums to staging, as rows of pixels (64 channels each, 128-byte swizzle), in place of the residual that lies there.
__device__ void stage(const float (&d)[PIXELS / 2], u32 staging, float bias_low, float bias_high) {
  const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  // Lanes 0-7 address 8 pixels of channels 0-7 of the warp's 16, lanes 8-15 of channels 8-15, the others 8 pixels on.
  const int pixel = lane % 8 + lane / 16 * 8, chunk = (warp * 2 + lane / 8 % 2) ^ lane % 8;
  const u32 at = staging + pixel * PIXEL_BYTES + chunk * 16;
#pragma unroll
  for (int j = 0; j + 2 <= PIXELS / 8; j += 2) {
    u32 r[4] = {}, v[4];
    if constexpr (RESIDUAL)
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                   : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                   : "r"(at + j * 8 * PIXEL_BYTES)
                   : "memory");
    finish(d + 4 * j, bias_low, bias_high, RESIDUAL, r, v);
    finish(d + 4 * j + 4, bias_low, bias_high, RESIDUAL, r + 2, v + 2);
    asm volatile(
        "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(at + j * 8 * PIXEL_BYTES),
        "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3])
        : "memory");
  }
  if constexpr (PIXELS / 8 % 2) {
    constexpr int j = PIXELS / 8 - 1;
    u32 r[2] = {}, v[2];
    if constexpr (RESIDUAL)
      asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                   : "=r"(r[0]), "=r"(r[1])
                   : "r"(at + j * 8 * PIXEL_BYTES)
                   : "memory");
    finish(d + 4 * j, bias_low, bias_high, RESIDUAL, r, v);
    asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(at + j * 8 * PIXEL_BYTES),
                 "r"(v[0]), "r"(v[1])
                 : "memory");
  }
}

__device__ void copy_boxes(bool load, const TensorMap& map, int c, int tile, int first_pixel, u32 shared, u32 barrier) {
  const Place at(tile);
  const int w = WHOLE_ROWS ? 0 : tile * TILE_PIXELS + first_pixel;
  const int h = WHOLE_ROWS ? at.row : 0, n = WHOLE_ROWS ? at.sample : 0;
#pragma unroll
  for (int i = 0; i < M_BLOCKS; i++) {
    if (load)
      load_box(shared + i * STAGING_BYTES, map, c + i * 64, w, h, n, barrier);
    else
      store_box(map, c + i * 64, w, h, n, shared + i * STAGING_BYTES);
  }
}
#endif
#endif

__device__ void consume(u32 base, const float* __restrict__ bias, const int* __restrict__ first,
                        const u32* __restrict__ steps, const Outputs& out, int samples, int tile_groups) {
  // The same in all lanes of a warp, and the compiler knows it.
  const int group = __shfl_sync(~0u, threadIdx.x / WARPGROUP, 0), lane = threadIdx.x % 32;
  const int across = ACROSS == 2 ? group : 0, along = ACROSS == 2 ? 0 : group;
  const u32 a_first = (base + A + across * M_BLOCKS * A_BLOCK) / 16,
            b_first = (base + B + along * PIXELS * PIXEL_BYTES) / 16;
  const u32 metadata_first =
      base + A + TILE_BLOCKS * A_BLOCK + across * M_BLOCKS * METADATA_BLOCK + threadIdx.x % WARPGROUP * 4;
  Ring<A_STAGES> ring_a;
  Ring<B_STAGES> ring_b;
  float d[M_BLOCKS][PIXELS / 2];
  u32 metadata[2][M_BLOCKS] = {};
  int set = 0;
  const u32 never = samples < 0;

  const auto release_a = [&](int stage) {
    if (lane < CLUSTER) barrier_arrive_at(base + EMPTY_A + 8 * stage, lane);
  };
  const auto release_b = [&](int stage) {
    if (lane == 0) barrier_arrive(base + EMPTY_B + 8 * stage);
  };

  // A sparse wgmma reads its metadata register while it runs, and the assembler takes the register for free as soon as
  // the instruction is issued: with two steps in flight the second's metadata would overwrite that of the first. So
  // steps take turns with two sets of registers, and both are kept alive until behind the wait for what reads them.
  const auto keep_metadata = [&] {
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
      for (int j = 0; j < M_BLOCKS; j++) keep(metadata[i][j], never, base + UNUSED);
  };
  // One weight tile times the pixels of a tap. Each way commits for itself: a commit behind the branches would become a
  // group of its own, and one without products would make the compiler wait for every product.
  const auto issue = [&](u32(&of)[M_BLOCKS], u32 from, u64 a, u64 b, u32 halves, int accumulate) {
#pragma unroll
    for (int i = 0; i < M_BLOCKS; i++) of[i] = load_word(from + i * METADATA_BLOCK);
    if (halves == 3) {
      mma_fence();
#pragma unroll
      for (int i = 0; i < M_BLOCKS; i++) {
        mma<0>(d[i], a + i * (A_BLOCK / 16), b, of[i], accumulate);
        mma<1>(d[i], a + i * (A_BLOCK / 16) + A_HALF, b + B_HALF, of[i], 1);
      }
      mma_commit();
    } else if (halves == 1) {
      mma_fence();
#pragma unroll
      for (int i = 0; i < M_BLOCKS; i++) mma<0>(d[i], a + i * (A_BLOCK / 16), b, of[i], 1);
      mma_commit();
    } else if (halves == 2) {
      mma_fence();
#pragma unroll
      for (int i = 0; i < M_BLOCKS; i++) mma<1>(d[i], a + i * (A_BLOCK / 16) + A_HALF, b + B_HALF, of[i], 1);
      mma_commit();
    } else {
      mma_wait<0>();
    }
  };

#if BOXES_OUT
  // A box of pixels may belong to both warpgroups, which then store it together.
  constexpr bool JOINT = ALONG == 2 && TAP_GROUP != IM2COL;
  const int store_id = JOINT ? 1 : 1 + group, store_threads = JOINT ? CONSUMERS : WARPGROUP;
  const bool leads = threadIdx.x == (JOINT ? 0 : group * WARPGROUP);
  [[maybe_unused]] const u32 residual_here = base + RESIDUAL_HERE + (JOINT ? 0 : 8 * group);
  const u32 staging = base + STAGING + across * M_BLOCKS * STAGING_BYTES + along * PIXELS * PIXEL_BYTES;
  const u32 box = JOINT ? base + STAGING : staging;
  [[maybe_unused]] u32 residual_parity = 0;
#endif

  for (Work work(tile_groups); work.left(); work.next()) {
    const int row = work.m_tile() * M_TILE + across * M_BLOCKS * 64;
#if BOXES_OUT && RESIDUAL
    if (leads) {
      store_wait();
      barrier_expect(residual_here, M_BLOCKS * BOX_PIXELS * PIXEL_BYTES);
      copy_boxes(true, out.residual_map, row, work.tile(), along * PIXELS, box, residual_here);
    }
#endif
    // The first step overwrites the sums: they need no registers through the end of the tile before.
#pragma unroll
    for (int i = 0; i < M_BLOCKS; i++)
#pragma unroll
      for (int j = 0; j < PIXELS / 2; j++) asm volatile("" : "=f"(d[i][j]));
    const u32* listed = steps + __ldg(first + work.m_tile() * TAP_GROUPS);
    u32 step = __ldg(listed);
    int accumulate = 0;
    // Neither loop may be unrolled or peeled: of products in several places the compiler waits for each.
#pragma unroll 1
    for (int tap_group = 0; tap_group < TAP_GROUPS; tap_group++) {
      barrier_wait(base + FULL_B + 8 * ring_b.stage, ring_b.parity);
      const u32 b_group = b_first + ring_b.stage * (B_STAGE_BYTES / 16);
      bool more = true;
#pragma unroll 1
      for (int tap = 0; more; tap++) {
        // Bits 0-15: where the tap begins in the group's pixels; from bit 16 two for each warpgroup across: which
        // halves of the input channels there are for it; bit 31: the group's last.
        const u32 now = __shfl_sync(~0u, step, 0);
        more = now >> 31 == 0;
        step = __ldg(++listed);  // there is one behind the last
        barrier_wait(base + FULL_A + 8 * ring_a.stage, ring_a.parity);
        const u64 a = descriptor(a_first + ring_a.stage * (A_BYTES / 16), A_ROWS);
        const u64 b = descriptor(b_group + (now & 0xffff), B_ROWS);
        const u32 from = metadata_first + ring_a.stage * A_BYTES, halves = now >> (16 + 2 * across) & 3;
        if (set == 0)
          issue(metadata[0], from, a, b, halves, accumulate);
        else
          issue(metadata[1], from, a, b, halves, accumulate);
        set ^= 1;
        mma_wait<1>();
        keep_metadata();
        if (accumulate) {  // the step before this one is done with its stages
          release_a(ring_a.previous());
          if (tap == 0) release_b(ring_b.previous());
        }
        accumulate = 1;
        ring_a.next();
      }
      ring_b.next();
    }

    float bias_low[M_BLOCKS], bias_high[M_BLOCKS];
#pragma unroll
    for (int i = 0; i < M_BLOCKS; i++) {
      const float* const of = bias + row + i * 64 + threadIdx.x / 32 % 4 * 16 + lane / 4;
      bias_low[i] = __ldg(of), bias_high[i] = __ldg(of + 8);
    }
    mma_wait<0>();
    keep_metadata();
    release_a(ring_a.previous());
    release_b(ring_b.previous());

#if STORAGE == 0
    const u32 staging = base + STAGING + threadIdx.x / 32 * STAGING_BYTES;
#pragma unroll
    for (int i = 0; i < M_BLOCKS; i++) {
      const int* const channels = out.out_order + row + i * 64 + threadIdx.x / 32 % 4 * 16;
      store(d[i], staging, bias_low[i], bias_high[i], channels, work.tile(), along * PIXELS, samples, out);
    }
#elif OUT_NCHW
    // A warp stores what it has staged itself; but warpgroups that have the same channels store half of them each.
    constexpr int ROWS = 16 / ALONG;
    if (ALONG == 2) sync(1, CONSUMERS);
    const u32 staging = base + STAGING + across * M_BLOCKS * STAGING_BYTES;
#pragma unroll
    for (int i = 0; i < M_BLOCKS; i++)
      stage(d[i], staging + i * STAGING_BYTES + along * PIXELS * 2, bias_low[i], bias_high[i]);
    if (ALONG == 2) sync(1, CONSUMERS);
    __syncwarp();
    const int of_warp = threadIdx.x / 32 % 4 * 16 + along * ROWS;
#pragma unroll 1
    for (int i = 0; i < M_BLOCKS; i++)
      store_rows<ROWS>(staging + i * STAGING_BYTES + of_warp * STAGING_PITCH, out.out_order + row + i * 64 + of_warp,
                       work.tile(), samples, out.y, out.residual);
    __syncwarp();
#else
#if RESIDUAL
    barrier_wait(residual_here, residual_parity);
    residual_parity ^= 1;
#else
    if (leads) store_wait();  // the tile before has left staging
    sync(store_id, store_threads);
#endif
#pragma unroll
    for (int i = 0; i < M_BLOCKS; i++) stage(d[i], staging + i * STAGING_BYTES, bias_low[i], bias_high[i]);
    async_fence();
    sync(store_id, store_threads);
    if (leads) {
      copy_boxes(false, out.y_map, row, work.tile(), along * PIXELS, box, 0);
      store_commit();
    }
#endif
  }
#if BOXES_OUT
  if (leads) store_wait();
#endif
}

#if CLUSTER > 1
#define CLUSTERED __cluster_dims__(CLUSTER, 1, 1)
#else
#define CLUSTERED
#endif

// a: weight tiles; bias: one per row of all tiles; first: (M_TILES * TAP_GROUPS + 1), a tap group's first
// weight tile; steps: one per weight tile, and one more that is only read.
extern "C" __global__ void CLUSTERED __launch_bounds__(CONSUMERS + WARPGROUP, 1)
    sparse_tc(const __grid_constant__ TensorMap x_map, const u8* __restrict__ a, const float* __restrict__ bias,
              const int* __restrict__ first, const u32* __restrict__ steps, OUTPUTS, int samples, int tile_groups) {
  extern __shared__ __align__(1024) u8 memory[];
  const u32 base = static_cast<u32>(__cvta_generic_to_shared(memory));
  if (threadIdx.x == 0) {
    for (int i = 0; i < A_STAGES; i++) {
      barrier_init(base + FULL_A + 8 * i, 1);
      barrier_init(base + EMPTY_A + 8 * i, CONSUMER_WARPS * CLUSTER);
    }
    for (int i = 0; i < B_STAGES; i++) {
      barrier_init(base + FULL_B + 8 * i, 1);
      barrier_init(base + EMPTY_B + 8 * i, CONSUMER_WARPS);
    }
    for (int i = 0; i < 2; i++) barrier_init(base + RESIDUAL_HERE + 8 * i, 1);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  // HALO: the padding behind a tap group's last row, which no next row holds.
  for (int i = threadIdx.x; i < B_STAGES * ZERO_PIXELS * 8; i += CONSUMERS + WARPGROUP) {
    const int stage = i / (ZERO_PIXELS * 8 + !ZERO_PIXELS), at = i - stage * ZERO_PIXELS * 8;
    *reinterpret_cast<uint4*>(memory + B + stage * B_STAGE_BYTES + LOAD_PIXELS * PIXEL_BYTES + at * 16) =
        make_uint4(0, 0, 0, 0);
  }
  async_fence();
  __syncthreads();
  meet();
  // What the kernel before this one wrote may be read afterwards.
  asm volatile("griddepcontrol.launch_dependents; griddepcontrol.wait;" ::: "memory");

  if (threadIdx.x >= CONSUMERS) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(PRODUCER_REGISTERS));
    if (threadIdx.x == CONSUMERS) produce(base, x_map, a, first, tile_groups);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(CONSUMER_REGISTERS));
    consume(base, bias, first, steps, {MAKE_OUTPUTS}, samples, tile_groups);
  }
  __syncwarp();
  meet();  // others may still write here, or arrive at barriers here
}
