// The activations that kernels fuse. epilogue.hpp computes them.
#pragma once

#include <cstdint>

namespace escort {

// In the order of `Activation` in problem.py, whose numbers tables hold.
enum class Activation : int32_t {
  none,
  relu,
  relu6,
  leaky_relu,
  prelu,
  sigmoid,
  tanh,
  silu,
  gelu,
  gelu_tanh,
  hardsigmoid,
  hardswish,
};

struct Epilogue {  // what runs behind the sums of one output channel and its residual add
  Activation activation;
  float slope;  // of negative numbers, for leaky_relu and prelu
};

// Whether an activation only bounds its argument, which costs no more than an instruction or two per vector.
static inline bool is_bound(Activation activation) { return activation <= Activation::relu6; }

}  // namespace escort
