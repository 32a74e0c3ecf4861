// The kernel of direct.hpp, compiled once per instruction set.
#include "direct.hpp"
#include "vector.hpp"

namespace escort {
namespace {

// Both bounds let a NaN pass, as torch does.
template <class T>
inline T activate(T v, Activation activation) {
  if (activation == Activation::none) return v;
  const T zero = T{};
  v = v < zero ? zero : v;
  if (activation == Activation::relu6) {
    const T six = T{} + 6.0f;
    v = v > six ? six : v;
  }
  return v;
}

// Rows of a tile lie a plane apart, each in a page of its own, where no hardware prefetcher follows: asks for the
// places that a row some way ahead will read and write.
constexpr int kRowsAhead = 4;
template <int V>
inline void prefetch_row(const float* residual, const float* y) {
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

void stage_block(const Direct& d, const Tile& tile, const Block& block, const float* image, float* stage) {
  for (int channel = block.first_channel; channel < block.end_channel; channel++, stage += d.channel_stride) {
    const float* plane = image + channel * d.x_plane;
    for (int i = tile.first_run; i < tile.end_run; i++) {
      const Run& run = d.runs[i];
      float* to = stage + run.to;
      const float* from = plane + run.from;
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

// Writes a finished tile of one output channel, row piece by row piece; what the tile holds between rows is dropped.
void write_segments(const Direct& d, const Tile& tile, const float* sums, const float* residual, float* y) {
  const auto vector = [&](const Segment& s, int i) {
    Vector v = load(sums + s.from + i);
    if (residual) v += load(residual + s.to + i);
    store(y + s.to + i, activate(v, d.activation));
  };
  for (int n = tile.first_segment; n < tile.end_segment; n++) {
    const Segment& s = d.segments[n];
    if (s.length < kLanes) {
      for (int i = 0; i < s.length; i++) {
        const float v = sums[s.from + i] + (residual ? residual[s.to + i] : 0.0f);
        y[s.to + i] = activate(v, d.activation);
      }
      continue;
    }
    int i = 0;
    for (; i + kLanes <= s.length; i += kLanes) vector(s, i);
    if (i < s.length) vector(s, s.length - kLanes);
  }
}

// Input that is read in place and not yet in cache: the next block of this tile or the first of the next tile, which
// the same thread most likely takes. It is asked for row by row, so that it arrives while this block is computed.
struct Ahead {
  const float* x;
  int channels;
};

// Accumulates one block into every row of a job, for one tile of V vectors. `x` is where offset 0 of the block lies for
// this tile; `residual` and `y` are the tile's place in channel 0 (in place) or the plane of channel 0 (staged).
template <int V, bool InPlace>
void accumulate(const Direct& d, const Tile& tile, const Block& block, bool first, bool last, const float* x,
                Ahead ahead, float* partial, const float* residual, float* y) {
  alignas(64) float sums[V * kLanes];
  // The last vector of a tile in place overlaps the one before it, so that nothing outside the tile is touched.
  const int64_t tail = InPlace ? tile.length - kLanes : (V - 1) * kLanes;
  const int64_t place = InPlace ? 0 : d.segments[tile.first_segment].to;
  int asked = 0;
  for (int i = block.first_row; i < block.end_row; i++) {
    if (InPlace && ahead.channels > 0) {
      const int64_t due = int64_t(ahead.channels) * (i + 1 - block.first_row) / (block.end_row - block.first_row);
      for (; asked < due; asked++)
        for (int j = 0; j < V * kLanes; j += 16) __builtin_prefetch(ahead.x + asked * d.x_plane + j, 0, 2);
    }
    const Row& row = d.rows[i];
    const Entry* end = d.entries + d.rows[i + 1].first_entry;
    float* slot = partial + int64_t(row.slot) * (V * kLanes);
    if (last && i + kRowsAhead < block.end_row) {
      const int64_t at = d.rows[i + kRowsAhead].channel * d.y_plane + place;
      prefetch_row<V>(residual ? residual + at : nullptr, y + at);
    }
    Vector sum[V];
#pragma GCC unroll 28
    for (int v = 0; v < V; v++) sum[v] = first ? Vector{} + row.bias : load(slot + v * kLanes);
    for (const Entry* entry = d.entries + row.first_entry; entry < end; entry++) {
      const Vector weight = Vector{} + entry->value;
      const float* p = x + entry->offset;
#pragma GCC unroll 28
      for (int v = 0; v < V - 1; v++) sum[v] += weight * load(p + v * kLanes);
      sum[V - 1] += weight * load(p + tail);
    }
    if (!last) {
#pragma GCC unroll 28
      for (int v = 0; v < V; v++) store(slot + v * kLanes, sum[v]);
    } else if (InPlace) {
      const int64_t plane = row.channel * d.y_plane;
#pragma GCC unroll 28
      for (int v = 0; v < V; v++) {
        const int64_t at = plane + (v == V - 1 ? tail : v * kLanes);
        store(y + at, activate(residual ? sum[v] + load(residual + at) : sum[v], d.activation));
      }
    } else {
      const int64_t plane = row.channel * d.y_plane;
#pragma GCC unroll 28
      for (int v = 0; v < V; v++) store(sums + v * kLanes, sum[v]);
      write_segments(d, tile, sums, residual ? residual + plane : nullptr, y + plane);
    }
  }
}

using Accumulate = void (*)(const Direct&, const Tile&, const Block&, bool, bool, const float*, Ahead, float*,
                            const float*, float*);

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
  const int64_t image = task / d.job_count / d.tile_count;
  x += image * d.x_image;
  y += image * d.y_image;
  if (residual) residual += image * d.y_image;
  float* partial = scratch + d.stage_size;
  for (int b = job.first_block; b < job.end_block; b++) {
    const Block& block = d.blocks[b];
    const bool first = b == job.first_block, last = b == job.end_block - 1;
    if (d.in_place) {
      const Block& next = d.blocks[last ? job.first_block : b + 1];
      const Tile& next_tile = last && &tile != d.tiles + d.tile_count - 1 ? (&tile)[1] : tile;
      const Ahead ahead = {x + next.first_channel * d.x_plane + next_tile.start,
                           d.fetch_ahead ? next.end_channel - next.first_channel : 0};
      TileSizes::pick<true>(tile.vectors)(d, tile, block, first, last, x + block.first_channel * d.x_plane + tile.start,
                                          ahead, partial, residual ? residual + tile.start : nullptr, y + tile.start);
    } else {
      stage_block(d, tile, block, x, scratch);
      TileSizes::pick<false>(tile.vectors)(d, tile, block, first, last, scratch, {}, partial, residual, y);
    }
  }
}

}  // namespace

extern const Isa ESCORT_FOR_ISA(direct);
const Isa ESCORT_FOR_ISA(direct) = {ESCORT_ISA_NAME, kLanes, kMaxVectors, run_task};

}  // namespace escort
