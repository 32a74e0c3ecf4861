// Direct sparse convolution, driven by the data: one kernel for every filter and geometry of a tile shape.
//
// Activations are plain NCHW. Output positions are numbered in one sequence (sample, row, column) with a pitch that
// leaves room for the zeros between rows and between samples, so any range of positions is a tile and every nonzero
// reads its input at one constant distance from the output position. A block owns a tile of positions and a group of
// output channels. Producer warps copy the tile's input, one block of channels after the other, into a ring of stages
// in shared memory, with the nonzeros of those channels; consumer warps multiply. methods/cuda/direct lays
// out the tables and fills Params.
//
// Compiled once per
//   STORAGE   what activations are stored as: 0 float, 1 half, 2 bfloat16
//   PACKED    1: products of 16-bit storage are summed in 16 bits, FLUSH at a time, 0: every product is summed in float
//   WORDS     positions per lane; for 16-bit storage a word holds the same position of two neighbouring samples
//   OUT_CHANNELS   output channels per consumer warp
//   PAIRED    1: of 16-bit storage, two neighbouring columns are read at once (stride 1, an even number of elements per
//             sample), 0: one element at a time
//   ODD       where PAIRED, whether a channel has an odd number of elements
//   SLOTS     most words (pairs of words where PAIRED) per lane that a producer warp copies per channel
//   THREADS   threads per multiprocessor that registers must leave room for, in one block or in several
//   ACTIVATION   the activation, where it does more than bound (activation.cuh)
//   SIGNALS   lanes of a warp that arrive when the warp is done with a stage: the first one, or all. compute-sanitizer
//             does not follow that __syncwarp puts all lanes' accesses before the first lane's arrival
#if STORAGE == 1
#include <cuda_fp16.h>
typedef unsigned short Element;
typedef __half2 Pair;
#elif STORAGE == 2
#include <cuda_bf16.h>
typedef unsigned short Element;
typedef __nv_bfloat162 Pair;
#else
typedef float Element;
#endif

#include "activation.cuh"
#include "divisor.cuh"
#include "ptx.cuh"

#define LANES 32
#define SAMPLES (STORAGE == 0 ? 1 : 2)  // of a word
#define SUMS (SAMPLES * WORDS)          // per lane and output channel
#ifndef SIGNALS
#define SIGNALS 1
#endif

// The same in every launch; methods/cuda/direct/params.py has a dataclass of the same fields that says what each means.
struct Params {
  int in_channels, height, width;
  int out_channels, out_height, out_width;
  int pitch;
  Divisor by_pitch;
  int sample_rows;
  Divisor by_sample_rows, by_width, by_pairs;
  int row_padding, column_padding, row_stride, column_stride;
  int phases;
  u32 phase_words;
  int channel_words, slots;
  int chunks, channel_block, stages;
  int position_warps, out_channel_warps, in_channel_warps, producers;
  int record_bytes, bound;
};

// Where a segment, what a stage holds of a group's filter, begins: its records, in units of 16 bytes, and its channels.
struct __align__(8) Segment {
  int record, channel;
};

// What a block computes: some output channels of the words from the first one on.
struct Tile {
  int group, first_word, samples;
};

// The parameters and what follows from them, as values: parameters in memory would be read anew behind every barrier.
struct Shape : Params {
  int consumers;           // warps
  int plane, sample_size;  // elements of a channel and of a sample
  int channel_bytes, stage_bytes;
  __device__ __forceinline__ explicit Shape(const Params& p) : Params(p) {
    consumers = position_warps * out_channel_warps * in_channel_warps;
    plane = height * width, sample_size = in_channels * plane;
    channel_bytes = channel_words * 4, stage_bytes = channel_block * channel_bytes + record_bytes;
  }
};

// Shared addresses: the stages, each some channels of a tile's input and then the records that multiply them; and of
// each stage three barriers. Clean: its padding is zero; full: its producers are done; empty: its consumers are.
struct Ring {
  u32 begin, full, empty, clean;
  __device__ __forceinline__ Ring(const Shape& p, const char* shared) : begin(shared_address(shared)) {
    full = begin + p.stages * p.stage_bytes, empty = full + 8 * p.stages, clean = empty + 8 * p.stages;
  }
};

// Goes through the ring: a stage, and the parity of its barriers' phase.
struct Turn {
  int stage = 0;
  u32 parity = 0;
  __device__ __forceinline__ void next(int stages) {
    if (++stage == stages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

#if STORAGE != 0
__device__ __forceinline__ float low(u32 word) {
#if STORAGE == 1
  return __half2float(__ushort_as_half((unsigned short)word));
#else
  return __uint_as_float(word << 16);
#endif
}

__device__ __forceinline__ float high(u32 word) {
#if STORAGE == 1
  return __half2float(__ushort_as_half((unsigned short)(word >> 16)));
#else
  return __uint_as_float(word & 0xffff0000u);
#endif
}
#endif

#include "direct_consume.cuh"
#include "direct_finish.cuh"
#include "direct_produce.cuh"

__device__ __forceinline__ void set_up(const Shape& p, const Ring& ring) {
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < p.stages; stage++) {
      // Each producer thread arrives for its copies, and each producer warp for its stores.
      barrier_init(ring.full + 8 * stage, p.producers * (LANES + SIGNALS));
      barrier_init(ring.empty + 8 * stage, p.consumers * SIGNALS);
      barrier_init(ring.clean + 8 * stage, p.consumers * LANES);
    }
  }
  __syncthreads();
}

// bias: null or one per output channel, where SLOPED with the slopes behind them.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    direct(const Element* __restrict__ x, Element* __restrict__ y, const Element* __restrict__ residual,
           const float* __restrict__ bias, const uint4* __restrict__ records, const Segment* __restrict__ segments,
           const int* __restrict__ channel_of, const int* __restrict__ first_channels,
           const __grid_constant__ Params params, int samples, int tiles) {
  extern __shared__ __align__(128) char shared[];
  const Shape p(params);
  const int warp = threadIdx.x / LANES, number = blockIdx.z * gridDim.y + blockIdx.y;
  if (number >= tiles) return;
  const Tile tile = {(int)blockIdx.x, number * (LANES * WORDS * p.position_warps), samples};
  const Ring ring(p, shared);
  set_up(p, ring);
  let_next_kernel_start();

  if (warp >= p.consumers) {
    const Segment* const of_group = segments + tile.group * (p.chunks + 1);
    produce(p, ring, tile, x, first_channels[tile.group], of_group, records);
    return;
  }
  clean(p, ring, shared);
  const Consumer me(p, warp);
  Output out[OUT_CHANNELS];
  outputs(out, channel_of + (tile.group * p.out_channel_warps + me.out_channel_warp) * OUT_CHANNELS, bias);
  float sum[OUT_CHANNELS][SUMS];
  consume(sum, p, ring, me);
  if (p.in_channel_warps > 1 && !gather(sum, p, shared, me)) return;
  finish(sum, out, p, tile, me, y, residual, bias + p.out_channels);
}
