#include "program.hpp"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>
#include <stdexcept>

#include "threads.hpp"

namespace escort {
namespace {

// Memory that runs take turns with: as many pieces as runs were under way at once, at most kMostIdle. Each is as large
// as the largest run that had it; larger ones than kMostKept go back at once.
constexpr int kMostIdle = 8;
constexpr int64_t kMostKept = 1 << 24;  // floats: 64 MiB

struct Arena {
  explicit Arena(int64_t size)
      : data(static_cast<float*>(std::aligned_alloc(64, (size * sizeof(float) + 63) / 64 * 64))), size(size) {
    if (!data) throw std::bad_alloc();
  }
  ~Arena() { std::free(data); }
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  float* data;
  int64_t size;
};

std::atomic<Arena*> idle[kMostIdle];  // without a lock, which a child that was forked would find taken

// An arena for one run.
class Borrowed {
 public:
  explicit Borrowed(int64_t size) {
    if (size == 0) return;
    for (std::atomic<Arena*>& place : idle) {
      arena_.reset(place.exchange(nullptr));
      if (arena_) break;
    }
    if (arena_ && arena_->size >= size) return;
    arena_.reset();
    arena_ = std::make_unique<Arena>(size);
  }
  ~Borrowed() {
    if (!arena_ || arena_->size > kMostKept) return;
    for (std::atomic<Arena*>& place : idle) {
      Arena* none = nullptr;
      if (place.compare_exchange_strong(none, arena_.get())) {
        arena_.release();
        return;
      }
    }
  }
  float* data() const { return arena_ ? arena_->data : nullptr; }

 private:
  std::unique_ptr<Arena> arena_;
};

}  // namespace

NativeProgram::NativeProgram(std::vector<Instruction> instructions, int32_t buffers, int64_t arena_size)
    : instructions_(std::move(instructions)), buffers_(buffers), arena_size_(arena_size) {
  for (const Instruction& each : instructions_) {
    const std::vector<int64_t>& sizes = each.op->input_sizes;
    if (each.inputs.size() != sizes.size()) throw std::invalid_argument("an instruction has too many or few inputs");
    if (each.output.buffer < 0) throw std::invalid_argument("an instruction has no output");
    for (size_t i = 0; i < sizes.size(); i++) check(each.inputs[i], sizes[i], each.samples);
    check(each.output, each.op->output_size, each.samples);
    most_inputs_ = std::max(most_inputs_, sizes.size());
  }
}

// What lies beyond the caller's buffers only the caller can know.
void NativeProgram::check(const Operand& operand, int64_t size, int64_t samples) const {
  const int64_t end = operand.offset + (samples - 1) * operand.stride + size;
  if (operand.buffer < -1 || operand.buffer > buffers_ || operand.offset < 0 || operand.stride < 0 || samples < 1 ||
      (operand.buffer == buffers_ && end > arena_size_))
    throw std::invalid_argument("an operand lies outside of its buffer");
}

void NativeProgram::run(const std::vector<float*>& buffers, int threads) const {
  if (buffers.size() != static_cast<size_t>(buffers_)) throw std::invalid_argument("too many or few buffers");
  const Borrowed arena(arena_size_);
  const auto at = [&](const Operand& operand) -> float* {
    if (operand.buffer < 0) return nullptr;
    return (operand.buffer == buffers_ ? arena.data() : buffers[operand.buffer]) + operand.offset;
  };
  std::vector<Input> inputs(most_inputs_);
  with_threads(threads, [&] {
    for (const Instruction& each : instructions_) {
      for (size_t i = 0; i < each.inputs.size(); i++) inputs[i] = {at(each.inputs[i]), each.inputs[i].stride};
      each.op->run(inputs.data(), {at(each.output), each.output.stride}, each.samples, threads);
    }
  });
}

}  // namespace escort
