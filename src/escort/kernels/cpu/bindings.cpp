// Python's door to the kernels: `escort.kernels._cpu`.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/string.h>

#include <omp.h>
#if defined(__GLIBC__)
#include <malloc.h>
#endif

#include <array>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "direct.hpp"
#include "max_pool.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace escort {
namespace {

struct Kernels {
  const Isa* direct;
  PoolPlane pool;
};

// The kernels that this build holds and this processor runs, fastest first.
std::vector<Kernels> supported() {
  std::vector<Kernels> isas;
#ifdef ESCORT_HAVE_AVX512
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq"))
    isas.push_back({&direct_avx512, pool_avx512});
#endif
#ifdef ESCORT_HAVE_AVX2
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) isas.push_back({&direct_avx2, pool_avx2});
#endif
  isas.push_back({&direct_generic, pool_generic});
  return isas;
}

const Isa* find_isa(const std::string& name) {
  for (const Kernels& isa : supported())
    if (name == isa.direct->name) return isa.direct;
  throw std::invalid_argument("instruction set '" + name + "' is not available on this machine");
}

// A numpy table of 32-bit records as a vector of structs.
using Table = nb::ndarray<const int32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
template <class T>
std::vector<T> records(const Table& table, const char* name) {
  if (table.shape(1) * sizeof(int32_t) != sizeof(T)) throw std::invalid_argument(std::string(name) + ": wrong columns");
  std::vector<T> result(table.shape(0));
  if (!result.empty()) std::memcpy(result.data(), table.data(), result.size() * sizeof(T));
  return result;
}

struct Free {
  void operator()(float* p) const { std::free(p); }
};

// Runs task(i, thread) for every i below `tasks`. Each thread starts with its own share of consecutive tasks, the same
// in every layer, so that it finds in its cache what it wrote in the layer before; one that is done helps the others.
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
#pragma omp parallel num_threads(threads)
  {
    const int thread = omp_get_thread_num();
    for (int t = 0; t < threads; t++) {
      Share& share = shares[(thread + t) % threads];
      for (int64_t i; (i = share.next.fetch_add(1, std::memory_order_relaxed)) < share.end;) task(i, thread);
    }
  }
}

// Scratch of the calling thread for all its workers; it grows to the largest layer and is then reused.
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

constexpr int64_t kFarFloats = 2 << 20;  // an input of 8 MiB is not in cache when its layer starts

// Owns the tables of one convolution.
class DirectConvolution {
 public:
  DirectConvolution(const std::string& isa, const Table& entries, const Table& rows, const Table& blocks,
                    const Table& jobs, const Table& runs, const Table& segments, const Table& tiles, bool in_place,
                    int column_stride, int channel_stride, int64_t stage_size, int64_t partial_size, int64_t x_image,
                    int64_t x_plane, int64_t y_image, int64_t y_plane, int activation)
      : isa_(find_isa(isa)),
        entries_(records<Entry>(entries, "entries")),
        rows_(records<Row>(rows, "rows")),
        blocks_(records<Block>(blocks, "blocks")),
        jobs_(records<Job>(jobs, "jobs")),
        runs_(records<Run>(runs, "runs")),
        segments_(records<Segment>(segments, "segments")),
        tiles_(records<Tile>(tiles, "tiles")) {
    for (const Tile& tile : tiles_)
      if (tile.vectors < 1 || tile.vectors > isa_->max_vectors) throw std::invalid_argument("tile: too many vectors");
    direct_ = {entries_.data(),
               rows_.data(),
               blocks_.data(),
               jobs_.data(),
               runs_.data(),
               segments_.data(),
               tiles_.data(),
               static_cast<int32_t>(jobs_.size()),
               static_cast<int32_t>(tiles_.size()),
               in_place,
               false,
               column_stride,
               channel_stride,
               stage_size,
               partial_size,
               (stage_size + partial_size + 15) / 16 * 16,
               x_image,
               x_plane,
               y_image,
               y_plane,
               static_cast<Activation>(activation)};
  }

  // x, residual (or 0) and y are addresses of contiguous float32 tensors of `images` images.
  void run(uintptr_t x, uintptr_t residual, uintptr_t y, int64_t images, int threads) const {
    const nb::gil_scoped_release release;
    const int64_t tasks = images * direct_.tile_count * direct_.job_count;
    if (threads > tasks) threads = static_cast<int>(tasks);
    float* memory = scratch(direct_.scratch_size * (threads > 1 ? threads : 1));
    Direct direct = direct_;
    direct.fetch_ahead = images * direct.x_image > kFarFloats;
    parallel(tasks, threads, [&](int64_t i, int thread) {
      isa_->run(direct, i, reinterpret_cast<const float*>(x), reinterpret_cast<const float*>(residual),
                reinterpret_cast<float*>(y), memory + thread * direct_.scratch_size);
    });
  }

 private:
  const Isa* isa_;
  std::vector<Entry> entries_;
  std::vector<Row> rows_;
  std::vector<Block> blocks_;
  std::vector<Job> jobs_;
  std::vector<Run> runs_;
  std::vector<Segment> segments_;
  std::vector<Tile> tiles_;
  Direct direct_;
};

// x and y are addresses of `planes` contiguous float32 planes.
void max_pool2d(uintptr_t x, uintptr_t y, int64_t planes, std::array<int, 2> in, std::array<int, 2> out,
                std::array<int, 2> kernel, std::array<int, 2> stride, std::array<int, 2> padding,
                std::array<int, 2> dilation, int threads) {
  const nb::gil_scoped_release release;
  const Pool pool = {in[0],     in[1],     out[0],      out[1],      kernel[0],  kernel[1],
                     stride[0], stride[1], dilation[0], dilation[1], padding[0], padding[1]};
  if (threads > planes) threads = static_cast<int>(planes);
  static const PoolPlane pool_plane = supported().front().pool;
  // A window that ceil_mode adds may reach beyond the right padding.
  const int64_t line = pool.left + pool.width + int64_t(pool.columns) * pool.column_dilation + pool.column_stride;
  float* memory = scratch(line * (threads > 1 ? threads : 1));
  parallel(planes, threads, [&](int64_t i, int thread) {
    pool_plane(pool, reinterpret_cast<const float*>(x) + i * pool.height * pool.width,
               reinterpret_cast<float*>(y) + i * pool.out_height * pool.out_width, memory + thread * line);
  });
}

// Blocks below `bytes` are neither mapped one by one nor trimmed off the heap when freed.
bool keep_freed_memory(int bytes) {
#if defined(__GLIBC__)
  return mallopt(M_MMAP_THRESHOLD, bytes) == 1 && mallopt(M_TRIM_THRESHOLD, bytes) == 1;
#else
  (void)bytes;
  return false;
#endif
}

}  // namespace
}  // namespace escort

NB_MODULE(_cpu, m) {
  using namespace escort;
  nb::set_leak_warnings(false);  // a model that lives until the interpreter exits is no leak
  m.doc() = "Native kernels; see kernels/cpu/direct.hpp for the tables they take.";
  m.def(
      "isas",
      [] {
        nb::list result;
        for (const Kernels& isa : supported())
          result.append(nb::make_tuple(isa.direct->name, isa.direct->lanes, isa.direct->max_vectors));
        return result;
      },
      "The instruction sets of this machine, fastest first: (name, floats per vector, vectors per tile).");
  m.def("keep_freed_memory", &keep_freed_memory, "bytes"_a);
  m.def("max_pool2d", &max_pool2d, "x"_a, "y"_a, "planes"_a, "input_size"_a, "output_size"_a, "kernel"_a, "stride"_a,
        "padding"_a, "dilation"_a, "threads"_a);
  nb::class_<DirectConvolution>(m, "DirectConvolution")
      .def(nb::init<const std::string&, const Table&, const Table&, const Table&, const Table&, const Table&,
                    const Table&, const Table&, bool, int, int, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                    int>(),
           nb::kw_only(), "isa"_a, "entries"_a, "rows"_a, "blocks"_a, "jobs"_a, "runs"_a, "segments"_a, "tiles"_a,
           "in_place"_a, "column_stride"_a, "channel_stride"_a, "stage_size"_a, "partial_size"_a, "x_image"_a,
           "x_plane"_a, "y_image"_a, "y_plane"_a, "activation"_a)
      .def("run", &DirectConvolution::run, "x"_a, "residual"_a, "y"_a, "images"_a, "threads"_a);
}
