#include "program_bindings.hpp"

#include <nanobind/stl/array.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <string>
#include <tuple>

#include "ops.hpp"
#include "program.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace escort {
namespace {

using Sizes = std::vector<int64_t>;
using Place = std::tuple<int32_t, int64_t, int64_t>;                      // an Operand
using Step = std::tuple<nb::object, int64_t, std::vector<Place>, Place>;  // an Instruction

Operand operand(const Place& place) { return {std::get<0>(place), std::get<1>(place), std::get<2>(place)}; }

// A program that keeps its operations alive.
class OwningProgram {
 public:
  OwningProgram(const std::vector<Step>& steps, int32_t buffers, int64_t arena_size, int64_t samples, int64_t chunk)
      : program_(instructions(steps), buffers, arena_size, {samples, chunk}) {
    for (const Step& step : steps) ops_.push_back(std::get<0>(step));
  }

  void run(const std::vector<uintptr_t>& buffers, int threads, bool take_chunks) const {
    const nb::gil_scoped_release release;
    std::vector<float*> addresses;
    for (const uintptr_t buffer : buffers) addresses.push_back(reinterpret_cast<float*>(buffer));
    program_.run(addresses, threads, take_chunks);
  }

 private:
  static std::vector<Instruction> instructions(const std::vector<Step>& steps) {
    std::vector<Instruction> result;
    for (const auto& [op, samples, inputs, output] : steps) {
      Instruction each = {nb::cast<const Op*>(op), samples, {}, operand(output)};
      for (const Place& place : inputs) each.inputs.push_back(operand(place));
      result.push_back(std::move(each));
    }
    return result;
  }

  NativeProgram program_;
  std::vector<nb::object> ops_;
};

Combine combine_of(const std::string& name) {
  static const char* const names[] = {"first", "add", "subtract", "multiply", "divide", "maximum", "minimum", "slope"};
  for (int32_t i = 0; i < 8; i++)
    if (name == names[i]) return static_cast<Combine>(i);
  throw std::invalid_argument("operands cannot be combined by '" + name + "'");
}

// Windows and pairs of neighbours as Python lists them: (int, int, float).
template <class T>
std::vector<T> records_of(const std::vector<std::tuple<int32_t, int32_t, float>>& tuples) {
  std::vector<T> result;
  for (const auto& [a, b, c] : tuples) result.push_back({a, b, c});
  return result;
}

// An operation that says of each row and column of its result what it is made of.
template <class T, class Record>
void bind_plane_op(nb::module_& m, const char* name) {
  using Tuples = std::vector<std::tuple<int32_t, int32_t, float>>;
  nb::class_<T, Op>(m, name).def(
      "__init__",
      [](T* self, int64_t channels, Plane input_size, const Tuples& rows, const Tuples& columns) {
        new (self) T(channels, input_size, records_of<Record>(rows), records_of<Record>(columns));
      },
      "channels"_a, "input_size"_a, "rows"_a, "columns"_a);
}

}  // namespace

void bind_program(nb::module_& m) {
  nb::class_<Op>(m, "Op", "An operation that a NativeProgram calls.")
      .def_ro("input_sizes", &Op::input_sizes)
      .def_ro("output_size", &Op::output_size);
  nb::class_<OwningProgram>(m, "NativeProgram", "See kernels/cpu/program.hpp.")
      .def(nb::init<const std::vector<Step>&, int32_t, int64_t, int64_t, int64_t>(), "instructions"_a, "buffers"_a,
           "arena_size"_a, "samples"_a = 1, "chunk"_a = 1)
      .def("run", &OwningProgram::run, "buffers"_a, "threads"_a, "take_chunks"_a = false);
  nb::class_<Elementwise, Op>(m, "Elementwise")
      .def(
          "__init__",
          [](Elementwise* self, const std::string& combine, int activation, float slope, const Sizes& shape,
             const Sizes& a_strides, const Sizes& b_strides) {
            const Epilogue epilogue = {static_cast<Activation>(activation), slope};
            new (self) Elementwise(combine_of(combine), epilogue, shape, a_strides, b_strides);
          },
          "combine"_a, "activation"_a, "slope"_a, "shape"_a, "a_strides"_a, "b_strides"_a);
  nb::class_<Copy, Op>(m, "Copy").def(nb::init<Sizes, Sizes>(), "shape"_a, "strides"_a);
  nb::class_<Pad, Op>(m, "Pad", "borders: at the left, right, top and bottom.")
      .def(nb::init<int64_t, Plane, std::array<int64_t, 4>, float>(), "channels"_a, "input_size"_a, "borders"_a,
           "value"_a);
  nb::class_<BatchNorm, Op>(m, "BatchNorm")
      .def(nb::init<int64_t, Plane, float>(), "channels"_a, "input_size"_a, "epsilon"_a);
  bind_plane_op<AveragePool, Window>(m, "AveragePool");
  bind_plane_op<Resize, Between>(m, "Resize");
  using Cubics = std::vector<std::tuple<std::array<int32_t, 4>, std::array<float, 4>>>;
  nb::class_<Bicubic, Op>(m, "Bicubic")
      .def(
          "__init__",
          [](Bicubic* self, int64_t channels, Plane input_size, const Cubics& rows, const Cubics& columns) {
            const auto cubics = [](const Cubics& tuples) {
              std::vector<Cubic> result;
              for (const auto& [at, weight] : tuples) result.push_back({at, weight});
              return result;
            };
            new (self) Bicubic(channels, input_size, cubics(rows), cubics(columns));
          },
          "channels"_a, "input_size"_a, "rows"_a, "columns"_a);
  nb::class_<Softmax, Op>(m, "Softmax", "Along the middle one of three axes.")
      .def(nb::init<int64_t, int64_t, int64_t>(), "outer"_a, "size"_a, "inner"_a);
  nb::class_<Linear, Op>(m, "Linear").def(nb::init<int64_t, int64_t>(), "in_features"_a, "out_features"_a);
}

}  // namespace escort
