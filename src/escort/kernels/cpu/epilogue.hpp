// What runs behind the sums of a convolution: residual add and activation. For kernels, which are compiled once per
// instruction set.
#pragma once

#include "activation.hpp"
#include "vector.hpp"

namespace escort {
namespace {

// The activation of a Vector or a float. A NaN passes, as in torch.
template <class T>
inline T activate(T v, Epilogue epilogue) {
  if (epilogue.activation == Activation::none) return v;
  const T zero = T{};
  v = v < zero ? zero : v;
  if (epilogue.activation == Activation::relu6) {
    const T six = T{} + 6.0f;
    v = v > six ? six : v;
  }
  return v;
}

// activate(sum + residual) of a vector or a float; `residual` may be null.
inline Vector finish(Vector sum, const float* residual, Epilogue epilogue) {
  return activate(residual ? sum + load(residual) : sum, epilogue);
}
// Finishes the first `count` lanes of `sum` and writes them to y.
inline void finish_lanes(float* y, Vector sum, const float* residual, int count, Epilogue epilogue) {
  if (residual) sum += load_lanes(residual, (1 << count) - 1);
  store_lanes(y, activate(sum, epilogue), count);
}
inline float finish(float sum, const float* residual, Epilogue epilogue) {
  return activate(residual ? sum + *residual : sum, epilogue);
}

}  // namespace
}  // namespace escort
