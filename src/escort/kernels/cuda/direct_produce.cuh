// direct.cu, the producer warps: each copies channels of the tile's input, and all of them the records.
#define GROUP (SLOTS < 4 ? SLOTS : 4)      // words that a lane of a producer warp loads before it stores them
#define BATCH (SLOTS < 8 ? 8 / SLOTS : 1)  // channels that a producer warp copies at a time where PAIRED
#define NONE 0xffffffffu

// What a lane copies of every channel: where it lies in the first channel and, where that depends on the lane, where it
// goes in a stage, both in bytes. A word of 16-bit storage comes from two samples; where the last one has no neighbour,
// half of the word is arbitrary.
#if PAIRED
// A load brings two columns, aligned to 4 bytes: it begins one element earlier in a channel that starts at an odd one.
struct Copies {
  u32 source[SLOTS];
  // Half of the lanes first store what goes to an even word and the other half what goes to an odd one, so that
  // hardly two lanes of a warp meet in a bank. The lowest bit of a place says that the right column comes first.
  u32 to[SLOTS][1 + ODD][2];  // [of a channel that starts at an even or odd element][first or second store]
  u32 lone;                   // a bit per slot: the sample has no neighbour
  // A warp copies BATCH channels at a time and loads the next ones before it waits for room.
  u32 low[BATCH][SLOTS], high[BATCH][SLOTS];

  __device__ __forceinline__ Copies(const Shape& p, const Tile& tile, int lane) : lone(0) {
    const u32 plane_pairs = (p.plane + 1) / 2;
    const u32 line = p.by_pitch.quotient(tile.first_word), unit = p.by_sample_rows.quotient(line);
    const int row = (int)(line - unit * p.sample_rows) - p.row_padding;
    const int column = (int)(tile.first_word - line * p.pitch) - p.column_padding;
    const int begin = row < 0 ? 0 : row >= p.height ? p.plane : row * p.width + min(max(column, 0), p.width);
    const u32 first_pair = unit * plane_pairs + begin / 2;
#pragma unroll
    for (int i = 0; i < SLOTS; i++) place(p, tile, i, first_pair + i * LANES + lane, lane);
  }

  // Slot i copies that pair, of all pairs of a channel through the samples.
  __device__ __forceinline__ void place(const Shape& p, const Tile& tile, int i, u32 pair, int lane) {
    const u32 plane_pairs = (p.plane + 1) / 2, unit = p.by_pairs.quotient(pair);
    const int element = 2 * (pair - unit * plane_pairs), row = p.by_width.quotient(element);
    const int column = element - row * p.width;
    const int at = (unit * p.sample_rows + row + p.row_padding) * p.pitch + column + p.column_padding - tile.first_word;
    const bool inside = 2 * unit < tile.samples;
    u32 word[3] = {u32(column > 0 ? at - 1 : at - p.pitch + p.width - 1), u32(at),
                   u32(column + 1 < p.width ? at + 1 : at + p.pitch - p.width + 1)};
#pragma unroll
    for (int k = 0; k < 3; k++) {  // the elements before, at and behind
      const int e = element + k - 1;
      if (!inside || e < 0 || e >= p.plane || word[k] >= p.phase_words) word[k] = NONE;
    }
    source[i] = inside ? (2 * unit * p.sample_size + element) * 2 : 0;
    lone |= u32(2 * unit + 1 >= tile.samples) << i;
#pragma unroll
    for (int odd = 0; odd < 1 + ODD; odd++) {
      const u32 low = word[1 - odd], high = word[2 - odd];
      const bool swap = low == NONE || (high != NONE && (low & 1) != lane / (LANES / 2));
      const u32 first = swap ? high : low, second = swap ? low : high;
      to[i][odd][0] = first == NONE ? NONE : 4 * first | swap;
      to[i][odd][1] = second == NONE ? NONE : 4 * second;
    }
  }

  // Loads a batch of channels, those from `channel` to `end` of the group's.
  __device__ __forceinline__ void load(const Shape& p, const Element* x, int first_channel, int channel, int end) {
#pragma unroll
    for (int c = 0; c < BATCH; c++) {
      if (channel + c < end) {
        const int place = first_channel + channel + c;
        const char* const from = (const char*)(x + (place * p.plane - (ODD & place)));
        const char* const from_neighbour = from + 2 * p.sample_size;
#pragma unroll
        for (int i = 0; i < SLOTS; i++) {
          if (i < p.slots) {
            low[c][i] = __ldg((const u32*)(from + source[i]));
            if (!(lone >> i & 1)) high[c][i] = __ldg((const u32*)(from_neighbour + source[i]));
          }
        }
      }
    }
  }

  // Stores channel c of the batch.
  __device__ __forceinline__ void store(const Shape& p, u32 to_channel, int c, bool odd) {
#pragma unroll
    for (int i = 0; i < SLOTS; i++) {
      if (i < p.slots) {
        const u32 first_to = odd ? to[i][ODD][0] : to[i][0][0], second_to = odd ? to[i][ODD][1] : to[i][0][1];
        const u32 select = first_to & 1 ? 0x7632 : 0x5410;
        if (first_to != NONE) store4(to_channel + (first_to & ~1), __byte_perm(low[c][i], high[c][i], select));
        if (second_to != NONE)
          store4(to_channel + second_to, __byte_perm(low[c][i], high[c][i], select ^ (0x5410 ^ 0x7632)));
      }
    }
  }
};
#else
struct Copies {
  u32 source[SLOTS];
#if STORAGE != 0
  u32 neighbour[SLOTS];
#endif

  __device__ __forceinline__ Copies(const Shape& p, const Tile& tile, int lane) {
    if (p.phases > 1)
      locate<true>(p, tile, lane);
    else
      locate<false>(p, tile, lane);
  }

  template <bool PHASES>
  __device__ __forceinline__ void locate(const Shape& p, const Tile& tile, int lane) {
#pragma unroll
    for (int i = 0; i < SLOTS; i++) {
      source[i] = NONE;
      if (i < p.slots) {
        int word = i * LANES + lane, phase_row = 0, phase_column = 0;
        bool inside = word < p.phases * p.phase_words;
        if (PHASES) {
          const int phase = word / p.phase_words;
          word -= phase * p.phase_words;
          phase_row = phase / p.column_stride;
          phase_column = phase - phase_row * p.column_stride;
        }
        const u32 position = tile.first_word + word, line = p.by_pitch.quotient(position);
        const u32 unit = p.by_sample_rows.quotient(line), sample = unit * SAMPLES;
        const int row = (int)(line - unit * p.sample_rows) * p.row_stride + phase_row - p.row_padding;
        const int column = (int)(position - line * p.pitch) * p.column_stride + phase_column - p.column_padding;
        inside &= row >= 0 && row < p.height && column >= 0 && column < p.width && sample < tile.samples;
        if (inside) source[i] = (sample * p.sample_size + row * p.width + column) * sizeof(Element);
#if STORAGE != 0
        neighbour[i] = source[i] + (sample + 1 < tile.samples ? p.sample_size * 2 : 0);
#endif
      }
    }
  }

  // Copies the lane's words of the channel at x.
  __device__ __forceinline__ void copy(const Shape& p, const char* from, u32 to) const {
#if STORAGE == 0
#pragma unroll
    for (int i = 0; i < SLOTS; i++) {
      if (source[i] != NONE) copy4(to + i * LANES * 4, from + source[i]);
    }
#else
#pragma unroll
    for (int start = 0; start < SLOTS; start += GROUP) {
      if (start < p.slots) {
        u32 word[GROUP];
#pragma unroll
        for (int i = 0; i < GROUP; i++) {
          if (source[start + i] != NONE)
            word[i] = __ldg((const Element*)(from + source[start + i])) |
                      (u32)__ldg((const Element*)(from + neighbour[start + i])) << 16;
        }
#pragma unroll
        for (int i = 0; i < GROUP; i++) {
          if (source[start + i] != NONE) store4(to + (start + i) * LANES * 4, word[i]);
        }
      }
    }
#endif
  }
};
#endif

// Fills the ring with one segment after the other.
__device__ __forceinline__ void produce(const Shape& p, const Ring& ring, const Tile& tile, const Element* x,
                                        int first_channel, const Segment* segment, const uint4* records) {
  const int lane = threadIdx.x % LANES, producer = threadIdx.x / LANES - p.consumers;
  const int thread = producer * LANES + lane;
  Segment here = segment[0], next = segment[1], after = next;
  Copies copies(p, tile, lane);
  wait_for_previous_kernel();
  Turn turn;
#if PAIRED
  copies.load(p, x, first_channel, here.channel + BATCH * producer, next.channel);
#endif
  for (int chunk = 0; chunk < p.chunks; chunk++) {
    if (chunk + 1 < p.chunks) after = segment[chunk + 2];
    if (chunk < p.stages)
      barrier_wait(ring.clean + 8 * turn.stage, 0);
    else
      barrier_wait(ring.empty + 8 * turn.stage, turn.parity ^ 1);
    const u32 to_stage = ring.begin + turn.stage * p.stage_bytes;
    const u32 to_records = to_stage + p.channel_block * p.channel_bytes;
    for (int i = thread; i < next.record - here.record; i += p.producers * LANES)
      copy16(to_records + 16 * i, records + here.record + i);
    const int first = first_channel + here.channel, channels = next.channel - here.channel;
#if PAIRED
    for (int channel = BATCH * producer; channel < channels; channel += BATCH * p.producers) {
#pragma unroll
      for (int c = 0; c < BATCH; c++) {
        if (channel + c < channels)
          copies.store(p, to_stage + (channel + c) * p.channel_bytes, c, ODD & (first + channel + c));
      }
      if (channel + BATCH * p.producers < channels)
        copies.load(p, x, first_channel, here.channel + channel + BATCH * p.producers, next.channel);
    }
    if (chunk + 1 < p.chunks) copies.load(p, x, first_channel, next.channel + BATCH * producer, after.channel);
#else
    for (int channel = producer; channel < channels; channel += p.producers)
      copies.copy(p, (const char*)(x + (first + channel) * p.plane), to_stage + channel * p.channel_bytes + lane * 4);
#endif
    here = next;
    next = after;
    barrier_arrive_after_copies(ring.full + 8 * turn.stage);
    __syncwarp();
    if (lane < SIGNALS) barrier_arrive(ring.full + 8 * turn.stage);
    turn.next(p.stages);
  }
}
