// The operations that are layers of a network: convolutions, which own their tables, and max pooling.
#pragma once

#include <array>
#include <cstdint>

#include "depthwise.hpp"
#include "direct.hpp"
#include "max_pool.hpp"
#include "memory.hpp"
#include "op.hpp"

namespace escort {

// A convolution whose inputs are x and the residual, which may be left out.
class Convolution : public Op {
 public:
  Convolution() : Op({}, 0) {}
};

struct DirectTables {
  Params params;
  Table<Nonzero> nonzeros;
  Table<OutChannel> out_channels;
  Table<Block> blocks;
  Table<Run> runs;
  Table<Segment> segments;
  Table<Tile> tiles;
};

class DirectConvolution : public Convolution {
 public:
  // Throws std::invalid_argument for tiles that the registers do not hold, and blocks that are not those of parts.
  DirectConvolution(const Isa& isa, DirectTables tables);
  void run(const Input* inputs, Output output, int64_t samples, int threads) const override;

 private:
  const Isa* isa_;
  DirectTables tables_;
  Direct direct_;
};

struct DepthwiseTables {
  DepthwiseParams params;
  Table<Phase> phases;
  Table<int32_t> tap_columns;
  Table<float> weights, bias, slope;
};

class DepthwiseConvolution : public Convolution {
 public:
  // Throws std::invalid_argument for tables that do not fit one another or the kernel.
  DepthwiseConvolution(const DepthwiseIsa& isa, DepthwiseTables tables);
  void run(const Input* inputs, Output output, int64_t samples, int threads) const override;

 private:
  const DepthwiseIsa* isa_;
  DepthwiseTables tables_;
  Depthwise depthwise_;
};

struct LinearTables {
  Table<float> weights;      // (in_channels, pitch) with zeros behind the output channels
  Table<float> bias, slope;  // (pitch,), which is a multiple of 16
};

// A convolution of one pixel by all weights: a matrix times a vector for each sample.
class LinearConvolution : public Convolution {
 public:
  // Throws std::invalid_argument for tables that are not those of so many channels.
  LinearConvolution(int64_t in_channels, int64_t out_channels, Activation activation, LinearTables tables);
  void run(const Input* inputs, Output output, int64_t samples, int threads) const override;

 private:
  void finish(float* y, const float* residual, const float* slope, int64_t n) const;

  int64_t in_, out_, pitch_;
  Activation activation_;
  LinearTables tables_;
};

// Max pooling of planes of one size. Pairs are (rows, columns).
class MaxPool2d : public Op {
 public:
  using Pair = std::array<int, 2>;

  // window: kernel_size, stride, padding and dilation.
  MaxPool2d(int64_t channels, Pair input_size, Pair output_size, const std::array<Pair, 4>& window);
  void run(const Input* inputs, Output output, int64_t samples, int threads) const override;

 private:
  int64_t channels_;
  Pool pool_;
};

}  // namespace escort
