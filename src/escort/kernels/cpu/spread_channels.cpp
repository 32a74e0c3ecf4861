#include "spread_channels.hpp"

#include <algorithm>
#include <numeric>
#include <utility>

#include "isas.hpp"

namespace escort {
namespace {

constexpr int kMostInByte = 255;

// Numbers in lists, one list behind the other.
class Lists {
 public:
  struct List {
    const int32_t *first, *last;
    const int32_t* begin() const { return first; }
    const int32_t* end() const { return last; }
    int64_t size() const { return last - first; }
  };

  // Number i goes to list list_of[i].
  Lists(const int32_t* list_of, const int32_t* numbers, int64_t count, int64_t lists)
      : first_(lists + 1), numbers_(count) {
    for (int64_t i = 0; i < count; i++) first_[list_of[i] + 1]++;
    std::partial_sum(first_.begin(), first_.end(), first_.begin());
    std::vector<int64_t> next(first_.begin(), first_.end() - 1);
    for (int64_t i = 0; i < count; i++) numbers_[next[list_of[i]]++] = numbers[i];
  }

  List operator[](int64_t list) const { return {numbers_.data() + first_[list], numbers_.data() + first_[list + 1]}; }

 private:
  std::vector<int64_t> first_;
  std::vector<int32_t> numbers_;
};

// sums[i] += numbers[i] >= least. As parameters, unlike elsewhere, bytes are known to be none of another vector.
void add_where(const uint8_t* __restrict numbers, int least, uint8_t* __restrict sums, int32_t count) {
  const uint8_t bound = static_cast<uint8_t>(least);
  for (int32_t i = 0; i < count; i++) sums[i] += numbers[i] >= bound;
}

// Groups of neighbouring channels while they are being made.
class Groups {
 public:
  Groups(const Pattern& pattern, int kept, int of)
      : sites_(pattern.sites),
        channels_(pattern.channels),
        groups_((pattern.channels + of - 1) / of),
        kept_(kept),
        of_(of),
        sites_of_(pattern.channel_of, pattern.site_of, pattern.nonzeros, channels_),
        members_(groups_),
        counts_(sites_ * groups_) {}

  // Puts each channel, those with most nonzeros first, where fewest of its nonzeros exceed what is kept.
  void place_all() {
    std::vector<int32_t> order(channels_);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(),
                     [&](int32_t a, int32_t b) { return sites_of_[a].size() > sites_of_[b].size(); });
    std::vector<int64_t> load(groups_);
    std::vector<int32_t> exceeding;
    for (const int32_t channel : order) {
      exceeding.assign(groups_, 0);
      count_sites(sites_of_[channel], counts_, kept_, exceeding);
      int32_t best = -1;
      for (int32_t group = 0; group < groups_; group++)
        if (has_room(group) &&
            (best < 0 || std::make_pair(exceeding[group], load[group]) < std::make_pair(exceeding[best], load[best])))
          best = group;
      members_[best].push_back(channel);
      for (const int32_t site : sites_of_[channel]) count(site, best)++;
      load[best] += sites_of_[channel].size();
    }
  }

  // The channels, group by group.
  std::vector<int32_t> order() const {
    std::vector<int64_t> excess(groups_);
    for (int64_t site = 0; site < sites_; site++)
      for (int32_t group = 0; group < groups_; group++) excess[group] += std::max(count(site, group) - kept_, 0);
    std::vector<int32_t> by_excess(groups_);
    std::iota(by_excess.begin(), by_excess.end(), 0);
    std::stable_sort(by_excess.begin(), by_excess.end() - (channels_ % of_ > 0),
                     [&](int32_t a, int32_t b) { return excess[a] < excess[b]; });
    std::vector<int32_t> order;
    for (const int32_t group : by_excess) {
      order.insert(order.end(), members_[group].begin(), members_[group].end());
      std::sort(order.end() - members_[group].size(), order.end());
    }
    return order;
  }

 private:
  uint8_t& count(int64_t site, int32_t group) { return counts_[site * groups_ + group]; }
  int count(int64_t site, int32_t group) const { return counts_[site * groups_ + group]; }
  bool has_room(int32_t group) const {
    const int32_t room = group + 1 < groups_ ? of_ : channels_ - of_ * group;
    return static_cast<int32_t>(members_[group].size()) < room;
  }

  // Adds to each sum how many of these sites have at least so much in its column of a table (sites, sums). Bytes are
  // added as far as they suffice.
  void count_sites(Lists::List sites, const std::vector<uint8_t>& table, int least, std::vector<int32_t>& sums) {
    const int32_t width = static_cast<int32_t>(sums.size());
    for (const int32_t* site = sites.begin(); site != sites.end();) {
      partial_.assign(width, 0);
      for (const int32_t* end = site + std::min<int64_t>(sites.end() - site, kMostInByte); site != end; site++)
        add_where(table.data() + int64_t(*site) * width, least, partial_.data(), width);
      for (int32_t i = 0; i < width; i++) sums[i] += partial_[i];
    }
  }

  const int64_t sites_;
  const int32_t channels_, groups_, kept_, of_;
  const Lists sites_of_;
  std::vector<std::vector<int32_t>> members_;
  std::vector<uint8_t> counts_;  // (sites, groups) nonzeros of a group's channels
  std::vector<uint8_t> partial_;
};

ChannelBits bits_of(const Pattern& pattern) {
  const int64_t words = (pattern.sites + kBlock - 1) / kBlock;
  ChannelBits result = {pattern.channels, words, std::vector<uint64_t>((pattern.channels + 1) * words)};
  for (int64_t i = 0; i < pattern.nonzeros; i++) {
    const int64_t site = pattern.site_of[i];
    result.bits[pattern.channel_of[i] * words + site / kBlock] |= uint64_t{1} << site % kBlock;
  }
  return result;
}

}  // namespace

std::vector<int32_t> spread_channels(const Pattern& pattern, int kept, int of, int cell_cost) {
  Groups groups(pattern, kept, of);
  groups.place_all();
  std::vector<int32_t> order = groups.order();
  supported().front().swap_channels(bits_of(pattern), kept, of, cell_cost, order);
  return order;
}

}  // namespace escort
