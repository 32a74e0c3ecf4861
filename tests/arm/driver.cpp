// Runs the files of tests/arm/file.py, which says what lies in them, by the kernels of this processor: `make test-arm`.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <limits>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "isas.hpp"
#include "layers.hpp"
#include "ops.hpp"
#include "program.hpp"
#include "threads.hpp"

using namespace escort;

namespace {

struct Array {
  uint32_t item_size;
  std::vector<char> bytes;
};

// Arrays by name.
class Group {
 public:
  explicit Group(std::istream& file) {
    for (auto count = number<uint32_t>(file); count > 0; count--) {
      const std::string name = bytes<std::string>(file, number<uint32_t>(file));
      const auto item_size = number<uint32_t>(file);
      const auto items = number<uint64_t>(file);
      arrays_[name] = {item_size, bytes<std::vector<char>>(file, items * item_size)};
    }
  }

  bool has(const std::string& name) const { return arrays_.count(name) == 1; }

  // Throws where there is none, or its items are of another size.
  template <class T, class Vector = std::vector<T>>
  Vector all(const std::string& name) const {
    if (!has(name)) throw std::runtime_error("there is no " + name);
    const Array& array = arrays_.at(name);
    if (array.item_size != sizeof(T)) throw std::runtime_error("items of another size: " + name);
    Vector result(array.bytes.size() / sizeof(T));
    if (!result.empty()) std::memcpy(result.data(), array.bytes.data(), array.bytes.size());
    return result;
  }

  template <class T>
  Table<T> table(const std::string& name) const {
    return all<T, Table<T>>(name);
  }

  template <class T>
  T one(const std::string& name) const {
    const std::vector<T> values = all<T>(name);
    if (values.size() != 1) throw std::runtime_error("not one item: " + name);
    return values[0];
  }

  template <class T, size_t N>
  std::array<T, N> some(const std::string& name) const {
    const std::vector<int64_t> values = all<int64_t>(name);
    if (values.size() != N) throw std::runtime_error("so many items are wrong: " + name);
    std::array<T, N> result;
    for (size_t i = 0; i < N; i++) result[i] = static_cast<T>(values[i]);
    return result;
  }

  std::string text(const std::string& name) const {
    const std::vector<char> letters = all<char>(name);
    return {letters.begin(), letters.end()};
  }

 private:
  template <class T>
  static T number(std::istream& file) {
    T result;
    if (!file.read(reinterpret_cast<char*>(&result), sizeof(T))) throw std::runtime_error("the file ends too early");
    return result;
  }

  template <class Bytes>
  static Bytes bytes(std::istream& file, size_t size) {
    Bytes result(size, 0);
    if (!file.read(result.data(), static_cast<std::streamsize>(size)))
      throw std::runtime_error("the file ends too early");
    return result;
  }

  std::map<std::string, Array> arrays_;
};

std::array<MaxPool2d::Pair, 4> window(const Group& g) {
  const auto sizes = g.some<int, 8>("window");
  return {{{sizes[0], sizes[1]}, {sizes[2], sizes[3]}, {sizes[4], sizes[5]}, {sizes[6], sizes[7]}}};
}

// The operation of that kind, of the arguments that kernels/_cpu.pyi names.
std::unique_ptr<Op> make_op(const std::string& kind, const Group& g) {
  using Sizes = std::vector<int64_t>;
  const auto channels = [&] { return g.one<int64_t>("channels"); };
  const auto plane = [&] { return g.some<int64_t, 2>("input_size"); };
  const auto sizes = [&](const char* name) -> Sizes { return g.all<int64_t>(name); };
  if (kind == "DirectConvolution")
    return std::make_unique<DirectConvolution>(
        *find_isa(g.text("isa")).direct,
        DirectTables{g.one<Params>("params"), g.table<Nonzero>("nonzeros"), g.table<OutChannel>("out_channels"),
                     g.table<Block>("blocks"), g.table<Run>("runs"), g.table<Segment>("segments"),
                     g.table<Tile>("tiles")});
  if (kind == "DepthwiseConvolution")
    return std::make_unique<DepthwiseConvolution>(
        *find_isa(g.text("isa")).depthwise,
        DepthwiseTables{g.one<DepthwiseParams>("params"), g.table<Phase>("phases"), g.table<int32_t>("tap_columns"),
                        g.table<float>("weights"), g.table<float>("bias"), g.table<float>("slope")});
  if (kind == "LinearConvolution")
    return std::make_unique<LinearConvolution>(
        g.one<int64_t>("in_channels"), g.one<int64_t>("out_channels"),
        static_cast<Activation>(g.one<int64_t>("activation")),
        LinearTables{g.table<float>("weights"), g.table<float>("bias"), g.table<float>("slope")});
  if (kind == "MaxPool2d")
    return std::make_unique<MaxPool2d>(channels(), g.some<int, 2>("input_size"), g.some<int, 2>("output_size"),
                                       window(g));
  if (kind == "Elementwise") {
    const Epilogue epilogue = {static_cast<Activation>(g.one<int64_t>("activation")), g.one<float>("slope")};
    return std::make_unique<Elementwise>(combine_of(g.text("combine")), epilogue, sizes("shape"), sizes("a_strides"),
                                         sizes("b_strides"));
  }
  if (kind == "Copy") return std::make_unique<Copy>(sizes("shape"), sizes("strides"));
  if (kind == "Pad")
    return std::make_unique<Pad>(channels(), plane(), g.some<int64_t, 4>("borders"), g.one<float>("value"));
  if (kind == "BatchNorm") return std::make_unique<BatchNorm>(channels(), plane(), g.one<float>("epsilon"));
  if (kind == "AveragePool")
    return std::make_unique<AveragePool>(channels(), plane(), g.all<Window>("rows"), g.all<Window>("columns"));
  if (kind == "Resize")
    return std::make_unique<Resize>(channels(), plane(), g.all<Between>("rows"), g.all<Between>("columns"));
  if (kind == "Bicubic")
    return std::make_unique<Bicubic>(channels(), plane(), g.all<Cubic>("rows"), g.all<Cubic>("columns"));
  if (kind == "Softmax")
    return std::make_unique<Softmax>(g.one<int64_t>("outer"), g.one<int64_t>("size"), g.one<int64_t>("inner"));
  if (kind == "Linear") return std::make_unique<Linear>(g.one<int64_t>("in_features"), g.one<int64_t>("out_features"));
  throw std::runtime_error("no operation is a " + kind);
}

// A buffer between two borders, which nothing may write to. They are NaN, which shows in what was made of them.
class Buffer {
 public:
  explicit Buffer(const std::vector<float>& content) : memory_(content.size() + 2 * kBorder, kNan) {
    std::copy(content.begin(), content.end(), data());
  }
  float* data() { return memory_.data() + kBorder; }
  bool is_written_beyond() const {
    for (size_t i = 0; i < kBorder; i++)
      if (!std::isnan(memory_[i]) || !std::isnan(memory_[memory_.size() - 1 - i])) return true;
    return false;
  }

 private:
  static constexpr size_t kBorder = 256;
  static constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
  std::vector<float> memory_;
};

// One run of the file.
class Case {
 public:
  explicit Case(std::istream& file) : header_(file), buffers_(file) {
    for (auto count = header_.one<int64_t>("instructions"); count > 0; count--) {
      const Group group(file);
      ops_.push_back(make_op(group.text("op"), group));
      const std::vector<int64_t> places = group.all<int64_t>("places");
      std::vector<Operand> operands;
      for (size_t i = 0; i + 2 < places.size(); i += 3)
        operands.push_back({static_cast<int32_t>(places[i]), places[i + 1], places[i + 2]});
      const Operand output = operands.back();
      operands.pop_back();
      instructions_.push_back({ops_.back().get(), group.one<int64_t>("samples"), operands, output});
    }
    for (auto count = header_.one<int64_t>("results"); count > 0; count--) results_.emplace_back(file);
  }

  std::string name() const { return header_.text("name"); }
  bool is_right() const { return header_.one<int64_t>("is_right") == 1; }

  // Whether all results are within the bound.
  bool holds(int threads, bool take_chunks) const {
    std::vector<Buffer> buffers;
    for (int i = 0; buffers_.has(std::to_string(i)); i++) buffers.emplace_back(buffers_.all<float>(std::to_string(i)));
    std::vector<float*> addresses;
    for (Buffer& buffer : buffers) addresses.push_back(buffer.data());
    const auto [samples, chunk] = header_.some<int64_t, 2>("batch");
    NativeProgram(instructions_, static_cast<int32_t>(buffers.size()), header_.one<int64_t>("arena_size"),
                  {samples, chunk})
        .run(addresses, threads, take_chunks);
    for (const Buffer& buffer : buffers)
      if (buffer.is_written_beyond()) throw std::runtime_error("something was written beyond a buffer");
    bool all_hold = true;
    for (const Group& result : results_) {
      const auto [buffer, offset, stride] = result.some<int64_t, 3>("place");
      all_hold &= is_within(result.all<double>("values"), result.one<int64_t>("samples"),
                            addresses[static_cast<size_t>(buffer)] + offset, stride);
    }
    return all_hold;
  }

 private:
  // As escort.reference.compare and torch.testing.assert_close do.
  bool is_within(const std::vector<double>& expected, int64_t samples, const float* y, int64_t stride) const {
    const std::vector<double> bound = header_.all<double>("bound");
    const auto size = static_cast<int64_t>(expected.size()) / samples;
    double error = 0, norm = 0;
    bool each_holds = true;
    for (int64_t i = 0; i < samples * size; i++) {
      const double wanted = expected[static_cast<size_t>(i)], found = y[i / size * stride + i % size];
      error += (found - wanted) * (found - wanted);
      norm += wanted * wanted;
      const bool is_same = found == wanted || (std::isnan(found) && std::isnan(wanted));
      if (bound.size() == 2)
        each_holds &= is_same || std::abs(found - wanted) <= bound[1] + bound[0] * std::abs(wanted);
    }
    if (bound.size() == 2) return each_holds;
    return std::sqrt(error) <= bound.at(0) * (norm > 0 ? std::sqrt(norm) : 1.0);  // not so where it is NaN
  }

  Group header_, buffers_;
  std::vector<std::unique_ptr<Op>> ops_;
  std::vector<Instruction> instructions_;
  std::vector<Group> results_;
};

}  // namespace

int main(int count, char** paths) {
  assume_fork_join_ns(1);  // small layers run on several threads, too
  int right = 0, wrong = 0, failed = 0;
  for (int i = 1; i < count; i++) {
    std::ifstream file(paths[i], std::ios::binary);
    if (!file) throw std::runtime_error(std::string("there is no file ") + paths[i]);
    while (file.peek() != std::ifstream::traits_type::eof()) {
      const Case each(file);
      for (const int threads : {1, 2}) {
        if (each.holds(threads, threads > 1) == each.is_right()) continue;
        std::printf("%s on %d threads: %s\n", each.name().c_str(), threads,
                    each.is_right() ? "not within the bound" : "found right, and is wrong");
        failed++;
      }
      (each.is_right() ? right : wrong)++;
    }
  }
  std::printf("%s: %d runs, and %d that are wrong on purpose; %d failures\n", supported().front().direct->name, right,
              wrong, failed);
  return failed || right == 0 || wrong == 0;
}
