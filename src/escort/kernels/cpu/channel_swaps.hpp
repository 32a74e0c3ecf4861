// Swaps of a filter's channels, after which few halves of weight tiles have a remainder (spread_channels.hpp).
#pragma once

#include <cstdint>
#include <vector>

namespace escort {

// The sites at which each channel is not zero, as bits: those of a block of output channels for one tap are a word.
struct ChannelBits {
  int32_t channels;
  int64_t words;
  std::vector<uint64_t> bits;  // (channels + 1, words); the last one is none and has no nonzeros

  const uint64_t* of(int32_t channel) const { return bits.data() + channel * words; }
};

// Swaps channels in an order of them, whose groups of neighbours keep half of their two or four. Other groups stay.
// cell_cost: of a half with a remainder, of which a site costs 1.
using SwapChannels = void (*)(const ChannelBits&, int kept, int of, int cell_cost, std::vector<int32_t>& order);

extern const SwapChannels swap_channels_generic;
extern const SwapChannels swap_channels_avx2;
extern const SwapChannels swap_channels_avx512;
extern const SwapChannels swap_channels_neon;

}  // namespace escort
