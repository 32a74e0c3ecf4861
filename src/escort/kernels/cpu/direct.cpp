// The kernel of direct.hpp, compiled once per instruction set.
#include "direct.hpp"

#include <utility>

#include "epilogue.hpp"
#include "vector.hpp"

namespace escort {
namespace {

// Prefetches what an output channel some way ahead will read and write: the channels of a tile lie a plane apart, each
// in a page of its own, where no hardware prefetcher follows.
constexpr int kChannelsAhead = 8;

// How far ahead nonzeros are prefetched. Hardware prefetchers stop at the end of a page, which is so many nonzeros.
constexpr int kNonzerosAhead = 4096 / sizeof(Nonzero), kNonzerosOfLine = 64 / sizeof(Nonzero);

// What a vector of a run holds of a plane, from `from` on, whose values lie `stride` apart; Stride is 1, 2 or, for any
// other, 0.
template <int Stride>
ESCORT_INLINE Vector staged(const Run& run, const float* from, int stride) {
  if (Stride == 1) return load_lanes(from, run.lanes);
  // The second load starts one early and takes the odd lanes, so that nothing behind the last value is read.
  if (Stride == 2) return pick_evens(load_lanes(from, run.lanes), load_lanes(from + kLanes - 1, run.more_lanes));
  Vector v = {};
  for (int i = 0; i < kLanes; i++)
    if (run.lanes >> i & 1) v[i] = from[int64_t(i) * stride];
  return v;
}

// Copies a tile's part of the block's input channels, with zeros where the padding is. `x` is one sample.
template <int Stride>
void stage_block(const Direct& d, const Tile& tile, const Block& block, const float* x, float* stage) {
  const Run *const runs = d.runs + tile.first_run, *const end = d.runs + tile.end_run;
  const int64_t plane_stride = d.x_plane_stride, channel_stride = d.channel_stride;
  const int stride = d.column_stride;
  x += block.first_channel * plane_stride + tile.x_start;
  for (int channel = block.first_channel; channel < block.end_channel; channel++) {
    for (const Run* run = runs; run != end; run++) {
      const float* from = x + run->plane_position;
      float *to = stage + run->stage_position, *const last = to + int64_t(run->count) * kLanes;
      const int64_t step = run->plane_step;
      if (run->joins)
        for (; to != last; to += kLanes, from += step) store(to, staged<Stride>(*run, from, stride) + load(to));
      else
        for (; to != last; to += kLanes, from += step) store(to, staged<Stride>(*run, from, stride));
    }
    x += plane_stride;
    stage += channel_stride;
  }
}

// Activates what was written of a tile for some output channels. One channel alone would wait for the latency of its
// exponentials; those of several overlap.
constexpr int kActivatedTogether = 16;
void activate_channels(const Direct& d, const Tile& tile, float* y, int record, int end_record) {
  if (d.y_plane_stride == 1 && d.activation != Activation::prelu) {  // vectors of output channels
    float values[2 * kActivatedTogether];
    const OutChannel* out = d.out_channels + record;
    const int count = end_record - record;
    for (int i = 0; i < count; i++) values[i] = y[out[i].channel];
    activate(values, count, {d.activation, out->slope});
    for (int i = 0; i < count; i++) y[out[i].channel] = values[i];
    return;
  }
  for (; record < end_record; record++) {
    const OutChannel& out = d.out_channels[record];
    float* plane = y + out.channel * d.y_plane_stride;
    with_function({d.activation, out.slope}, [&](const auto& function) {
      if (tile.first_segment == tile.end_segment) activate_line(plane + tile.y_start, tile.length, function);
      const Segment *s = d.segments + tile.first_segment, *const last = d.segments + tile.end_segment;
      while (s != last) {  // those that follow one another at once
        const int begin = s->plane_position;
        int end = begin + s->length;
        for (s++; s != last && s->plane_position == end; s++) end += s->length;
        activate_line(plane + begin, end - begin, function);
      }
    });
  }
}

// Where a block is read, accumulated and written for one tile.
struct Places {
  const float* x;         // offset 0 of the block
  float* partial;         // the part's partial sums
  const float* residual;  // like y, or null
  float* y;               // the plane of channel 0
  bool first, last;       // whether the block starts the sums, and whether it finishes them
};

// Input that is read in place and not yet in cache: the next block of this tile or the first of the next tile, which
// the same thread most likely takes. It is prefetched channel by channel while this block is computed.
struct Ahead {
  const float* x;
  int channels;
};

// What prefetches is inlined: GCC takes a function that does nothing else for one without effect, and drops its calls.
ESCORT_INLINE void prefetch_written(const Places& places, int64_t at) {
  if (places.residual) __builtin_prefetch(places.residual + at, 0);
  __builtin_prefetch(places.y + at, 1);
}

template <int V>
ESCORT_INLINE void prefetch_tile(const Direct& d, const Tile& tile, const Places& places, int64_t plane) {
  if (tile.first_segment == tile.end_segment)
    for (int i = 0; i < V * kLanes; i += 16) prefetch_written(places, plane + tile.y_start + i);
  for (int n = tile.first_segment; n < tile.end_segment; n++)
    prefetch_written(places, plane + d.segments[n].plane_position);
}

// Writes a finished tile of one output channel, not yet activated where that takes more than a bound; what the tile
// holds between rows is dropped.
template <int V>
inline void finish_tile(const Direct& d, const Tile& tile, const Vector* sum, const float* residual, float* y) {
  if (tile.first_segment == tile.end_segment) {  // a range of the plane
    y += tile.y_start;
    if (residual) residual += tile.y_start;
#pragma GCC unroll 28
    for (int v = 0; v < V - 1; v++)
      store(y + v * kLanes, finish(sum[v], residual ? residual + v * kLanes : nullptr, d.activation));
    const int tail = (V - 1) * kLanes;
    finish_lanes(y + tail, sum[V - 1], residual ? residual + tail : nullptr, tile.length - tail, d.activation);
    return;
  }
  const Segment* segments = d.segments + tile.first_segment;
  const auto finish_segment = [&](const Segment& s, Vector v) {
    finish_lanes(y + s.plane_position, v, residual ? residual + s.plane_position : nullptr, s.length, d.activation);
  };
  if (tile.end_segment - tile.first_segment == V) {  // every vector is a segment
#pragma GCC unroll 28
    for (int v = 0; v < V; v++) finish_segment(segments[v], sum[v]);
    return;
  }
  alignas(64) float sums[(V + 1) * kLanes];
#pragma GCC unroll 28
  for (int v = 0; v < V; v++) store(sums + v * kLanes, sum[v]);
  for (const Segment* s = segments; s != d.segments + tile.end_segment; s++)
    finish_segment(*s, load(sums + s->tile_position));
}

// Accumulates one block into G output channels, records i .. i + G, for one tile of V vectors. Where their nonzeros are
// alike, a vector of x is loaded once for all of them.
template <int V, int G, bool Alike>
inline void accumulate_channels(const Direct& d, const Tile& tile, const Places& places, int i) {
  const OutChannel* out = d.out_channels + i;
  const bool first = places.first, last = places.last;
  Vector sum[G][V];
  const Nonzero* nonzero[G];
  int common = 1 << 30;
#pragma GCC unroll 4
  for (int g = 0; g < G; g++) {
    float* slot = places.partial + int64_t(out[g].slot) * (V * kLanes);
#pragma GCC unroll 28
    for (int v = 0; v < V; v++) sum[g][v] = first ? Vector{} + out[g].bias : load(slot + v * kLanes);
    nonzero[g] = d.nonzeros + out[g].first_nonzero;
    common = min(common, out[g + 1].first_nonzero - out[g].first_nonzero);
  }
  const auto add = [&](int g) __attribute__((always_inline)) {
    const Vector weight = nonzero[g]->value - Vector{};  // plus zeros, which changes -0, would be an instruction
    const float* p = places.x + nonzero[g]->offset;
    nonzero[g]++;
#pragma GCC unroll 28
    for (int v = 0; v < V; v++) sum[g][v] += weight * load(p + v * kLanes);
  };
  if constexpr (Alike) {
    for (int n = 0; n < common; n++) {
      const float* p = places.x + nonzero[0]->offset;
      Vector weight[G];
#pragma GCC unroll 4
      for (int g = 0; g < G; g++) weight[g] = in_register(nonzero[g]++->value - Vector{});
#pragma GCC unroll 28
      for (int v = 0; v < V; v++) {
        const Vector x = in_register(load(p + v * kLanes));
#pragma GCC unroll 4
        for (int g = 0; g < G; g++) sum[g][v] += weight[g] * x;
      }
    }
  } else {
    for (int n = 0; n < common; n++)
#pragma GCC unroll 4
      for (int g = 0; g < G; g++) add(g);
  }
  if (G > 1 && !Alike) {
#pragma GCC unroll 4
    for (int g = 0; g < G; g++)
      while (nonzero[g] < d.nonzeros + out[g + 1].first_nonzero) add(g);
  }
#pragma GCC unroll 4
  for (int g = 0; g < G; g++) {
    float* slot = places.partial + int64_t(out[g].slot) * (V * kLanes);
    if (!last) {
#pragma GCC unroll 28
      for (int v = 0; v < V; v++) store(slot + v * kLanes, sum[g][v]);
    } else {
      const int64_t plane = out[g].channel * d.y_plane_stride;
      finish_tile<V>(d, tile, sum[g], places.residual ? places.residual + plane : nullptr, places.y + plane);
    }
  }
}

// Accumulates one block into every output channel of a part, for one tile of V vectors, G channels at a time.
template <int V, int G, bool Alike = false>
void accumulate(const Direct& d, const Tile& tile, const Block& block, const Places& places, const Ahead& ahead) {
  int fetched = 0;  // channels of `ahead`
  const bool activates = places.last && !is_bound(d.activation);
  int activated = block.first_record;
  int64_t nonzero = d.out_channels[block.first_record].first_nonzero;
  for (int i = block.first_record; i < block.end_record; i += G) {
    for (; nonzero < d.out_channels[min(i + G, block.end_record)].first_nonzero; nonzero += kNonzerosOfLine)
      __builtin_prefetch(d.nonzeros + nonzero + kNonzerosAhead, 0, 2);
    if (ahead.channels > 0) {
      const int64_t due =
          int64_t(ahead.channels) * (i + G - block.first_record) / (block.end_record - block.first_record);
      for (; fetched < min(due, ahead.channels); fetched++)
        for (int j = 0; j < V * kLanes; j += 16) __builtin_prefetch(ahead.x + fetched * d.x_plane_stride + j, 0, 2);
    }
    if (places.last && d.fetch_written)
      for (int j = i + kChannelsAhead; j < min(i + kChannelsAhead + G, block.end_record); j++)
        prefetch_tile<V>(d, tile, places, d.out_channels[j].channel * d.y_plane_stride);
    if (i + G <= block.end_record) {
      accumulate_channels<V, G, Alike>(d, tile, places, i);
    } else {
      for (int j = i; j < block.end_record; j++) accumulate_channels<V, 1, false>(d, tile, places, j);
    }
    const int end = min(i + G, block.end_record);
    if (activates && (end == block.end_record || end - activated >= kActivatedTogether)) {
      activate_channels(d, tile, places.y, activated, end);
      activated = end;
    }
  }
}

using Accumulate = void (*)(const Direct&, const Tile&, const Block&, const Places&, const Ahead&);

// accumulate<1, G>, accumulate<2, G>, ... as far as the registers reach, by number of vectors.
template <int G, bool Alike = false, int... V>
Accumulate pick(int vectors, std::integer_sequence<int, V...>) {
  static constexpr Accumulate table[] = {accumulate<V + 1, G, Alike>...};
  return table[vectors - 1];
}
Accumulate pick(int vectors, int channels, bool alike) {
  if (alike && channels == 4) return pick<4, true>(vectors, std::make_integer_sequence<int, kMaxVectors / 4>{});
  switch (channels) {
    case 1:
      return pick<1>(vectors, std::make_integer_sequence<int, kMaxVectors>{});
    case 2:
      return pick<2>(vectors, std::make_integer_sequence<int, kMaxVectors / 2>{});
    case 3:
      return pick<3>(vectors, std::make_integer_sequence<int, kMaxVectors / 3>{});
    default:
      return pick<4>(vectors, std::make_integer_sequence<int, kMaxVectors / 4>{});
  }
}

void run_task(const Direct& d, int64_t task, const float* x, const float* residual, float* y, float* scratch) {
  const int64_t share = task % d.shares, group = task / d.shares % d.group_count;
  const int64_t of_tile = task / d.shares / d.group_count, sample = of_tile / d.tile_count;
  const Tile& tile = d.tiles[of_tile % d.tile_count];
  const int64_t first_part = d.parts * share / d.shares, parts = d.parts * (share + 1) / d.shares - first_part;
  const Block* const blocks = d.blocks + (group * d.parts + first_part) * d.blocks_of_part;
  x += sample * d.x_sample_stride;
  y += sample * d.y_sample_stride;
  if (residual) residual += sample * d.residual_sample_stride;
  float* partial = scratch + d.stage_size;
  const bool reads_on = d.fetch_next_task && share == d.shares - 1 &&
                        group == d.group_count - 1;  // else the next task reads the same tile
  const Accumulate accumulate = pick(tile.vectors, d.channels, d.alike);
  for (int b = 0; b < d.blocks_of_part; b++) {
    const bool first = b == 0, last = b == d.blocks_of_part - 1;
    const Block& channels = blocks[b];  // all parts have blocks of the same input channels
    bool is_empty = true;
    for (int64_t p = 0; p < parts; p++)
      is_empty &= blocks[p * d.blocks_of_part + b].first_record == blocks[p * d.blocks_of_part + b].end_record;
    if (is_empty) continue;
    const float* block_x = scratch;
    Ahead next = {};
    if (d.in_place) {
      const Block& next_block = blocks[last ? 0 : b + 1];
      const Tile& next_tile = last && &tile != d.tiles + d.tile_count - 1 ? (&tile)[1] : tile;
      next = {x + next_block.first_channel * d.x_plane_stride + next_tile.x_start,
              d.fetch_ahead && (!last || reads_on) ? next_block.end_channel - next_block.first_channel : 0};
      block_x = x + channels.first_channel * d.x_plane_stride + tile.x_start;
    } else {
      (d.column_stride == 1   ? stage_block<1>
       : d.column_stride == 2 ? stage_block<2>
                              : stage_block<0>)(d, tile, channels, x, scratch);
    }
    for (int64_t p = 0; p < parts; p++) {
      const int64_t from = next.channels * p / parts, to = next.channels * (p + 1) / parts;
      accumulate(d, tile, blocks[p * d.blocks_of_part + b],
                 {block_x, partial + p * d.partial_size, residual, y, first, last},
                 {next.x + from * d.x_plane_stride, static_cast<int>(to - from)});
    }
  }
}

}  // namespace

extern const Isa ESCORT_FOR_ISA(direct);
const Isa ESCORT_FOR_ISA(direct) = {ESCORT_ISA_NAME, kLanes, kMaxVectors, run_task};

}  // namespace escort
