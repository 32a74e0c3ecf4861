// The kernel of depthwise.hpp, compiled once per instruction set.
#include "depthwise.hpp"

#include "epilogue.hpp"
#include "staging.hpp"

namespace escort {
namespace {

// Vectors of which each of P planes fills an equal share of the lanes; what belongs to the second lies `apart` from
// that of the first.
template <int P>
struct Lanes;

template <>
struct Lanes<1> {
  static Vector gather(const float* p, int64_t) { return load(p); }
  static Vector spread(const float* p, int64_t) { return *p - Vector{}; }
  static void scatter(float* p, int64_t, Vector v) { store(p, v); }
};

#if defined(__AVX512F__)
template <>
struct Lanes<2> {
  using Half = Floats<8>;
  static Vector join(Half::Type low, Half::Type high) {
    return __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  }
  static Vector gather(const float* p, int64_t apart) { return join(Half::load(p), Half::load(p + apart)); }
  static Vector spread(const float* p, int64_t apart) { return join(p[0] - Half::Type{}, p[apart] - Half::Type{}); }
  static void scatter(float* p, int64_t apart, Vector v) {
    Half::store(p, __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7));
    Half::store(p + apart, __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15));
  }
};
#endif

// A pointer to what belongs to the first plane, and how far from it that of the second lies.
template <class T>
struct Of {
  T* first;
  int64_t apart;
};

// A block of output rows of one plane, or of two side by side.
struct Block {
  Of<const float> stage;  // from the first staged row that it reads
  Of<const float> weights;
  Of<const float> bias;
  Of<const float> residual;  // like y, or null
  Of<float> y;               // from its first row
  int64_t left;              // floats of the band from there on
  int rows;
  float low, high;  // what the sums are bounded by
};

// Taps that are known when this is compiled: an input vector is loaded once for all rows that read it.
template <int Rows, int Columns, int RowStride>
struct Tuned {
  template <int R, int P>
  static void add(const Depthwise& d, const Block& block, int column, Vector (&sum)[R]) {
#pragma GCC unroll 5
    for (int s = 0; s < Columns; s++) {
      Vector weight[Rows];
#pragma GCC unroll 5
      for (int r = 0; r < Rows; r++)
        weight[r] = Lanes<P>::spread(block.weights.first + r * Columns + s, block.weights.apart);
      const float* p = block.stage.first + d.tap_columns[s] + column;
#pragma GCC unroll 32
      for (int i = 0; i < (R - 1) * RowStride + Rows; i++, p += d.pitch) {
        const Vector v = in_register(Lanes<P>::gather(p, block.stage.apart));
#pragma GCC unroll 5
        for (int r = 0; r < Rows; r++)
          if (i >= r && (i - r) % RowStride == 0 && (i - r) / RowStride < R) sum[(i - r) / RowStride] += weight[r] * v;
      }
    }
  }
};

// Taps of any number, stride and dilation.
struct Any {
  template <int R, int P>
  static void add(const Depthwise& d, const Block& block, int column, Vector (&sum)[R]) {
    const float* weight = block.weights.first;
    const int64_t row_step = int64_t(d.row_stride) * d.pitch;
    for (int r = 0; r < d.kernel_rows; r++) {
      const float* row = block.stage.first + int64_t(r) * d.row_dilation * d.pitch + column;
      for (int s = 0; s < d.kernel_columns; s++, weight++) {
        const Vector w = Lanes<P>::spread(weight, block.weights.apart);
        const float* p = row + d.tap_columns[s];
#pragma GCC unroll 8
        for (int o = 0; o < R; o++, p += row_step) sum[o] += w * Lanes<P>::gather(p, block.stage.apart);
      }
    }
  }
};

// Writes a vector of an output row. At the end of a band, where rows are shorter than a vector, it writes what is left.
template <int P>
inline void write(const Block& block, int64_t place, int rest, Vector v) {
  constexpr int kShare = kLanes / P;
  float* y = block.y.first + place;
  if (__builtin_expect(place + kShare <= block.left, 1)) return Lanes<P>::scatter(y, block.y.apart, v);
  alignas(64) float part[2 * kLanes];
  store(part, v);
  for (int p = 0; p < P; p++) copy(y + p * block.y.apart, part + p * kShare, rest);
}

// Adds the residual to a vector of each row of a block, and writes it. It is compiled once for all sizes of blocks.
template <int P>
__attribute__((noinline)) void finish_block(const Depthwise& d, const Block& block, int column, const float* sums) {
  constexpr int kShare = kLanes / P;
  const int rest = d.out_width - column;
  const Vector low = block.low - Vector{}, high = block.high - Vector{};
  int64_t place = column;
  for (int o = 0; o < block.rows; o++, place += d.out_width) {
    const float* residual = block.residual.first + place;
    alignas(64) float part[2 * kLanes] = {};
    const bool is_whole = place + kShare <= block.left;
    if (!is_whole)
      for (int p = 0; p < P; p++) copy(part + p * kShare, residual + p * block.residual.apart, rest);
    const Vector more = is_whole ? Lanes<P>::gather(residual, block.residual.apart) : load(part);
    write<P>(block, place, rest, at_most(high, at_least(low, load(sums + o * kLanes) + more)));
  }
}

// Computes a block of R rows. The last vector of a row overlaps the one before it. Where a row is shorter than a
// vector, what is written behind it is overwritten by the next row.
template <class Taps, int R, int P>
void compute(const Depthwise& d, const Block& block) {
  constexpr int kShare = kLanes / P;
  const int last = d.out_width > kShare ? d.out_width - kShare : 0;
  for (int column = 0;; column = column + kShare < last ? column + kShare : last) {
    Vector sum[R];
    const Vector bias = Lanes<P>::spread(block.bias.first, block.bias.apart);
#pragma GCC unroll 8
    for (int o = 0; o < R; o++) sum[o] = bias;
    Taps::template add<R, P>(d, block, column, sum);
    if (!block.residual.first) {
      const Vector low = block.low - Vector{}, high = block.high - Vector{};
#pragma GCC unroll 8
      for (int o = 0; o < R; o++) {
        sum[o] = at_most(high, at_least(low, sum[o]));
        write<P>(block, int64_t(o) * d.out_width + column, d.out_width - column, sum[o]);
      }
    } else {
      alignas(64) float sums[R * kLanes];
#pragma GCC unroll 8
      for (int o = 0; o < R; o++) store(sums + o * kLanes, sum[o]);
      finish_block<P>(d, block, column, sums);
    }
    if (column == last) return;
  }
}

using Compute = void (*)(const Depthwise&, const Block&);

// By the number of rows less one.
template <class Taps, int P>
constexpr Compute by_rows[kMostBlockRows] = {compute<Taps, 1, P>, compute<Taps, 2, P>, compute<Taps, 3, P>,
                                             compute<Taps, 4, P>, compute<Taps, 5, P>, compute<Taps, 6, P>,
                                             compute<Taps, 7, P>, compute<Taps, 8, P>};

template <int P>
const Compute* computes(const Depthwise& d) {
  const auto is = [&](int size, int stride) {
    return d.kernel_rows == size && d.kernel_columns == size && d.row_stride == stride && d.row_dilation == 1;
  };
  if (is(3, 1)) return by_rows<Tuned<3, 3, 1>, P>;
  if (is(3, 2)) return by_rows<Tuned<3, 3, 2>, P>;
  if (is(5, 1)) return by_rows<Tuned<5, 5, 1>, P>;
  if (is(5, 2)) return by_rows<Tuned<5, 5, 2>, P>;
  return by_rows<Any, P>;
}

// Stages `count` input rows of a plane from `first` on, of which some may lie in the padding. What lies between the
// phases was cleared before and stays zero, and so do the rows of padding where a plane is one band.
void stage_rows(const Depthwise& d, const float* plane, int first, int count, float* stage) {
  const int above = first < 0 ? (-first < count ? -first : count) : 0;
  const int inside = d.height - first < count ? d.height - first : count;  // and above
  for (int i = 0; d.bands > 1 && i < count; i++) {
    if (i >= above && i < inside) continue;
    for (int n = 0; n < d.phase_count; n++)
      for (int j = 0; j < d.phases[n].length; j++) stage[int64_t(i) * d.pitch + d.phases[n].position + j] = 0.0f;
  }
  const int rows = inside - above;
  if (rows <= 0) return;
  stage += int64_t(above) * d.pitch;
  plane += int64_t(first + above) * d.width;
  if (d.column_stride == 2 && d.phase_count == 2) {
    const Phase &even = d.phases[d.phases[0].first_column], &odd = d.phases[1 - d.phases[0].first_column];
    return split_rows({stage + even.position, d.pitch}, odd.position - even.position, {plane, d.width}, rows, d.width);
  }
  for (int n = 0; n < d.phase_count; n++) {
    const Phase& phase = d.phases[n];
    copy_rows({stage + phase.position, d.pitch}, {plane + phase.first_column, d.width}, rows, phase.length,
              d.column_stride);
  }
}

// Rows that are cut into parts of nearly the same size: part i ends where part i + 1 begins.
struct Cut {
  int size, rest;

  Cut(int rows, int parts) : size(rows / parts), rest(rows % parts) {}
  int begin(int i) const { return i * size + (i < rest ? i : rest); }
};

// Rows begin .. end of a plane, or of two side by side, from `channel` on.
template <int P>
void run_band(const Depthwise& d, const Compute* compute_rows, Block block, int channel, int begin, int end,
              const float* x, float* stage) {
  const int64_t plane_size = int64_t(d.height) * d.width, out_size = int64_t(d.out_height) * d.out_width;
  const int taps = d.kernel_rows * d.kernel_columns;
  // The last plane of an odd number is computed twice, side by side.
  const int apart = P == 2 && channel + 1 < d.channels ? 1 : 0;
  const int rows = end - begin, blocks = (rows + d.block_rows - 1) / d.block_rows;
  const Cut cut(rows, blocks);
  const int staged = (rows - 1) * d.row_stride + (d.kernel_rows - 1) * d.row_dilation + 1;
  for (int p = 0; p < P; p++)
    stage_rows(d, x + (channel + p * apart) * plane_size, begin * d.row_stride - d.top, staged,
               stage + p * d.stage_size);
  const int k_apart = apart * d.multiplier;
  float* y = block.y.first;
  const float* residual = block.residual.first;
  for (int k = channel * d.multiplier; k < (channel + 1) * d.multiplier; k++) {
    for (int b = 0; b < blocks; b++) {
      const int row = cut.begin(b);
      const int64_t place = k * out_size + int64_t(begin + row) * d.out_width;
      block.stage = {stage + int64_t(row) * d.row_stride * d.pitch, d.stage_size};
      block.weights = {d.weights + int64_t(k) * taps, int64_t(k_apart) * taps};
      block.bias = {d.bias + k, k_apart};
      block.residual = {residual ? residual + place : nullptr, k_apart * out_size};
      block.y = {y + place, k_apart * out_size};
      block.left = int64_t(rows - row) * d.out_width;
      block.rows = cut.begin(b + 1) - row;
      compute_rows[block.rows - 1](d, block);
    }
    if (is_bound(d.activation)) continue;
    for (int other = k; other <= k + k_apart; other += d.multiplier)  // what lies in the level-1 cache now
      activate(y + other * out_size + int64_t(begin) * d.out_width, int64_t(rows) * d.out_width,
               {d.activation, d.slope[other]});
  }
}

template <int P>
void run_bands(const Depthwise& d, const DepthwiseTensors& tensors, int64_t first, int64_t end, float* stage) {
  const Compute* compute_rows = computes<P>(d);
  Block block = {};
  const bool is_relu = d.activation == Activation::relu || d.activation == Activation::relu6;
  block.low = is_relu ? 0.0f : -__builtin_inff();
  block.high = d.activation == Activation::relu6 ? 6.0f : __builtin_inff();
  const Cut cut(d.out_height, d.bands);
  int64_t group = first % d.groups, sample = first / d.groups / d.bands;
  int band = first / d.groups % d.bands;
  for (int64_t i = first; i < end; i++) {
    block.residual.first = tensors.residual ? tensors.residual + sample * tensors.residual_stride : nullptr;
    block.y.first = tensors.y + sample * tensors.y_stride;
    run_band<P>(d, compute_rows, block, static_cast<int>(group) * P, cut.begin(band), cut.begin(band + 1),
                tensors.x + sample * tensors.x_stride, stage);
    if (++group < d.groups) continue;
    group = 0;
    if (++band < d.bands) continue;
    band = 0;
    sample++;
  }
}

void run(const Depthwise& d, const DepthwiseTensors& tensors, int64_t first, int64_t end, float* scratch) {
  const int64_t size = int64_t(d.planes) * d.stage_size + kLanes;
  for (int64_t i = 0; i < size; i++) scratch[i] = 0.0f;
#if defined(__AVX512F__)
  if (d.planes == 2) return run_bands<2>(d, tensors, first, end, scratch);
#endif
  run_bands<1>(d, tensors, first, end, scratch);
}

}  // namespace

extern const DepthwiseIsa ESCORT_FOR_ISA(depthwise);
#if defined(__AVX512F__)
const DepthwiseIsa ESCORT_FOR_ISA(depthwise) = {run, kLanes, 2};
#else
const DepthwiseIsa ESCORT_FOR_ISA(depthwise) = {run, kLanes, 1};
#endif

}  // namespace escort
