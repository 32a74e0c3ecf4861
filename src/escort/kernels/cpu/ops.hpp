// The operations of a program that stand between convolutions.
#pragma once

#include <array>
#include <cstdint>
#include <utility>
#include <vector>

#include "lines.hpp"
#include "op.hpp"

namespace escort {

using Plane = std::array<int64_t, 2>;  // rows and columns

// y = activate(combine(a, b)), where axes of size 1 in an operand are broadcast. The output may be one of the operands
// where that has its size.
class Elementwise : public Op {
 public:
  // shape: of a sample of y. a_strides and b_strides say how far the neighbours along an axis are apart, 0 where an
  // operand is broadcast; along the last axis 0 or 1. Without b_strides there is no b.
  Elementwise(Combine combine, Epilogue epilogue, std::vector<int64_t> shape, std::vector<int64_t> a_strides,
              std::vector<int64_t> b_strides);
  void run(const Input* inputs, Output output, int64_t samples, int threads) const override;

 private:
  Combine combine_;
  Epilogue epilogue_;
  std::vector<int64_t> shape_, a_strides_, b_strides_;
};

// A contiguous copy of samples with any strides.
class Copy : public Op {
 public:
  Copy(std::vector<int64_t> shape, std::vector<int64_t> strides);
  void run(const Input* inputs, Output output, int64_t samples, int threads) const override;

 private:
  void transpose(const float* x, float* y, int64_t rows) const;

  std::vector<int64_t> shape_, strides_;
};

// Planes with a border of one value around them; where a border is negative, something is cut off.
class Pad : public Op {
 public:
  // borders: at the left, right, top and bottom.
  Pad(int64_t channels, Plane input_size, std::array<int64_t, 4> borders, float value);
  void run(const Input* inputs, Output output, int64_t samples, int threads) const override;

 private:
  int64_t channels_, height_, width_, left_, right_, top_, bottom_;
  float value_;
};

// y = (x - mean) / sqrt(variance + epsilon) * weight + bias, channel by channel. Inputs are x, mean, variance, weight
// and bias, of which the last two may be left out.
class BatchNorm : public Op {
 public:
  BatchNorm(int64_t channels, Plane input_size, float epsilon);
  void run(const Input* inputs, Output output, int64_t samples, int threads) const override;

 private:
  int64_t channels_, plane_;
  float epsilon_;
};

// The rows or columns that are averaged into one, and what their sum is divided by.
struct Window {
  int32_t begin, end;
  float count;
};

// What makes planes of planes, one by one.
class OfPlanes : public Op {
 public:
  void run(const Input* inputs, Output output, int64_t samples, int threads) const final;

 protected:
  OfPlanes(int64_t channels, Plane input_size, Plane output_size);

  int64_t channels_, height_, width_, out_plane_;

 private:
  // `line` is scratch for a row of x.
  virtual void plane(const float* x, float* y, float* line) const = 0;
};

// Averages of windows of planes.
class AveragePool : public OfPlanes {
 public:
  AveragePool(int64_t channels, Plane input_size, std::vector<Window> rows, std::vector<Window> columns);

 private:
  void plane(const float* x, float* y, float* line) const override;

  std::vector<Window> rows_, columns_;
};

// A row or column between two: low * (1 - share) + high * share. Where both are one, it is that.
struct Between {
  int32_t low, high;
  float share;
};

// Planes of another size.
class Resize : public OfPlanes {
 public:
  Resize(int64_t channels, Plane input_size, std::vector<Between> rows, std::vector<Between> columns);

 private:
  void plane(const float* x, float* y, float* line) const override;

  std::vector<Between> rows_, columns_;
};

// A row or column that four make: the sum of weight[i] of each at[i].
struct Cubic {
  std::array<int32_t, 4> at;
  std::array<float, 4> weight;
};

// Planes of another size, each row and column of which four make.
class Bicubic : public OfPlanes {
 public:
  Bicubic(int64_t channels, Plane input_size, std::vector<Cubic> rows, std::vector<Cubic> columns);

 private:
  void plane(const float* x, float* y, float* line) const override;

  std::vector<Cubic> rows_, columns_;
};

// y = e^x / the sum of e^x along the middle one of three axes.
class Softmax : public Op {
 public:
  Softmax(int64_t outer, int64_t size, int64_t inner);
  void run(const Input* inputs, Output output, int64_t samples, int threads) const override;

 private:
  void row(const float* x, float* y) const;
  void columns(const float* x, float* y, int64_t n, float* line) const;

  int64_t outer_, size_, inner_;
};

// y = x weight^T + bias. Inputs are x, the weight (out, in) and the bias (out), which may be left out.
class Linear : public Op {
 public:
  Linear(int64_t in, int64_t out);
  void run(const Input* inputs, Output output, int64_t samples, int threads) const override;

 private:
  int64_t in_, out_;
};

}  // namespace escort
