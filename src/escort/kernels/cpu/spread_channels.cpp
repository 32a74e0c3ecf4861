#include "spread_channels.hpp"

#include <algorithm>
#include <numeric>
#include <utility>

namespace escort {
namespace {

constexpr int kMostSweeps = 4;                    // over all channels; most of what swaps gain comes with the first
constexpr int64_t kMostAdded = int64_t{1} << 33;  // bytes that swaps may add up, about a second's work
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
//
// A site is crowded in a group that has as many nonzeros there as are kept, or more. It is full for a channel of the
// group if it is crowded without that channel: what takes the channel's place exceeds there, if it has a nonzero.
class Groups {
 public:
  Groups(const Pattern& pattern, int kept, int of)
      : sites_(pattern.sites),
        channels_(pattern.channels),
        groups_((pattern.channels + of - 1) / of),
        kept_(kept),
        of_(of),
        sites_of_(pattern.channel_of, pattern.site_of, pattern.nonzeros, channels_),
        channels_at_(pattern.site_of, pattern.channel_of, pattern.nonzeros, sites_),
        members_(groups_),
        group_of_(channels_),
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
      group_of_[channel] = best;
      for (const int32_t site : sites_of_[channel]) count(site, best)++;
      load[best] += sites_of_[channel].size();
    }
  }

  // Swaps two channels of different groups as long as fewer nonzeros exceed what is kept afterwards.
  void swap_all() {
    crowded_.resize(groups_);
    full_.resize(sites_ * channels_);
    relief_.resize(channels_);
    for (int32_t group = 0; group < groups_; group++) settle(group);
    int64_t added = 0;
    for (int sweep = 0; sweep < kMostSweeps; sweep++) {
      std::vector<int32_t> exceeding;
      for (int32_t channel = 0; channel < channels_; channel++)
        if (relief_[channel] > 0) exceeding.push_back(channel);
      bool swapped = false;
      for (const int32_t channel : exceeding) {
        if ((added += sites_of_[channel].size() * channels_) > kMostAdded) return;
        const int32_t other = best_swap(channel);
        if (other < 0) continue;
        swap_two(channel, other);
        swapped = true;
      }
      if (!swapped) break;
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
  uint8_t& full(int64_t site, int32_t channel) { return full_[site * channels_ + channel]; }

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

  // Finds out which sites of a group are crowded, full for which member, and how many fewer nonzeros exceed without it.
  void settle(int32_t group) {
    for (int64_t site = 0; site < sites_; site++)
      if (count(site, group) >= kept_) crowded_[group].push_back(static_cast<int32_t>(site));
    for (const int32_t member : members_[group]) {
      for (const int32_t site : crowded_[group]) full(site, member) = 1;
      relief_[member] = 0;
      for (const int32_t site : sites_of_[member]) relief_[member] += full(site, member) = count(site, group) > kept_;
    }
  }

  // Takes back what was found out.
  void unsettle(int32_t group) {
    for (const int32_t site : crowded_[group])
      for (const int32_t member : members_[group]) full(site, member) = 0;
    crowded_[group].clear();
  }

  // The channel to swap with a channel so that fewest nonzeros exceed; -1 where no swap helps.
  int32_t best_swap(int32_t channel) {
    exceeding_.assign(channels_, 0);  // of this channel's and each other's, when each stands in the other's place
    count_sites(sites_of_[channel], full_, 1, exceeding_);
    for (const int32_t site : crowded_[group_of_[channel]])
      if (full(site, channel))
        for (const int32_t other : channels_at_[site]) exceeding_[other]++;
    int32_t best = -1, most = 0;
    for (int32_t other = 0; other < channels_; other++) {
      const int32_t gain = relief_[channel] + relief_[other] - exceeding_[other];
      if (gain > most && group_of_[other] != group_of_[channel]) best = other, most = gain;
    }
    return best;
  }

  void swap_two(int32_t channel, int32_t other) {
    const int32_t group = group_of_[channel], other_group = group_of_[other];
    unsettle(group), unsettle(other_group);
    move(channel, other_group), move(other, group);
    settle(group), settle(other_group);
  }

  void move(int32_t channel, int32_t target) {
    const int32_t source = group_of_[channel];
    for (const int32_t site : sites_of_[channel]) count(site, source)--, count(site, target)++;
    members_[source].erase(std::find(members_[source].begin(), members_[source].end(), channel));
    members_[target].push_back(channel);
    group_of_[channel] = target;
  }

  const int64_t sites_;
  const int32_t channels_, groups_, kept_, of_;
  const Lists sites_of_, channels_at_;
  std::vector<std::vector<int32_t>> members_;
  std::vector<int32_t> group_of_;
  std::vector<uint8_t> counts_;                // (sites, groups) nonzeros of a group's channels
  std::vector<std::vector<int32_t>> crowded_;  // of each group
  std::vector<uint8_t> full_;                  // (sites, channels) 1 where a site is full for a channel
  std::vector<int32_t> relief_;                // how many fewer nonzeros exceed in a channel's group without it
  std::vector<int32_t> exceeding_;
  std::vector<uint8_t> partial_;
};

}  // namespace

std::vector<int32_t> spread_channels(const Pattern& pattern, int kept, int of) {
  Groups groups(pattern, kept, of);
  groups.place_all();
  groups.swap_all();
  return groups.order();
}

}  // namespace escort
