// Direct sparse convolution on the CPU: the tables and parameters that the kernel walks.
//
// The output plane of a sample is cut into strips of columns, and these into tiles of consecutive positions.
// Every nonzero of an output channel then reads the input at one constant distance from the tile, so a tile's
// accumulators stay in registers while the nonzeros stream by:
//
//     for each tile, for each block of input channels:
//         stage the block's part of the input (with its zero padding) into cache
//         for each output channel, some at a time: accumulator[0:vectors] += value * stage[offset + 0:vectors]
//
// Python makes every table as a numpy array of records with the same field names (methods/cpu/direct/), and
// bindings.cpp checks that they agree. Counts are in floats unless a comment says otherwise.
#pragma once

#include <cstdint>

#include "activation.hpp"

namespace escort {

struct Nonzero {
  int32_t offset;
  float value;
};

// One output channel within one block of input channels; its nonzeros end where those of the next record begin.
struct OutChannel {
  int32_t channel;
  int32_t slot;  // which of its part's partial sums it accumulates into
  int32_t first_nonzero;
  float bias;
  float slope;  // of the activation, if it has one
};

struct Block {  // input channels of one stage, and the records of a part's output channels that read them
  int32_t first_channel, end_channel;
  int32_t first_record, end_record;  // the first and the last block of a part have all its output channels
};

// What vectors of the stage, one behind the other, hold of a plane; their other lanes hold zeros.
struct Run {
  int32_t stage_position, plane_position;  // of lane 0 of the first
  int32_t count, plane_step;               // vectors, and how far apart they are in the plane
  int32_t lanes, more_lanes;  // a bit for each value to load from there; stride 2: and from kLanes - 1 further on
  int32_t joins;              // whether they also hold what a run before put there, in other lanes
};

struct Segment {  // a vector of a tile, or a part of one, that lies in one output row
  int32_t plane_position, tile_position, length;
};

struct Tile {
  int32_t x_start;                     // where it is read in place, or what its runs add their plane_position to
  int32_t first_run, end_run;          // staged tiles; tiles that read alike share them
  int32_t first_segment, end_segment;  // none where the tile is `length` positions of the plane from y_start on
  int32_t y_start, length;
  int32_t vectors;
};

struct Params {                      // what all tiles have in common
  int64_t stage_size, partial_size;  // scratch of a thread: the staged block; the partial sums of a part
  int64_t x_sample_stride, x_plane_stride, y_sample_stride, y_plane_stride;
  int32_t column_stride;   // between the values that a run gathers
  int32_t channel_stride;  // between staged channels
  int32_t in_place;        // whether tiles are read from x without a stage: 1x1 without stride or padding
  int32_t parts;           // into which the output channels of each group are cut
  int32_t blocks_of_part;  // in the order of accumulation; those of the next part follow
  int32_t channels;        // output channels that are accumulated at a time
  int32_t alike;           // whether the nonzeros of all output channels of a block have the same offsets: all weights
  Activation activation;
};

// One convolution, ready to run for any number of samples. Every pointer stays the owner's.
struct Direct : Params {
  const Nonzero* nonzeros;
  const OutChannel* out_channels;  // one more than there are, to end the last one's nonzeros
  const Block* blocks;             // of all parts of the first group, then of the next
  const Run* runs;
  const Segment* segments;
  const Tile* tiles;
  int32_t group_count, tile_count;
  // Set for each call, as the sample strides of x and y are:
  int64_t residual_sample_stride;
  int32_t shares;  // tasks that share the parts of a group, for a tile of a sample
  // In place: whether x is not in this thread's cache already, and whether the thread most likely takes the next task.
  bool fetch_ahead, fetch_next_task;
  bool fetch_written;  // whether y is not in this thread's cache, nor the residual
};

// Runs one task: task = ((sample * tile_count + tile) * group_count + group) * shares + share. `residual` may be null;
// `scratch` holds a stage and the partial sums of a task's parts, aligned to 64 bytes.
using RunTask = void (*)(const Direct&, int64_t task, const float* x, const float* residual, float* y, float* scratch);

struct Isa {
  const char* name;
  int lanes;        // floats per vector
  int max_vectors;  // vectors per tile that the registers hold
  RunTask run;
};

extern const Isa direct_generic;
extern const Isa direct_avx2;
extern const Isa direct_avx512;
extern const Isa direct_neon;

}  // namespace escort
