// Convolution of few input channels, dense, on tensor cores: y[p][k] = activation(sum over (r, s, c) of w[k][r][s][c] *
// x[p + (r, s)][c] + bias[k] + residual[p][k]), summed in float. x lies in any memory format.
//
// An implicit matrix product. A block stages the input of a tile of outputs in shared memory, pixel by pixel with the
// channels innermost, so that a filter's row reads one run of it; and all weights, arranged as registers want them.
// What is summed are words of such a run, two elements or one float each: a table says where in a window each word
// lies, and which of its halves count. A warp multiplies four octets, each eight outputs of a row, with 8 TILES
// channels at a time. In NHWC outputs are rows of the product, and channels are dealt to its columns so that a lane
// writes VECTOR neighbours; in NCHW channels are its rows.
//
// STORAGE     0: float multiplied as TF32, 1: fp16, 2: bf16
// LAST        1: y and the residual lie in NHWC, 0: in NCHW
// CHANNELS    of x, up to 4
// TILES       of 8 output channels that a warp multiplies at a time, an even number
// VECTOR      neighbours that a lane writes: channels, of which it has 2 TILES, or in NCHW outputs of a row, 1 or 2
// THREADS     of a block, 128 or 256
// GROUP       where it is 1 four warps multiply together, which takes LAST and compute capability 9.0
// IMAGES      where it is 1 x has bytes, of which elements are made by a scale and a shift for each channel
// ACTIVATION  as in activation.cuh
#include "activation.cuh"
#include "divisor.cuh"
#include "elements.cuh"
#include "mma.cuh"
#include "ptx.cuh"
#if GROUP
#include "wgmma.cuh"
#endif

#ifndef GROUP
#define GROUP 0
#endif
#define WARPS (THREADS / 32)
#define OCTETS 4  // of a warp
#define BATCH 6   // pixels that a thread loads before it stores the first
// Blocks of a multiprocessor at least.
#define BLOCKS ((BYTES == 2 || GROUP ? 512 : 384) / THREADS)

#if IMAGES
typedef unsigned char Input;
#else
typedef Element Input;
#endif

typedef float Sums[OCTETS * TILES / 2][4];

// The same in every launch; methods/cuda/stem/params.py has a dataclass of the same fields that says what each means.
struct Params {
  int channels, height, width, out_height, out_width;
  int stride_down, stride_right, top, left;
  int rows, octets, row_tiles, column_tiles;
  int in_rows, in_columns, pixel, pitch;
  int steps, groups;
  Divisor by_row_tiles, by_column_tiles, by_octets, by_in_columns;
  int bound;
};

// The tile of outputs that a block computes.
struct Tile {
  int sample, row, column;

  __device__ explicit Tile(const Params& p) {
    const int across = p.by_column_tiles.quotient(blockIdx.x);
    sample = p.by_row_tiles.quotient(across);
    row = (across - sample * p.row_tiles) * p.rows;
    column = (blockIdx.x - across * p.column_tiles) * p.octets * 8;
  }
};

// x, the elements from one of its samples, channels, rows and pixels to the next, and what makes elements of bytes.
struct Source {
  const Input* x;
  int sample, channel, row, pixel;
  float scale[CHANNELS], shift[CHANNELS];

  __device__ Source(const Input* x, int sample, int channel, int row, int pixel, const float* factors)
      : x(x), sample(sample), channel(channel), row(row), pixel(pixel) {
#if IMAGES
#pragma unroll
    for (int c = 0; c < CHANNELS; c++) scale[c] = __ldg(factors + c), shift[c] = __ldg(factors + CHANNELS + c);
#endif
  }

  __device__ Element element(Input value, int c) const {
#if IMAGES
    const Element made = narrowed(fmaf(value, scale[c], shift[c]));
#else
    const Element made = value;
#endif
#if STORAGE == 0
    return rounded_to_tf32(made);
#else
    return made;
#endif
  }
};

// What a tile of outputs reads, with zeros around x. All loads of a batch come before its first store, which waits for
// them: what is outside of x is loaded from its first pixel, and not used.
__device__ __forceinline__ void stage(Element* staged, const Source& from, const Tile& tile, const Params& p) {
  const int top = tile.row * p.stride_down - p.top, left = tile.column * p.stride_right - p.left;
  const Input* const x = from.x + (long long)tile.sample * from.sample;
  const int pixels = p.in_rows * p.in_columns;
  for (int first = threadIdx.x; first < pixels; first += BATCH * THREADS) {
    Input values[BATCH][CHANNELS];
    int to[BATCH];
    u32 inside = 0;
#pragma unroll
    for (int b = 0; b < BATCH; b++) {
      const int at = first + b * THREADS, row = p.by_in_columns.quotient(at), column = at - row * p.in_columns;
      const u32 h = top + row, w = left + column;  // those before x are large
      const bool is_inside = h < (u32)p.height && w < (u32)p.width;
      const int offset = is_inside ? h * from.row + w * from.pixel : 0;
      to[b] = at < pixels ? row * p.pitch + column * p.pixel : -1;
      inside |= (u32)is_inside << b;
#pragma unroll
      for (int c = 0; c < CHANNELS; c++) values[b][c] = __ldg(x + offset + c * from.channel);
    }
#pragma unroll
    for (int b = 0; b < BATCH; b++)
#pragma unroll
      for (int c = 0; c < CHANNELS; c++)
        if (to[b] >= 0) staged[to[b] + c] = inside >> b & 1 ? from.element(values[b][c], c) : Element(0);
  }
}

// Of four octets, where this lane's output lies in the staged input, and the first output of each in y. What is beyond
// the tile reads its last octet, and counts as beyond the map.
struct Octets {
  const char* from[OCTETS];
  int row[OCTETS], column[OCTETS];

  __device__ Octets(const char* staged, int first, const Tile& tile, const Params& p) {
    const int last = p.rows * p.octets - 1, lane_column = threadIdx.x % 32 / 4;
#pragma unroll
    for (int o = 0; o < OCTETS; o++) {
      const int octet = min(first + o, last), down = p.by_octets.quotient(octet);
      const int right = (octet - down * p.octets) * 8;
      from[o] = staged + (down * p.stride_down * p.pitch + (right + lane_column) * p.stride_right * p.pixel) * BYTES;
      row[o] = first + o <= last ? tile.row + down : p.out_height;
      column[o] = tile.column + right;
    }
  }
};

__device__ __forceinline__ float result(float sum, int channel, const float* bias, const Params& p) {
  float slope = 0.f;
#if SLOPED
  slope = __ldg(bias + p.channels + channel);
#endif
  return BEYOND_BOUNDS ? activated(sum, slope) : bounded(sum, p.bound);
}

// The results of a vector of sums, stored with the residual added. `channel` is the first one's; the others' follow
// where LAST.
__device__ __forceinline__ void write(float (&sums)[VECTOR], long long at, int channel, Element* y,
                                      const Element* residual, const float* bias, const Params& p) {
  if (residual) {
    float added[VECTOR];
    widen(load(residual + at), added);
#pragma unroll
    for (int e = 0; e < VECTOR; e++) sums[e] += added[e];
  }
#pragma unroll
  for (int e = 0; e < VECTOR; e++) sums[e] = result(sums[e], LAST ? channel + e : channel, bias, p);
  *(Vector*)(y + at) = narrow(sums);
}

#if LAST
#define PAIRS (VECTOR / 2)   // of neighbouring channels that a lane writes at once, each of a tile of its own
#define ACROSS (4 * VECTOR)  // channels that four lanes write at once

__device__ __forceinline__ void begin(Sums& sums, int first_channel, const float* bias, const Params& p) {
  const int t = threadIdx.x % 4;
#pragma unroll
  for (int j = 0; j < TILES; j++)
#pragma unroll
    for (int e = 0; e < 2; e++) {
      const int channel = first_channel + j / PAIRS * ACROSS + t * VECTOR + j % PAIRS * 2 + e;
      const float value = bias && channel < p.channels ? __ldg(bias + channel) : 0.f;
#pragma unroll
      for (int o = 0; o < OCTETS; o++) sums[o / 2 * TILES + j][o % 2 * 2 + e] = value;
    }
}

#if GROUP
__device__ __forceinline__ void multiply(Sums& sums, const uint4* weights, const u32 (&x)[OCTETS][2]) {
  begin_products();
#pragma unroll
  for (int o = 0; o < OCTETS; o += 2)
    start_product(sums + o / 2 * TILES, x[o][0], x[o + 1][0], x[o][1], x[o + 1][1], weights);
  end_products();
}
#else
__device__ __forceinline__ void multiply(Sums& sums, const uint4* weights, const u32 (&x)[OCTETS][2]) {
#pragma unroll
  for (int j = 0; j < TILES; j += 2) {
    const uint4 w = weights[j / 2 * 32 + threadIdx.x % 32];
#pragma unroll
    for (int o = 0; o < OCTETS; o += 2) {
      float (*const sum)[4] = sums + o / 2 * TILES + j;
      multiply_add(sum[0], x[o][0], x[o + 1][0], x[o][1], x[o + 1][1], w.x, w.y);
      multiply_add(sum[1], x[o][0], x[o + 1][0], x[o][1], x[o + 1][1], w.z, w.w);
    }
  }
}
#endif

__device__ __forceinline__ void finish(const Sums& sums, const Octets& octets, int sample, int first_channel,
                                       Element* y, const Element* residual, const float* bias, const Params& p) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int o = 0; o < OCTETS; o++) {
    const int row = octets.row[o], column = octets.column[o] + g;
    if (row >= p.out_height || column >= p.out_width) continue;
    const long long pixel = (((long long)sample * p.out_height + row) * p.out_width + column) * p.channels;
#pragma unroll
    for (int v = 0; v < TILES / PAIRS; v++) {
      const int channel = first_channel + v * ACROSS + t * VECTOR;
      if (channel >= p.channels) continue;
      float values[VECTOR];
#pragma unroll
      for (int e = 0; e < VECTOR; e++) values[e] = sums[o / 2 * TILES + v * PAIRS + e / 2][o % 2 * 2 + e % 2];
      write(values, pixel + channel, channel, y, residual, bias, p);
    }
  }
}
#else
__device__ __forceinline__ void begin(Sums& sums, int first_channel, const float* bias, const Params& p) {
#pragma unroll
  for (int j = 0; j < TILES; j++) {
    const int channel = first_channel + j * 8 + threadIdx.x % 32 / 4;
    const float value = bias && channel < p.channels ? __ldg(bias + channel) : 0.f;
#pragma unroll
    for (int o = 0; o < OCTETS; o++)
#pragma unroll
      for (int e = 0; e < 2; e++) sums[o * TILES / 2 + j / 2][j % 2 * 2 + e] = value;
  }
}

__device__ __forceinline__ void multiply(Sums& sums, const uint4* weights, const u32 (&x)[OCTETS][2]) {
#pragma unroll
  for (int j = 0; j < TILES / 2; j++) {
    const uint4 w = weights[j * 32 + threadIdx.x % 32];
#pragma unroll
    for (int o = 0; o < OCTETS; o++) multiply_add(sums[o * TILES / 2 + j], w.x, w.y, w.z, w.w, x[o][0], x[o][1]);
  }
}

__device__ __forceinline__ void finish(const Sums& sums, const Octets& octets, int sample, int first_channel,
                                       Element* y, const Element* residual, const float* bias, const Params& p) {
#pragma unroll
  for (int j = 0; j < TILES; j++) {
    const int channel = first_channel + j * 8 + threadIdx.x % 32 / 4;
    if (channel >= p.channels) continue;
    const long long plane = ((long long)sample * p.channels + channel) * p.out_height;
#pragma unroll
    for (int o = 0; o < OCTETS; o++)
#pragma unroll
      for (int e = 0; e < 2; e += VECTOR) {
        const int row = octets.row[o], column = octets.column[o] + threadIdx.x % 4 * 2 + e;
        if (row >= p.out_height || column >= p.out_width) continue;
        float values[VECTOR];
#pragma unroll
        for (int i = 0; i < VECTOR; i++) values[i] = sums[o * TILES / 2 + j / 2][j % 2 * 2 + e + i];
        write(values, (plane + row) * p.out_width + column, channel, y, residual, bias, p);
      }
  }
}
#endif

// bias may be null, and has the activation's slopes behind it; residual lies as y does, or is null. words: for each
// word of a window its bytes from the window's begin, and the bits of it that count.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    stem(const Input* __restrict__ x, Element* __restrict__ y, const Element* __restrict__ residual,
         const uint4* __restrict__ weights, const uint2* __restrict__ words, const float* __restrict__ bias,
         const float* __restrict__ factors, const __grid_constant__ Params p, int in_sample, int in_channel, int in_row,
         int in_pixel) {
  extern __shared__ uint4 shared[];
  let_next_kernel_start();
  const int step_vectors = TILES / 2 * 32, weight_vectors = p.groups * p.steps * step_vectors;
  uint2* const word = (uint2*)(shared + weight_vectors);
  char* const staged = (char*)(word + p.steps * 8);
#pragma unroll 4
  for (int i = threadIdx.x; i < weight_vectors; i += THREADS) copy16(shared_address(shared + i), weights + i);
  for (int i = threadIdx.x; i < p.steps * 8; i += THREADS) word[i] = __ldg(words + i);
  const Tile tile(p);
  wait_for_previous_kernel();
  stage((Element*)staged, Source(x, in_sample, in_channel, in_row, in_pixel, factors), tile, p);
  wait_for_copies();
#if GROUP
  show_to_products();
#endif
  __syncthreads();
  for (int first = 0; first < p.rows * p.octets; first += WARPS * OCTETS) {  // the warps of a group go on together
    const int own = first + threadIdx.x / 32 * OCTETS;
    if (!GROUP && own >= p.rows * p.octets) break;
    const Octets octets(staged, own, tile, p);
    for (int group = 0; group < p.groups; group++) {
      Sums sums;
      begin(sums, group * TILES * 8, bias, p);
      const uint4* const from = shared + group * p.steps * step_vectors;
      __syncwarp();
#pragma unroll(GROUP ? 1 : 2)
      for (int step = 0; step < p.steps; step++) {
        u32 pixels[OCTETS][2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
          const uint2 at = word[step * 8 + half * 4 + threadIdx.x % 4];
#pragma unroll
          for (int o = 0; o < OCTETS; o++) pixels[o][half] = *(const u32*)(octets.from[o] + at.x) & at.y;
        }
        multiply(sums, from + step * step_vectors, pixels);
      }
      finish(sums, octets, tile.sample, group * TILES * 8, y, residual, bias, p);
    }
  }
}
