// direct.cu, the consumer warps: each multiplies some output channels' nonzeros with some positions of the tile.
#define FLUSH 32  // nonzeros that are summed in 16 bits

// A consumer warp: which positions, output channels and input channels of the block's it has.
struct Consumer {
  int warp, lane, position_warp, out_channel_warp, in_channel_warp;
  __device__ __forceinline__ Consumer(const Shape& p, int warp) : warp(warp), lane(threadIdx.x % LANES) {
    const int rest = warp / p.position_warps;
    position_warp = warp % p.position_warps;
    out_channel_warp = rest % p.out_channel_warps, in_channel_warp = rest / p.out_channel_warps;
  }
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
#elif PACKED  // a nonzero is (offset in bytes << 16 | weight)
__device__ __forceinline__ void multiply(Pair (&sum)[WORDS], u32 x, u32 nonzero) {
  const u32 from = x + (nonzero >> 16), weights = __byte_perm(nonzero, nonzero, 0x1010);
  u32 word[WORDS];
#pragma unroll
  for (int v = 0; v < WORDS; v++) word[v] = load4(from + v * LANES * 4);
#pragma unroll
  for (int v = 0; v < WORDS; v++) sum[v] = __hfma2(*(Pair*)&word[v], *(const Pair*)&weights, sum[v]);
}
#else
__device__ __forceinline__ void multiply(float (&sum)[SUMS], u32 x, u32 nonzero) {
  const u32 from = x + (nonzero >> 16);
  const float weight = low(nonzero);
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

// The products of `count` nonzeros, whose records begin at the shared address `record`. `next` holds the 16 bytes at
// that address; both move on to what follows the last nonzero.
#if STORAGE == 0
__device__ __forceinline__ void multiply_all(float (&sum)[SUMS], u32 x, u32& record, uint4& next, int count) {
#pragma unroll 1
  for (; count >= 4; count -= 4) {
    const uint4 a = next, b = load16(record + 16);
    next = load16(record += 32);
    multiply(sum, x, a.x, a.y);
    multiply(sum, x, a.z, a.w);
    multiply(sum, x, b.x, b.y);
    multiply(sum, x, b.z, b.w);
  }
  if (count & 2) {
    const uint4 a = next;
    next = load16(record += 16);
    multiply(sum, x, a.x, a.y);
    multiply(sum, x, a.z, a.w);
  }
  if (count & 1) {
    multiply(sum, x, next.x, next.y);
    next = load16(record += 16);
  }
}
#else
template <class Sums>
__device__ __forceinline__ void multiply_few(Sums& sum, u32 x, u32& record, uint4& next, int count) {
#pragma unroll 1
  for (; count >= 4; count -= 4) {
    const uint4 a = next;
    next = load16(record += 16);
    multiply(sum, x, a.x);
    multiply(sum, x, a.y);
    multiply(sum, x, a.z);
    multiply(sum, x, a.w);
  }
  if (count > 0) {
    const uint4 a = next;
    next = load16(record += 16);
    multiply(sum, x, a.x);
    if (count > 1) multiply(sum, x, a.y);
    if (count > 2) multiply(sum, x, a.z);
  }
}

__device__ __forceinline__ void multiply_all(float (&sum)[SUMS], u32 x, u32& record, uint4& next, int count) {
#if PACKED
#pragma unroll 1
  while (count > 0) {
    Pair part[WORDS];
    const u32 zero = 0;
#pragma unroll
    for (int v = 0; v < WORDS; v++) part[v] = *(const Pair*)&zero;
    const int left = max(count - FLUSH, 0);
    multiply_few(part, x, record, next, count - left);
    count = left;
#pragma unroll
    for (int v = 0; v < WORDS; v++) {
      sum[2 * v] += low(*(u32*)&part[v]);
      sum[2 * v + 1] += high(*(u32*)&part[v]);
    }
  }
#else
  multiply_few(sum, x, record, next, count);
#endif
}
#endif

// Zeroes the padding, once, since copies never touch it. Producers may use a stage as soon as it is clean.
__device__ __forceinline__ void clean(const Shape& p, const Ring& ring, char* shared) {
  for (int stage = 0; stage < min(p.stages, p.chunks); stage++) {
    uint4* const words = (uint4*)(shared + stage * p.stage_bytes);
    for (int i = threadIdx.x; i < p.channel_block * p.channel_bytes / 16; i += p.consumers * LANES)
      words[i] = make_uint4(0, 0, 0, 0);
    barrier_arrive(ring.clean + 8 * stage);
  }
}

// Sums up the products of all stages.
__device__ __forceinline__ void consume(float (&sum)[OUT_CHANNELS][SUMS], const Shape& p, const Ring& ring,
                                        const Consumer& me) {
#pragma unroll
  for (int j = 0; j < OUT_CHANNELS; j++)
#pragma unroll
    for (int v = 0; v < SUMS; v++) sum[j][v] = 0.f;

  Turn turn;
  for (int chunk = 0; chunk < p.chunks; chunk++) {
    barrier_wait(ring.full + 8 * turn.stage, turn.parity);
    const u32 base = ring.begin + turn.stage * p.stage_bytes;
    const u32 x = base + (me.position_warp * LANES * WORDS + me.lane) * 4;
    const u32 nonzeros = base + p.channel_block * p.channel_bytes;
    // A header word per output channel: where its nonzeros start, in units of 16 bytes, << 16 | how many there are.
    const int first = (me.in_channel_warp * p.out_channel_warps + me.out_channel_warp) * OUT_CHANNELS;
    u32 header[OUT_CHANNELS];
#pragma unroll
    for (int j = 0; j < OUT_CHANNELS; j++) header[j] = load4(nonzeros + 4 * (first + j));
    u32 record = nonzeros + 16 * (header[0] >> 16);
    uint4 next = load16(record);  // the nonzeros of a warp's channels lie one after the other
#pragma unroll
    for (int j = 0; j < OUT_CHANNELS; j++) multiply_all(sum[j], x, record, next, header[j] & 0xffff);
    __syncwarp();
    if (me.lane < SIGNALS) barrier_arrive(ring.empty + 8 * turn.stage);
    turn.next(p.stages);
  }
}
