// The epilogue of sparse_tc.cuh: sums with bias and residual, activated, reach y through a staging in shared memory.
// One of three ways has the struct Store: floats (sparse_tc_store_floats.cuh), 16-bit elements to NCHW
// (sparse_tc_store_planes.cuh) and to NHWC (sparse_tc_store_boxes.cuh).
#pragma once
#if STORAGE == 1
#include <cuda_fp16.h>
#elif STORAGE == 2
#include <cuda_bf16.h>
#endif
#include "activation.cuh"
#include "sparse_tc_ptx.cuh"
#include "sparse_tc_split.cuh"
#include "sparse_tc_tiles.cuh"
#define BOXES_OUT (STORAGE && !OUT_NCHW)  // the copy engine stores y and loads the residual; else warps do

#if STORAGE == 0
using Element = float;
#else
using Element = u16;
#endif

// Where y goes, and where the residual is.
#if BOXES_OUT
#define OUTPUTS const __grid_constant__ TensorMap y_map, const __grid_constant__ TensorMap residual_map
struct Outputs {
  const TensorMap &y_map, &residual_map;
  const float* slopes;  // one per output channel of all tiles
};
#define MAKE_OUTPUTS y_map, residual_map
#else
#define OUTPUTS const int* __restrict__ out_order, Element* __restrict__ y, const Element* __restrict__ residual
struct Outputs {
  const int* out_order;  // which output channel stands at each place of all tiles; -1: none
  Element* y;
  const Element* residual;
  const float* slopes;  // one at each place
};
#define MAKE_OUTPUTS out_order, y, residual
#endif

using Sums = float[M_BLOCKS][PIXELS / 2];

// A lane's: of each 64 channels it has sums of two.
struct Bias {
  float low[M_BLOCKS], high[M_BLOCKS];
  __device__ explicit Bias(const float* __restrict__ bias) {
#pragma unroll
    for (int i = 0; i < M_BLOCKS; i++) {
      const float* const channel = bias + i * 64 + threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4;
      low[i] = __ldg(channel), high[i] = __ldg(channel + 8);
    }
  }
};

// Those of the activation, where it has any.
struct Slopes {
  float low = 0.f, high = 0.f;
  __device__ explicit Slopes(const float* __restrict__ slopes) {
    const float* const channel = slopes + threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4;
    if (SLOPED) low = __ldg(channel), high = __ldg(channel + 8);
  }
};

// Whether anything is done to sums with bias and residual.
__device__ bool activates(const Params& p) { return BEYOND_BOUNDS || p.bound; }

#if STORAGE == 1
__device__ float2 unpack(u32 pair) { return __half22float2(reinterpret_cast<const __half2&>(pair)); }
constexpr u32 SIX = 0x46004600, INFINITE = 0x7c007c00;  // in pairs
#elif STORAGE == 2
__device__ float2 unpack(u32 pair) { return __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(pair)); }
constexpr u32 SIX = 0x40c040c0, INFINITE = 0x7f807f80;
#endif

#if STORAGE
// What a bound leaves of a pair at most.
__device__ u32 most_of(int bound) { return bound == 2 ? SIX : INFINITE; }

// 8 channels twice x 8 pixels of sums, 4 a lane, with bias as two words of outputs. What is known of the epilogue makes
// code of its own, since it is done for every output.
template <bool RESIDUAL, bool ACTIVATED>
__device__ void finish(const float* d, float bias_low, float bias_high, const Slopes& slopes, const u32* residuals,
                       u32 most, u32* out) {
  float v[4] = {d[0] + bias_low, d[1] + bias_low, d[2] + bias_high, d[3] + bias_high};
#pragma unroll
  for (int i = 0; i < 2; i++) {
    if constexpr (RESIDUAL) {
      const float2 r = unpack(residuals[i]);
      v[2 * i] += r.x, v[2 * i + 1] += r.y;
    }
    if constexpr (ACTIVATED && BEYOND_BOUNDS) {
      const float slope = i ? slopes.high : slopes.low;
      out[i] = pack<false>(activated(v[2 * i], slope), activated(v[2 * i + 1], slope));
    } else {
      out[i] = pack<ACTIVATED>(v[2 * i], v[2 * i + 1]);
      if constexpr (ACTIVATED) out[i] = smaller(out[i], most);
    }
  }
}
#endif

#if STORAGE == 0
#include "sparse_tc_store_floats.cuh"
#elif OUT_NCHW
#include "sparse_tc_store_planes.cuh"
#else
#include "sparse_tc_store_boxes.cuh"
#endif
