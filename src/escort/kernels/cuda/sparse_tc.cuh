// y = activation(conv2d(x, w) + bias + residual) on the sparse tensor cores of compute capability 9.0, as an implicit
// matrix product D[channel, pixel] = A[channel, k] * B[k, pixel] with sums in float.
//
//   A  The filter. A weight tile of it is a tile of channels x K_BLOCK input channels of one tap, compressed to two
//      of each four (TF32: one of two), with metadata that say which: packed by packing.py just as the tensor cores
//      read shared memory. What a filter has beyond that is further weight tiles, the remainder. Blocks of a cluster
//      compute different pixels of the same channels, and each copies a part of every weight tile to all of them.
//   B  x in NHWC, K_BLOCK channels (128 bytes, in 128-byte swizzle) of many pixels: those that a tap group reads,
//      brought by the copy engine at once. A list says which weight tiles multiply them, and at which pixel they begin:
//        IM2COL   the pixels that one tap of the tile reads (any stride): one tap per group;
//        COLUMNS  the tile's input rows from one column of taps on: the taps of that column, rows apart;
//        HALO     the tile's input rows: all taps. A row's padding is the next row's padding, too, so columns of the
//                 output beyond its width are computed and dropped;
//        FLAT     pixels in a row (pointwise): its only tap.
//
// Two consumer warpgroups multiply, ACROSS of them side by side along the channels, each M_BLOCKS x 64 channels and
// PIXELS pixels; BY_TURNS both compute the same ones, of half of the tap groups each, and one of them adds up and
// stores. Two threads of the producer warpgroup copy. Blocks are persistent. SPLIT the blocks of a cluster have the
// same tile instead, and a share of its tap groups each.
//
// Geometry and epilogue are a struct (Params), so that few kernels serve all layers. It is compiled once per
//   STORAGE     0: float, multiplied in TF32, 1: fp16, 2: bf16
//   TAP_GROUP   IM2COL, COLUMNS, HALO or FLAT
//   PIXELS, M_BLOCKS, ACROSS, BY_TURNS   the tile, and so what sizes the sums, which are registers
//   A_STAGES, B_STAGES   of weight tiles and of pixels; IM2COL and FLAT: what fits beside such a tile
//   OUT_NCHW    1: y and the residual lie in NCHW, 0: in NHWC
//   VECTOR      of 16-bit elements in NCHW, how many neighbours a lane stores at once
//   UNALIGNED   whether these lie unaligned in staging
//   SPLIT       1: blocks of a cluster share a tile (BY_TURNS, in NHWC); else it may be left out
//   ACTIVATION  the activation, where it does more than bound (activation.cuh)
// source.py puts the integers' short names and mma<SELECTOR>(d, a, b, metadata, accumulate) before this.
//
//   sparse_tc_tiles.cuh     sizes, shared memory, the order of work
//   sparse_tc_load.cuh      the producers
//   sparse_tc_multiply.cuh  the products
//   sparse_tc_split.cuh     how blocks add up a tile that they share
//   sparse_tc_store.cuh     the epilogue, in one of three ways
#include "sparse_tc_load.cuh"
#include "sparse_tc_multiply.cuh"
#include "sparse_tc_ptx.cuh"
#include "sparse_tc_store.cuh"
#include "sparse_tc_tiles.cuh"

constexpr int CONSUMER_REGISTERS = 224, PRODUCER_REGISTERS = 56;

__device__ void consume(const Params& p, u32 base, const float* __restrict__ bias, const int* __restrict__ first,
                        const u32* __restrict__ steps, const Outputs& out, int samples, int tile_groups) {
  const Warpgroup group;
  Products products(p, base, group, samples < 0);
  Store store(p, base, group, out, samples);
  [[maybe_unused]] const Shares shares(p, base);
  const Part part(p);
  int turn = 0;  // BY_TURNS: which warpgroup stores a tile, while the other one goes on
  for (Work work(p, tile_groups); work.left(); work.next(), turn ^= 1) {
    const int first_channel = (work.m_tile() * ACROSS + group.across) * M_BLOCKS * 64;
    const bool stores = !BY_TURNS || group.number == turn;
    const int begin = BY_TURNS && !stores ? part.storing : 0;
    const int groups = BY_TURNS && stores ? part.storing : part.count - begin;
    const int step = __ldg(first + work.m_tile() * p.tap_groups + part.begin + begin);
    if (!BY_TURNS || SPLIT && stores) store.begin(first_channel, work.tile());
    products.start(steps + step, groups);
    const Bias biases(bias + first_channel);
    products.wait();
    wait_for_previous_kernel();  // which may read what y overwrites
#if SPLIT
    if (!stores) {
      shares.wait_until_read(turn);
      products.give();
    } else {
      products.take(turn);
      products.put();
      shares.meet(turn);
      store.store(shares, biases, first_channel, work.tile());
      shares.are_read();
    }
#else
    if (BY_TURNS && !stores) {
      store.end();
      sync(1 + group.number, WARPGROUP);
      products.give();
      continue;
    }
    if (BY_TURNS) {
      products.take(turn);
      async_fence();
      sync(1 + group.number, WARPGROUP);
      store.begin(first_channel, work.tile());
    }
    store.store(products.d, biases, first_channel, work.tile());
#endif
  }
  store.end();
}

// a: weight tiles; bias: one per output channel of all tiles, where SLOPED with the slopes behind them; first: (m_tiles
// * tap_groups + 1), a tap group's first weight tile; steps: one per weight tile, and two more that are only read.
extern "C" __global__ void __launch_bounds__(CONSUMERS + WARPGROUP, 1)
    sparse_tc(const __grid_constant__ TensorMap x_map, const u8* __restrict__ a, const float* __restrict__ bias,
              const int* __restrict__ first, const u32* __restrict__ steps, OUTPUTS,
              const __grid_constant__ Params params, int samples, int tile_groups) {
  extern __shared__ __align__(1024) u8 memory[];
  const u32 base = shared_address(memory);
  const Params p = params;  // as values: parameters in memory would be read anew behind every barrier
  if (threadIdx.x == 0) {
    for (int i = 0; i < A_STAGES; i++) {
      barrier_init(base + FULL_A + 8 * i, 1);
      barrier_init(base + EMPTY_A + 8 * i, STAGE_WARPS * (SPLIT ? 1 : p.cluster));
    }
    for (int i = 0; i < B_STAGES; i++) {
      barrier_init(base + FULL_B + 8 * i, 1);
      barrier_init(base + EMPTY_B + 8 * i, STAGE_WARPS);
    }
    for (int i = 0; i < 2; i++) barrier_init(base + RESIDUAL_HERE + 8 * i, 1);
    barrier_init(base + SUMS_HERE, CONSUMER_WARPS / 2);
    barrier_init(base + NO_STAGE, 1);
    if (SPLIT) {
      barrier_init(base + ALL_SUMS_HERE, CONSUMER_WARPS / 2 * p.cluster);
      barrier_init(base + ALL_SUMS_READ, CONSUMER_WARPS / 2 * p.cluster);
    }
    barriers_are_ready();
  }
  // HALO: the padding behind a tap group's last row, which no next row holds.
  for (int stage = 0; TAP_GROUP == HALO && stage < B_STAGES; stage++) {
    u8* const zeros = memory + B_BEGIN + stage * p.b_stage_bytes + p.load_pixels * PIXEL_BYTES;
    for (int i = threadIdx.x; i < p.zero_pixels * 8; i += CONSUMERS + WARPGROUP)
      reinterpret_cast<uint4*>(zeros)[i] = make_uint4(0, 0, 0, 0);
  }
  async_fence();
  __syncthreads();
  meet();
  let_next_kernel_start();

  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
  if (warp >= CONSUMER_WARPS) {
    give_registers_up<PRODUCER_REGISTERS>();
    if (warp == CONSUMER_WARPS)
      copy_pixels(p, base, x_map, tile_groups);
    else if (warp == CONSUMER_WARPS + 1 && (SPLIT || p.cluster == 1))
      copy_weight_tiles<false>(p, base, a, first, tile_groups);
    else if (warp == CONSUMER_WARPS + 1)
      copy_weight_tiles<true>(p, base, a, first, tile_groups);
  } else {
    take_registers<CONSUMER_REGISTERS>();
    consume(p, base, bias, first, steps, {MAKE_OUTPUTS, bias + p.m_tiles * (TILE_BLOCKS * 64)}, samples, tile_groups);
  }
  __syncwarp();
  meet();  // others may still write here, or arrive at barriers here
}
