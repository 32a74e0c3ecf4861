"""A barrier in shared memory (PTX `mbarrier`) in C++, for kernels that tests run on a CPU."""

MBARRIER = """
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
// A barrier in shared memory: its phase ends when all have arrived and all bytes that were announced have come.
static std::atomic<bool> stuck;
struct Barrier {
  std::mutex mutex;
  std::condition_variable ended;
  int all = 0, left = 0, bytes = 0;
  unsigned phase = 0;
  void change(int arrivals, int more_bytes) {
    std::lock_guard<std::mutex> lock(mutex);
    left -= arrivals;
    bytes += more_bytes;
    if (left == 0 && bytes == 0) {
      phase ^= 1;
      left = all;
      ended.notify_all();
    }
  }
  void wait(unsigned parity) {
    std::unique_lock<std::mutex> lock(mutex);
    if (!ended.wait_for(lock, std::chrono::seconds(stuck ? 0 : 20), [&] { return phase != parity; })) stuck = true;
  }
  bool has_ended(unsigned parity) {
    std::lock_guard<std::mutex> lock(mutex);
    return phase != parity;
  }
};
"""
