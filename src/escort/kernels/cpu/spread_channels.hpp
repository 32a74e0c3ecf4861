// An order of a filter's channels for sparse tensor cores, which keep few nonzeros of each group of neighbours.
#pragma once

#include <cstdint>
#include <vector>

namespace escort {

// Where a filter is not zero. A site is a tap of an output channel.
struct Pattern {
  const int32_t* site_of;  // of each nonzero
  const int32_t* channel_of;
  int64_t nonzeros;
  int64_t sites;
  int32_t channels;
};

// The channels in groups of `of`, in which few nonzeros of a site exceed the `kept` that a group keeps.
//
// Channels are placed one by one, those with most nonzeros first, each in the group where fewest of its nonzeros exceed
// what is kept. Then two channels of different groups swap places as long as fewer exceed afterwards, and for
// about a second at most: the work is counted, so that the order is the same each time. Groups are sorted by how many
// exceed in them; the last one, which may be smaller than the others, stays last.
std::vector<int32_t> spread_channels(const Pattern& pattern, int kept, int of);

}  // namespace escort
