// The computations of lines.hpp, compiled once per instruction set.
#include "lines.hpp"

#include "epilogue.hpp"
#include "vector.hpp"

namespace escort {
namespace {

// The larger or smaller value, or NaN where either is NaN, as in torch.
inline Vector larger(Vector a, Vector b) { return (a > b) | (a != a) ? a : b; }
inline Vector smaller(Vector a, Vector b) { return (a < b) | (a != a) ? a : b; }

template <Combine C>
inline Vector combined(Vector a, Vector b) {
  switch (C) {
    case Combine::add:
      return a + b;
    case Combine::subtract:
      return a - b;
    case Combine::multiply:
      return a * b;
    case Combine::divide:
      return a / b;
    case Combine::maximum:
      return larger(a, b);
    case Combine::minimum:
      return smaller(a, b);
    case Combine::slope:
      return a < 0.0f ? a * b : a;
    default:
      return a;
  }
}

// The first n floats of a vector, zeros behind them.
inline Vector load_some(const float* p, int n) {
  float some[kLanes] = {};
  for (int i = 0; i < n; i++) some[i] = p[i];
  return load(some);
}

inline void store_some(float* p, Vector v, int n) {
  float some[kLanes];
  store(some, v);
  for (int i = 0; i < n; i++) p[i] = some[i];
}

template <Combine C>
void combine_line(Activation bound, const float* a, int a_step, const float* b, int b_step, float* y, int64_t n) {
  const Vector one_a = Vector{} + *a, one_b = Vector{} + *b;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    store(y + i, bounded(combined<C>(a_step ? load(a + i) : one_a, b_step ? load(b + i) : one_b), bound));
  if (const int left = static_cast<int>(n - i)) {
    const Vector v = combined<C>(a_step ? load_some(a + i, left) : one_a, b_step ? load_some(b + i, left) : one_b);
    store_some(y + i, bounded(v, bound), left);
  }
}

void combine(Combine how, Epilogue epilogue, const float* a, int a_step, const float* b, int b_step, float* y,
             int64_t n) {
  using Line = void (*)(Activation, const float*, int, const float*, int, float*, int64_t);
  static constexpr Line all[] = {combine_line<Combine::first>,    combine_line<Combine::add>,
                                 combine_line<Combine::subtract>, combine_line<Combine::multiply>,
                                 combine_line<Combine::divide>,   combine_line<Combine::maximum>,
                                 combine_line<Combine::minimum>,  combine_line<Combine::slope>};
  const bool bounds = is_bound(epilogue.activation);
  all[static_cast<int32_t>(how)](bounds ? epilogue.activation : Activation::none, a, a_step, b, b_step, y, n);
  if (!bounds) activate(y, n, epilogue);
}

void scale(const float* x, float factor, float shift, float* y, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(y + i, load(x + i) * factor + shift);
  for (; i < n; i++) y[i] = x[i] * factor + shift;
}

inline float total(Vector v) {
  float lanes[kLanes], result = 0.0f;
  store(lanes, v);
  for (int i = 0; i < kLanes; i++) result += lanes[i];
  return result;
}

float sum(const float* x, int64_t n) {
  constexpr int kChains = 4;
  Vector sums[kChains] = {};
  int64_t i = 0;
  for (; i + kChains * kLanes <= n; i += kChains * kLanes)
    for (int c = 0; c < kChains; c++) sums[c] += load(x + i + c * kLanes);
  for (; i + kLanes <= n; i += kLanes) sums[0] += load(x + i);
  sums[1] += load_some(x + i, static_cast<int>(n - i));
  return total((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

float largest(const float* x, int64_t n) {
  float lanes[kLanes], result = x[0];
  int64_t i = 0;
  if (n >= kLanes) {
    Vector v = load(x);
    for (i = kLanes; i + kLanes <= n; i += kLanes) v = larger(load(x + i), v);
    store(lanes, v);
    for (const float lane : lanes) result = lane > result || lane != lane ? lane : result;
  }
  for (; i < n; i++) result = x[i] > result || x[i] != x[i] ? x[i] : result;
  return result;
}

void exponential(const float* x, const float* largest, int step, float* y, int64_t n) {
  const Vector one = Vector{} + *largest;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    store(y + i, Exponential(load(x + i) - (step ? load(largest + i) : one)).value());
  if (const int left = static_cast<int>(n - i)) {
    const Vector most = step ? load_some(largest + i, left) : one;
    store_some(y + i, Exponential(load_some(x + i, left) - most).value(), left);
  }
}

void accumulate(const float* x, float* y, int64_t n, bool first) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(y + i, first ? load(x + i) : load(y + i) + load(x + i));
  for (; i < n; i++) y[i] = first ? x[i] : y[i] + x[i];
}

void blend(const float* a, const float* b, float share, float* y, int64_t n) {
  const float rest = 1.0f - share;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(y + i, load(a + i) * rest + load(b + i) * share);
  for (; i < n; i++) y[i] = a[i] * rest + b[i] * share;
}

// The products of S samples with R rows.
template <int S, int R>
inline void block(const float* x, int64_t x_stride, const float* weight, const float* bias, int64_t n, float* y,
                  int64_t y_stride) {
  Vector sums[S][R] = {};
  int64_t i = 0;
  const auto add = [&](auto&& at) {
    Vector from[S];
    for (int s = 0; s < S; s++) from[s] = at(x + s * x_stride + i);
    for (int r = 0; r < R; r++) {
      const Vector w = at(weight + r * n + i);
      for (int s = 0; s < S; s++) sums[s][r] += from[s] * w;
    }
  };
  for (; i + kLanes <= n; i += kLanes) add([](const float* p) { return load(p); });
  if (i < n) add([&](const float* p) { return load_some(p, static_cast<int>(n - i)); });
  for (int s = 0; s < S; s++)
    for (int r = 0; r < R; r++) y[s * y_stride + r] = total(sums[s][r]) + (bias ? bias[r] : 0.0f);
}

// R rows of the weight are used by all samples while they are in cache.
template <int R>
inline void some_rows(const float* x, int64_t x_stride, int64_t samples, const float* weight, const float* bias,
                      int64_t n, float* y, int64_t y_stride) {
  int64_t s = 0;
  for (; s + 2 <= samples; s += 2) block<2, R>(x + s * x_stride, x_stride, weight, bias, n, y + s * y_stride, y_stride);
  if (s < samples) block<1, R>(x + s * x_stride, x_stride, weight, bias, n, y + s * y_stride, y_stride);
}

void products(const float* x, int64_t x_stride, int64_t samples, const float* weight, const float* bias, int rows,
              int64_t n, float* y, int64_t y_stride) {
  constexpr int kRows = 4;
  int r = 0;
  for (; r + kRows <= rows; r += kRows)
    some_rows<kRows>(x, x_stride, samples, weight + r * n, bias ? bias + r : nullptr, n, y + r, y_stride);
  for (; r < rows; r++)
    some_rows<1>(x, x_stride, samples, weight + r * n, bias ? bias + r : nullptr, n, y + r, y_stride);
}

// V vectors of columns, the last of which may be cut off, for S samples.
template <int S, int V>
inline void mix_block(const float* x, int64_t x_stride, const float* weight, int64_t pitch, const float* bias,
                      int columns, int64_t n, float* y, int64_t y_stride) {
  Vector sums[S][V];
  for (int s = 0; s < S; s++)
    for (int v = 0; v < V; v++) sums[s][v] = load(bias + v * kLanes);
  for (int64_t i = 0; i < n; i++, weight += pitch) {
    for (int v = 0; v < V; v++) {
      const Vector w = load(weight + v * kLanes);
      for (int s = 0; s < S; s++) sums[s][v] += x[s * x_stride + i] * w;
    }
  }
  for (int s = 0; s < S; s++)
    for (int v = 0; v < V; v++)
      store_lanes(y + s * y_stride + v * kLanes, sums[s][v], min(columns - v * kLanes, kLanes));
}

void mix(const float* x, int64_t x_stride, int64_t samples, const float* weight, int64_t pitch, const float* bias,
         int columns, int64_t n, float* y, int64_t y_stride) {
  using Block = void (*)(const float*, int64_t, const float*, int64_t, const float*, int, int64_t, float*, int64_t);
  static constexpr Block blocks[2][4] = {{mix_block<1, 1>, mix_block<1, 2>, mix_block<1, 3>, mix_block<1, 4>},
                                         {mix_block<2, 1>, mix_block<2, 2>, mix_block<2, 3>, mix_block<2, 4>}};
  for (int k = 0; k < columns; k += 4 * kLanes) {
    const int left = min(columns - k, 4 * kLanes), v = (left + kLanes - 1) / kLanes - 1;
    for (int64_t s = 0; s < samples; s += 2)
      blocks[s + 2 <= samples][v](x + s * x_stride, x_stride, weight + k, pitch, bias + k, left, n,
                                  y + s * y_stride + k, y_stride);
  }
}

}  // namespace

extern const Lines ESCORT_FOR_ISA(lines);
const Lines ESCORT_FOR_ISA(lines) = {combine, scale, sum, largest, exponential, accumulate, blend, products, mix};

}  // namespace escort
