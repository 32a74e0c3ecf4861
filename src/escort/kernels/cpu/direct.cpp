// The kernel of direct.hpp, compiled once per instruction set.
#include "direct.hpp"

#include "epilogue.hpp"
#include "vector.hpp"

namespace escort {
namespace {

// Prefetches what a channel some way ahead will read and write: the output channels of a tile lie a plane apart, each
// in a page of its own, where no hardware prefetcher follows.
constexpr int kChannelsAhead = 4;
template <int V>
inline void prefetch_channel(const float* residual, const float* y) {
  for (int i = 0; i < V * kLanes; i += 16) {
    if (residual) __builtin_prefetch(residual + i, 0);
    __builtin_prefetch(y + i, 1);
  }
}

// Copies n floats by whole vectors, the last one overlapping the one before it.
inline void copy(float* to, const float* from, int n) {
  if (n < kLanes) {
    for (int i = 0; i < n; i++) to[i] = from[i];
    return;
  }
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) store(to + i, load(from + i));
  if (i < n) store(to + n - kLanes, load(from + n - kLanes));
}

// Gathers n floats that lie `stride` apart.
inline void gather(float* to, const float* from, int n, int stride) {
  int i = 0;
  if (stride == 2 && n >= kLanes) {
    // The second load starts one early and takes the odd lanes, so that nothing behind the last value is read.
    const auto evens = [&](int j) { store(to + j, pick_evens(load(from + 2 * j), load(from + 2 * j + kLanes - 1))); };
    for (; i + kLanes <= n; i += kLanes) evens(i);
    if (i < n) evens(n - kLanes);
    return;
  }
  for (; i < n; i++) to[i] = from[int64_t(i) * stride];
}

// Copies a tile's part of the block's input channels, with zeros where the padding is. `x` is one sample.
void stage_block(const Direct& d, const Tile& tile, const Block& block, const float* x, float* stage) {
  for (int channel = block.first_channel; channel < block.end_channel; channel++, stage += d.channel_stride) {
    const float* plane = x + channel * d.x_plane_stride;
    for (int i = tile.first_run; i < tile.end_run; i++) {
      const Run& run = d.runs[i];
      float* to = stage + run.stage_position;
      const float* from = plane + run.plane_position;
      if (d.column_stride == 1) {
        copy(to, from, run.length);
      } else {
        gather(to, from, run.length, d.column_stride);
      }
      to += run.length;
      for (int j = 0; j < run.zeros; j++) to[j] = 0.0f;
    }
  }
}

// Writes a finished tile of one output channel, segment by segment; what the tile holds between rows is dropped.
void write_segments(const Direct& d, const Tile& tile, Epilogue epilogue, float* sums, const float* residual,
                    float* y) {
  if (!is_bound(epilogue.activation)) {  // at once for all segments, as rows may be shorter than vectors
    for (int n = tile.first_segment; residual && n < tile.end_segment; n++) {
      const Segment& s = d.segments[n];
      for (int i = 0; i < s.length; i++) sums[s.tile_position + i] += residual[s.plane_position + i];
    }
    activate(sums, tile.vectors * kLanes, epilogue);
    residual = nullptr;
    epilogue.activation = Activation::none;
  }
  const auto vector = [&](const Segment& s, int i) {
    const Vector v = load(sums + s.tile_position + i);
    const Vector sum = residual ? v + load(residual + s.plane_position + i) : v;
    store(y + s.plane_position + i, bounded(sum, epilogue.activation));
  };
  for (int n = tile.first_segment; n < tile.end_segment; n++) {
    const Segment& s = d.segments[n];
    if (s.length < kLanes) {
      for (int i = 0; i < s.length; i++) {
        const float v = sums[s.tile_position + i] + (residual ? residual[s.plane_position + i] : 0.0f);
        y[s.plane_position + i] = bounded(v, epilogue.activation);
      }
      continue;
    }
    int i = 0;
    for (; i + kLanes <= s.length; i += kLanes) vector(s, i);
    if (i < s.length) vector(s, s.length - kLanes);
  }
}

// Where a block is read, accumulated and written for one tile.
struct Places {
  const float* x;         // offset 0 of the block
  float* partial;         // the job's partial sums
  const float* residual;  // like y, or null
  float* y;               // the tile's place in channel 0 (in place) or the plane of channel 0 (staged)
  bool first, last;       // whether the block starts the sums, and whether it finishes them
};

// Input that is read in place and not yet in cache: the next block of this tile or the first of the next tile, which
// the same thread most likely takes. It is prefetched channel by channel while this block is computed.
struct Ahead {
  const float* x;
  int channels;
};

// Accumulates one block into every output channel of a job, for one tile of V vectors.
template <int V, bool InPlace>
void accumulate(const Direct& d, const Tile& tile, const Block& block, Places places, Ahead ahead) {
  const auto [x, partial, residual, y, first, last] = places;
  alignas(64) float sums[V * kLanes];
  // The last vector of a tile in place overlaps the one before it, so that nothing outside the tile is touched.
  const int64_t tail = InPlace ? tile.length - kLanes : (V - 1) * kLanes;
  const int64_t place = InPlace ? 0 : d.segments[tile.first_segment].plane_position;
  int fetched = 0;  // channels of `ahead`
  for (int i = block.first_record; i < block.end_record; i++) {
    if (InPlace && ahead.channels > 0) {
      const int64_t due =
          int64_t(ahead.channels) * (i + 1 - block.first_record) / (block.end_record - block.first_record);
      for (; fetched < due; fetched++)
        for (int j = 0; j < V * kLanes; j += 16) __builtin_prefetch(ahead.x + fetched * d.x_plane_stride + j, 0, 2);
    }
    const OutChannel& out = d.out_channels[i];
    const Epilogue epilogue = {d.activation, out.slope};
    const Nonzero* end = d.nonzeros + d.out_channels[i + 1].first_nonzero;
    float* slot = partial + int64_t(out.slot) * (V * kLanes);
    if (last && i + kChannelsAhead < block.end_record) {
      const int64_t at = d.out_channels[i + kChannelsAhead].channel * d.y_plane_stride + place;
      prefetch_channel<V>(residual ? residual + at : nullptr, y + at);
    }
    Vector sum[V];
#pragma GCC unroll 28
    for (int v = 0; v < V; v++) sum[v] = first ? Vector{} + out.bias : load(slot + v * kLanes);
    for (const Nonzero* nonzero = d.nonzeros + out.first_nonzero; nonzero < end; nonzero++) {
      const Vector weight = Vector{} + nonzero->value;
      const float* p = x + nonzero->offset;
#pragma GCC unroll 28
      for (int v = 0; v < V - 1; v++) sum[v] += weight * load(p + v * kLanes);
      sum[V - 1] += weight * load(p + tail);
    }
    if (!last) {
#pragma GCC unroll 28
      for (int v = 0; v < V; v++) store(slot + v * kLanes, sum[v]);
    } else if (InPlace) {
      const int64_t plane = out.channel * d.y_plane_stride;
      if (!is_bound(d.activation)) {
        const int64_t begin = tail < 0 ? tail : 0;  // a tile shorter than a vector begins in the one before it
#pragma GCC unroll 28
        for (int v = 0; v < V; v++) {
          const int64_t at = v == V - 1 ? tail : v * kLanes;
          store(sums + at - begin, residual ? sum[v] + load(residual + plane + at) : sum[v]);
        }
        activate(sums, tile.length - begin, epilogue);
        copy(y + plane + begin, sums, tile.length - begin);
        continue;
      }
#pragma GCC unroll 28
      for (int v = 0; v < V; v++) {
        const int64_t at = plane + (v == V - 1 ? tail : v * kLanes);
        store(y + at, bounded(residual ? sum[v] + load(residual + at) : sum[v], d.activation));
      }
    } else {
      const int64_t plane = out.channel * d.y_plane_stride;
#pragma GCC unroll 28
      for (int v = 0; v < V; v++) store(sums + v * kLanes, sum[v]);
      write_segments(d, tile, epilogue, sums, residual ? residual + plane : nullptr, y + plane);
    }
  }
}

using Accumulate = void (*)(const Direct&, const Tile&, const Block&, Places, Ahead);

// accumulate<1>, accumulate<2>, ... accumulate<kMaxVectors>, by number.
template <int... V>
struct Counts {
  template <bool InPlace>
  static Accumulate pick(int vectors) {
    static constexpr Accumulate table[] = {accumulate<V, InPlace>...};
    return table[vectors - 1];
  }
};
template <int N, int... V>
struct CountTo : CountTo<N - 1, N, V...> {};
template <int... V>
struct CountTo<0, V...> {
  using type = Counts<V...>;
};
using TileSizes = CountTo<kMaxVectors>::type;

void run_task(const Direct& d, int64_t task, const float* x, const float* residual, float* y, float* scratch) {
  const Job& job = d.jobs[task % d.job_count];
  const Tile& tile = d.tiles[task / d.job_count % d.tile_count];
  const int64_t sample = task / d.job_count / d.tile_count;
  x += sample * d.x_sample_stride;
  y += sample * d.y_sample_stride;
  if (residual) residual += sample * d.y_sample_stride;
  float* partial = scratch + d.stage_size;
  for (int b = job.first_block; b < job.end_block; b++) {
    const Block& block = d.blocks[b];
    const bool first = b == job.first_block, last = b == job.end_block - 1;
    if (d.in_place) {
      const Block& next = d.blocks[last ? job.first_block : b + 1];
      const Tile& next_tile = last && &tile != d.tiles + d.tile_count - 1 ? (&tile)[1] : tile;
      const Ahead ahead = {x + next.first_channel * d.x_plane_stride + next_tile.start,
                           d.fetch_ahead ? next.end_channel - next.first_channel : 0};
      const Places places = {
          x + block.first_channel * d.x_plane_stride + tile.start,
          partial,
          residual ? residual + tile.start : nullptr,
          y + tile.start,
          first,
          last,
      };
      TileSizes::pick<true>(tile.vectors)(d, tile, block, places, ahead);
    } else {
      stage_block(d, tile, block, x, scratch);
      TileSizes::pick<false>(tile.vectors)(d, tile, block, {scratch, partial, residual, y, first, last}, {});
    }
  }
}

}  // namespace

extern const Isa ESCORT_FOR_ISA(direct);
const Isa ESCORT_FOR_ISA(direct) = {ESCORT_ISA_NAME, kLanes, kMaxVectors, run_task};

}  // namespace escort
