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
#include <utility>
#include <vector>

#include "isas.hpp"
#include "layers.hpp"
#include "op.hpp"
#include "program_bindings.hpp"
#include "spread_channels.hpp"
#include "tables.hpp"
#include "threads.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace escort {
namespace {

// The only record of the table of that name.
template <class T>
T record(const nb::dict& tables, const char* name) {
  const Table<T> all = records<T>(tables, name);
  if (all.size() != 1) throw std::invalid_argument(std::string(name) + ": one record");
  return all[0];
}

DirectTables direct_tables(const nb::dict& tables) {
  return {record<Params>(tables, "params"),
          records<Nonzero>(tables, "nonzeros"),
          records<OutChannel>(tables, "out_channels"),
          records<Block>(tables, "blocks"),
          records<Run>(tables, "runs"),
          records<Segment>(tables, "segments"),
          records<Tile>(tables, "tiles")};
}

DepthwiseTables depthwise_tables(const nb::dict& tables) {
  return {record<DepthwiseParams>(tables, "params"),
          records<Phase>(tables, "phases"),
          numbers<int32_t>(tables, "tap_columns"),
          numbers<float>(tables, "weights"),
          numbers<float>(tables, "bias"),
          numbers<float>(tables, "slope")};
}

// Runs an operation of one input or two. Each address is that of a contiguous float32 tensor of `samples` samples; that
// of an operand which is left out is 0.
void run_at(const Op& op, const std::array<uintptr_t, 2>& operands, uintptr_t y, int64_t samples, int threads) {
  const nb::gil_scoped_release release;
  Input inputs[2] = {};
  for (size_t i = 0; i < op.input_sizes.size(); i++)
    inputs[i] = {reinterpret_cast<const float*>(operands[i]), op.input_sizes[i]};
  op.run(inputs, {reinterpret_cast<float*>(y), op.output_size}, samples, threads);
}

using Numbers = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

// See spread_channels.hpp; sites and channels are those of the nonzeros.
std::vector<int32_t> checked_spread_channels(const Numbers& sites, const Numbers& channels, int64_t site_count,
                                             int32_t channel_count, int kept, int of, int cell_cost) {
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
  return spread_channels(pattern, kept, of, cell_cost);
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
        "kept"_a, "of"_a, "cell_cost"_a);
  bind_program(m);
  nb::class_<Convolution, Op>(m, "Convolution")
      .def(
          "run",
          [](const Convolution& self, uintptr_t x, uintptr_t residual, uintptr_t y, int64_t samples, int threads) {
            run_at(self, {x, residual}, y, samples, threads);
          },
          "x"_a, "residual"_a, "y"_a, "samples"_a, "threads"_a);
  nb::class_<DirectConvolution, Convolution>(m, "DirectConvolution", "tables: records by name; params are one record.")
      .def(
          "__init__",
          [](DirectConvolution* self, const std::string& isa, const nb::dict& tables) {
            const Isa& kernel = *find_isa(isa).direct;
            new (self) DirectConvolution(kernel, direct_tables(tables));
          },
          "isa"_a, "tables"_a);
  nb::class_<DepthwiseConvolution, Convolution>(m, "DepthwiseConvolution",
                                                "tables: arrays by name; phases and params are records.")
      .def(
          "__init__",
          [](DepthwiseConvolution* self, const std::string& isa, const nb::dict& tables) {
            const DepthwiseIsa& kernel = *find_isa(isa).depthwise;
            new (self) DepthwiseConvolution(kernel, depthwise_tables(tables));
          },
          "isa"_a, "tables"_a);
  nb::class_<LinearConvolution, Convolution>(m, "LinearConvolution")
      .def(
          "__init__",
          [](LinearConvolution* self, int64_t in_channels, int64_t out_channels, int activation,
             const nb::dict& tables) {
            LinearTables own = {numbers<float>(tables, "weights"), numbers<float>(tables, "bias"),
                                numbers<float>(tables, "slope")};
            new (self)
                LinearConvolution(in_channels, out_channels, static_cast<Activation>(activation), std::move(own));
          },
          "in_channels"_a, "out_channels"_a, "activation"_a, "tables"_a);
  using Pair = MaxPool2d::Pair;
  nb::class_<MaxPool2d, Op>(m, "MaxPool2d", "window: kernel_size, stride, padding and dilation.")
      .def(nb::init<int64_t, Pair, Pair, const std::array<Pair, 4>&>(), "channels"_a, "input_size"_a, "output_size"_a,
           "window"_a)
      .def(
          "run",
          [](const MaxPool2d& self, uintptr_t x, uintptr_t y, int64_t samples, int threads) {
            run_at(self, {x}, y, samples, threads);
          },
          "x"_a, "y"_a, "samples"_a, "threads"_a);
}
