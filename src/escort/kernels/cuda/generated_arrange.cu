// Lays the input out for generated kernels that stage it by whole channels: the words of all samples one after the
// other, channel by channel, with zeros for the padding. codegen.py defines the capitals as in generated.cuh.
#include "ptx.cuh"

#if STORAGE == 0
typedef float Element;
#else
typedef unsigned short Element;
#endif
#define PLANE (HEIGHT * WIDTH)
#define WORDS 4  // per thread, side by side

__constant__ int first_row[] = {FIRST_ROWS}, first_column[] = {FIRST_COLUMNS};  // of each plane

// x (samples, CHANNELS, HEIGHT, WIDTH) to (CHANNELS, PLANES, words), words a multiple of WORDS. A plane has every
// STRIDE_DOWN-th row and every STRIDE_RIGHT-th column from its first ones on. Threads along x share out the words,
// blocks along y the planes.
extern "C" __global__ void __launch_bounds__(THREADS)
    generated_arrange(const Element* __restrict__ x, uint4* __restrict__ to, int samples, u32 words) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  const u32 thread = blockIdx.x * THREADS + threadIdx.x;
  if (thread * WORDS >= words) return;
  for (u32 plane = blockIdx.y; plane < CHANNELS * PLANES; plane += gridDim.y) {
    const u32 channel = plane / PLANES;
    u32 word[WORDS];
#pragma unroll
    for (int w = 0; w < WORDS; w++) {
      const u32 position = thread * WORDS + w, line = position / PITCH;
      const int row = ((int)(line % SAMPLE_ROWS) - TOP) * STRIDE_DOWN + first_row[plane % PLANES];
      const int column = ((int)(position - line * PITCH) - LEFT) * STRIDE_RIGHT + first_column[plane % PLANES];
      word[w] = 0;
#pragma unroll
      for (int i = 0; i < SAMPLES; i++) {
        const u32 sample = line / SAMPLE_ROWS * SAMPLES + i;
        if (row < 0 || row >= HEIGHT || column < 0 || column >= WIDTH || sample >= samples) continue;
        const Element element = __ldg(x + (sample * (long long)CHANNELS + channel) * PLANE + row * WIDTH + column);
#if STORAGE == 0
        word[w] = __float_as_uint(element);
#else
        word[w] |= (u32)element << (16 * i);
#endif
      }
    }
    to[(plane * (unsigned long long)words + thread * WORDS) / WORDS] = make_uint4(word[0], word[1], word[2], word[3]);
  }
}
