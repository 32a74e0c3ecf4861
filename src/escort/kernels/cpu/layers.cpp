#include "layers.hpp"

#include <algorithm>
#include <stdexcept>
#include <utility>

#include "isas.hpp"
#include "threads.hpp"

namespace escort {
namespace {

// An input of 1 MiB is not all in the level-2 cache when its layer starts.
constexpr int64_t kFarFloats = 1 << 18;

// Into how many shares to cut the parts of a group, where a share of each is so many tasks. A task stages its input
// once for all its parts, which takes about a sixteenth of the work on them all. Single samples have the shares that
// were planned and timed; of others, those are taken that give least to the thread with most to do.
int32_t shares_of(int32_t parts, int64_t tasks, int64_t samples, int threads) {
  if (threads == 1) return 1;
  if (samples == 1) return parts;
  int32_t best = 1;
  double least = 0;
  for (int32_t shares = 1; shares <= parts; shares++) {
    const double fullest = (shares * tasks + threads - 1) / threads * (1.0 / shares + 1.0 / 16);
    if (shares > 1 && fullest >= least) continue;
    best = shares;
    least = fullest;
  }
  return best;
}

}  // namespace

DirectConvolution::DirectConvolution(const Isa& isa, DirectTables tables) : isa_(&isa), tables_(std::move(tables)) {
  const Params& params = tables_.params;
  input_sizes = {params.x_sample_stride, params.y_sample_stride};
  output_size = params.y_sample_stride;
  if (params.channels < 1 || params.channels > 4) throw std::invalid_argument("params: 1 to 4 channels at a time");
  for (const Tile& tile : tables_.tiles)
    if (tile.vectors < 1 || tile.vectors > isa.max_vectors / params.channels)
      throw std::invalid_argument("tile: too many vectors");
  const size_t blocks_of_group = size_t(params.parts) * params.blocks_of_part;
  if (params.parts < 1 || params.blocks_of_part < 1 || tables_.blocks.size() % blocks_of_group != 0)
    throw std::invalid_argument("blocks: as many for each part of each group");
  direct_ = {params,
             tables_.nonzeros.data(),
             tables_.out_channels.data(),
             tables_.blocks.data(),
             tables_.runs.data(),
             tables_.segments.data(),
             tables_.tiles.data(),
             static_cast<int32_t>(tables_.blocks.size() / blocks_of_group),
             static_cast<int32_t>(tables_.tiles.size()),
             params.y_sample_stride,
             1,
             false,
             false,
             false};
  // About two vectors of multiply-adds per nanosecond, and one that is written.
  int64_t vectors = 0;
  for (const Tile& tile : tables_.tiles) vectors += tile.vectors;
  sample_ns = vectors * static_cast<int64_t>(tables_.nonzeros.size() / 2 + tables_.out_channels.size());
}

void DirectConvolution::run(const Input* inputs, Output output, int64_t samples, int threads) const {
  const int64_t of_share = samples * direct_.tile_count * direct_.group_count;
  threads = threads_for(samples * sample_ns, static_cast<int>(std::min<int64_t>(threads, of_share * direct_.parts)));
  Direct direct = direct_;
  direct.shares = shares_of(direct_.parts, of_share, samples, threads);
  const int64_t tasks = of_share * direct.shares, parts = (direct.parts + direct.shares - 1) / direct.shares;
  const Scratch memory = scratch(direct.stage_size + direct.partial_size * parts, threads);
  direct.fetch_ahead = threads > 1 || samples * direct.x_sample_stride > kFarFloats;  // others have written a part
  direct.fetch_next_task = tasks > threads;
  direct.fetch_written = threads > 1 || samples * direct.y_sample_stride > kFarFloats;
  direct.x_sample_stride = inputs[0].stride;
  direct.residual_sample_stride = inputs[1].stride;
  direct.y_sample_stride = output.stride;
  parallel(tasks, threads, [&](int64_t i, int thread) {
    isa_->run(direct, i, inputs[0].data, inputs[1].data, output.data, memory.of(thread));
  });
}

DepthwiseConvolution::DepthwiseConvolution(const DepthwiseIsa& isa, DepthwiseTables tables)
    : isa_(&isa), tables_(std::move(tables)) {
  const auto& [p, phases, tap_columns, weights, bias, slope] = tables_;
  if (p.block_rows < 1 || p.block_rows > kMostBlockRows) throw std::invalid_argument("block_rows: too many rows");
  if (p.planes < 1 || p.planes > isa.most_planes) throw std::invalid_argument("planes: too many side by side");
  const size_t out_channels = size_t(p.channels) * p.multiplier, taps = size_t(p.kernel_rows) * p.kernel_columns;
  if (weights.size() != out_channels * taps || bias.size() != out_channels || slope.size() != out_channels ||
      tap_columns.size() != size_t(p.kernel_columns))
    throw std::invalid_argument("weights, bias, slope and tap_columns are those of params");
  output_size = int64_t(out_channels) * p.out_height * p.out_width;
  input_sizes = {int64_t(p.channels) * p.height * p.width, output_size};
  depthwise_ = {p,
                phases.data(),
                tap_columns.data(),
                weights.data(),
                bias.data(),
                slope.data(),
                static_cast<int32_t>(phases.size()),
                (int64_t(p.channels) + p.planes - 1) / p.planes};
  sample_ns = output_size * static_cast<int64_t>(taps + 9) / 100;  // about, of one thread
}

void DepthwiseConvolution::run(const Input* inputs, Output output, int64_t samples, int threads) const {
  const int64_t bands = samples * depthwise_.groups * depthwise_.bands;
  threads = threads_for(samples * sample_ns, static_cast<int>(std::min<int64_t>(threads, bands)));
  // A task clears its scratch once: one for a thread alone, else eight of each thread.
  const int64_t tasks = threads > 1 ? std::min<int64_t>(bands, 8 * threads) : std::min<int64_t>(bands, 1);
  const Scratch memory = scratch(int64_t(depthwise_.planes) * depthwise_.stage_size + isa_->lanes, threads);
  const DepthwiseTensors tensors = {inputs[0].data,   inputs[1].data,   output.data,
                                    inputs[0].stride, inputs[1].stride, output.stride};
  parallel(tasks, threads, [&](int64_t i, int thread) {
    isa_->run(depthwise_, tensors, bands * i / tasks, bands * (i + 1) / tasks, memory.of(thread));
  });
}

LinearConvolution::LinearConvolution(int64_t in_channels, int64_t out_channels, Activation activation,
                                     LinearTables tables)
    : in_(in_channels),
      out_(out_channels),
      pitch_((out_channels + 15) / 16 * 16),
      activation_(activation),
      tables_(std::move(tables)) {
  const auto& [weights, bias, slope] = tables_;
  if (in_ < 1 || out_ < 1 || weights.size() != size_t(in_ * pitch_) || bias.size() != size_t(pitch_) ||
      slope.size() != size_t(pitch_))
    throw std::invalid_argument("weights, bias and slope are those of so many channels");
  input_sizes = {in_, out_};
  output_size = out_;
  sample_ns = in_ * pitch_ / 32;  // about two vectors of multiply-adds in a nanosecond
}

void LinearConvolution::run(const Input* inputs, Output output, int64_t samples, int threads) const {
  constexpr int64_t kColumns = 64;  // of a task
  const int64_t tasks = (out_ + kColumns - 1) / kColumns;
  parallel(tasks, threads_for(samples * sample_ns, threads), [&](int64_t i, int) {
    const int64_t begin = i * kColumns, columns = std::min(kColumns, out_ - begin);
    lines().mix(inputs[0].data, inputs[0].stride, samples, tables_.weights.data() + begin, pitch_,
                tables_.bias.data() + begin, static_cast<int>(columns), in_, output.data + begin, output.stride);
    for (int64_t s = 0; s < samples; s++) {
      const float* residual = inputs[1].data ? inputs[1].data + s * inputs[1].stride + begin : nullptr;
      finish(output.data + s * output.stride + begin, residual, tables_.slope.data() + begin, columns);
    }
  });
}

void LinearConvolution::finish(float* y, const float* residual, const float* slope, int64_t n) const {
  if (residual) lines().combine(Combine::add, {}, y, 1, residual, 1, y, n);
  if (activation_ == Activation::leaky_relu || activation_ == Activation::prelu) {
    lines().combine(Combine::slope, {}, y, 1, slope, 1, y, n);
  } else if (activation_ != Activation::none) {
    lines().combine(Combine::first, {activation_, 0.0f}, y, 1, y, 1, y, n);
  }
}

MaxPool2d::MaxPool2d(int64_t channels, Pair input_size, Pair output_size, const std::array<Pair, 4>& window)
    : Op({channels * input_size[0] * input_size[1]}, channels * output_size[0] * output_size[1]),
      channels_(channels),
      pool_{input_size[0], input_size[1], output_size[0], output_size[1], window[0][0], window[0][1],
            window[1][0],  window[1][1],  window[3][0],   window[3][1],   window[2][0], window[2][1]} {
  sample_ns = channels * pool_.height * pool_.width / 2;
}

void MaxPool2d::run(const Input* inputs, Output output, int64_t samples, int threads) const {
  const int64_t planes = samples * channels_;
  threads = threads_for(samples * sample_ns, static_cast<int>(std::min<int64_t>(threads, planes)));
  const PoolPlane pool_plane = supported().front().pool;
  // A window that ceil_mode adds may reach beyond the right padding.
  const int64_t reach = pool_.left + pool_.width + int64_t(pool_.columns) * pool_.column_dilation + pool_.column_stride;
  const Scratch memory = scratch(reach, threads);
  parallel(planes, threads, [&](int64_t i, int thread) {
    const int64_t sample = i / channels_, channel = i % channels_;
    pool_plane(pool_, inputs[0].data + sample * inputs[0].stride + channel * pool_.height * pool_.width,
               output.data + sample * output.stride + channel * pool_.out_height * pool_.out_width, memory.of(thread));
  });
}

}  // namespace escort
