// direct.cu, what consumer warps do in the end: add up the sums of warps that share output channels, and store.
#define INFINITY __int_as_float(0x7f800000)

// An output channel of a warp, -1 where there is none, and its bias.
struct Output {
  int channel;
  float bias;
};

__device__ __forceinline__ void outputs(Output (&out)[OUT_CHANNELS], const int* __restrict__ channel,
                                        const float* __restrict__ bias) {
#pragma unroll
  for (int j = 0; j < OUT_CHANNELS; j++) {
    out[j].channel = channel[j];
    out[j].bias = bias && out[j].channel >= 0 ? bias[out[j].channel] : 0.f;
  }
}

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

// The first of the warps that share output channels gathers the sums of the others; the ring is free by now. Returns
// whether this warp is such a first one.
__device__ __forceinline__ bool gather(float (&sum)[OUT_CHANNELS][SUMS], const Shape& p, char* shared,
                                       const Consumer& me) {
  float* const parts = (float*)shared + me.lane;
  const int team = p.position_warps * p.out_channel_warps, threads = p.consumers * LANES;
  asm volatile("bar.sync 1, %0;" ::"r"(threads) : "memory");
  if (me.in_channel_warp > 0) {
#pragma unroll
    for (int j = 0; j < OUT_CHANNELS; j++)
#pragma unroll
      for (int v = 0; v < SUMS; v++) parts[((me.warp - team) * OUT_CHANNELS * SUMS + j * SUMS + v) * LANES] = sum[j][v];
  }
  asm volatile("bar.sync 1, %0;" ::"r"(threads) : "memory");
  if (me.in_channel_warp > 0) return false;
  for (int other = 0; other < p.in_channel_warps - 1; other++) {
#pragma unroll
    for (int j = 0; j < OUT_CHANNELS; j++)
#pragma unroll
      for (int v = 0; v < SUMS; v++)
        sum[j][v] += parts[((other * team + me.warp) * OUT_CHANNELS * SUMS + j * SUMS + v) * LANES];
  }
  return true;
}

// Stores activation(sum + bias + residual).
__device__ __forceinline__ void finish(float (&sum)[OUT_CHANNELS][SUMS], const Output (&out)[OUT_CHANNELS],
                                       const Shape& p, const Tile& tile, const Consumer& me, Element* y,
                                       const Element* residual, const float* __restrict__ slopes) {
  wait_for_previous_kernel();
  const int out_plane = p.out_height * p.out_width, out_size = p.out_channels * out_plane;
  const float least = p.bound >= 1 ? 0.f : -INFINITY, most = p.bound == 2 ? 6.f : INFINITY;
  u32 at[WORDS];                         // in channel 0 of the first sample
  u32 inside = 0, neighbour_inside = 0;  // a bit per word
#pragma unroll
  for (int v = 0; v < WORDS; v++) {
    const u32 position = tile.first_word + (me.position_warp * WORDS + v) * LANES + me.lane;
    const u32 line = p.by_pitch.quotient(position), unit = p.by_sample_rows.quotient(line);
    const int sample = unit * SAMPLES, row = line - unit * p.sample_rows, column = position - line * p.pitch;
    const bool output = row < p.out_height && column < p.out_width;
    at[v] = sample * out_size + row * p.out_width + column;
    inside |= u32(output && sample < tile.samples) << v;
    neighbour_inside |= u32(output && sample + 1 < tile.samples) << v;
  }
#pragma unroll
  for (int j = 0; j < OUT_CHANNELS; j++) {
    if (out[j].channel < 0) continue;
    Element* const to = y + out[j].channel * out_plane;
    const Element* const from = residual + out[j].channel * out_plane;
    const float slope = SLOPED ? slopes[out[j].channel] : 0.f;
#pragma unroll
    for (int v = 0; v < WORDS; v++) {
#pragma unroll
      for (int neighbour = 0; neighbour < SAMPLES; neighbour++) {
        const u32 place = at[v] + neighbour * out_size;
        if ((neighbour ? neighbour_inside : inside) >> v & 1) {
          float value = sum[j][v * SAMPLES + neighbour] + out[j].bias;
          if (residual) value += load(from + place);
          store(to + place, BEYOND_BOUNDS ? activated(value, slope) : clamp(value, least, most));
        }
      }
    }
  }
}
