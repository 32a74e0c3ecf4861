// The search of channel_swaps.hpp, compiled once per instruction set.
#include "channel_swaps.hpp"

#include <algorithm>
#include <bit>
#include <utility>

#include "vector.hpp"

namespace escort {
namespace {

constexpr int kGroupsOfHalf = 8;           // of half a weight tile's input channels
constexpr int64_t kMostSwaps = 150'000;    // that are tried,
constexpr int64_t kMostWords = 4'000'000;  // and words that these read: a hundredth of a second's work
constexpr int kGroupsInstead = 8;          // every so many tries two groups swap instead of two channels

// Sites at which more than half of a group's channels are not zero.
template <int KEPT>
void exceed(const uint64_t* const* channels, int64_t words, uint64_t* exceeding) {
  for (int64_t w = 0; w < words; w++) {
    if constexpr (KEPT == 1) {
      exceeding[w] = channels[0][w] & channels[1][w];
    } else {
      const uint64_t a = channels[0][w], b = channels[1][w], c = channels[2][w], d = channels[3][w];
      exceeding[w] = (a & b & (c | d)) | (c & d & (a | b));
    }
  }
}

// Tries swaps at random, the same ones each time, and keeps those after which nothing is worse.
template <int KEPT>
class Swaps {
 public:
  static constexpr int OF = 2 * KEPT;

  Swaps(const ChannelBits& bits, int cell_cost, std::vector<int32_t>& order)
      : bits_(bits),
        cell_cost_(cell_cost),
        words_(bits.words),
        order_(order),
        whole_(static_cast<int32_t>(order.size()) / OF),
        groups_((static_cast<int32_t>(order.size()) + OF - 1) / OF),
        exceeding_(groups_ * words_),
        counts_((groups_ + kGroupsOfHalf - 1) / kGroupsOfHalf * words_),
        new_a_(words_),
        new_b_(words_) {
    order_.resize(groups_ * OF, bits.channels);
    for (int32_t group = 0; group < groups_; group++) {
      exceed_of(group, exceeding(group));
      for (int64_t w = 0; w < words_; w++) counts(group)[w] += std::popcount(exceeding(group)[w]);
    }
    for (const int32_t count : counts_) left_ += count;
  }

  void run() {
    const int64_t most = std::min(kMostSwaps, kMostWords / std::max<int64_t>(words_, 1));
    for (int64_t i = 0; i < most && left_ > 0; i++) {
      const int32_t a = below(bits_.channels), b = below(bits_.channels);
      if (i % kGroupsInstead == 0)
        swap_groups(a / OF, b / OF);
      else
        swap_channels(a, b);
    }
    order_.resize(bits_.channels);
  }

 private:
  uint64_t* exceeding(int32_t group) { return exceeding_.data() + group * words_; }
  int32_t* counts(int32_t group) { return counts_.data() + group / kGroupsOfHalf * words_; }

  void exceed_of(int32_t group, uint64_t* sites) {
    const uint64_t* channels[OF];
    for (int i = 0; i < OF; i++) channels[i] = bits_.of(order_[group * OF + i]);
    exceed<KEPT>(channels, words_, sites);
  }

  int32_t below(int32_t end) {  // Marsaglia's xorshift
    random_ ^= random_ << 13, random_ ^= random_ >> 7, random_ ^= random_ << 17;
    return static_cast<int32_t>((random_ >> 32) * end >> 32);
  }

  static int change(uint64_t now, uint64_t before) { return std::popcount(now) - std::popcount(before); }

  // Two groups have other sites. Keeps that and returns true, unless it costs more.
  bool replace(int32_t a, int32_t b, const uint64_t* now_a, const uint64_t* now_b) {
    uint64_t *before_a = exceeding(a), *before_b = exceeding(b);
    int32_t *count_a = counts(a), *count_b = counts(b);
    int cells = 0, sites = 0;
    if (count_a == count_b) {
      for (int64_t w = 0; w < words_; w++) {
        const int more = change(now_a[w], before_a[w]) + change(now_b[w], before_b[w]);
        sites += more, cells += (count_a[w] + more > 0) - (count_a[w] > 0);
      }
    } else {
      for (int64_t w = 0; w < words_; w++) {
        const int more_a = change(now_a[w], before_a[w]), more_b = change(now_b[w], before_b[w]);
        sites += more_a + more_b;
        cells += (count_a[w] + more_a > 0) - (count_a[w] > 0) + (count_b[w] + more_b > 0) - (count_b[w] > 0);
      }
    }
    if (cell_cost_ * cells + sites > 0) return false;
    left_ += sites;
    for (int64_t w = 0; w < words_; w++) {
      count_a[w] += change(now_a[w], before_a[w]), count_b[w] += change(now_b[w], before_b[w]);
      before_a[w] = now_a[w], before_b[w] = now_b[w];
    }
    return true;
  }

  void swap_channels(int32_t at, int32_t other) {
    const int32_t a = at / OF, b = other / OF;
    if (a == b) return;
    std::swap(order_[at], order_[other]);
    exceed_of(a, new_a_.data()), exceed_of(b, new_b_.data());
    if (!replace(a, b, new_a_.data(), new_b_.data())) std::swap(order_[at], order_[other]);
  }

  void swap_groups(int32_t a, int32_t b) {
    if (a / kGroupsOfHalf == b / kGroupsOfHalf || std::max(a, b) >= whole_) return;
    std::copy_n(exceeding(a), words_, new_b_.data()), std::copy_n(exceeding(b), words_, new_a_.data());
    if (replace(a, b, new_a_.data(), new_b_.data()))
      std::swap_ranges(order_.begin() + a * OF, order_.begin() + (a + 1) * OF, order_.begin() + b * OF);
  }

  const ChannelBits& bits_;
  const int cell_cost_;
  const int64_t words_;
  std::vector<int32_t>& order_;
  const int32_t whole_, groups_;
  std::vector<uint64_t> exceeding_;  // (groups, words) sites at which a group's channels exceed what is kept
  std::vector<int32_t> counts_;      // (halves, words) how many of them the groups of a half have
  std::vector<uint64_t> new_a_, new_b_;
  int64_t left_ = 0;  // sites that exceed
  uint64_t random_ = 88172645463325252u;
};

void swap_channels(const ChannelBits& bits, int kept, int of, int cell_cost, std::vector<int32_t>& order) {
  if (kept == 2 && of == 4) Swaps<2>(bits, cell_cost, order).run();
  if (kept == 1 && of == 2) Swaps<1>(bits, cell_cost, order).run();
}

}  // namespace

extern const SwapChannels ESCORT_FOR_ISA(swap_channels);
const SwapChannels ESCORT_FOR_ISA(swap_channels) = swap_channels;

}  // namespace escort
