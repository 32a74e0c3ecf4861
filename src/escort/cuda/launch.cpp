// Launches kernels through the driver of CUDA, as `escort.cuda._launch`. It is built and imported without CUDA: what it
// needs of cuda.h is declared here, and Python brings the addresses of the driver's functions.
#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <array>
#include <climits>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <utility>
#include <vector>

namespace nb = nanobind;
using namespace nb::literals;

namespace escort {
namespace {

using Status = int;  // CUresult
constexpr Status kSuccess = 0;

struct LaunchAttribute {  // CUlaunchAttribute
  int id;
  alignas(8) std::array<int, 16> value;
};

using Attributes = std::vector<std::pair<int, std::array<int, 3>>>;

struct LaunchConfig {  // CUlaunchConfig
  std::array<unsigned, 3> grid, block;
  unsigned shared_bytes;
  void* stream;
  const LaunchAttribute* attributes;
  unsigned attribute_count;
};
static_assert(sizeof(LaunchAttribute) == 72 && sizeof(LaunchConfig) == 56, "as in cuda.h");

using LaunchKernel = Status(const LaunchConfig*, void* function, void** parameters, void** extra);
using EncodeTiled = Status(void* map, int type, uint32_t rank, void* address, const uint64_t* sizes,
                           const uint64_t* strides, const uint32_t* box, const uint32_t* steps, int interleaving,
                           int swizzle, int promotion, int fill);
using EncodeIm2col = Status(void* map, int type, uint32_t rank, void* address, const uint64_t* sizes,
                            const uint64_t* strides, const int* lower, const int* upper, uint32_t channels,
                            uint32_t pixels, const uint32_t* steps, int interleaving, int swizzle, int promotion,
                            int fill);

using LaunchGraph = Status(void* graph, void* stream);
using CopyOnDevice = Status(uintptr_t to, uintptr_t from, size_t bytes, void* stream);
using AskCapturing = Status(void* stream, int* capturing);

constexpr uint32_t kRank = 4;
constexpr int kNotInterleaved = 0, kFilledWithZeros = 0;
using Sizes = std::array<uint64_t, kRank>;
using Box = std::array<uint32_t, kRank>;
using Corner = std::array<int, 2>;

// Asks the driver for a map: writes its 128 bytes, for a tensor at an address, of such sizes and strides.
using Encode = std::function<Status(void*, void*, const uint64_t*, const uint64_t*)>;

// Makes a tensor map (CUtensorMap) for each tensor that it is given. Its samples lie one behind the other.
struct TensorMap {
  Encode encode;
  uint64_t element_bytes;
  Sizes sizes;            // of a sample, innermost first
  int samples_along;      // the dimension of `sizes` that grows with each sample
  uint64_t pitch, begin;  // elements from pixel to pixel, of which those from `begin` on are mapped

  uint64_t sample_elements() const { return pitch * sizes[1] * sizes[2] * sizes[3]; }

  Status write(void* map, void* address, uint64_t samples) const {
    Sizes whole = sizes;
    whole[samples_along] *= samples;
    uint64_t strides[kRank - 1], bytes = element_bytes;
    for (uint32_t i = 0; i < kRank - 1; i++) strides[i] = bytes *= i ? whole[i] : pitch;
    return encode(map, static_cast<char*>(address) + begin * element_bytes, whole.data(), strides);
  }
};

// As the fields of the same names of Python's TensorMap; `type`, `swizzle` and `promotion` are the driver's numbers.
struct Tensor {
  int type;
  uint64_t element_bytes;
  Sizes sizes;
  int samples_along, swizzle, promotion;
  uint64_t pitch, begin;
};

TensorMap tiled(uintptr_t function, const Tensor& x, const Box& box) {
  const auto encode = [=, ask = reinterpret_cast<EncodeTiled*>(function)](
                          void* map, void* address, const uint64_t* sizes, const uint64_t* strides) {
    constexpr Box steps = {1, 1, 1, 1};
    return ask(map, x.type, kRank, address, sizes, strides, box.data(), steps.data(), kNotInterleaved, x.swizzle,
               x.promotion, kFilledWithZeros);
  };
  return {encode, x.element_bytes, x.sizes, x.samples_along, x.pitch, x.begin};
}

TensorMap im2col(uintptr_t function, const Tensor& x, Corner lower, Corner upper, uint32_t channels, uint32_t pixels,
                 const Box& steps) {
  const auto encode = [=, ask = reinterpret_cast<EncodeIm2col*>(function)](
                          void* map, void* address, const uint64_t* sizes, const uint64_t* strides) {
    return ask(map, x.type, kRank, address, sizes, strides, lower.data(), upper.data(), channels, pixels, steps.data(),
               kNotInterleaved, x.swizzle, x.promotion, kFilledWithZeros);
  };
  return {encode, x.element_bytes, x.sizes, x.samples_along, x.pitch, x.begin};
}

// What a tensor says of itself, by the method of that name.
template <class Number>
Number asked(nb::handle tensor, PyObject* method) {
  PyObject* self = tensor.ptr();  // PyObject_CallMethodNoArgs, which is this, is not of the stable ABI
  PyObject* result = PyObject_VectorcallMethod(method, &self, 1 | PY_VECTORCALL_ARGUMENTS_OFFSET, nullptr);
  if (!result) throw nb::python_error();
  return nb::cast<Number>(nb::steal(result));
}

PyObject *get_device, *data_ptr, *numel;  // names, interned once

constexpr size_t kMostPerLaunch = 16, kMostParameters = 64;

struct alignas(64) Slot {  // aligned as a tensor map must be
  unsigned char bytes[128];
};

// A kernel with its block, shared memory and the arguments that all launches share. It never changes: what differs lies
// on the stack of the call, so that any thread may launch.
class Launch {
 public:
  // parameters: of each the bytes that all launches share; or, for what each launch passes, "P" for a tensor, "i" for
  // an int32, "f" for a float32, and a TensorMap for a tensor whose map the kernel takes.
  // attributes: the number and the first values of each.
  Launch(std::string kernel, uintptr_t launch, uintptr_t function, int device, unsigned block, unsigned shared_bytes,
         const Attributes& attributes, nb::sequence parameters)
      : kernel_(std::move(kernel)),
        launch_(reinterpret_cast<LaunchKernel*>(launch)),
        function_(reinterpret_cast<void*>(function)),
        device_(device) {
    for (const auto& [id, value] : attributes) attributes_.push_back({id, {value[0], value[1], value[2]}});
    const auto count = static_cast<unsigned>(attributes_.size());
    config_ = {{0, 0, 0}, {block, 1, 1}, shared_bytes, nullptr, attributes_.data(), count};
    for (nb::handle parameter : parameters) add(parameter);
    if (passed_ > kMostPerLaunch || parameters_.size() > kMostParameters)
      refuse(PyExc_ValueError, "takes too many arguments: %zu, and %zu per launch", parameters_.size(), passed_);
  }

  // None, or why the driver refused: its status, and which of `args` has no map; -1 where it refused the launch.
  nb::object issue(const std::array<unsigned, 3>& grid, uintptr_t stream, nb::tuple args) const {
    if (args.size() != passed_)
      refuse(PyExc_TypeError, "takes %zu arguments per launch, got %zu", passed_, args.size());
    if (!grid[0] || !grid[1] || !grid[2]) return nb::none();
    Slot slots[kMostPerLaunch];
    void* addresses[kMostParameters];
    for (size_t i = 0; i < parameters_.size(); i++) {
      const Parameter& parameter = parameters_[i];
      addresses[i] = parameter.shared;
      if (parameter.kind == Kind::kShared) continue;
      addresses[i] = slots[parameter.index].bytes;
      if (Status status = write(parameter, args[parameter.index], addresses[i]))
        return nb::make_tuple(status, parameter.index);
    }
    LaunchConfig config = config_;
    config.grid = grid;
    config.stream = reinterpret_cast<void*>(stream);
    Status status;
    {
      nb::gil_scoped_release others;  // the driver waits where the stream is full
      status = launch_(&config, function_, addresses, nullptr);
    }
    return status == kSuccess ? nb::object(nb::none()) : nb::object(nb::make_tuple(status, -1));
  }

 private:
  enum class Kind { kShared, kTensor, kInt, kFloat, kMap };
  using Bytes = std::vector<unsigned char>;
  struct Parameter {
    Kind kind;
    void* shared;  // the bytes that all launches share, or
    size_t index;  // in the arguments of a launch
    TensorMap map;
  };

  void add(nb::handle parameter) {
    Parameter added = {Kind::kShared, nullptr, 0, {}};
    nb::bytes bytes;
    if (nb::try_cast(parameter, bytes)) {
      const auto* first = static_cast<const unsigned char*>(bytes.data());
      shared_.push_back(Bytes(first, first + bytes.size()));
      added.shared = shared_.back().data();
    } else {
      added.index = passed_++;
      if (nb::try_cast(parameter, added.map)) {
        added.kind = Kind::kMap;
      } else {
        const auto code = nb::cast<std::string>(parameter);
        added.kind = code == "P" ? Kind::kTensor : code == "i" ? Kind::kInt : Kind::kFloat;
      }
    }
    parameters_.push_back(added);
  }

  Status write(const Parameter& parameter, nb::handle value, void* to) const {
    switch (parameter.kind) {
      case Kind::kInt: {
        int overflow;
        const long number = PyLong_AsLongAndOverflow(value.ptr(), &overflow);
        if (PyErr_Occurred()) throw nb::python_error();
        if (overflow || number < INT_MIN || number > INT_MAX)
          refuse(PyExc_ValueError, "takes 32-bit integers, got %R", value.ptr());
        return put(to, static_cast<int>(number));
      }
      case Kind::kFloat: {
        const double number = PyFloat_AsDouble(value.ptr());
        if (PyErr_Occurred()) throw nb::python_error();
        return put(to, static_cast<float>(number));
      }
      case Kind::kTensor:
        return put(to, address(value));
      default:
        return write_map(parameter.map, value, to);
    }
  }

  template <class Value>
  static Status put(void* to, const Value& value) {
    std::memcpy(to, &value, sizeof(value));
    return kSuccess;
  }

  // The map of a tensor; of None one that must not be read.
  Status write_map(const TensorMap& map, nb::handle value, void* to) const {
    void* const at = address(value);
    if (!at) return put(to, Slot{});
    const uint64_t elements = asked<uint64_t>(value, numel), sample = map.sample_elements();
    if (!sample || elements % sample)
      refuse(PyExc_ValueError, "takes a tensor of samples of %llu elements, got one of %llu",
             static_cast<unsigned long long>(sample), static_cast<unsigned long long>(elements));
    return map.write(to, at, elements / sample);
  }

  void* address(nb::handle value) const {
    if (value.is_none()) return nullptr;
    if (asked<int>(value, get_device) != device_)
      refuse(PyExc_ValueError, "got a tensor on %S; move it to the kernel's device",
             nb::object(value.attr("device")).ptr());
    return reinterpret_cast<void*>(asked<uintptr_t>(value, data_ptr));
  }

  // Raises an error that begins with the kernel.
  template <class... Args>
  [[noreturn]] void refuse(PyObject* type, const char* format, Args... args) const {
    PyErr_Format(type, (std::string("%s ") + format).c_str(), kernel_.c_str(), args...);
    throw nb::python_error();
  }

  std::string kernel_;
  LaunchKernel* launch_;
  void* function_;
  int device_;
  std::vector<LaunchAttribute> attributes_;
  LaunchConfig config_;  // but for grid and stream
  std::vector<Bytes> shared_;
  std::vector<Parameter> parameters_;
  size_t passed_ = 0;
};

// A captured graph of one input: what the driver is asked for by a call, as one step of the caller. It never changes.
class Replay {
 public:
  // place, size: where the graph reads its input.
  Replay(uintptr_t launch, uintptr_t copy, uintptr_t ask_capturing, uintptr_t graph, uintptr_t place, size_t size)
      : launch_(reinterpret_cast<LaunchGraph*>(launch)),
        copy_(reinterpret_cast<CopyOnDevice*>(copy)),
        ask_capturing_(reinterpret_cast<AskCapturing*>(ask_capturing)),
        graph_(reinterpret_cast<void*>(graph)),
        place_(place),
        size_(size) {}

  // Copies the bytes of a tensor there and launches the graph. Returns the driver's status, and kIsCaptured,
  // with nothing launched, where somebody captures the stream.
  Status issue(uintptr_t stream, nb::handle x) const {
    const auto from = asked<uintptr_t>(x, data_ptr);
    void* const on = reinterpret_cast<void*>(stream);
    nb::gil_scoped_release others;
    int capturing = 0;
    if (Status status = ask_capturing_(on, &capturing)) return status;
    if (capturing) return kIsCaptured;
    if (Status status = copy_(place_, from, size_, on)) return status;
    return launch_(graph_, on);
  }

 private:
  static constexpr Status kIsCaptured = -1;
  LaunchGraph* launch_;
  CopyOnDevice* copy_;
  AskCapturing* ask_capturing_;
  void* graph_;
  uintptr_t place_;
  size_t size_;
};

}  // namespace
}  // namespace escort

NB_MODULE(_launch, m) {
  using namespace escort;
  nb::set_leak_warnings(false);  // a model that lives until the interpreter exits is no leak
  get_device = PyUnicode_InternFromString("get_device");
  data_ptr = PyUnicode_InternFromString("data_ptr");
  numel = PyUnicode_InternFromString("numel");
  m.doc() = "Launches of kernels by the driver of CUDA.";
  nb::class_<Tensor>(m, "Tensor")
      .def(nb::init<int, uint64_t, Sizes, int, int, int, uint64_t, uint64_t>(), "type"_a, "element_bytes"_a, "sizes"_a,
           "samples_along"_a, "swizzle"_a, "promotion"_a, "pitch"_a, "begin"_a);
  nb::class_<TensorMap>(m, "TensorMap");
  m.def("tiled", &tiled, "function"_a, "x"_a, "box"_a);
  m.def("im2col", &im2col, "function"_a, "x"_a, "lower"_a, "upper"_a, "channels"_a, "pixels"_a, "steps"_a);
  nb::class_<Launch>(m, "Launch")
      .def(nb::init<std::string, uintptr_t, uintptr_t, int, unsigned, unsigned, const Attributes&, nb::sequence>(),
           "kernel"_a, "launch"_a, "function"_a, "device"_a, "block"_a, "shared_bytes"_a, "attributes"_a,
           "parameters"_a)
      .def("issue", &Launch::issue, "grid"_a, "stream"_a, "args"_a);
  nb::class_<Replay>(m, "Replay")
      .def(nb::init<uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, size_t>(), "launch"_a, "copy"_a,
           "ask_capturing"_a, "graph"_a, "place"_a, "size"_a)
      .def("issue", &Replay::issue, "stream"_a, "x"_a);
}
