// Holds what threads.hpp and program.hpp promise, under the thread sanitizer: `make test-tsan`. It is built without OpenMP, whose
// runtime the sanitizer does not know, and with more cores than there are (ESCORT_CORES).
#include "program.hpp"
#include "threads.hpp"

#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

using namespace escort;

namespace {

void check(bool right, const char* what) {
  if (right) return;
  std::fprintf(stderr, "not so: %s\n", what);
  std::abort();
}

// Runs so many tasks on so many threads, and holds that each is run once, by one of them, before `parallel` returns.
void check_tasks(int64_t tasks, int threads) {
  std::vector<int> runs(tasks);  // plain numbers: two threads that touch one would be reported
  parallel(tasks, threads, [&](int64_t i, int thread) {
    check(thread >= 0 && (thread < threads || thread == 0), "the thread is one of those that were asked for");
    runs[i]++;
  });
  for (const int count : runs) check(count == 1, "each task is run once");
}

void layers(int rounds) {
  for (int round = 0; round < rounds; round++) {
    for (const int64_t tasks : {0, 1, 3, 16, 100}) check_tasks(tasks, 1 + round % 7);
    if (round % 16 == 0) std::this_thread::sleep_for(std::chrono::microseconds(200));  // the others fall asleep
  }
}

// Each layer reads what others have written in the layer before.
void chain(int threads) {
  std::vector<int64_t> before(64), after(64);
  for (int layer = 0; layer < 50; layer++) {
    parallel(64, threads, [&](int64_t i, int) { after[i] = 1 + before[63 - i]; });
    std::swap(before, after);
  }
  for (const int64_t value : before) check(value == 50, "a layer sees the whole of the one before it");
}

void check_errors() {
  std::string caught;
  try {
    with_threads(4, [] {
      check_tasks(20, 4);
      throw std::runtime_error("of the body");
    });
  } catch (const std::runtime_error& error) {
    caught = error.what();
  }
  check(caught == "of the body", "what the body throws reaches the caller");
  check_tasks(20, 4);
}

// Adds 1 to each number of each sample.
struct AddOne : Op {
  explicit AddOne(int64_t size) : Op({size}, size) {}
  void run(const Input* inputs, Output output, int64_t samples, int threads) const override {
    parallel(samples * output_size, threads, [&](int64_t i, int) {
      const int64_t sample = i / output_size, place = i % output_size;
      output.data[sample * output.stride + place] = inputs[0].data[sample * inputs[0].stride + place] + 1;
    });
  }
};

// A program of three steps, whose threads share steps or take chunks of the samples.
void programs() {
  constexpr int64_t kSize = 5;
  const AddOne add(kSize);
  for (const int64_t samples : {1, 4, 7, 16}) {
    for (const int64_t chunk : {1, 2, 3}) {
      if (chunk > samples) continue;
      const int64_t beside = chunk * kSize;
      const NativeProgram program({{&add, samples, {{0, 0, kSize}}, {2, 0, kSize}},
                                   {&add, samples, {{2, 0, kSize}}, {2, beside, kSize}},
                                   {&add, samples, {{2, beside, kSize}}, {1, 0, kSize}}},
                                  2, 2 * beside, {samples, chunk});
      for (const int threads : {1, 3, 4}) {
        std::vector<float> x(samples * kSize, 2), y(samples * kSize);
        program.run({x.data(), y.data()}, threads, true);
        program.run({y.data(), x.data()}, threads, false);
        for (const float value : x) check(value == 8, "each sample goes through all steps");
      }
    }
  }
}

void check_threads_for() {
  check(threads_for(100, 8) == 1, "short work stays on one thread");
  check(threads_for(int64_t(1) << 40, 1) == 1, "one thread is one thread");
  check(threads_for(int64_t(1) << 40, 4) == 4, "long work is for all threads");
  with_threads(4, [] {
    const double share = 2 * fork_join_ns(4);
    check(threads_for(int64_t(share * 2.5), 4) <= 2, "each thread gets twice what its start takes");
    check(threads_for(int64_t(1) << 40, 3) == 3, "no more threads than are asked for");
  });
}

void all() {
  layers(100);
  with_threads(8, [] { layers(100); });
  with_threads(3, [] { with_threads(8, [] { chain(8); }); });  // the inner one only runs its body
  with_threads(1, [] { chain(4); });
  check_errors();
  programs();
}

}  // namespace

int main() {
  watch_forks();
  check_threads_for();
  all();
  std::vector<std::thread> callers;  // several at once
  for (int i = 0; i < 4; i++) callers.emplace_back(all);
  for (std::thread& caller : callers) caller.join();
  const pid_t child = fork();
  if (child == 0) {
    alarm(60);
    all();
    _exit(0);
  }
  int status = 1;
  waitpid(child, &status, 0);
  check(status == 0, "a child of a fork has threads of its own");
  std::puts("threads: all right");
}
