// A run of operations in one call: buffers are planned before, and nothing is allocated or asked of Python in between.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "op.hpp"

namespace escort {

// Samples of a buffer: where the first of them begins in it, and how far they are apart, in floats.
struct Operand {
  int32_t buffer;  // -1 for an operand that is left out
  int64_t offset, stride;
};

struct Instruction {
  const Op* op;  // the owner keeps it alive
  int64_t samples;
  std::vector<Operand> inputs;
  Operand output;
};

class NativeProgram {
 public:
  // Buffers are those of the caller, by number, and behind them the arena of `arena_size` floats, which each run has
  // for itself. Throws std::invalid_argument for operands that an operation does not take, or beyond the arena.
  NativeProgram(std::vector<Instruction> instructions, int32_t buffers, int64_t arena_size);

  // Runs all instructions in their order; any number of threads may do so at once.
  void run(const std::vector<float*>& buffers, int threads) const;

 private:
  void check(const Operand& operand, int64_t size, int64_t samples) const;

  std::vector<Instruction> instructions_;
  int32_t buffers_;
  int64_t arena_size_;
  size_t most_inputs_ = 0;
};

}  // namespace escort
