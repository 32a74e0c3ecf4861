// See threads.hpp. Without OpenMP, and in a child of a fork, each call starts threads of its own.
#include "threads.hpp"

#ifdef _OPENMP
#include <omp.h>
#endif
#include <pthread.h>

#include <algorithm>
#include <chrono>
#include <exception>
#include <system_error>
#include <thread>
#include <vector>

#include "memory.hpp"

namespace escort {
namespace {

using Clock = std::chrono::steady_clock;

// How long a thread waits before it sleeps: about what waking it costs, so that it costs twice that at worst.
constexpr std::chrono::nanoseconds kPatience{kPatienceNs};

// The threads of all calls that run on several: a further call that would exceed the cores runs alone.
std::atomic<int> threads_at_work{0};

// fork_join_ns by number of threads: outside and inside of with_threads. Zero: not measured yet.
std::atomic<float> fork_joins[2][kMostThreads + 1];

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
void wait_while(const std::atomic<int>& number, int value) {
  const Clock::time_point begin = Clock::now();
  do {
    for (int i = 0; i < 32; i++) {
      if (number.load(std::memory_order_acquire) != value) return;
      pause();
    }
  } while (Clock::now() - begin < kPatience);
  number.wait(value);
}

// Waits for a number to be reached, and lets go of the core while it takes long: a thread that woke up on this core
// would else come to run when the system's timer moves one of the two, which is 8 ms later. Whoever reaches the number
// does not wake this thread, which would take the core from it on its way into OpenMP's barrier.
void await(const std::atomic<int>& number, int value) {
  for (const Clock::time_point begin = Clock::now(); number.load(std::memory_order_acquire) < value;) {
    for (int i = 0; i < 32 && number.load(std::memory_order_acquire) < value; i++) pause();
    if (Clock::now() - begin > kPatience) std::this_thread::sleep_for(std::chrono::microseconds(10));
  }
}

// Calls call(work, thread) on up to so many threads, this one as thread 0, and waits for all of them. OpenMP is always
// asked for the number that torch has: each change of it ends threads and starts others, which takes a millisecond.
void fork_join(int threads, Call call, const void* work) {
#ifdef _OPENMP
  if (!came_out_of_fork) {
    std::atomic<int> done{0};
#pragma omp parallel num_threads(threads)
    {
      call(work, omp_get_thread_num());
      done++;
      if (omp_get_thread_num() == 0) await(done, omp_get_num_threads());
    }
    return;
  }
#endif
  std::vector<std::thread> others;
  others.reserve(threads - 1);
  try {
    for (int t = 1; t < threads; t++) others.emplace_back(call, work, t);
  } catch (const std::system_error&) {  // no more threads are to be had: those that are there do the work
  }
  call(work, 0);
  for (std::thread& other : others) other.join();
}

// The threads of a with_threads. They take turns: a turn with an odd number is open, and whoever sees it may join in.
class Team {
 public:
  explicit Team(int threads) : size_(std::min(threads, cores())) {}

  // On the thread that the team belongs to: calls call(work, thread) with as many others as come in time.
  void run(int threads, Call call, const void* work) {
    threads = std::min(threads, size_);
    if (threads <= 1) return call(work, 0);
    call_ = call;
    work_ = work;
    members_.store(threads, std::memory_order_relaxed);
    const int turn = turn_.load(std::memory_order_relaxed) + 1;
    turn_.store(turn);
    turn_.notify_all();
    call(work, 0);
    turn_.store(turn + 1);  // whoever comes now stays out
    for (int t = 1; t < threads; t++)
      while (joined_[t].turn.load() == turn) wait_while(joined_[t].turn, turn);
  }

  // On every other thread: joins in until the team is dismissed.
  void serve(int thread) {
    if (thread >= size_) return;
    std::atomic<int>& joined = joined_[thread].turn;
    for (int turn = 0; turn != kDismissed;) {
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
    turn_.store(kDismissed);
    turn_.notify_all();
  }

  int size() const { return size_; }

 private:
  static constexpr int kDismissed = -2;
  struct alignas(64) Joined {
    std::atomic<int> turn{0};
  };

  alignas(64) std::atomic<int> turn_{0};
  std::atomic<int> members_{0};
  Call call_ = nullptr;
  const void* work_ = nullptr;
  const int size_;
  Joined joined_[kMostThreads];  // the turn that each thread is in, or 0
};

thread_local Team* team = nullptr;  // of the with_threads that this thread is in

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
constexpr int kMostForkJoin = 50'000;                   // ns, where a core is busy with something else
constexpr std::chrono::milliseconds kMostMeasuring{5};  // as OpenMP's barriers take milliseconds there
constexpr std::chrono::milliseconds kRetry{200};

constexpr double kShort = 500;  // no machine starts a thread in less: nothing is measured, and no thread started

void meet(const void* m, int) {
  Meeting& meeting = *static_cast<Meeting*>(const_cast<void*>(m));
  meeting.present++;
  while (meeting.present < meeting.threads && Clock::now() < meeting.end) pause();
}

}  // namespace

void on_threads(int threads, Call call, const void* work) {
  if (team) return team->run(threads, call, work);
  const Grant grant(threads);
  if (grant.threads() <= 1) return call(work, 0);
  fork_join(grant.threads(), call, work);
}

void with_threads(int threads, const std::function<void()>& body) {
  if (team) return body();
  const Grant grant(threads);
  struct Session {
    Team team;
    const std::function<void()>& body;
    std::exception_ptr error;
  } session{Team(grant.threads()), body, nullptr};
  const auto take_part = [](const void* s, int thread) {
    Session& session = *static_cast<Session*>(const_cast<void*>(s));
    if (thread > 0) return session.team.serve(thread);
    team = &session.team;
    try {
      session.body();
    } catch (...) {
      session.error = std::current_exception();
    }
    team = nullptr;
    session.team.dismiss();
  };
  if (session.team.size() <= 1) {
    take_part(&session, 0);
  } else {
    fork_join(grant.threads(), take_part, &session);
  }
  if (session.error) std::rethrow_exception(session.error);
}

double fork_join_ns(int threads) {
  threads = std::clamp(threads, 1, team ? team->size() : kMostThreads);
  std::atomic<float>& known = fork_joins[team != nullptr][threads];
  float least = known.load(std::memory_order_relaxed);
  if (least > 0) return least;
  static std::atomic<Clock::rep> next_try{0};
  const Clock::time_point first = Clock::now();
  least = kMostForkJoin;
  if (first.time_since_epoch().count() < next_try) return least;
  for (int i = 0; i < 30 && Clock::now() - first < kMostMeasuring; i++) {
    const Clock::time_point begin = Clock::now();
    Meeting meeting{threads, begin + std::chrono::nanoseconds(kMostForkJoin)};
    team ? team->run(threads, meet, &meeting) : fork_join(threads, meet, &meeting);
    least = std::min(least, std::chrono::duration<float, std::nano>(Clock::now() - begin).count());
  }
  if (least < kMostForkJoin) {
    known.store(least, std::memory_order_relaxed);
  } else {  // a core is busy with something else
    next_try = (Clock::now() + kRetry).time_since_epoch().count();
  }
  return least;
}

void assume_fork_join_ns(double nanoseconds) {
  for (auto& row : fork_joins)
    for (std::atomic<float>& known : row) known = static_cast<float>(nanoseconds);
}

int threads_at_hand_for(int64_t nanoseconds, int threads) {
  const float known = fork_joins[1][std::clamp(threads, 1, kMostThreads)].load(std::memory_order_relaxed);
  const double shares = static_cast<double>(nanoseconds) / (2 * (known > 0 ? known : kShort));
  return static_cast<int>(std::clamp(shares, 1.0, static_cast<double>(threads)));
}

int threads_for(int64_t nanoseconds, int threads) {
  if (threads <= 1) return 1;
  const bool known = fork_joins[team != nullptr][std::min(threads, kMostThreads)].load(std::memory_order_relaxed) > 0;
  const double fork_join = known || nanoseconds >= 2 * kShort ? fork_join_ns(threads) : kShort;
  const double shares = static_cast<double>(nanoseconds) / (2 * fork_join);
  if (!team) return shares >= 1 ? threads : 1;  // OpenMP starts all or none
  return static_cast<int>(std::clamp(shares, 1.0, static_cast<double>(threads)));
}

void watch_forks() {
  pthread_atfork(nullptr, nullptr, [] {
    came_out_of_fork = true;
    threads_at_work = 0;  // calls of threads that are not here
    assume_fork_join_ns(0);
  });
}

Scratch scratch(int64_t floats, int threads) {
  thread_local Memory<float> memory;
  thread_local int64_t pitch = 0, workers = 0;
  threads = std::clamp(threads, 1, kMostThreads);
  if (floats > pitch || threads > workers) {
    constexpr int64_t kLine = 16;  // floats of a line of the cache
    const int64_t wider = std::max(pitch, (floats + kLine - 1) / kLine * kLine),
                  more = std::max<int64_t>(workers, threads);
    pitch = workers = 0;
    memory = allocate_array<float>(wider * more);
    pitch = wider;
    workers = more;
  }
  return {memory.get(), pitch};
}

}  // namespace escort
