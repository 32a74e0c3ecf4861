// Direct sparse convolution on the CPU: what the planner hands to the kernel.
//
// The output plane of an image is cut into tiles of consecutive positions in a row pitch that leaves room for padding;
// every nonzero of a filter row then reads the input at one constant distance from the tile, so a tile's accumulators
// stay in registers while the row's nonzeros stream by:
//
//     for each tile, for each block of input channels:
//         stage the block's part of the input (with its zero padding) into cache
//         for each output channel: accumulator[0:vectors] += value * stage[offset + 0:vectors]
//
// All tables below are made in Python (methods/direct.py); counts are in floats unless said otherwise.
#pragma once

#include <cstdint>

namespace escort {

struct Entry {  // one nonzero
  int32_t offset;
  float value;
};

struct Row {  // one output channel within one block of input channels; its entries end where the next row's begin
  int32_t channel;
  int32_t slot;  // which of the job's partial sums it accumulates into
  int32_t first_entry;
  float bias;
};

struct Block {  // input channels that are staged together, and the rows that read them
  int32_t first_channel, end_channel;
  int32_t first_row, end_row;
};

struct Job {  // a share of the output channels of one group: its blocks, in the order of accumulation
  int32_t first_block, end_block;
};

struct Run {  // a piece of an image row to stage: `length` values, then `zeros` zeros
  int32_t to, from, length, zeros;
};

struct Segment {  // a piece of a tile that lies in one output row
  int32_t to, from, length;
};

struct Tile {
  int32_t first_run, end_run;          // staged tiles
  int32_t first_segment, end_segment;  // staged tiles
  int32_t start, length;               // tiles read and written in place: positions start .. start + length
  int32_t vectors;
};

enum class Activation : int32_t { none, relu, relu6 };

// One convolution, ready to run for any number of images. Every pointer stays the owner's.
struct Direct {
  const Entry* entries;
  const Row* rows;  // one more than there are, to end the last one's entries
  const Block* blocks;
  const Job* jobs;
  const Run* runs;
  const Segment* segments;
  const Tile* tiles;
  int32_t job_count, tile_count;
  bool in_place;           // tiles are read from x and written to y directly: a 1x1 kernel without stride or padding
  bool fetch_ahead;        // in place: whether x is too large to be in cache already; set for each run
  int32_t column_stride;   // between the values that a run gathers
  int32_t channel_stride;  // between staged channels
  int64_t stage_size, partial_size, scratch_size;  // per thread; scratch = stage + partial sums + one tile
  int64_t x_image, x_plane, y_image, y_plane;
  Activation activation;
};

// Runs one task: task = (image * tile_count + tile) * job_count + job. `residual` may be null; `scratch` holds
// scratch_size floats, aligned to 64 bytes.
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

}  // namespace escort
