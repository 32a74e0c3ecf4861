// Depthwise convolution, dense: y[p][k] = activation(sum over taps of w[tap][k] * x[p + tap][k / multiplier] + bias[k]
// + residual[p][k]), summed in float, in NHWC, or in NCHW with a VECTOR of 1.
//
// Memory bounds it: x and y should pass once. A thread computes a strip of WIDTH outputs of a row for a vector of
// channels, and loads each input of a row once for all taps that read it. A block has vectors, strips and rows side by
// side in a tile, whose overlapping inputs its threads find in the first-level cache. Nothing else is shared.
// VECTOR           elements of 16 bytes at most, a divisor of the channels
// ROWS, COLUMNS    of the filter
// WIDTH            outputs of a strip; 1 with any stride and dilation of columns
// RIGHT            the stride of columns where a strip is wider, which has no dilation of columns then
// ACTIVATION       as in activation.cuh
#define THREADS 128

#include "activation.cuh"
#include "divisor.cuh"
#include "elements.cuh"
#include "ptx.cuh"

#define SPAN ((WIDTH - 1) * RIGHT + COLUMNS)  // inputs of a row that a strip reads

// The same in every launch; methods/cuda/depthwise.py has a dataclass of the same fields that says what each means.
struct Params {
  int channels, multiplier;
  int in_sample, in_channel, in_pixel, out_sample, out_channel, out_pixel;
  int height, width, out_height, out_width;
  int stride_down, stride_right, top, left, dilation_down, dilation_right;
  int log_vectors, log_strips;
  int vector_tiles, strip_tiles, row_tiles;
  Divisor by_vector_tiles, by_strip_tiles, by_row_tiles;
  int bound;
};

// Where a thread's strip begins in y.
struct Strip {
  int sample, channel, row, column;

  __device__ explicit Strip(const Params& p) {
    const u32 strips = p.by_vector_tiles.quotient(blockIdx.x), rows = p.by_strip_tiles.quotient(strips);
    sample = p.by_row_tiles.quotient(rows);
    const u32 thread = threadIdx.x, across = thread >> p.log_vectors;
    channel = ((blockIdx.x - strips * p.vector_tiles << p.log_vectors) + (thread & (1 << p.log_vectors) - 1)) * VECTOR;
    column = ((strips - rows * p.strip_tiles << p.log_strips) + (across & (1 << p.log_strips) - 1)) * WIDTH;
    row = (rows - sample * p.row_tiles) * (THREADS >> p.log_vectors + p.log_strips) + (across >> p.log_strips);
  }
};

__device__ __forceinline__ void add_products(float (&sum)[WIDTH][VECTOR], const float (&x)[VECTOR], int column,
                                             const float (&weights)[COLUMNS][VECTOR]) {
#pragma unroll
  for (int t = 0; t < WIDTH; t++) {
    const int s = column - t * RIGHT;
    if (s < 0 || s >= COLUMNS) continue;
#pragma unroll
    for (int i = 0; i < VECTOR; i++) sum[t][i] = fmaf(x[i], weights[s][i], sum[t][i]);
  }
}

// bias may be null, and has the activation's slopes behind it; residual lies as y does, or is null.
extern "C" __global__ void __launch_bounds__(THREADS, 3)
    depthwise(const Element* __restrict__ x, Element* __restrict__ y, const Element* __restrict__ residual,
              const Element* __restrict__ weights, const float* __restrict__ bias, const __grid_constant__ Params p) {
  let_next_kernel_start();
  const Strip at(p);
  if (at.channel >= p.channels || at.column >= p.out_width || at.row >= p.out_height) return;
  const int in_channel = VECTOR > 1 ? at.channel : at.channel / p.multiplier;
  const Element* const plane = x + (long long)at.sample * p.in_sample + in_channel * p.in_channel;
  const int top = at.row * p.stride_down - p.top, left = at.column * p.stride_right - p.left;
  const int step = WIDTH > 1 ? 1 : p.dilation_right;
  float sum[WIDTH][VECTOR];
#pragma unroll
  for (int t = 0; t < WIDTH; t++)
#pragma unroll
    for (int i = 0; i < VECTOR; i++) sum[t][i] = bias ? __ldg(bias + at.channel + i) : 0.f;
  wait_for_previous_kernel();
#pragma unroll(ROWS > 3 ? 1 : ROWS)
  for (int r = 0; r < ROWS; r++) {
    const int row = top + r * p.dilation_down;
    const bool is_inside = row >= 0 && row < p.height;
    const Element* const from = plane + (row * p.width + left) * p.in_pixel;
    Vector inputs[SPAN];
#pragma unroll
    for (int j = 0; j < SPAN; j++) {
      const int column = left + j * step;
      inputs[j] = {};
      if (is_inside && column >= 0 && column < p.width) inputs[j] = load(from + j * step * p.in_pixel);
    }
    float row_weights[COLUMNS][VECTOR];
#pragma unroll
    for (int s = 0; s < COLUMNS; s++)
      widen(load(weights + (r * COLUMNS + s) * p.channels + at.channel), row_weights[s]);
#pragma unroll
    for (int j = 0; j < SPAN; j++) {
      float values[VECTOR];
      widen(inputs[j], values);
      add_products(sum, values, j, row_weights);
    }
  }
  const int pixel = (at.row * p.out_width + at.column) * p.out_pixel;
  const long long out = (long long)at.sample * p.out_sample + at.channel * p.out_channel + pixel;
#pragma unroll
  for (int t = 0; t < WIDTH; t++) {
    if (at.column + t >= p.out_width) break;
    if (residual) {
      float added[VECTOR];
      widen(load(residual + out + t * p.out_pixel), added);
#pragma unroll
      for (int i = 0; i < VECTOR; i++) sum[t][i] += added[i];
    }
#pragma unroll
    for (int i = 0; i < VECTOR; i++) {
      float slope = 0.f;
#if SLOPED
      slope = __ldg(bias + p.channels + at.channel + i);
#endif
      sum[t][i] = BEYOND_BOUNDS ? activated(sum[t][i], slope) : bounded(sum[t][i], p.bound);
    }
    *(Vector*)(y + out + t * p.out_pixel) = narrow(sum[t]);
  }
}
