// Work on several threads, and their scratch memory.
//
// The threads are those of OpenMP, as in torch's operators. Threads of our own would share their cores with OpenMP's,
// which wait for milliseconds behind each operator of torch without sleeping: measured, ours then add nothing.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>

namespace escort {

constexpr int kMostThreads = 256;

// Work as a plain function, called with its data and the number of the thread. It must not throw.
using Call = void (*)(const void* work, int thread);

// Calls call(work, thread) with thread 0 on the calling thread and, at the same time, on up to `threads` - 1 others.
// Fewer take part where another call keeps the processor busy, where cores are lacking, or when they come too late: the
// work is done by whoever is there, and the caller waits only for those that have begun.
void on_threads(int threads, Call call, const void* work);

// Runs body() on the calling thread with that many threads at hand: an on_threads in it calls them by one write to
// memory. They wait for the next one without sleeping, for some microseconds, and then sleep. Throws what body throws.
// Within another with_threads it only runs body.
void with_threads(int threads, const std::function<void()>& body);

// How many of that many threads are worth their start for work that takes one thread about so long: each gets twice
// the time that they take to begin and end together, which is measured when it is first asked for.
int threads_for(int64_t nanoseconds, int threads);

// The same with threads at hand, without measuring anything.
int threads_at_hand_for(int64_t nanoseconds, int threads);

// Threads at hand that are not called for so long fall asleep, and the end of a with_threads waits until they are awake
// again.
constexpr int64_t kPatienceNs = 50'000, kWakingNs = 25'000;

// How long an on_threads takes in which all threads only wait for each other, here: in a with_threads or outside of
// one. Measured by the first call for a number of threads.
double fork_join_ns(int threads);

// Takes so long for a fork and join from here on, whatever it takes; 0 has it measured anew.
void assume_fork_join_ns(double nanoseconds);

// Notices forks from here on; called once, when the module is imported.
void watch_forks();

// Scratch of the calling thread for its workers, each aligned to 64 bytes. It grows to the largest layer and is then
// reused; a worker so has the same memory in every layer, which lies in the cache of its core. It holds until the
// thread's next call.
struct Scratch {
  float* memory;
  int64_t pitch;

  float* of(int thread) const { return memory + thread * pitch; }
};

// For so many workers, of at least so many floats each. Throws std::bad_alloc.
Scratch scratch(int64_t floats, int threads);

// Runs task(i, thread) for every i below `tasks`, on up to so many threads. Each starts with its own share of
// consecutive tasks, the same share in every layer, so that it finds in its cache what it wrote in the layer before. A
// thread that is done helps the others.
template <class Task>
void parallel(int64_t tasks, int threads, const Task& task) {
  if (threads > tasks) threads = static_cast<int>(tasks);
  if (threads <= 1) {
    for (int64_t i = 0; i < tasks; i++) task(i, 0);
    return;
  }
  struct alignas(64) Share {
    std::atomic<int64_t> next;
    int64_t end;
  };
  if (threads > kMostThreads) threads = kMostThreads;
  Share shares[kMostThreads];
  for (int t = 0; t < threads; t++) {
    shares[t].next.store(tasks * t / threads, std::memory_order_relaxed);
    shares[t].end = tasks * (t + 1) / threads;
  }
  const auto work = [&](int thread) {
    for (int t = 0; t < threads; t++) {
      Share& share = shares[(thread + t) % threads];
      if (share.next.load(std::memory_order_relaxed) >= share.end) continue;
      for (int64_t i; (i = share.next.fetch_add(1, std::memory_order_relaxed)) < share.end;) task(i, thread);
    }
  };
  using Work = decltype(work);
  on_threads(threads, [](const void* w, int thread) { (*static_cast<Work*>(w))(thread); }, &work);
}

}  // namespace escort
