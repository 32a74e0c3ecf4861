// Depthwise convolution on the CPU: each output channel reads one input channel through a dense filter.
//
// A plane is computed in bands of output rows. The input rows of a band are staged in cache, with their zero padding
// and split into the phases of the column stride. The sums of several output rows then lie in registers, and a vector
// of inputs is loaded once for all of them that read it:
//
//     for each input plane, for each band of its output rows:
//         stage the band's input rows
//         for each output channel of the plane, for each block of rows, for each vector of columns:
//             for each column of taps, for each staged row: sum[row] += weight * stage[column]
//
// Python makes every table as a numpy array of records with the same field names (methods/cpu/depthwise.py), and
// bindings.cpp checks that they agree. Counts are in floats unless a comment says otherwise.
#pragma once

#include <cstdint>

#include "activation.hpp"

namespace escort {

// Columns of an input row that lie a column stride apart: `length` values from `first_column` on are staged from
// `position` of the staged row on.
struct Phase {
  int32_t position, first_column, length;
};

struct DepthwiseParams {
  int32_t channels, multiplier;  // input channels; output channels of each
  int32_t height, width, out_height, out_width;
  int32_t kernel_rows, kernel_columns;
  int32_t row_stride, row_dilation, column_stride;
  int32_t top;         // rows of padding
  int32_t pitch;       // between staged rows
  int32_t stage_size;  // of a plane's band
  int32_t bands;       // of a plane, of nearly the same number of output rows
  int32_t block_rows;  // most output rows whose sums are in registers at a time
  int32_t planes;      // whose rows lie side by side in a vector: 1, or 2 where a row takes half a vector at most
  Activation activation;
};

constexpr int kMostBlockRows = 8;

// One convolution, ready to run for any number of samples. Every pointer stays the owner's.
struct Depthwise : DepthwiseParams {
  const Phase* phases;
  const int32_t* tap_columns;  // (kernel_columns) where in a staged row each column of taps finds its first input
  const float* weights;        // (channels * multiplier, kernel_rows, kernel_columns)
  const float* bias;           // (channels * multiplier)
  const float* slope;          // (channels * multiplier), for the activations that have one
  int32_t phase_count;
  int64_t groups;  // of planes that are computed together, in a sample
};

// What a call reads and writes: samples lie their stride apart, and are contiguous. `residual` may be null.
struct DepthwiseTensors {
  const float *x, *residual;
  float* y;
  int64_t x_stride, residual_stride, y_stride;
};

// Computes the bands first .. end, numbered through the samples, the bands of a plane and the groups of planes: a
// thread computes rows of many planes, as in convolutions of all channels, and reads those that it wrote. `scratch`
// holds planes * stage_size floats and a vector, aligned to 64 bytes.
using RunDepthwise = void (*)(const Depthwise&, const DepthwiseTensors&, int64_t first, int64_t end, float* scratch);

struct DepthwiseIsa {
  RunDepthwise run;
  int lanes;        // floats per vector
  int most_planes;  // that lie side by side in a vector
};

extern const DepthwiseIsa depthwise_generic;
extern const DepthwiseIsa depthwise_avx2;
extern const DepthwiseIsa depthwise_avx512;
extern const DepthwiseIsa depthwise_neon;

}  // namespace escort
