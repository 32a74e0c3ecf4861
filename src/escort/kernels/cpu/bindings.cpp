// Offers the kernels to Python as `escort.kernels._cpu`.
#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#if defined(__GLIBC__)
#include <malloc.h>
#endif

#include <algorithm>
#include <array>
#include <stdexcept>
#include <string>
#include <vector>

#include "direct.hpp"
#include "max_pool.hpp"
#include "spread_channels.hpp"
#include "tables.hpp"
#include "threads.hpp"

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

constexpr int64_t kFarFloats = 2 << 20;  // an input of 8 MiB is not in cache when its layer starts

// Owns the tables of one convolution.
class DirectConvolution {
 public:
  // tables: arrays of records by name, each of the structs of direct.hpp; params is an array of one record.
  DirectConvolution(const std::string& isa, const nb::dict& tables)
      : isa_(find_isa(isa)),
        nonzeros_(records<Nonzero>(tables, "nonzeros")),
        out_channels_(records<OutChannel>(tables, "out_channels")),
        blocks_(records<Block>(tables, "blocks")),
        jobs_(records<Job>(tables, "jobs")),
        runs_(records<Run>(tables, "runs")),
        segments_(records<Segment>(tables, "segments")),
        tiles_(records<Tile>(tables, "tiles")) {
    const std::vector<Params> params = records<Params>(tables, "params");
    if (params.size() != 1) throw std::invalid_argument("params: one record");
    for (const Tile& tile : tiles_)
      if (tile.vectors < 1 || tile.vectors > isa_->max_vectors) throw std::invalid_argument("tile: too many vectors");
    direct_ = {params[0],
               nonzeros_.data(),
               out_channels_.data(),
               blocks_.data(),
               jobs_.data(),
               runs_.data(),
               segments_.data(),
               tiles_.data(),
               static_cast<int32_t>(jobs_.size()),
               static_cast<int32_t>(tiles_.size()),
               (params[0].stage_size + params[0].partial_size + 15) / 16 * 16,
               false};
    // About two vectors of multiply-adds per nanosecond, and one that is written.
    int64_t vectors = 0;
    for (const Tile& tile : tiles_) vectors += tile.vectors;
    sample_ns_ = vectors * static_cast<int64_t>(nonzeros_.size() / 2 + out_channels_.size());
  }

  // x, residual (or 0) and y are addresses of contiguous float32 tensors of `samples` samples.
  void run(uintptr_t x, uintptr_t residual, uintptr_t y, int64_t samples, int threads) const {
    const nb::gil_scoped_release release;
    const int64_t tasks = samples * direct_.tile_count * direct_.job_count;
    threads = threads_for(samples * sample_ns_, static_cast<int>(std::min<int64_t>(threads, tasks)));
    float* memory = scratch(direct_.scratch_size * (threads > 1 ? threads : 1));
    Direct direct = direct_;
    direct.fetch_ahead = samples * direct.x_sample_stride > kFarFloats;
    parallel(tasks, threads, [&](int64_t i, int thread) {
      isa_->run(direct, i, reinterpret_cast<const float*>(x), reinterpret_cast<const float*>(residual),
                reinterpret_cast<float*>(y), memory + thread * direct_.scratch_size);
    });
  }

 private:
  const Isa* isa_;
  std::vector<Nonzero> nonzeros_;
  std::vector<OutChannel> out_channels_;
  std::vector<Block> blocks_;
  std::vector<Job> jobs_;
  std::vector<Run> runs_;
  std::vector<Segment> segments_;
  std::vector<Tile> tiles_;
  Direct direct_;
  int64_t sample_ns_;  // about what a sample takes one thread
};

// Max pooling of planes of one size. Pairs are (rows, columns).
class MaxPool2d {
 public:
  using Pair = std::array<int, 2>;

  MaxPool2d(Pair input_size, Pair output_size, Pair kernel_size, Pair stride, Pair padding, Pair dilation)
      : pool_{input_size[0], input_size[1], output_size[0], output_size[1], kernel_size[0], kernel_size[1],
              stride[0],     stride[1],     dilation[0],    dilation[1],    padding[0],     padding[1]} {}

  // x and y are addresses of `planes` contiguous float32 planes.
  void run(uintptr_t x, uintptr_t y, int64_t planes, int threads) const {
    const nb::gil_scoped_release release;
    const int64_t plane_ns = int64_t(pool_.height) * pool_.width / 2;  // about, of one thread
    threads = threads_for(planes * plane_ns, static_cast<int>(std::min<int64_t>(threads, planes)));
    static const PoolPlane pool_plane = supported().front().pool;
    // A window that ceil_mode adds may reach beyond the right padding.
    const int64_t line_size =
        pool_.left + pool_.width + int64_t(pool_.columns) * pool_.column_dilation + pool_.column_stride;
    float* memory = scratch(line_size * (threads > 1 ? threads : 1));
    parallel(planes, threads, [&](int64_t i, int thread) {
      pool_plane(pool_, reinterpret_cast<const float*>(x) + i * pool_.height * pool_.width,
                 reinterpret_cast<float*>(y) + i * pool_.out_height * pool_.out_width, memory + thread * line_size);
    });
  }

 private:
  Pool pool_;
};

using Numbers = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

// See spread_channels.hpp; sites and channels are those of the nonzeros.
std::vector<int32_t> checked_spread_channels(const Numbers& sites, const Numbers& channels, int64_t site_count,
                                             int32_t channel_count, int kept, int of) {
  const Pattern pattern = {sites.data(), channels.data(), static_cast<int64_t>(sites.size()), site_count,
                           channel_count};
  const auto within = [&](const Numbers& numbers, int64_t end) {
    return std::all_of(numbers.data(), numbers.data() + numbers.size(),
                       [&](int32_t number) { return number >= 0 && number < end; });
  };
  if (channels.size() != sites.size() || !within(sites, site_count) || !within(channels, channel_count))
    throw std::invalid_argument("each nonzero has a site and a channel within the filter");
  if (kept < 1 || kept > of || of > 255) throw std::invalid_argument("a group keeps some of at most 255 channels");
  const nb::gil_scoped_release release;
  return spread_channels(pattern, kept, of);
}

// Makes glibc's allocator keep freed memory: what is smaller than `most_bytes` is neither mapped on its own nor given
// back. False where the allocator is another one.
bool keep_freed_memory(int most_bytes) {
#if defined(__GLIBC__)
  return mallopt(M_MMAP_THRESHOLD, most_bytes) == 1 && mallopt(M_TRIM_THRESHOLD, most_bytes) == 1;
#else
  (void)most_bytes;
  return false;
#endif
}

}  // namespace
}  // namespace escort

NB_MODULE(_cpu, m) {
  using namespace escort;
  nb::set_leak_warnings(false);  // a model that lives until the interpreter exits is no leak
  watch_forks();
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
  m.def("keep_freed_memory", &keep_freed_memory, "most_bytes"_a);
  m.def(
      "fork_join_ns",
      [](int threads, bool at_hand) {
        const nb::gil_scoped_release release;
        if (!at_hand) return fork_join_ns(threads);
        double taken = 0;
        const auto measure = [&] { taken = fork_join_ns(threads); };
        with_threads(threads, measure);
        return taken;
      },
      "threads"_a, "at_hand"_a);
  m.def("assume_fork_join_ns", &assume_fork_join_ns, "nanoseconds"_a);
  m.def("spread_channels", &checked_spread_channels, "sites"_a, "channels"_a, "site_count"_a, "channel_count"_a,
        "kept"_a, "of"_a);
  nb::class_<DirectConvolution>(m, "DirectConvolution")
      .def(nb::init<const std::string&, const nb::dict&>(), "isa"_a, "tables"_a)
      .def("run", &DirectConvolution::run, "x"_a, "residual"_a, "y"_a, "samples"_a, "threads"_a);
  using Pair = MaxPool2d::Pair;
  nb::class_<MaxPool2d>(m, "MaxPool2d")
      .def(nb::init<Pair, Pair, Pair, Pair, Pair, Pair>(), "input_size"_a, "output_size"_a, "kernel_size"_a, "stride"_a,
           "padding"_a, "dilation"_a)
      .def("run", &MaxPool2d::run, "x"_a, "y"_a, "planes"_a, "threads"_a);
}
