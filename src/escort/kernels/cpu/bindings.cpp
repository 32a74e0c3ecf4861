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

#include "depthwise.hpp"
#include "direct.hpp"
#include "lines.hpp"
#include "max_pool.hpp"
#include "op.hpp"
#include "program_bindings.hpp"
#include "spread_channels.hpp"
#include "tables.hpp"
#include "threads.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace escort {
namespace {

struct Kernels {
  const Isa* direct;
  const DepthwiseIsa* depthwise;
  PoolPlane pool;
  const Lines* lines;
};

// The kernels that this build holds and this processor runs, fastest first.
std::vector<Kernels> supported() {
  std::vector<Kernels> isas;
#ifdef ESCORT_HAVE_AVX512
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq"))
    isas.push_back({&direct_avx512, &depthwise_avx512, pool_avx512, &lines_avx512});
#endif
#ifdef ESCORT_HAVE_AVX2
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    isas.push_back({&direct_avx2, &depthwise_avx2, pool_avx2, &lines_avx2});
#endif
  isas.push_back({&direct_generic, &depthwise_generic, pool_generic, &lines_generic});
  return isas;
}

Kernels find_isa(const std::string& name) {
  for (const Kernels& isa : supported())
    if (name == isa.direct->name) return isa;
  throw std::invalid_argument("instruction set '" + name + "' is not available on this machine");
}

constexpr int64_t kFarFloats = 2 << 20;  // an input of 8 MiB is not in cache when its layer starts

// A convolution whose inputs are x and the residual, which may be left out.
class Convolution : public Op {
 public:
  Convolution() : Op({}, 0) {}

  // x, residual (or 0) and y are addresses of contiguous float32 tensors of `samples` samples.
  void run_at(uintptr_t x, uintptr_t residual, uintptr_t y, int64_t samples, int threads) const {
    const nb::gil_scoped_release release;
    const Input inputs[] = {{reinterpret_cast<const float*>(x), input_sizes[0]},
                            {reinterpret_cast<const float*>(residual), output_size}};
    run(inputs, {reinterpret_cast<float*>(y), output_size}, samples, threads);
  }
};

// Owns the tables of one convolution.
class DirectConvolution : public Convolution {
 public:
  // tables: arrays of records by name, each of the structs of direct.hpp; params is an array of one record.
  DirectConvolution(const std::string& isa, const nb::dict& tables)
      : isa_(find_isa(isa).direct),
        nonzeros_(records<Nonzero>(tables, "nonzeros")),
        out_channels_(records<OutChannel>(tables, "out_channels")),
        blocks_(records<Block>(tables, "blocks")),
        jobs_(records<Job>(tables, "jobs")),
        runs_(records<Run>(tables, "runs")),
        segments_(records<Segment>(tables, "segments")),
        tiles_(records<Tile>(tables, "tiles")) {
    const std::vector<Params> all = records<Params>(tables, "params");
    if (all.size() != 1) throw std::invalid_argument("params: one record");
    const Params& params = all[0];
    input_sizes = {params.x_sample_stride, params.y_sample_stride};
    output_size = params.y_sample_stride;
    if (params.channels < 1 || params.channels > 4) throw std::invalid_argument("params: 1 to 4 channels at a time");
    for (const Tile& tile : tiles_)
      if (tile.vectors < 1 || tile.vectors > isa_->max_vectors / params.channels)
        throw std::invalid_argument("tile: too many vectors");
    direct_ = {params,
               nonzeros_.data(),
               out_channels_.data(),
               blocks_.data(),
               jobs_.data(),
               runs_.data(),
               segments_.data(),
               tiles_.data(),
               static_cast<int32_t>(jobs_.size()),
               static_cast<int32_t>(tiles_.size()),
               (params.stage_size + params.partial_size + 15) / 16 * 16,
               params.y_sample_stride,
               false};
    // About two vectors of multiply-adds per nanosecond, and one that is written.
    int64_t vectors = 0;
    for (const Tile& tile : tiles_) vectors += tile.vectors;
    sample_ns = vectors * static_cast<int64_t>(nonzeros_.size() / 2 + out_channels_.size());
  }

  void run(const Input* inputs, Output output, int64_t samples, int threads) const override {
    const int64_t tasks = samples * direct_.tile_count * direct_.job_count;
    threads = threads_for(samples * sample_ns, static_cast<int>(std::min<int64_t>(threads, tasks)));
    float* memory = scratch(direct_.scratch_size * (threads > 1 ? threads : 1));
    Direct direct = direct_;
    direct.fetch_ahead = samples * direct.x_sample_stride > kFarFloats;
    direct.x_sample_stride = inputs[0].stride;
    direct.residual_sample_stride = inputs[1].stride;
    direct.y_sample_stride = output.stride;
    parallel(tasks, threads, [&](int64_t i, int thread) {
      isa_->run(direct, i, inputs[0].data, inputs[1].data, output.data, memory + thread * direct_.scratch_size);
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
};

// Owns the tables of one depthwise convolution.
class DepthwiseConvolution : public Convolution {
 public:
  // tables: arrays by name, as in depthwise.hpp; phases and params are records, params one of them.
  DepthwiseConvolution(const std::string& isa, const nb::dict& tables)
      : isa_(find_isa(isa).depthwise),
        phases_(records<Phase>(tables, "phases")),
        tap_columns_(numbers<int32_t>(tables, "tap_columns")),
        weights_(numbers<float>(tables, "weights")),
        bias_(numbers<float>(tables, "bias")),
        slope_(numbers<float>(tables, "slope")) {
    const std::vector<DepthwiseParams> all = records<DepthwiseParams>(tables, "params");
    if (all.size() != 1) throw std::invalid_argument("params: one record");
    const DepthwiseParams& p = all[0];
    if (p.block_rows < 1 || p.block_rows > kMostBlockRows) throw std::invalid_argument("block_rows: too many rows");
    if (p.planes < 1 || p.planes > isa_->most_planes) throw std::invalid_argument("planes: too many side by side");
    const size_t out_channels = size_t(p.channels) * p.multiplier, taps = size_t(p.kernel_rows) * p.kernel_columns;
    if (weights_.size() != out_channels * taps || bias_.size() != out_channels || slope_.size() != out_channels ||
        tap_columns_.size() != size_t(p.kernel_columns))
      throw std::invalid_argument("weights, bias, slope and tap_columns are those of params");
    output_size = int64_t(out_channels) * p.out_height * p.out_width;
    input_sizes = {int64_t(p.channels) * p.height * p.width, output_size};
    depthwise_ = {p,
                  phases_.data(),
                  tap_columns_.data(),
                  weights_.data(),
                  bias_.data(),
                  slope_.data(),
                  static_cast<int32_t>(phases_.size()),
                  (int64_t(p.channels) + p.planes - 1) / p.planes};
    sample_ns = output_size * static_cast<int64_t>(taps + 9) / 100;  // about, of one thread
  }

  void run(const Input* inputs, Output output, int64_t samples, int threads) const override {
    const int64_t bands = samples * depthwise_.groups * depthwise_.bands;
    threads = threads_for(samples * sample_ns, static_cast<int>(std::min<int64_t>(threads, bands)));
    // A task clears its scratch once: one for a thread alone, else eight of each thread.
    const int64_t tasks = threads > 1 ? std::min<int64_t>(bands, 8 * threads) : std::min<int64_t>(bands, 1);
    const int64_t scratch_size = (int64_t(depthwise_.planes) * depthwise_.stage_size + isa_->lanes + 15) / 16 * 16;
    float* memory = scratch(scratch_size * (threads > 1 ? threads : 1));
    const DepthwiseTensors tensors = {inputs[0].data,   inputs[1].data,   output.data,
                                      inputs[0].stride, inputs[1].stride, output.stride};
    parallel(tasks, threads, [&](int64_t i, int thread) {
      isa_->run(depthwise_, tensors, bands * i / tasks, bands * (i + 1) / tasks, memory + thread * scratch_size);
    });
  }

 private:
  const DepthwiseIsa* isa_;
  std::vector<Phase> phases_;
  std::vector<int32_t> tap_columns_;
  std::vector<float> weights_, bias_, slope_;
  Depthwise depthwise_;
};

// A convolution of one pixel by all weights: a matrix times a vector for each sample.
class LinearConvolution : public Convolution {
 public:
  // tables: weights (in_channels, pitch) with zeros behind the output channels, bias and slope (pitch,); pitch is a
  // multiple of 16.
  LinearConvolution(int64_t in_channels, int64_t out_channels, int activation, const nb::dict& tables)
      : in_(in_channels),
        out_(out_channels),
        pitch_((out_channels + 15) / 16 * 16),
        activation_(static_cast<Activation>(activation)),
        weights_(numbers<float>(tables, "weights")),
        bias_(numbers<float>(tables, "bias")),
        slope_(numbers<float>(tables, "slope")) {
    if (in_ < 1 || out_ < 1 || weights_.size() != size_t(in_ * pitch_) || bias_.size() != size_t(pitch_) ||
        slope_.size() != size_t(pitch_))
      throw std::invalid_argument("weights, bias and slope are those of so many channels");
    input_sizes = {in_, out_};
    output_size = out_;
    sample_ns = in_ * pitch_ / 32;  // about two vectors of multiply-adds in a nanosecond
  }

  void run(const Input* inputs, Output output, int64_t samples, int threads) const override {
    constexpr int64_t kColumns = 64;  // of a task
    const int64_t tasks = (out_ + kColumns - 1) / kColumns;
    parallel(tasks, threads_for(samples * sample_ns, threads), [&](int64_t i, int) {
      const int64_t begin = i * kColumns, columns = std::min(kColumns, out_ - begin);
      lines().mix(inputs[0].data, inputs[0].stride, samples, weights_.data() + begin, pitch_, bias_.data() + begin,
                  static_cast<int>(columns), in_, output.data + begin, output.stride);
      for (int64_t s = 0; s < samples; s++) {
        const float* residual = inputs[1].data ? inputs[1].data + s * inputs[1].stride + begin : nullptr;
        finish(output.data + s * output.stride + begin, residual, slope_.data() + begin, columns);
      }
    });
  }

 private:
  void finish(float* y, const float* residual, const float* slope, int64_t n) const {
    if (residual) lines().combine(Combine::add, {}, y, 1, residual, 1, y, n);
    if (activation_ == Activation::leaky_relu || activation_ == Activation::prelu) {
      lines().combine(Combine::slope, {}, y, 1, slope, 1, y, n);
    } else if (activation_ != Activation::none) {
      lines().combine(Combine::first, {activation_, 0.0f}, y, 1, y, 1, y, n);
    }
  }

  int64_t in_, out_, pitch_;
  Activation activation_;
  std::vector<float> weights_, bias_, slope_;
};

// Max pooling of planes of one size. Pairs are (rows, columns).
class MaxPool2d : public Op {
 public:
  using Pair = std::array<int, 2>;

  MaxPool2d(int64_t channels, Pair input_size, Pair output_size, const std::array<Pair, 4>& window)
      : Op({channels * input_size[0] * input_size[1]}, channels * output_size[0] * output_size[1]),
        channels_(channels),
        pool_{input_size[0], input_size[1], output_size[0], output_size[1], window[0][0], window[0][1],
              window[1][0],  window[1][1],  window[3][0],   window[3][1],   window[2][0], window[2][1]} {
    sample_ns = channels * pool_.height * pool_.width / 2;
  }

  // x and y are addresses of contiguous float32 tensors of `samples` samples.
  void run(uintptr_t x, uintptr_t y, int64_t samples, int threads) const {
    const nb::gil_scoped_release release;
    const Input input = {reinterpret_cast<const float*>(x), input_sizes[0]};
    run(&input, {reinterpret_cast<float*>(y), output_size}, samples, threads);
  }

  void run(const Input* inputs, Output output, int64_t samples, int threads) const override {
    const int64_t planes = samples * channels_;
    threads = threads_for(samples * sample_ns, static_cast<int>(std::min<int64_t>(threads, planes)));
    static const PoolPlane pool_plane = supported().front().pool;
    // A window that ceil_mode adds may reach beyond the right padding.
    const int64_t line_size =
        pool_.left + pool_.width + int64_t(pool_.columns) * pool_.column_dilation + pool_.column_stride;
    float* memory = scratch(line_size * (threads > 1 ? threads : 1));
    parallel(planes, threads, [&](int64_t i, int thread) {
      const int64_t sample = i / channels_, channel = i % channels_;
      pool_plane(pool_, inputs[0].data + sample * inputs[0].stride + channel * pool_.height * pool_.width,
                 output.data + sample * output.stride + channel * pool_.out_height * pool_.out_width,
                 memory + thread * line_size);
    });
  }

 private:
  int64_t channels_;
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

const Lines& lines() {
  static const Lines& fastest = *supported().front().lines;
  return fastest;
}

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
  bind_program(m);
  nb::class_<Convolution, Op>(m, "Convolution")
      .def("run", &Convolution::run_at, "x"_a, "residual"_a, "y"_a, "samples"_a, "threads"_a);
  nb::class_<DirectConvolution, Convolution>(m, "DirectConvolution")
      .def(nb::init<const std::string&, const nb::dict&>(), "isa"_a, "tables"_a);
  nb::class_<DepthwiseConvolution, Convolution>(m, "DepthwiseConvolution")
      .def(nb::init<const std::string&, const nb::dict&>(), "isa"_a, "tables"_a);
  nb::class_<LinearConvolution, Convolution>(m, "LinearConvolution")
      .def(nb::init<int64_t, int64_t, int, const nb::dict&>(), "in_channels"_a, "out_channels"_a, "activation"_a,
           "tables"_a);
  using Pair = MaxPool2d::Pair;
  nb::class_<MaxPool2d, Op>(m, "MaxPool2d", "window: kernel_size, stride, padding and dilation.")
      .def(nb::init<int64_t, Pair, Pair, const std::array<Pair, 4>&>(), "channels"_a, "input_size"_a, "output_size"_a,
           "window"_a)
      .def("run", static_cast<void (MaxPool2d::*)(uintptr_t, uintptr_t, int64_t, int) const>(&MaxPool2d::run), "x"_a,
           "y"_a, "samples"_a, "threads"_a);
}
