// Computations on lines, which are floats that lie side by side: what runs between convolutions is made of them.
#pragma once

#include <cstdint>

#include "activation.hpp"

namespace escort {

// slope: a where that is not negative, else a * b.
enum class Combine : int32_t { first, add, subtract, multiply, divide, maximum, minimum, slope };

struct Lines {
  // y[i] = activate(combine(a[i], b[i])). An operand with a step of 0 is one number. y may be one of the operands.
  void (*combine)(Combine, Epilogue, const float* a, int a_step, const float* b, int b_step, float* y, int64_t n);
  // y[i] = x[i] * factor + shift.
  void (*scale)(const float* x, float factor, float shift, float* y, int64_t n);
  // The sum of x[i].
  float (*sum)(const float* x, int64_t n);
  // The largest of x[i], of which there is one at least; NaN where one is.
  float (*largest)(const float* x, int64_t n);
  // y[i] = e^(x[i] - largest[i]), which is no smaller than x[i]. With a step of 0 that is one number.
  void (*exponential)(const float* x, const float* largest, int step, float* y, int64_t n);
  // y[i] += x[i], or y[i] = x[i] where it is the first.
  void (*accumulate)(const float* x, float* y, int64_t n, bool first);
  // y[i] = a[i] * (1 - share) + b[i] * share.
  void (*blend)(const float* a, const float* b, float share, float* y, int64_t n);
  // y[s * y_stride + r] = bias[r] + the sum of x[s * x_stride + i] * weight[r * n + i], for `rows` rows; bias may be
  // null.
  void (*products)(const float* x, int64_t x_stride, int64_t samples, const float* weight, const float* bias, int rows,
                   int64_t n, float* y, int64_t y_stride);
  // y[s * y_stride + k] = bias[k] + the sum of x[s * x_stride + i] * weight[i * pitch + k], for k below `columns`.
  // Whole vectors of weights and biases are read, at most 16 floats.
  void (*mix)(const float* x, int64_t x_stride, int64_t samples, const float* weight, int64_t pitch, const float* bias,
              int columns, int64_t n, float* y, int64_t y_stride);
};

extern const Lines lines_generic;
extern const Lines lines_avx2;
extern const Lines lines_avx512;

// Those of the fastest instruction set of this machine.
const Lines& lines();

}  // namespace escort
