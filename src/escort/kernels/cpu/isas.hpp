// The kernels by instruction set.
#pragma once

#include <string>
#include <vector>

#include "channel_swaps.hpp"
#include "depthwise.hpp"
#include "direct.hpp"
#include "lines.hpp"
#include "max_pool.hpp"

namespace escort {

struct Kernels {
  const Isa* direct;
  const DepthwiseIsa* depthwise;
  PoolPlane pool;
  const Lines* lines;
  SwapChannels swap_channels;
};

// Those that this build holds and this processor runs, fastest first.
const std::vector<Kernels>& supported();

// Those of that name. Throws std::invalid_argument where this machine has none.
const Kernels& find_isa(const std::string& name);

}  // namespace escort
