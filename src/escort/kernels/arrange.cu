// Lays the input out for generated kernels that stage it by whole channels: the words of all images one after the
// other, channel by channel, with zeros for the padding. codegen.py defines the capitals as in generated.cuh.
#if STORAGE == 0
typedef float Element;
#else
typedef unsigned short Element;
#endif
typedef unsigned int u32;
#define PLANE (HEIGHT * WIDTH)
#define WORDS 4  // per thread, side by side

// x (images, CHANNELS, HEIGHT, WIDTH) to (CHANNELS, words), words a multiple of WORDS. Threads along x share out the
// words, blocks along y the channels.
extern "C" __global__ void __launch_bounds__(THREADS)
    arrange(const Element* __restrict__ x, uint4* __restrict__ to, int images, u32 words) {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents; griddepcontrol.wait;" ::: "memory");
#endif
  const u32 thread = blockIdx.x * THREADS + threadIdx.x;
  if (thread * WORDS >= words) return;
  const Element* from[WORDS][IMAGES];
  bool inside[WORDS][IMAGES];
#pragma unroll
  for (int w = 0; w < WORDS; w++) {
    const u32 position = thread * WORDS + w, line = position / PITCH;
    const int row = (int)(line % IMAGE_ROWS) - TOP, column = (int)(position - line * PITCH) - LEFT;
#pragma unroll
    for (int i = 0; i < IMAGES; i++) {
      const u32 image = line / IMAGE_ROWS * IMAGES + i;
      inside[w][i] = row >= 0 && row < HEIGHT && column >= 0 && column < WIDTH && image < images;
      from[w][i] = x + (inside[w][i] ? image * (long long)(CHANNELS * PLANE) + row * WIDTH + column : 0);
    }
  }
  for (u32 channel = blockIdx.y; channel < CHANNELS; channel += gridDim.y) {
    u32 word[WORDS];
#pragma unroll
    for (int w = 0; w < WORDS; w++) {
#if STORAGE == 0
      word[w] = inside[w][0] ? __float_as_uint(__ldg(from[w][0] + channel * PLANE)) : 0;
#else
      word[w] = 0;
#pragma unroll
      for (int i = 0; i < IMAGES; i++)
        if (inside[w][i]) word[w] |= (u32)__ldg(from[w][i] + channel * PLANE) << (16 * i);
#endif
    }
    to[(channel * (unsigned long long)words + thread * WORDS) / WORDS] = make_uint4(word[0], word[1], word[2], word[3]);
  }
}
