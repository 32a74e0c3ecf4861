// What a program calls: an operation that was prepared for samples of one size.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

namespace escort {

// Samples of float32: each is contiguous, and `stride` floats lie from one to the next. A slice of the channels of a
// larger tensor is of that form, too.
struct Input {
  const float* data;  // null for an operand that is left out
  int64_t stride;
};
struct Output {
  float* data;
  int64_t stride;
};

constexpr int64_t kFloatsPerNs = 4;  // that one thread reads and writes, about

class Op {
 public:
  Op(std::vector<int64_t> input_sizes, int64_t output_size)
      : input_sizes(std::move(input_sizes)), output_size(output_size), sample_ns(output_size / kFloatsPerNs) {}
  virtual ~Op() = default;
  Op(const Op&) = delete;
  Op& operator=(const Op&) = delete;

  // Any thread may call it at any time. `inputs` has one entry for each of `input_sizes`; the output overlaps none of
  // them, unless the operation says that it may.
  virtual void run(const Input* inputs, Output output, int64_t samples, int threads) const = 0;

  std::vector<int64_t> input_sizes;  // floats of a sample
  int64_t output_size;
  int64_t sample_ns;  // about what a sample takes one thread: what writing it takes, unless the operation knows better
};

}  // namespace escort
