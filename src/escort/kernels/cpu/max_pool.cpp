// The kernel of max_pool.hpp, compiled once per instruction set.
#include "max_pool.hpp"

#include "vector.hpp"

namespace escort {
namespace {

// The larger value, or NaN where either is NaN, as torch pools.
inline Vector larger(Vector a, Vector b) { return (a > b) | (a != a) ? a : b; }
inline float larger(float a, float b) { return (a > b || a != a) ? a : b; }

// The maximum over the rows of output row i's windows, for each column of the input.
void pool_rows(const Pool& p, const float* x, int i, float* line) {
  bool first = true;
  for (int r = 0; r < p.rows; r++) {
    const int row = i * p.row_stride - p.top + r * p.row_dilation;
    if (row < 0 || row >= p.height) continue;
    const float* from = x + int64_t(row) * p.width;
    int j = 0;
    for (; j + kLanes <= p.width; j += kLanes) {
      const Vector v = load(from + j);
      store(line + j, first ? v : larger(v, load(line + j)));
    }
    for (; j < p.width; j++) line[j] = first ? from[j] : larger(from[j], line[j]);
    first = false;
  }
  for (int j = 0; first && j < p.width; j++) line[j] = -__builtin_inff();  // a dilated window can miss a small plane
}

// One row of outputs: the maximum over the columns of its windows. `line` starts with the left padding.
void pool_columns(const Pool& p, const float* line, float* y) {
  int j = 0;
  if (p.column_stride <= 2) {
    for (; j + kLanes <= p.out_width; j += kLanes) {
      const float* from = line + j * p.column_stride;
      const auto at = [&](int s) {
        const float* tap = from + s * p.column_dilation;
        return p.column_stride == 1 ? load(tap) : pick_evens(load(tap), load(tap + kLanes - 1));
      };
      Vector best = at(0);
      for (int s = 1; s < p.columns; s++) best = larger(at(s), best);
      store(y + j, best);
    }
  }
  for (; j < p.out_width; j++) {
    const float* from = line + j * p.column_stride;
    float best = from[0];
    for (int s = 1; s < p.columns; s++) best = larger(from[s * p.column_dilation], best);
    y[j] = best;
  }
}

void pool_plane(const Pool& p, const float* x, float* y, float* line) {
  const int reach = (p.out_width - 1) * p.column_stride + (p.columns - 1) * p.column_dilation + 1;
  for (int j = 0; j < p.left; j++) line[j] = -__builtin_inff();
  for (int j = p.left + p.width; j < reach; j++) line[j] = -__builtin_inff();
  for (int i = 0; i < p.out_height; i++) {
    pool_rows(p, x, i, line + p.left);
    pool_columns(p, line, y + int64_t(i) * p.out_width);
  }
}

}  // namespace

extern const PoolPlane ESCORT_FOR_ISA(pool);
const PoolPlane ESCORT_FOR_ISA(pool) = pool_plane;

}  // namespace escort
