// Max pooling of float32 planes on the CPU.
#pragma once

#include <cstdint>

namespace escort {

struct Pool {  // what all planes have in common
  int32_t height, width, out_height, out_width;
  int32_t rows, columns;  // of the window
  int32_t row_stride, column_stride, row_dilation, column_dilation;
  int32_t top, left;  // padding, whose values no maximum takes
};

// Pools one plane. `line` is scratch for one row with its padding, as far as the windows reach.
using PoolPlane = void (*)(const Pool&, const float* x, float* y, float* line);

extern const PoolPlane pool_generic;
extern const PoolPlane pool_avx2;
extern const PoolPlane pool_avx512;
extern const PoolPlane pool_neon;

}  // namespace escort
