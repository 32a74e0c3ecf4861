// Depthwise convolution by dense products on tensor cores, in NHWC, of 16-bit elements or of floats as TF32:
// y[p][k] = activation(sum over taps of w[tap][k] * x[p + tap][k] + bias[k] + residual[p][k]), summed in float.
//
// Memory bounds it: x and y should pass once. Multiply-adds and conversions alone would take longer, so a row of taps
// is a product of matrices. Its rows are 16 strips of neighbouring outputs, four or in TF32 eight. Along the reduction
// lie the pixels that a strip reads, each with a word: two channels, or one float. Columns are the outputs with the
// same channels. The matrix between them (Toeplitz) has w[tap][channel] where the pixel is the output's tap and the
// channels are equal, else zero.
//
// A block computes a tile of rows and strips of a few samples for four vectors of channels, 16 bytes each. Its input is
// copied to shared memory with its padding. A warp has a vector, and transposes it in place: a quad, four pixels with
// four words each, becomes four words with four pixels each, as the products read them. Four products have the whole
// vector; what they give takes the place of inputs that are no longer needed, and is written from there, 64 bytes of a
// pixel at a time.
// ROWS, COLUMNS    of the filter
// STRIDE, RIGHT    of rows and columns
// DOWN             neighbouring outputs of a column that a lane computes, a stack: input rows are read once for all
// RESIDUAL         1: there is one
// OCCUPANCY        blocks that registers leave room for
// ACTIVATION       as in activation.cuh
#define THREADS 128
#define VECTOR (STORAGE ? 8 : 4)
#define VECTORS (THREADS / 32)      // of a tile
#define PIXELS (THREADS / VECTORS)  // that are copied at once
#define PIXEL_BYTES (16 * VECTORS)
#define QUAD_BYTES (4 * PIXEL_BYTES + 16)  // of four pixels, so that eight neighbours lie in different banks
#define STRIP (STORAGE ? 4 : 8)
#define QUADS (((STRIP - 1) * RIGHT + COLUMNS + 3) / 4)  // four pixels each that a strip reads
#define SPAN ((DOWN - 1) * STRIDE + ROWS)                // input rows of a stack

#include "activation.cuh"
#include "divisor.cuh"
#include "elements.cuh"
#include "mma.cuh"
#include "ptx.cuh"

#define PER_CHANNEL_BYTES (4 * VECTORS * VECTOR * (1 + SLOPED))  // the bias and the slopes of a tile's channels

// A rectangle of pixels with so many columns, and how far on the pixel is that PIXELS others lie before.
struct Rectangle {
  int columns, rows_on, columns_on;
};

// The same in every launch; methods/cuda/depthwise_tc.py has a dataclass of the same fields that says what each means.
struct Params {
  int channels, in_sample, out_sample;
  int height, width, out_height, out_width, top, left;
  int rows, strips, samples;
  int in_rows, read_columns, row_quads;
  Rectangle in_pixels, out_pixels;
  int vector_tiles, strip_tiles, row_tiles;
  Divisor by_vector_tiles, by_strip_tiles, by_row_tiles, by_strips;
  int bound;
};

// Where a block's tile begins in y.
struct Tile {
  int sample, channel, row, column;

  __device__ explicit Tile(const Params& p) {
    const u32 strips = p.by_vector_tiles.quotient(blockIdx.x), rows = p.by_strip_tiles.quotient(strips);
    const u32 samples = p.by_row_tiles.quotient(rows);
    sample = samples * p.samples;
    channel = (blockIdx.x - strips * p.vector_tiles) * VECTORS * VECTOR;
    column = (strips - rows * p.strip_tiles) * p.strips * STRIP;
    row = (rows - samples * p.row_tiles) * p.rows;
  }
};

// The pixels of a rectangle that a thread copies, one of PIXELS, row by row.
struct Walk {
  int row, column;

  __device__ __forceinline__ explicit Walk(const Rectangle& pixels) {
    row = 0, column = threadIdx.x / VECTORS;
    while (column >= pixels.columns) column -= pixels.columns, row++;
  }
  __device__ __forceinline__ void advance(const Rectangle& pixels) {
    row += pixels.rows_on, column += pixels.columns_on;
    if (column >= pixels.columns) column -= pixels.columns, row++;
  }
};

// The lane's words of the matrices of weights, one for each row of taps and word of a vector.
__device__ __forceinline__ void load_matrices(u32 (&matrices)[ROWS][QUADS][4], const Element* weights, int channels) {
  const int lane = threadIdx.x % 32, output = lane / 4 * STRIP / 8;
#pragma unroll
  for (int q = 0; q < QUADS; q++) {
    const int tap = 4 * q + lane % 4 - output * RIGHT;
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      Elements taps = {};
      if (tap >= 0 && tap < COLUMNS) taps.vector = load(weights + (r * COLUMNS + tap) * channels);
#pragma unroll
      for (int j = 0; j < 4; j++)
        matrices[r][q][j] = STORAGE ? taps.words[j] & (lane / 4 % 2 ? 0xffff0000 : 0xffff)  // the lane's column
                                    : rounded_to_tf32(taps.words[j]);
    }
  }
}

// Makes of four pixels with four words each four words with four pixels each, in a warp's vector of all quads. Floats
// are rounded to TF32 here, where each passes once: tensor cores would cut them off, always towards zero.
__device__ __forceinline__ void transpose(u32 own, int quads) {
  own += threadIdx.x % 32 * QUAD_BYTES;
#pragma unroll 1
  for (int quad = threadIdx.x % 32; quad < quads; quad += 32, own += 32 * QUAD_BYTES) {
    Elements pixels[4], words[4];
#pragma unroll
    for (int i = 0; i < 4; i++) pixels[i].vector = load16(own + i * PIXEL_BYTES);
#pragma unroll
    for (int i = 0; i < 16; i++) {
      const u32 word = pixels[i % 4].words[i / 4];
      words[i / 4].words[i % 4] = STORAGE ? word : rounded_to_tf32(word);
    }
#pragma unroll
    for (int i = 0; i < 4; i++) store16(own + i * PIXEL_BYTES, words[i].vector);
  }
}

// Adds the bias and the residual that lies at an address, applies the activation and rounds. In shared memory lie the
// bias of a vector, and the activation's slopes behind the tile's.
__device__ __forceinline__ Vector finished(float (&values)[VECTOR], u32 bias, const Element* residual, int bound) {
#if RESIDUAL
  float added[VECTOR];
  widen(load(residual), added);
#endif
#pragma unroll
  for (int i = 0; i < VECTOR; i += 4) {
    const uint4 offsets = load16(bias + 4 * i), slopes = SLOPED ? load16(bias + 4 * (VECTORS * VECTOR + i)) : uint4();
    const u32 offset[4] = {offsets.x, offsets.y, offsets.z, offsets.w};
    const u32 slope[4] = {slopes.x, slopes.y, slopes.z, slopes.w};
#pragma unroll
    for (int j = 0; j < 4; j++) {
      float& value = values[i + j];
      value += __uint_as_float(offset[j]);
#if RESIDUAL
      value += added[i + j];
#endif
      if (BEYOND_BOUNDS) value = activated(value, __uint_as_float(slope[j]));
#if STORAGE == 0
      if (!BEYOND_BOUNDS) value = bounded(value, bound);
#endif
    }
  }
#if STORAGE
  if (!BEYOND_BOUNDS) return Bounds(bound).of(narrow(values));
#endif
  return narrow(values);
}

// Copies the input of a tile's sample, which zeros stand for beyond the map.
__device__ __forceinline__ void copy_in(u32 to, const Element* x, const Tile& at, const Params& p) {
  const int channel = at.channel + threadIdx.x % VECTORS * VECTOR;
  const int top = at.row * STRIDE - p.top, left = at.column * RIGHT - p.left;
  const u32 width = channel < p.channels ? max(min(p.width, left + p.read_columns), 0) : 0;
  to += threadIdx.x / (4 * VECTORS) * QUAD_BYTES + threadIdx.x % (4 * VECTORS) * 16;
#pragma unroll 1
  for (Walk walk(p.in_pixels); walk.row < p.in_rows; walk.advance(p.in_pixels)) {
    const int row = top + walk.row, column = left + walk.column;
    const bool is_inside = (u32)row < (u32)p.height && (u32)column < width;
    copy16_or_zeros(to, x + (is_inside ? (row * p.width + column) * p.channels + channel : 0), is_inside);
    to += PIXELS / 4 * QUAD_BYTES;
  }
}

// Writes the outputs of a tile's sample, which lie at the beginning of its rows.
__device__ __forceinline__ void copy_out(Element* y, u32 from, const Tile& at, const Params& p) {
  const int channel = at.channel + threadIdx.x % VECTORS * VECTOR;
  const int rows = min(p.rows, p.out_height - at.row), columns = p.out_width - at.column;
  if (channel >= p.channels) return;
  y += (at.row * p.out_width + at.column) * p.channels + channel;
  from += threadIdx.x % VECTORS * 16;
#pragma unroll 1
  for (Walk walk(p.out_pixels); walk.row < rows; walk.advance(p.out_pixels))
    if (walk.column < columns)
      *(uint4*)(y + (walk.row * p.out_width + walk.column) * p.channels) =
          load16(from + (walk.row * p.row_quads + walk.column / 4) * QUAD_BYTES + walk.column % 4 * PIXEL_BYTES);
}

// bias may be null, and has the activation's slopes behind it; residual lies as y does.
extern "C" __global__ void __launch_bounds__(THREADS, OCCUPANCY)
    depthwise_tc(const Element* __restrict__ x, Element* __restrict__ y, const Element* __restrict__ residual,
                 const Element* __restrict__ weights, const float* __restrict__ bias, const __grid_constant__ Params p,
                 int samples) {
  extern __shared__ uint4 memory[];
  let_next_kernel_start();
  const Tile at(p);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, channel = at.channel + warp * VECTOR;
  const int count = min(p.samples, samples - at.sample), stacks = p.rows / DOWN * p.strips;
  const u32 per_channel = shared_address(memory), tile = per_channel + PER_CHANNEL_BYTES;
  const u32 row_bytes = p.row_quads * QUAD_BYTES, sample_bytes = p.in_rows * row_bytes;
  const bool has_channels = channel < p.channels;
  u32 matrices[ROWS][QUADS][4];
  if (has_channels) load_matrices(matrices, weights + channel, p.channels);
  if (threadIdx.x < PER_CHANNEL_BYTES / 4) {
    const int of = at.channel + threadIdx.x % (VECTORS * VECTOR);
    const bool is_slope = threadIdx.x >= VECTORS * VECTOR;
    store4(per_channel + 4 * threadIdx.x,
           bias && of < p.channels ? __float_as_uint(__ldg(bias + is_slope * p.channels + of)) : 0);
  }
  wait_for_previous_kernel();
  for (int n = 0; n < count; n++) copy_in(tile + n * sample_bytes, x + (long long)(at.sample + n) * p.in_sample, at, p);
  wait_for_copies();
  __syncthreads();
  u32 own = tile + warp * 16;
  if (has_channels) transpose(own, count * p.in_rows * p.row_quads);
  __syncwarp();
#pragma unroll 1
  for (int n = 0; n < (has_channels ? count : 0); n++, own += sample_bytes) {
#pragma unroll 1
    for (int base = 0; base < stacks; base += 16) {
      const int read = min(base + lane % 16, stacks - 1), down = p.by_strips.quotient(read);
      u32 from = own + down * DOWN * STRIDE * row_bytes +
                 ((read - down * p.strips) * (STRIP / 4 * RIGHT) + lane / 16) * QUAD_BYTES;
      float sum[DOWN][4][4] = {};
#pragma unroll
      for (int i = 0; i < SPAN; i++, from += row_bytes)
#pragma unroll
        for (int j = 0; j < 4; j++)
#pragma unroll
          for (int q = 0; q < QUADS; q += 2) {
            u32 pixels[4], last[2];
            if (q + 1 < QUADS)
              load_words(pixels, from + q * QUAD_BYTES + j * PIXEL_BYTES);
            else
              load_words8(last, from + q * QUAD_BYTES + j * PIXEL_BYTES);
#pragma unroll
            for (int d = 0; d < DOWN; d++) {
              const int r = i - d * STRIDE;
              if (r < 0 || r >= ROWS) continue;
              if (q + 1 < QUADS)
                multiply_add(sum[d][j], pixels[0], pixels[1], pixels[2], pixels[3], matrices[r][q][j],
                             matrices[r][q + 1][j]);
              else
                multiply_add8(sum[d][j], last[0], last[1], matrices[r][q][j]);
            }
          }
      __syncwarp();  // all lanes have read what is overwritten now
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const int stack = base + 8 * h + lane / 4, row = p.by_strips.quotient(stack) * DOWN;
        if (stack >= stacks) continue;
        const int strip = stack - row / DOWN * p.strips;
#pragma unroll
        for (int i = 0; i < DOWN * STRIP / 4; i++) {
          const int d = i % DOWN, output = STORAGE ? lane % 4 : lane % 4 * 2 + i / DOWN;
          const int out_row = at.row + row + d, out_column = at.column + strip * STRIP + output;
          if (RESIDUAL && (out_row >= p.out_height || out_column >= p.out_width)) continue;
          const long long out =
              (long long)(at.sample + n) * p.out_sample + (out_row * p.out_width + out_column) * p.channels + channel;
          float values[VECTOR];
#pragma unroll
          for (int j = 0; j < VECTOR; j++)
            values[j] = STORAGE ? sum[d][j / 2][2 * h + j % 2] : sum[d][j][2 * h + i / DOWN];
          const u32 quad = own + (row + d) * row_bytes + (strip * (STRIP / 4) + output / 4) * QUAD_BYTES;
          store16(quad + output % 4 * PIXEL_BYTES,
                  finished(values, per_channel + 4 * VECTOR * warp, residual + out, p.bound));
        }
      }
    }
  }
  __syncthreads();
  for (int n = 0; n < count; n++)
    copy_out(y + (long long)(at.sample + n) * p.out_sample, tile + n * sample_bytes, at, p);
}
