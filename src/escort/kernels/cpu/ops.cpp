#include "ops.hpp"

#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>
#include <stdexcept>

#include "threads.hpp"

namespace escort {
namespace {

constexpr int64_t kTaskFloats = 1 << 13;  // about a microsecond of work
constexpr int64_t kSoftmaxWork = 8;       // times as long as a copy, about
constexpr int64_t kBandRows = 16;         // of a transposed copy: a line of cache

int64_t product(const std::vector<int64_t>& sizes) {
  return std::accumulate(sizes.begin(), sizes.end(), int64_t{1}, std::multiplies<int64_t>());
}

// The floats of a sample that strides reach.
int64_t reach(const std::vector<int64_t>& shape, const std::vector<int64_t>& strides) {
  if (strides.size() != shape.size()) throw std::invalid_argument("as many strides as axes");
  int64_t last = 0;
  for (size_t i = 0; i < shape.size(); i++) {
    if (shape[i] < 1 || strides[i] < 0) throw std::invalid_argument("sizes are positive, strides not negative");
    last += (shape[i] - 1) * strides[i];
  }
  return last + 1;
}

std::vector<int64_t> sizes_of(const std::vector<int64_t>& shape, const std::vector<int64_t>& a,
                              const std::vector<int64_t>& b) {
  if (b.empty()) return {reach(shape, a)};
  return {reach(shape, a), reach(shape, b)};
}

// Where row number `row` of a sample begins: rows are numbered along all axes but the last.
int64_t row_offset(int64_t row, const std::vector<int64_t>& shape, const std::vector<int64_t>& strides) {
  int64_t offset = 0;
  for (size_t i = shape.size() - 1; i-- > 0; row /= shape[i]) offset += row % shape[i] * strides[i];
  return offset;
}

// Calls each(sample, row, begin, end) for all pieces of all rows.
template <class Each>
void for_rows(const std::vector<int64_t>& shape, int64_t samples, int threads, const Each& each) {
  const int64_t length = shape.back(), rows = product(shape) / length;
  const int64_t pieces = (length + kTaskFloats - 1) / kTaskFloats;                      // of a long row
  const int64_t together = std::max<int64_t>(kTaskFloats / length, 1);                  // short rows
  const int64_t tasks = pieces > 1 ? rows * pieces : (rows + together - 1) / together;  // of a sample
  parallel(samples * tasks, threads_for(samples * rows * length / kFloatsPerNs, threads), [&](int64_t i, int) {
    const int64_t sample = i / tasks, task = i % tasks;
    if (pieces > 1) {
      const int64_t begin = task % pieces * kTaskFloats;
      each(sample, task / pieces, begin, std::min(begin + kTaskFloats, length));
      return;
    }
    for (int64_t row = task * together; row < std::min((task + 1) * together, rows); row++)
      each(sample, row, 0, length);
  });
}

// Calls each(sample, channel, thread) for all planes; `floats` says how much work one is.
template <class Each>
void for_planes(int64_t channels, int64_t samples, int64_t floats, int threads, const Each& each) {
  threads = threads_for(samples * channels * floats / kFloatsPerNs, threads);
  parallel(samples * channels, threads, [&](int64_t i, int thread) { each(i / channels, i % channels, thread); });
}

}  // namespace

Combine combine_of(const std::string& name) {
  static const char* const names[] = {"first", "add", "subtract", "multiply", "divide", "maximum", "minimum", "slope"};
  for (int32_t i = 0; i < 8; i++)
    if (name == names[i]) return static_cast<Combine>(i);
  throw std::invalid_argument("operands cannot be combined by '" + name + "'");
}

Elementwise::Elementwise(Combine combine, Epilogue epilogue, std::vector<int64_t> shape, std::vector<int64_t> a_strides,
                         std::vector<int64_t> b_strides)
    : Op(sizes_of(shape, a_strides, b_strides), product(shape)),
      combine_(combine),
      epilogue_(epilogue),
      shape_(std::move(shape)),
      a_strides_(std::move(a_strides)),
      b_strides_(std::move(b_strides)) {
  const bool is_unary = combine_ == Combine::first;
  if (shape_.empty() || is_unary != b_strides_.empty()) throw std::invalid_argument("an axis, and b where it is used");
  if (a_strides_.back() > 1 || (!is_unary && b_strides_.back() > 1))
    throw std::invalid_argument("lines are contiguous");
}

void Elementwise::run(const Input* inputs, Output output, int64_t samples, int threads) const {
  const auto combine_line = lines().combine;
  const bool is_unary = b_strides_.empty();
  const int a_step = static_cast<int>(a_strides_.back()), b_step = is_unary ? 0 : static_cast<int>(b_strides_.back());
  for_rows(shape_, samples, threads, [&](int64_t sample, int64_t row, int64_t begin, int64_t end) {
    const float* a = inputs[0].data + sample * inputs[0].stride + row_offset(row, shape_, a_strides_) + begin * a_step;
    const float* b = a;
    if (!is_unary)
      b = inputs[1].data + sample * inputs[1].stride + row_offset(row, shape_, b_strides_) + begin * b_step;
    float* y = output.data + sample * output.stride + row * shape_.back() + begin;
    combine_line(combine_, epilogue_, a, a_step, b, b_step, y, end - begin);
  });
}

Copy::Copy(std::vector<int64_t> shape, std::vector<int64_t> strides)
    : Op({reach(shape, strides)}, product(shape)), shape_(std::move(shape)), strides_(std::move(strides)) {
  if (shape_.empty()) throw std::invalid_argument("an axis at least");
}

void Copy::run(const Input* inputs, Output output, int64_t samples, int threads) const {
  const int64_t step = strides_.back(), axes = static_cast<int64_t>(shape_.size());
  if (step != 1 && axes > 1 && strides_[axes - 2] == 1) {
    const int64_t height = shape_[axes - 2], planes = product(shape_) / (height * shape_.back());
    const int64_t bands = (height + kBandRows - 1) / kBandRows;
    for_planes(planes * bands, samples, kBandRows * shape_.back(), threads, [&](int64_t sample, int64_t i, int) {
      const int64_t row = i / bands * height + i % bands * kBandRows;
      transpose(inputs[0].data + sample * inputs[0].stride + row_offset(row, shape_, strides_),
                output.data + sample * output.stride + row * shape_.back(),
                std::min(kBandRows, height - i % bands * kBandRows));
    });
    return;
  }
  for_rows(shape_, samples, threads, [&](int64_t sample, int64_t row, int64_t begin, int64_t end) {
    const float* x = inputs[0].data + sample * inputs[0].stride + row_offset(row, shape_, strides_);
    float* y = output.data + sample * output.stride + row * shape_.back();
    if (step == 1) {
      std::copy(x + begin, x + end, y + begin);
    } else {
      for (int64_t i = begin; i < end; i++) y[i] = x[i * step];
    }
  });
}

// Rows of y that are neighbours in x: what is read of a line of cache is written before the next is read.
void Copy::transpose(const float* x, float* y, int64_t rows) const {
  const int64_t columns = shape_.back(), step = strides_.back();
  for (int64_t column = 0; column < columns; column++)
    for (int64_t row = 0; row < rows; row++) y[row * columns + column] = x[column * step + row];
}

Pad::Pad(int64_t channels, Plane input_size, std::array<int64_t, 4> borders, float value)
    : Op({channels * input_size[0] * input_size[1]},
         channels * (borders[2] + input_size[0] + borders[3]) * (borders[0] + input_size[1] + borders[1])),
      channels_(channels),
      height_(input_size[0]),
      width_(input_size[1]),
      left_(borders[0]),
      right_(borders[1]),
      top_(borders[2]),
      bottom_(borders[3]),
      value_(value) {
  if (top_ + height_ + bottom_ < 1 || left_ + width_ + right_ < 1) throw std::invalid_argument("nothing would be left");
}

void Pad::run(const Input* inputs, Output output, int64_t samples, int threads) const {
  const int64_t out_height = top_ + height_ + bottom_, out_width = left_ + width_ + right_;
  const int64_t begin = std::clamp<int64_t>(left_, 0, out_width);  // what a row of x fills of a row of y
  const int64_t end = std::clamp<int64_t>(left_ + width_, begin, out_width);
  for_planes(channels_, samples, out_height * out_width, threads, [&](int64_t sample, int64_t channel, int) {
    const float* x = inputs[0].data + sample * inputs[0].stride + channel * height_ * width_;
    float* y = output.data + sample * output.stride + channel * out_height * out_width;
    for (int64_t i = 0; i < out_height; i++, y += out_width) {
      const int64_t row = i - top_;
      if (row < 0 || row >= height_) {
        std::fill(y, y + out_width, value_);
        continue;
      }
      const float* from = x + row * width_ - left_;
      std::fill(y, y + begin, value_);
      std::copy(from + begin, from + end, y + begin);
      std::fill(y + end, y + out_width, value_);
    }
  });
}

BatchNorm::BatchNorm(int64_t channels, Plane input_size, float epsilon)
    : Op({channels * input_size[0] * input_size[1], channels, channels, channels, channels},
         channels * input_size[0] * input_size[1]),
      channels_(channels),
      plane_(input_size[0] * input_size[1]),
      epsilon_(epsilon) {}

void BatchNorm::run(const Input* inputs, Output output, int64_t samples, int threads) const {
  const float *mean = inputs[1].data, *variance = inputs[2].data, *weight = inputs[3].data, *bias = inputs[4].data;
  for_planes(channels_, samples, plane_, threads, [&](int64_t sample, int64_t channel, int) {
    const float scale = (weight ? weight[channel] : 1.0f) / std::sqrt(variance[channel] + epsilon_);
    const float shift = (bias ? bias[channel] : 0.0f) - mean[channel] * scale;
    lines().scale(inputs[0].data + sample * inputs[0].stride + channel * plane_, scale, shift,
                  output.data + sample * output.stride + channel * plane_, plane_);
  });
}

OfPlanes::OfPlanes(int64_t channels, Plane input_size, Plane output_size)
    : Op({channels * input_size[0] * input_size[1]}, channels * output_size[0] * output_size[1]),
      channels_(channels),
      height_(input_size[0]),
      width_(input_size[1]),
      out_plane_(output_size[0] * output_size[1]) {}

void OfPlanes::run(const Input* inputs, Output output, int64_t samples, int threads) const {
  const int64_t in_plane = height_ * width_;
  const Scratch line = scratch(width_, threads);
  constexpr int64_t kCall = 100;  // floats that are read in the time that the calls for a plane take
  for_planes(channels_, samples, std::max(in_plane, out_plane_) + kCall, threads,
             [&](int64_t sample, int64_t channel, int thread) {
               plane(inputs[0].data + sample * inputs[0].stride + channel * in_plane,
                     output.data + sample * output.stride + channel * out_plane_, line.of(thread));
             });
}

AveragePool::AveragePool(int64_t channels, Plane input_size, std::vector<Window> rows, std::vector<Window> columns)
    : OfPlanes(channels, input_size, {int64_t(rows.size()), int64_t(columns.size())}),
      rows_(std::move(rows)),
      columns_(std::move(columns)) {
  const auto within = [](const std::vector<Window>& windows, int64_t size) {
    return std::all_of(windows.begin(), windows.end(),
                       [&](const Window& w) { return 0 <= w.begin && w.begin < w.end && w.end <= size; });
  };
  if (!within(rows_, height_) || !within(columns_, width_)) throw std::invalid_argument("windows lie within the plane");
}

void AveragePool::plane(const float* x, float* y, float* line) const {
  const Lines& lines = escort::lines();
  for (const Window& row : rows_) {
    if (columns_.size() == 1 && columns_[0].begin == 0 && columns_[0].end == width_) {
      *y++ = lines.sum(x + row.begin * width_, (row.end - row.begin) * width_) / (row.count * columns_[0].count);
      continue;
    }
    for (int r = row.begin; r < row.end; r++) lines.accumulate(x + r * width_, line, width_, r == row.begin);
    for (const Window& column : columns_)
      *y++ = std::accumulate(line + column.begin, line + column.end, 0.0f) / (row.count * column.count);
  }
}

Resize::Resize(int64_t channels, Plane input_size, std::vector<Between> rows, std::vector<Between> columns)
    : OfPlanes(channels, input_size, {int64_t(rows.size()), int64_t(columns.size())}),
      rows_(std::move(rows)),
      columns_(std::move(columns)) {
  const auto within = [](const std::vector<Between>& all, int64_t size) {
    return std::all_of(all.begin(), all.end(), [&](const Between& b) {
      return std::min(b.low, b.high) >= 0 && std::max(b.low, b.high) < size;
    });
  };
  if (!within(rows_, height_) || !within(columns_, width_)) throw std::invalid_argument("both lie within the plane");
}

void Resize::plane(const float* x, float* y, float* line) const {
  const auto out_width = static_cast<int64_t>(columns_.size());
  const Between* before = nullptr;
  for (const Between& row : rows_) {
    const bool is_one = row.low == row.high;
    if (before && is_one && before->low == row.low && before->high == row.high) {  // as the row above it
      std::copy(y - out_width, y, y);
      y += out_width;
      continue;
    }
    before = &row;
    const float* from = x + row.low * width_;
    if (!is_one) {
      lines().blend(from, x + row.high * width_, row.share, line, width_);
      from = line;
    }
    for (const Between& column : columns_) {
      const float low = from[column.low];
      *y++ = column.low == column.high ? low : low * (1.0f - column.share) + from[column.high] * column.share;
    }
  }
}

Bicubic::Bicubic(int64_t channels, Plane input_size, std::vector<Cubic> rows, std::vector<Cubic> columns)
    : OfPlanes(channels, input_size, {int64_t(rows.size()), int64_t(columns.size())}),
      rows_(std::move(rows)),
      columns_(std::move(columns)) {
  const auto within = [](const std::vector<Cubic>& all, int64_t size) {
    return std::all_of(all.begin(), all.end(), [&](const Cubic& each) {
      return std::all_of(each.at.begin(), each.at.end(), [&](int32_t i) { return 0 <= i && i < size; });
    });
  };
  if (!within(rows_, height_) || !within(columns_, width_)) throw std::invalid_argument("all lie within the plane");
}

void Bicubic::plane(const float* x, float* y, float* line) const {
  const auto of_four = [](const Cubic& c, const auto& at) {
    return at(c.at[0]) * c.weight[0] + at(c.at[1]) * c.weight[1] + at(c.at[2]) * c.weight[2] +
           at(c.at[3]) * c.weight[3];
  };
  for (const Cubic& row : rows_) {
    for (int64_t i = 0; i < width_; i++) line[i] = of_four(row, [&](int32_t r) { return x[r * width_ + i]; });
    for (const Cubic& column : columns_) *y++ = of_four(column, [&](int32_t c) { return line[c]; });
  }
}

Softmax::Softmax(int64_t outer, int64_t size, int64_t inner)
    : Op({outer * size * inner}, outer * size * inner), outer_(outer), size_(size), inner_(inner) {
  if (outer < 1 || size < 1 || inner < 1) throw std::invalid_argument("sizes are positive");
  sample_ns = kSoftmaxWork * output_size / kFloatsPerNs;
}

void Softmax::run(const Input* inputs, Output output, int64_t samples, int threads) const {
  constexpr int64_t kPiece = 512;  // columns at a time
  const int64_t pieces = (inner_ + kPiece - 1) / kPiece;
  const Scratch memory = scratch(2 * kPiece, threads);
  for_planes(outer_ * pieces, samples, kSoftmaxWork * size_ * std::min(inner_, kPiece), threads,
             [&](int64_t sample, int64_t i, int thread) {
               const int64_t begin = i % pieces * kPiece, offset = i / pieces * size_ * inner_ + begin;
               const float* x = inputs[0].data + sample * inputs[0].stride + offset;
               float* y = output.data + sample * output.stride + offset;
               if (inner_ == 1) return row(x, y);
               columns(x, y, std::min(kPiece, inner_ - begin), memory.of(thread));
             });
}

void Softmax::row(const float* x, float* y) const {
  const float largest = lines().largest(x, size_);
  lines().exponential(x, &largest, 0, y, size_);
  const float sum = lines().sum(y, size_);
  lines().combine(Combine::divide, {}, y, 1, &sum, 0, y, size_);
}

void Softmax::columns(const float* x, float* y, int64_t n, float* line) const {
  float *largest = line, *sums = line + n;
  std::copy(x, x + n, largest);
  for (int64_t i = 1; i < size_; i++) lines().combine(Combine::maximum, {}, x + i * inner_, 1, largest, 1, largest, n);
  for (int64_t i = 0; i < size_; i++) {
    lines().exponential(x + i * inner_, largest, 1, y + i * inner_, n);
    lines().accumulate(y + i * inner_, sums, n, i == 0);
  }
  for (int64_t i = 0; i < size_; i++)
    lines().combine(Combine::divide, {}, y + i * inner_, 1, sums, 1, y + i * inner_, n);
}

Linear::Linear(int64_t in, int64_t out) : Op({in, in * out, out}, out), in_(in), out_(out) {
  if (in < 1 || out < 1) throw std::invalid_argument("sizes are positive");
  sample_ns = in * out / kFloatsPerNs;
}

void Linear::run(const Input* inputs, Output output, int64_t samples, int threads) const {
  constexpr int64_t kRows = 16;  // of a task
  const int64_t tasks = (out_ + kRows - 1) / kRows;
  parallel(tasks, threads_for(samples * sample_ns, threads), [&](int64_t i, int) {
    const int64_t row = i * kRows;
    lines().products(inputs[0].data, inputs[0].stride, samples, inputs[1].data + row * in_,
                     inputs[2].data ? inputs[2].data + row : nullptr, static_cast<int>(std::min(kRows, out_ - row)),
                     in_, output.data + row, output.stride);
  });
}

}  // namespace escort
