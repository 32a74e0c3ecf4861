#include "program.hpp"

#include <algorithm>
#include <atomic>
#include <memory>
#include <stdexcept>

#include "memory.hpp"
#include "threads.hpp"

namespace escort {
namespace {

// Memory that runs take turns with: as many pieces as runs were under way at once, at most kMostIdle. Each is as large
// as the largest run that had it; larger ones than kMostKept go back at once.
constexpr int kMostIdle = 8;
constexpr int64_t kMostKept = 1 << 24;  // floats: 64 MiB
constexpr int64_t kLineFloats = 16;     // of a cache line: arenas of threads do not share one

struct Arena {
  explicit Arena(int64_t size) : memory(allocate_array<float>(size)), size(size) {}

  Memory<float> memory;
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
  float* data() const { return arena_ ? arena_->memory.get() : nullptr; }

 private:
  std::unique_ptr<Arena> arena_;
};

}  // namespace

NativeProgram::NativeProgram(std::vector<Instruction> instructions, int32_t buffers, int64_t arena_size, Batch batch)
    : instructions_(std::move(instructions)), buffers_(buffers), arena_size_(arena_size), batch_(batch) {
  if (batch.chunk < 1 || batch.samples < batch.chunk) throw std::invalid_argument("a chunk is a part of the samples");
  for (const Instruction& each : instructions_) {
    const std::vector<int64_t>& sizes = each.op->input_sizes;
    if (each.inputs.size() != sizes.size()) throw std::invalid_argument("an instruction has too many or few inputs");
    if (each.output.buffer < 0) throw std::invalid_argument("an instruction has no output");
    if (each.samples < 1 || each.samples % batch.samples != 0)
      throw std::invalid_argument("the samples of an instruction are a multiple of the program's");
    const int64_t samples = each.samples / batch.samples * batch.chunk;
    for (size_t i = 0; i < sizes.size(); i++) check(each.inputs[i], sizes[i], samples);
    check(each.output, each.op->output_size, samples);
    most_inputs_ = std::max(most_inputs_, sizes.size());
  }
}

// What lies beyond the caller's buffers only the caller can know.
void NativeProgram::check(const Operand& operand, int64_t size, int64_t samples) const {
  const int64_t end = operand.offset + (samples - 1) * operand.stride + size;
  if (operand.buffer < -1 || operand.buffer > buffers_ || operand.offset < 0 || operand.stride < 0 ||
      (operand.buffer == buffers_ && end > arena_size_))
    throw std::invalid_argument("an operand lies outside of its buffer");
}

void NativeProgram::run_chunk(int64_t chunk, const std::vector<float*>& buffers, float* arena, int threads) const {
  const int64_t first = chunk * batch_.chunk, count = std::min(batch_.chunk, batch_.samples - first);
  std::vector<Input> inputs(most_inputs_);
  for (const Instruction& each : instructions_) {
    const int64_t samples = each.samples / batch_.samples;  // of each of the program's
    const auto at = [&](const Operand& operand) -> float* {
      if (operand.buffer < 0) return nullptr;
      if (operand.buffer == buffers_) return arena + operand.offset;
      return buffers[operand.buffer] + operand.offset + first * samples * operand.stride;
    };
    for (size_t i = 0; i < each.inputs.size(); i++) inputs[i] = {at(each.inputs[i]), each.inputs[i].stride};
    each.op->run(inputs.data(), {at(each.output), each.output.stride}, count * samples, threads);
  }
}

// Threads at hand save a part of what they share. Where nothing is shared for a while, they fall asleep and have to be
// woken up: whole programs of small operations take longer with them.
bool NativeProgram::gains_by(int threads) const {
  int64_t saved = 0, alone = 0;
  for (const Instruction& each : instructions_) {
    const int64_t nanoseconds = each.op->sample_ns * (each.samples / batch_.samples * batch_.chunk);
    const int taken = threads_at_hand_for(nanoseconds, threads);
    if (taken > 1) {
      if (alone > kPatienceNs) saved -= kWakingNs;
      saved += nanoseconds - nanoseconds / taken;
      alone = 0;
    } else {
      alone += nanoseconds;
    }
  }
  return saved > (alone > kPatienceNs ? kWakingNs : 0);
}

void NativeProgram::run(const std::vector<float*>& buffers, int threads, bool take_chunks) const {
  if (buffers.size() != static_cast<size_t>(buffers_)) throw std::invalid_argument("too many or few buffers");
  threads = std::clamp(threads, 1, kMostThreads);
  const int64_t taken = take_chunks && threads > 1 ? batch_.chunks() / threads * threads : 0;
  if (taken == 0 && !gains_by(threads)) threads = 1;
  const int64_t arena_size = (arena_size_ + kLineFloats - 1) / kLineFloats * kLineFloats;
  const Borrowed arena(arena_size * (taken > 0 ? threads : 1));
  with_threads(threads, [&] {
    std::atomic<bool> failed{false};  // for want of memory, which is all that an operation may throw for
    parallel(taken, threads, [&](int64_t chunk, int thread) {
      try {
        if (!failed) run_chunk(chunk, buffers, arena.data() + thread * arena_size, 1);
      } catch (const std::bad_alloc&) {
        failed = true;
      }
    });
    if (failed) throw std::bad_alloc();
    for (int64_t chunk = taken; chunk < batch_.chunks(); chunk++) run_chunk(chunk, buffers, arena.data(), threads);
  });
}

}  // namespace escort
