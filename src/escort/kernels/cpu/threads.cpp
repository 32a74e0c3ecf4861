// See threads.hpp.
#include "threads.hpp"

#ifdef _OPENMP
#include <omp.h>
#endif
#include <pthread.h>
#include <time.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <exception>
#include <memory>
#include <new>
#include <system_error>
#include <thread>

namespace escort {
namespace {

using Clock = std::chrono::steady_clock;

// How long a thread waits before it sleeps: about what waking it costs, so that it costs twice that at worst.
constexpr std::chrono::microseconds kPatience{50};

// The threads of all calls that run on several: a further call that would exceed the cores runs alone.
std::atomic<int> threads_at_work{0};

// fork_join_ns by number of threads. Zero: not measured yet.
std::atomic<float> fork_joins[kMostThreads + 1];

// Whether this thread came out of a fork: the threads that OpenMP believes it has were left behind in the parent, and a
// parallel region would wait for them forever. Threads that a child starts later have none yet, and are as any other.
thread_local bool came_out_of_fork = false;

// The cores that this thread may use. A few hundred nanoseconds.
int cores() {
#if defined(ESCORT_CORES)  // a test has more threads than the machine
  return ESCORT_CORES;
#elif defined(_OPENMP)
  return omp_get_num_procs();
#else
  return static_cast<int>(std::max(std::thread::hardware_concurrency(), 1u));
#endif
}

inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("isb");
#endif
}

// Waits while `number` is `value`: awake for a while, then asleep.
void wait_while(const std::atomic<uint32_t>& number, uint32_t value) {
  const Clock::time_point begin = Clock::now();
  do {
    for (int i = 0; i < 32; i++) {
      if (number.load(std::memory_order_acquire) != value) return;
      pause();
    }
  } while (Clock::now() - begin < kPatience);
  number.wait(value);
}

// Threads that take turns with the one that the team belongs to. A turn with an odd number is open, and whoever sees it
// may join in. The owner waits for those alone that have joined.
class Team {
 public:
  // For the owner alone: how many run at most, itself among them.
  void resize(int threads) { size_ = std::min(threads, cores()); }
  int size() const { return size_; }

  // On the owner: calls call(work, thread) with as many others as come in time.
  void run(int threads, Call call, const void* work) {
    threads = std::min(threads, size_);
    if (threads <= 1) return call(work, 0);
    call_ = call;
    work_ = work;
    members_.store(threads, std::memory_order_relaxed);
    const uint32_t turn = turn_.load(std::memory_order_relaxed) + 1;
    turn_.store(turn);
    turn_.notify_all();
    call(work, 0);
    turn_.store(turn + 1);  // whoever comes now stays out
    for (int t = 1; t < threads; t++)
      while (joined_[t].turn.load() == turn) wait_while(joined_[t].turn, turn);
  }

  // On every other thread: joins in until the team is dismissed.
  void serve(int thread) {
    std::atomic<uint32_t>& joined = joined_[thread].turn;
    for (uint32_t turn = 0; !dismissed_.load();) {
      wait_while(turn_, turn);
      turn = turn_.load();
      if (turn % 2 == 0 || thread >= members_.load(std::memory_order_relaxed)) continue;
      joined.store(turn);
      // The owner closes the turn and then looks who has joined: one of the two sees the other.
      if (turn_.load() == turn) call_(work_, thread);
      joined.store(0);
      joined.notify_one();
    }
  }

  void dismiss() {
    dismissed_.store(true);
    turn_.store(turn_.load() + 2);
    turn_.notify_all();
  }

 private:
  struct alignas(64) Joined {
    std::atomic<uint32_t> turn{0};
  };

  alignas(64) std::atomic<uint32_t> turn_{0};
  std::atomic<int> members_{0};
  std::atomic<bool> dismissed_{false};
  Call call_ = nullptr;
  const void* work_ = nullptr;
  int size_ = 1;
  Joined joined_[kMostThreads];  // the turn that each thread is in, or 0
};

thread_local Team* team = nullptr;  // of the with_threads that this thread is in

// Threads of our own, started when they are first needed and never ended: one call has them at a time.
class Pool {
 public:
  // The team, with as many threads as can be had, or null where another call has it.
  Team* take(int threads) {
    if (taken_.exchange(true)) return nullptr;
    team_.resize(threads);
    try {
      for (; started_ < team_.size(); started_++) std::thread(&Team::serve, &team_, started_).detach();
    } catch (const std::system_error&) {  // no more threads are to be had: those that are there do the work
      team_.resize(started_);
    }
    return &team_;
  }
  void give_back() { taken_ = false; }

 private:
  Team team_;
  std::atomic<bool> taken_{false};
  int started_ = 1;  // the caller counts
};

std::atomic<Pool*> pool{nullptr};  // never freed: its threads run until the process ends

Pool& the_pool() {
  if (Pool* known = pool) return *known;
  Pool *made = new Pool, *known = nullptr;
  if (pool.compare_exchange_strong(known, made)) return *made;
  delete made;
  return *known;
}

#ifdef _OPENMP
// Whether this thread's OpenMP threads are awake, as they are for milliseconds behind an operator of torch: they then
// hold the cores. Only whether the clock of one of them goes says so.
bool openmp_is_awake(int threads) {
  thread_local clockid_t clock;
  thread_local bool known = false;
  timespec before, after;
  if (came_out_of_fork) return false;  // its threads were left behind in the parent
  if (!known || clock_gettime(clock, &before) != 0) {
    known = false;
    bool found = false;
    clockid_t other = 0;
#pragma omp parallel num_threads(threads)
    if (omp_get_thread_num() == 1) found = pthread_getcpuclockid(pthread_self(), &other) == 0;
    clock = other;
    return known = found;
  }
  return clock_gettime(clock, &after) == 0 && (before.tv_nsec != after.tv_nsec || before.tv_sec != after.tv_sec);
}

// Calls call(work, thread) on OpenMP's threads, this one as thread 0, and waits for all of them. OpenMP is always asked
// for the number that torch has: each change of it ends threads and starts others, which takes a millisecond.
void fork_join(int threads, Call call, const void* work) {
#pragma omp parallel num_threads(threads)
  call(work, omp_get_thread_num());
}
#else
bool openmp_is_awake(int) { return false; }
void fork_join(int, Call call, const void* work) { call(work, 0); }
#endif

// Says how many threads a call gets: all that it asks for, or only its own.
class Grant {
 public:
  explicit Grant(int threads) : threads_(std::min(threads, kMostThreads)) {
    if (threads_ <= 1) return;
    const int available = cores();
    const int others = threads_at_work.fetch_add(threads_);
    if (available > 1 && (others == 0 || others + threads_ <= available)) return;
    threads_at_work -= threads_;
    threads_ = 1;
  }
  ~Grant() {
    if (threads_ > 1) threads_at_work -= threads_;
  }
  Grant(const Grant&) = delete;

  int threads() const { return threads_; }

 private:
  int threads_;
};

// Threads that wait until all are there, but not for ever: some may not come.
struct Meeting {
  int threads;
  Clock::time_point end;
  std::atomic<int> present{0};
};
constexpr int kMostForkJoin = 50'000;                    // ns, where a core is busy with something else
constexpr std::chrono::milliseconds kMostMeasuring{20};  // until the system has given each thread a core

void meet(const void* m, int) {
  Meeting& meeting = *static_cast<Meeting*>(const_cast<void*>(m));
  meeting.present++;
  while (meeting.present < meeting.threads && Clock::now() < meeting.end) pause();
}

struct Free {
  void operator()(float* p) const { std::free(p); }
};

}  // namespace

void on_threads(int threads, Call call, const void* work) {
  if (team) return team->run(threads, call, work);
  const Grant grant(threads);
  if (grant.threads() > 1 && openmp_is_awake(grant.threads())) return fork_join(grant.threads(), call, work);
  Team* own = grant.threads() > 1 ? the_pool().take(grant.threads()) : nullptr;
  if (!own) return call(work, 0);
  own->run(threads, call, work);
  the_pool().give_back();
}

void with_threads(int threads, const std::function<void()>& body) {
  if (team) return body();
  const Grant grant(threads);
  std::exception_ptr error;
  const auto lead = [&](Team& led) {
    team = &led;
    try {
      body();
    } catch (...) {
      error = std::current_exception();
    }
    team = nullptr;
  };
  if (grant.threads() > 1 && openmp_is_awake(grant.threads())) {
    Team openmp;
    openmp.resize(grant.threads());
    const auto take_part = [&](int thread) {
      if (thread > 0) return openmp.serve(thread);
      lead(openmp);
      openmp.dismiss();
    };
    using Part = decltype(take_part);
    fork_join(grant.threads(), [](const void* p, int thread) { (*static_cast<Part*>(p))(thread); }, &take_part);
  } else if (Team* own = grant.threads() > 1 ? the_pool().take(grant.threads()) : nullptr) {
    lead(*own);
    the_pool().give_back();
  } else {
    Team alone;
    lead(alone);
  }
  if (error) std::rethrow_exception(error);
}

double fork_join_ns(int threads) {
  threads = std::clamp(threads, 1, kMostThreads);
  std::atomic<float>& known = fork_joins[threads];
  float least = known.load(std::memory_order_relaxed);
  if (least > 0) return least;
  Team* own = team ? team : the_pool().take(threads);
  if (!own) return kMostForkJoin;
  const int present = std::min(threads, own->size());
  const Clock::time_point first = Clock::now();
  least = kMostForkJoin;
  for (int i = 0; i < 1000 && (i < 30 || least == kMostForkJoin) && Clock::now() - first < kMostMeasuring; i++) {
    const Clock::time_point begin = Clock::now();
    Meeting meeting{present, begin + std::chrono::nanoseconds(kMostForkJoin)};
    own->run(threads, meet, &meeting);
    least = std::min(least, std::chrono::duration<float, std::nano>(Clock::now() - begin).count());
  }
  if (!team) the_pool().give_back();
  known.store(least, std::memory_order_relaxed);
  return least;
}

void assume_fork_join_ns(double nanoseconds) {
  for (std::atomic<float>& known : fork_joins) known = static_cast<float>(nanoseconds);
}

int threads_for(int64_t nanoseconds, int threads) {
  constexpr double kShort = 500;  // no machine starts a thread in less: nothing is measured, and no thread started
  if (threads <= 1) return 1;
  const bool known = fork_joins[std::min(threads, kMostThreads)].load(std::memory_order_relaxed) > 0;
  const double fork_join = known || nanoseconds >= 2 * kShort ? fork_join_ns(threads) : kShort;
  const double shares = static_cast<double>(nanoseconds) / (2 * fork_join);
  if (!team) return shares >= 1 ? threads : 1;  // OpenMP starts all or none
  return static_cast<int>(std::clamp(shares, 1.0, static_cast<double>(threads)));
}

void watch_forks() {
  pthread_atfork(nullptr, nullptr, [] {
    came_out_of_fork = true;
    threads_at_work = 0;  // calls of threads that are not here
    pool = nullptr;
  });
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
