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
  const Op* op;     // the owner keeps it alive
  int64_t samples;  // a multiple of the program's
  std::vector<Operand> inputs;
  Operand output;
};

// How many samples a program is for, and how many of them go through it together: a chunk. A program whose samples
// depend on each other is one of one sample, whose instructions have many.
struct Batch {
  int64_t samples = 1, chunk = 1;

  int64_t chunks() const { return (samples + chunk - 1) / chunk; }
};

class NativeProgram {
 public:
  // Buffers are those of the caller, by number, and behind them the arena of `arena_size` floats for a chunk, which
  // each run has for itself. Throws std::invalid_argument for operands that an operation does not take, or beyond the
  // arena.
  NativeProgram(std::vector<Instruction> instructions, int32_t buffers, int64_t arena_size, Batch batch);

  // Runs all instructions in their order on each chunk; any number of threads may do so at once. The threads share each
  // instruction; or, where they are to take chunks, each takes some through all instructions, in an arena of its own,
  // as long as there is one for every thread, and they share the instructions on the chunks that are left.
  void run(const std::vector<float*>& buffers, int threads, bool take_chunks) const;

 private:
  void check(const Operand& operand, int64_t size, int64_t samples) const;
  bool gains_by(int threads) const;
  void run_chunk(int64_t chunk, const std::vector<float*>& buffers, float* arena, int threads) const;

  std::vector<Instruction> instructions_;
  int32_t buffers_;
  int64_t arena_size_;
  Batch batch_;
  size_t most_inputs_ = 0;
};

}  // namespace escort
