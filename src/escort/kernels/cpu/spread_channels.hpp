// An order of a filter's channels for sparse tensor cores, which keep few nonzeros of each group of neighbours.
#pragma once

#include <cstdint>
#include <vector>

namespace escort {

constexpr int64_t kBlock = 64;  // output channels that a warpgroup multiplies at the least

// Where a filter is not zero. A site is a tap of an output channel; those of a block of output channels follow one
// another, and each tap's begin at a multiple of a block.
struct Pattern {
  const int32_t* site_of;  // of each nonzero
  const int32_t* channel_of;
  int64_t nonzeros;
  int64_t sites;
  int32_t channels;
};

// The channels in groups of `of`, in which few nonzeros of a site exceed the `kept` that a group keeps, and these are
// in few halves of weight tiles, which are blocks of output channels by eight groups by a tap.
//
// Channels are placed one by one, those with most nonzeros first, each in the group where fewest of its nonzeros exceed
// what is kept. Groups are sorted by how many exceed in them; the last one, which may be smaller than the others, stays
// last. Then channels or groups swap places, at random but the same ones each time, wherever that makes nothing worse:
// a half with any remainder is multiplied, so that it costs as much as so many sites.
std::vector<int32_t> spread_channels(const Pattern& pattern, int kept, int of, int cell_cost);

}  // namespace escort
