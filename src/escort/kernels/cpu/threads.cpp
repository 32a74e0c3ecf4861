// The threads of threads.hpp: those of OpenMP.
#include "threads.hpp"

#include <omp.h>
#include <pthread.h>

#include <cstdlib>
#include <memory>
#include <new>
#include <thread>
#include <vector>

namespace escort {
namespace {

// Whether this thread came out of a fork: the threads that OpenMP believes it has were left behind in the parent, and a
// parallel region would wait for them forever. Threads that a child starts later have none yet, and are as any other.
thread_local bool came_out_of_fork = false;

struct Free {
  void operator()(float* p) const { std::free(p); }
};

}  // namespace

void watch_forks() {
  pthread_atfork(nullptr, nullptr, [] { came_out_of_fork = true; });
}

void on_threads(int threads, void (*call)(const void* work, int thread), const void* work) {
  if (came_out_of_fork) {
    std::vector<std::thread> others;
    for (int t = 1; t < threads; t++) others.emplace_back(call, work, t);
    call(work, 0);
    for (std::thread& other : others) other.join();
    return;
  }
#pragma omp parallel num_threads(threads)
  call(work, omp_get_thread_num());
}

float* scratch(int64_t floats) {
  thread_local std::unique_ptr<float, Free> memory;
  thread_local int64_t capacity = 0;
  if (floats > capacity) {
    memory.reset(static_cast<float*>(std::aligned_alloc(64, (floats * sizeof(float) + 63) / 64 * 64)));
    capacity = memory ? floats : 0;
    if (!memory) throw std::bad_alloc();
  }
  return memory.get();
}

}  // namespace escort
