// Work on several threads, and their scratch memory.
#pragma once

#include <atomic>
#include <cstdint>

namespace escort {

// Calls call(work, thread) on that many threads at the same time.
void on_threads(int threads, void (*call)(const void* work, int thread), const void* work);

// Notices forks from here on; called once, when the module is imported.
void watch_forks();

// Scratch of the calling thread for all its workers, aligned to 64 bytes; it grows to the largest layer and is then
// reused. A call throws std::bad_alloc, or ends the use of what the call before it returned.
float* scratch(int64_t floats);

// Runs task(i, thread) for every i below `tasks`. Each thread starts with its own share of consecutive tasks, the same
// share in every layer, so that it finds in its cache what it wrote in the layer before. A thread that is done helps
// the others.
template <class Task>
void parallel(int64_t tasks, int threads, const Task& task) {
  if (threads <= 1) {
    for (int64_t i = 0; i < tasks; i++) task(i, 0);
    return;
  }
  struct alignas(64) Share {
    std::atomic<int64_t> next;
    int64_t end;
  };
  constexpr int kMostThreads = 256;
  if (threads > kMostThreads) threads = kMostThreads;
  Share shares[kMostThreads];
  for (int t = 0; t < threads; t++) {
    shares[t].next = tasks * t / threads;
    shares[t].end = tasks * (t + 1) / threads;
  }
  const auto work = [&](int thread) {
    for (int t = 0; t < threads; t++) {
      Share& share = shares[(thread + t) % threads];
      for (int64_t i; (i = share.next.fetch_add(1, std::memory_order_relaxed)) < share.end;) task(i, thread);
    }
  };
  using Work = decltype(work);
  on_threads(threads, [](const void* w, int thread) { (*static_cast<Work*>(w))(thread); }, &work);
}

}  // namespace escort
