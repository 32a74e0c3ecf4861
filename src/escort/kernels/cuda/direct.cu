// Direct sparse convolution, driven by the data: one program for every filter and geometry of a tile shape.
//
// Activations are plain NCHW. Output positions are numbered in one sequence (image, row, column) with a pitch that
// leaves room for the zeros between rows and between images, so any range of positions is a tile and every nonzero
// reads its input at one constant distance from the output position. A block owns a tile of positions and a group of
// output channels. Producer warps copy the tile's input, one block of channels after the other, into a ring of stages
// in shared memory, together with the nonzeros of those channels; consumer warps multiply. methods/direct_cuda lays
// out the tables and says what each means.
//
// Compiled once per
//   STORAGE   what activations are stored as: 0 float, 1 half, 2 bfloat16
//   PACKED    1: products of 16-bit storage are summed in 16 bits over a flush, 0: every product is summed in float
//   WORDS     positions per lane; for 16-bit storage a word holds the same position of two neighbouring images
//   ROWS      output channels per consumer warp
//   PAIRED    1: of 16-bit storage, two neighbouring columns are read at once (stride 1, an even number of elements per
//             image), 0: one element at a time
//   ODD       where PAIRED, whether a channel has an odd number of elements
//   SLOTS     most words (pairs of words where PAIRED) per lane that a producer warp copies per channel
//   THREADS, BLOCKS   threads per block, and blocks per multiprocessor that registers must leave room for
//   SIGNALS   lanes of a warp that arrive when the warp is done with a stage: the first one, or all. compute-sanitizer
//             does not follow that __syncwarp puts all lanes' accesses before the first lane's arrival
#if STORAGE == 1
#include <cuda_fp16.h>
typedef unsigned short Element;
typedef __half2 Pair;
#elif STORAGE == 2
#include <cuda_bf16.h>
typedef unsigned short Element;
typedef __nv_bfloat162 Pair;
#else
typedef float Element;
#endif

#include "ptx.cuh"

#define LANES 32
#define INFINITY __int_as_float(0x7f800000)
#define GROUP (SLOTS < 4 ? SLOTS : 4)            // words that a lane of a producer warp loads before it stores them
#define BATCH (SLOTS < 8 ? 8 / SLOTS : 1)        // channels that a producer warp copies at a time where PAIRED
#define SUMS (STORAGE == 0 ? WORDS : 2 * WORDS)  // per lane and output channel
#define FLUSH 32                                 // nonzeros that are summed in 16 bits
#ifndef SIGNALS
#define SIGNALS 1
#endif

// Division by a run-time constant: exact below 2^31 for magic = ceil(2^(31 + shift) / divisor), 2^shift >= divisor.
struct Divisor {
  u32 magic, shift;
  __device__ u32 quotient(u32 n) const { return __umulhi(2 * n, magic) >> shift; }
};

// One nonzero times the lane's positions, which begin at x.
#if STORAGE == 0
__device__ __forceinline__ void multiply(float (&sum)[SUMS], u32 x, u32 offset, u32 weight) {
  u32 word[WORDS];
#pragma unroll
  for (int v = 0; v < WORDS; v++) word[v] = load4(x + offset + v * LANES * 4);
#pragma unroll
  for (int v = 0; v < WORDS; v++) sum[v] = fmaf(__uint_as_float(word[v]), __uint_as_float(weight), sum[v]);
}
#else
__device__ __forceinline__ float low(u32 word) {
#if STORAGE == 1
  return __half2float(__ushort_as_half((unsigned short)word));
#else
  return __uint_as_float(word << 16);
#endif
}

__device__ __forceinline__ float high(u32 word) {
#if STORAGE == 1
  return __half2float(__ushort_as_half((unsigned short)(word >> 16)));
#else
  return __uint_as_float(word & 0xffff0000u);
#endif
}

// An entry is (offset in bytes << 16 | weight).
#if PACKED
__device__ __forceinline__ void multiply(Pair (&sum)[WORDS], u32 x, u32 entry) {
  const u32 from = x + (entry >> 16), weights = __byte_perm(entry, entry, 0x1010);
  u32 word[WORDS];
#pragma unroll
  for (int v = 0; v < WORDS; v++) word[v] = load4(from + v * LANES * 4);
#pragma unroll
  for (int v = 0; v < WORDS; v++) sum[v] = __hfma2(*(Pair*)&word[v], *(const Pair*)&weights, sum[v]);
}
#else
__device__ __forceinline__ void multiply(float (&sum)[SUMS], u32 x, u32 entry) {
  const u32 from = x + (entry >> 16);
  const float weight = low(entry);
  u32 word[WORDS];
#pragma unroll
  for (int v = 0; v < WORDS; v++) word[v] = load4(from + v * LANES * 4);
#pragma unroll
  for (int v = 0; v < WORDS; v++) {
    sum[2 * v] = fmaf(low(word[v]), weight, sum[2 * v]);
    sum[2 * v + 1] = fmaf(high(word[v]), weight, sum[2 * v + 1]);
  }
}
#endif

template <class Sums>
__device__ __forceinline__ void multiply_all(Sums& sum, u32 x, u32& entry, uint4& next, int count) {
#pragma unroll 1
  for (; count >= 4; count -= 4) {
    const uint4 a = next;
    next = load16(entry += 16);
    multiply(sum, x, a.x);
    multiply(sum, x, a.y);
    multiply(sum, x, a.z);
    multiply(sum, x, a.w);
  }
  if (count > 0) {
    const uint4 a = next;
    next = load16(entry += 16);
    multiply(sum, x, a.x);
    if (count > 1) multiply(sum, x, a.y);
    if (count > 2) multiply(sum, x, a.z);
  }
}
#endif

// NaN goes through, as in torch.
__device__ __forceinline__ float clamp(float value, float least, float most) {
  asm("max.NaN.f32 %0, %0, %1;" : "+f"(value) : "f"(least));
  asm("min.NaN.f32 %0, %0, %1;" : "+f"(value) : "f"(most));
  return value;
}

__device__ __forceinline__ float load(const Element* p) {
#if STORAGE == 0
  return *p;
#else
  return low(*p);
#endif
}

__device__ __forceinline__ void store(Element* p, float value) {
#if STORAGE == 0
  *p = value;
#elif STORAGE == 1
  *p = __half_as_ushort(__float2half_rn(value));
#else
  *p = __bfloat16_as_ushort(__float2bfloat16_rn(value));
#endif
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    direct(const Element* __restrict__ x, Element* __restrict__ y, const Element* __restrict__ residual,
           const float* __restrict__ bias, const uint4* __restrict__ entries, const int2* __restrict__ segments,
           const int* __restrict__ rows, const int* __restrict__ first_channels, int images, int tiles, int channels,
           int height, int width, int out_channels, int out_height, int out_width, int pitch, u32 pitch_magic,
           u32 pitch_shift, int image_rows, u32 rows_magic, u32 rows_shift, u32 width_magic, u32 width_shift,
           u32 pairs_magic, u32 pairs_shift, int row_padding, int column_padding, int row_stride, int column_stride,
           int phases, u32 phase_words, int channel_words, int slots, int chunks, int channel_block, int stages,
           int position_warps, int row_warps, int channel_warps, int producers, int entry_bytes, int activation) {
  extern __shared__ __align__(128) char shared[];
  const Divisor by_pitch = {pitch_magic, pitch_shift}, by_rows = {rows_magic, rows_shift};
  const Divisor by_width = {width_magic, width_shift}, by_pairs = {pairs_magic, pairs_shift};
  const int warp = threadIdx.x / LANES, lane = threadIdx.x % LANES;
  const int consumers = position_warps * row_warps * channel_warps;
  const int group = blockIdx.x, tile = blockIdx.z * gridDim.y + blockIdx.y;
  if (tile >= tiles) return;

  const int channel_bytes = channel_words * 4, stage_bytes = channel_block * channel_bytes + entry_bytes;
  const int tile_words = LANES * WORDS * position_warps, first_word = tile * tile_words;
  const u32 ring = shared_address(shared), full = ring + stages * stage_bytes;  // barriers, one per stage
  const u32 empty = full + 8 * stages, clean = empty + 8 * stages;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < stages; stage++) {
      // Each producer thread arrives for its copies, and each producer warp for its stores.
      barrier_init(full + 8 * stage, producers * (LANES + SIGNALS));
      barrier_init(empty + 8 * stage, consumers * SIGNALS);
      barrier_init(clean + 8 * stage, consumers * LANES);
    }
  }
  __syncthreads();
  let_next_kernel_start();

  if (warp >= consumers) {
    const int producer = warp - consumers, thread = producer * LANES + lane;
    const int plane = height * width, image_size = channels * plane;
    const int first_channel = first_channels[group];
    // Where the entries (x) and the channels (y) of this chunk begin, of the next one, and of the one behind it.
    const int2* const segment = segments + group * (chunks + 1);
    int2 here = segment[0], next = segment[1], after = next;

    // What the lane copies of every channel: where it lies in the first channel and, where that depends on the lane,
    // where it goes in a stage, both in bytes. A word of 16-bit storage comes from two images; where the last one has
    // no neighbour, half of the word is arbitrary.
    u32 source[SLOTS];
#if STORAGE != 0 && !PAIRED
    u32 neighbour[SLOTS];
#endif
#if PAIRED
    // A load brings two columns, aligned to 4 bytes: it begins one element earlier in a channel that starts at an odd
    // one.
    const u32 none = 0xffffffff, plane_pairs = (plane + 1) / 2;
    // Half of the lanes first store what goes to an even word and the other half what goes to an odd one, so that
    // hardly two lanes of a warp meet in a bank. The lowest bit of a place says that the right column comes first.
    u32 to[SLOTS][1 + ODD][2];  // [of a channel that starts at an even or odd element][first or second store]
    u32 lone = 0;               // a bit per slot: the image has no neighbour
    {
      const u32 line = by_pitch.quotient(first_word), image = by_rows.quotient(line);
      const int row = (int)(line - image * image_rows) - row_padding;
      const int column = (int)(first_word - line * pitch) - column_padding;
      const int begin = row < 0 ? 0 : row >= height ? plane : row * width + min(max(column, 0), width);
      const u32 first_pair = image * plane_pairs + begin / 2;
#pragma unroll
      for (int i = 0; i < SLOTS; i++) {
        const u32 pair = first_pair + i * LANES + lane, image = by_pairs.quotient(pair);
        const int element = 2 * (pair - image * plane_pairs), row = by_width.quotient(element);
        const int column = element - row * width;
        const int at = (image * image_rows + row + row_padding) * pitch + column + column_padding - first_word;
        const bool inside = 2 * image < images;
        u32 word[3] = {u32(column > 0 ? at - 1 : at - pitch + width - 1), u32(at),
                       u32(column + 1 < width ? at + 1 : at + pitch - width + 1)};
#pragma unroll
        for (int k = 0; k < 3; k++) {  // the elements before, at and behind
          const int e = element + k - 1;
          if (!inside || e < 0 || e >= plane || word[k] >= phase_words) word[k] = none;
        }
        source[i] = inside ? (2 * image * image_size + element) * 2 : 0;
        lone |= u32(2 * image + 1 >= images) << i;
#pragma unroll
        for (int odd = 0; odd < 1 + ODD; odd++) {
          const u32 low = word[1 - odd], high = word[2 - odd];
          const bool swap = low == none || (high != none && (low & 1) != lane / (LANES / 2));
          const u32 first = swap ? high : low, second = swap ? low : high;
          to[i][odd][0] = first == none ? none : 4 * first | swap;
          to[i][odd][1] = second == none ? none : 4 * second;
        }
      }
    }
#else
    const u32 none = 0xffffffff;
#pragma unroll
    for (int i = 0; i < SLOTS; i++) {
      source[i] = none;
      if (i < slots) {
        int word = i * LANES + lane, phase_row = 0, phase_column = 0;
        bool inside = word < phases * phase_words;
        if (phases > 1) {
          const int phase = word / phase_words;
          word -= phase * phase_words;
          phase_row = phase / column_stride;
          phase_column = phase - phase_row * column_stride;
        }
        const u32 position = first_word + word, line = by_pitch.quotient(position);
        const u32 unit = by_rows.quotient(line), image = unit * (STORAGE == 0 ? 1 : 2);
        const int row = (int)(line - unit * image_rows) * row_stride + phase_row - row_padding;
        const int column = (int)(position - line * pitch) * column_stride + phase_column - column_padding;
        inside &= row >= 0 && row < height && column >= 0 && column < width && image < images;
        if (inside) source[i] = (image * image_size + row * width + column) * sizeof(Element);
#if STORAGE != 0
        neighbour[i] = source[i] + (image + 1 < images ? image_size * 2 : 0);
#endif
      }
    }
#endif
    wait_for_previous_kernel();
    int stage = 0;
    u32 parity = 0;
#if PAIRED
    // A warp copies BATCH channels at a time and loads the next ones before it waits for room.
    u32 low[BATCH][SLOTS], high[BATCH][SLOTS];
    auto load = [&](int channel, int end) {
#pragma unroll
      for (int c = 0; c < BATCH; c++) {
        if (channel + c < end) {
          const int place = first_channel + channel + c;
          const char* const from = (const char*)(x + (place * plane - (ODD & place)));
          const char* const from_neighbour = from + 2 * image_size;
#pragma unroll
          for (int i = 0; i < SLOTS; i++) {
            if (i < slots) {
              low[c][i] = __ldg((const u32*)(from + source[i]));
              if (!(lone >> i & 1)) high[c][i] = __ldg((const u32*)(from_neighbour + source[i]));
            }
          }
        }
      }
    };
    load(here.y + BATCH * producer, next.y);
#endif
    for (int chunk = 0; chunk < chunks; chunk++) {
      if (chunk + 1 < chunks) after = segment[chunk + 2];
      if (chunk < stages)
        barrier_wait(clean + 8 * stage, 0);
      else
        barrier_wait(empty + 8 * stage, parity ^ 1);
      const u32 to_stage = ring + stage * stage_bytes;
      const u32 to_entries = to_stage + channel_block * channel_bytes;
      for (int i = thread; i < next.x - here.x; i += producers * LANES)
        copy16(to_entries + 16 * i, entries + here.x + i);
      const int first = first_channel + here.y, channels_here = next.y - here.y;
#if STORAGE == 0
      for (int channel = producer; channel < channels_here; channel += producers) {
        const char* const from = (const char*)(x + (first + channel) * plane);
        const u32 to_words = to_stage + channel * channel_bytes + lane * 4;
#pragma unroll
        for (int i = 0; i < SLOTS; i++) {
          if (source[i] != none) copy4(to_words + i * LANES * 4, from + source[i]);
        }
      }
#elif PAIRED
      for (int channel = BATCH * producer; channel < channels_here; channel += BATCH * producers) {
#pragma unroll
        for (int c = 0; c < BATCH; c++) {
          if (channel + c < channels_here) {
            const u32 to_channel = to_stage + (channel + c) * channel_bytes;
            const bool odd = ODD & (first + channel + c);
#pragma unroll
            for (int i = 0; i < SLOTS; i++) {
              if (i < slots) {
                const u32 first_to = odd ? to[i][ODD][0] : to[i][0][0], second_to = odd ? to[i][ODD][1] : to[i][0][1];
                const u32 select = first_to & 1 ? 0x7632 : 0x5410;
                if (first_to != none) store4(to_channel + (first_to & ~1), __byte_perm(low[c][i], high[c][i], select));
                if (second_to != none)
                  store4(to_channel + second_to, __byte_perm(low[c][i], high[c][i], select ^ (0x5410 ^ 0x7632)));
              }
            }
          }
        }
        if (channel + BATCH * producers < channels_here) load(here.y + channel + BATCH * producers, next.y);
      }
      if (chunk + 1 < chunks) load(next.y + BATCH * producer, after.y);
#else
      for (int channel = producer; channel < channels_here; channel += producers) {
        const char* const from = (const char*)(x + (first + channel) * plane);
        const u32 to_words = to_stage + channel * channel_bytes + lane * 4;
#pragma unroll
        for (int start = 0; start < SLOTS; start += GROUP) {
          if (start < slots) {
            u32 word[GROUP];
#pragma unroll
            for (int i = 0; i < GROUP; i++) {
              if (source[start + i] != none)
                word[i] = __ldg((const Element*)(from + source[start + i])) |
                          (u32)__ldg((const Element*)(from + neighbour[start + i])) << 16;
            }
#pragma unroll
            for (int i = 0; i < GROUP; i++) {
              if (source[start + i] != none) store4(to_words + (start + i) * LANES * 4, word[i]);
            }
          }
        }
      }
#endif
      here = next;
      next = after;
      barrier_arrive_after_copies(full + 8 * stage);
      __syncwarp();
      if (lane < SIGNALS) barrier_arrive(full + 8 * stage);
      if (++stage == stages) {
        stage = 0;
        parity ^= 1;
      }
    }
    return;
  }

  // Padding is zeroed once: copies never touch it. A stage is handed to the producers as soon as it is clean.
  for (int stage = 0; stage < min(stages, chunks); stage++) {
    uint4* const words = (uint4*)(shared + stage * stage_bytes);
    for (int i = threadIdx.x; i < channel_block * channel_bytes / 16; i += consumers * LANES)
      words[i] = make_uint4(0, 0, 0, 0);
    barrier_arrive(clean + 8 * stage);
  }
  const int position_warp = warp % position_warps, rest = warp / position_warps;
  const int row_warp = rest % row_warps, channel_warp = rest / row_warps;
  int row_of[ROWS];
  float row_bias[ROWS];
#pragma unroll
  for (int j = 0; j < ROWS; j++) {
    row_of[j] = rows[(group * row_warps + row_warp) * ROWS + j];
    row_bias[j] = bias && row_of[j] >= 0 ? bias[row_of[j]] : 0.f;
  }
  float sum[ROWS][SUMS];
#pragma unroll
  for (int j = 0; j < ROWS; j++)
#pragma unroll
    for (int v = 0; v < SUMS; v++) sum[j][v] = 0.f;

  int stage = 0;
  u32 parity = 0;
  for (int chunk = 0; chunk < chunks; chunk++) {
    barrier_wait(full + 8 * stage, parity);
    const u32 base = ring + stage * stage_bytes;
    const u32 mine = base + (position_warp * LANES * WORDS + lane) * 4;
    const u32 nonzeros = base + channel_block * channel_bytes;
    // A header word per row: where its nonzeros start, in units of 16 bytes, << 16 | how many there are.
    u32 header[ROWS];
#pragma unroll
    for (int j = 0; j < ROWS; j++) header[j] = load4(nonzeros + 4 * ((channel_warp * row_warps + row_warp) * ROWS + j));
    u32 entry = nonzeros + 16 * (header[0] >> 16);
    uint4 next = load16(entry);  // the nonzeros of a warp's rows lie one after the other
#pragma unroll
    for (int j = 0; j < ROWS; j++) {
      int count = header[j] & 0xffff;
#if STORAGE == 0
#pragma unroll 1
      for (; count >= 4; count -= 4) {
        const uint4 a = next, b = load16(entry + 16);
        next = load16(entry += 32);
        multiply(sum[j], mine, a.x, a.y);
        multiply(sum[j], mine, a.z, a.w);
        multiply(sum[j], mine, b.x, b.y);
        multiply(sum[j], mine, b.z, b.w);
      }
      if (count & 2) {
        const uint4 a = next;
        next = load16(entry += 16);
        multiply(sum[j], mine, a.x, a.y);
        multiply(sum[j], mine, a.z, a.w);
      }
      if (count & 1) {
        multiply(sum[j], mine, next.x, next.y);
        next = load16(entry += 16);
      }
#elif PACKED
#pragma unroll 1
      while (count > 0) {
        Pair part[WORDS];
        const u32 zero = 0;
#pragma unroll
        for (int v = 0; v < WORDS; v++) part[v] = *(const Pair*)&zero;
        const int left = max(count - FLUSH, 0);
        multiply_all(part, mine, entry, next, count - left);
        count = left;
#pragma unroll
        for (int v = 0; v < WORDS; v++) {
          sum[j][2 * v] += low(*(u32*)&part[v]);
          sum[j][2 * v + 1] += high(*(u32*)&part[v]);
        }
      }
#else
      multiply_all(sum[j], mine, entry, next, count);
#endif
    }
    __syncwarp();
    if (lane < SIGNALS) barrier_arrive(empty + 8 * stage);
    if (++stage == stages) {
      stage = 0;
      parity ^= 1;
    }
  }

  if (channel_warps > 1) {  // the first channel warp gathers the sums of the others; the ring is free by now
    float* const parts = (float*)shared + lane;
    const int team = position_warps * row_warps;
    asm volatile("bar.sync 1, %0;" ::"r"(consumers * LANES) : "memory");
    if (channel_warp > 0) {
#pragma unroll
      for (int j = 0; j < ROWS; j++)
#pragma unroll
        for (int v = 0; v < SUMS; v++) parts[((warp - team) * ROWS * SUMS + j * SUMS + v) * LANES] = sum[j][v];
    }
    asm volatile("bar.sync 1, %0;" ::"r"(consumers * LANES) : "memory");
    if (channel_warp > 0) return;
    for (int other = 0; other < channel_warps - 1; other++) {
#pragma unroll
      for (int j = 0; j < ROWS; j++)
#pragma unroll
        for (int v = 0; v < SUMS; v++) sum[j][v] += parts[((other * team + warp) * ROWS * SUMS + j * SUMS + v) * LANES];
    }
  }

  wait_for_previous_kernel();
  const int out_plane = out_height * out_width, out_size = out_channels * out_plane;
  const float least = activation >= 1 ? 0.f : -INFINITY, most = activation == 2 ? 6.f : INFINITY;
  u32 at[WORDS];                         // in channel 0 of the first image
  u32 inside = 0, neighbour_inside = 0;  // a bit per word
#pragma unroll
  for (int v = 0; v < WORDS; v++) {
    const u32 position = first_word + (position_warp * WORDS + v) * LANES + lane;
    const u32 line = by_pitch.quotient(position), unit = by_rows.quotient(line);
    const int image = unit * (STORAGE == 0 ? 1 : 2), row = line - unit * image_rows, column = position - line * pitch;
    const bool output = row < out_height && column < out_width;
    at[v] = image * out_size + row * out_width + column;
    inside |= u32(output && image < images) << v;
    neighbour_inside |= u32(output && image + 1 < images) << v;
  }
#pragma unroll
  for (int j = 0; j < ROWS; j++) {
    if (row_of[j] < 0) continue;
    Element* const to = y + row_of[j] * out_plane;
    const Element* const from = residual + row_of[j] * out_plane;
#pragma unroll
    for (int v = 0; v < WORDS; v++) {
#pragma unroll
      for (int neighbour = 0; neighbour < SUMS / WORDS; neighbour++) {
        const u32 place = at[v] + neighbour * out_size;
        if ((neighbour ? neighbour_inside : inside) >> v & 1) {
          float value = sum[j][v * (SUMS / WORDS) + neighbour] + row_bias[j];
          if (residual) value += load(from + place);
          store(to + place, clamp(value, least, most));
        }
      }
    }
  }
}
