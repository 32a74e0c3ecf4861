// The activations that kernels fuse. Vectors are activated in epilogue.hpp.
#pragma once

#include <cstdint>

namespace escort {

enum class Activation : int32_t { none, relu, relu6 };  // in the order of `Activation` in problem.py

struct Epilogue {  // what runs behind the sums of one output channel and its residual add
  Activation activation;
  float slope;  // of negative numbers, for the activations that have one
};

}  // namespace escort
