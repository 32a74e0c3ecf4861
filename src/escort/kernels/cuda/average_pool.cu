// The average of each window of x (outer, height, width, pitch), summed in float. NHWC has samples outside and channels
// as pitch, NCHW planes outside and a pitch of 1.
//
// Threads share a window where there are few: its pixels are dealt to `1 << log_parts` threads of each block of a
// cluster, whose sums are added up in shared memory. A thread has VECTOR neighbouring outputs. Neighbouring threads
// have neighbouring outputs in NHWC, and neighbouring pixels of a window in NCHW.
// VECTOR          elements of 16 bytes at most, a divisor of the pitch
// ROWS, COLUMNS   of a small window that no threads share, whose loads are all issued together; 0 for any other
#define LOG_THREADS 8
#define THREADS (1 << LOG_THREADS)
#define AT_ONCE 4  // pixels whose loads are issued together
#define OCCUPANCY \
  (ROWS * COLUMNS > 4 ? 3 : 4)  // blocks that registers leave room for; by itself the compiler saves more

#include "divisor.cuh"
#include "elements.cuh"
#include "ptx.cuh"

// layers/planes/average.py has a dataclass of the same fields that says what each means.
struct Params {
  int vectors, pitch, height, width, out_height, out_width;
  int is_adaptive, rows, columns, down, right, top, left;
  int counts_padding, divisor;
  int log_parts, log_cluster;
  Divisor by_pixel, by_out_width, by_out_height;
};

// A window along one axis, and how many elements it counts there.
struct Side {
  int begin, end, counted;

  __device__ Side(int i, int size, int out_size, int window, int stride, int padding, const Params& p) {
    if (!ROWS && p.is_adaptive) {
      begin = (u32)(i * size) / out_size, end = (u32)((i + 1) * size + out_size - 1) / out_size;
      counted = end - begin;
    } else {
      const int first = i * stride - padding, last = min(first + window, size + padding);
      begin = max(first, 0), end = min(last, size);
      counted = p.counts_padding ? last - first : end - begin;
    }
  }
};

__device__ __forceinline__ void add(float (&sum)[VECTOR], Vector vector) {
  float values[VECTOR];
  widen(vector, values);
#pragma unroll
  for (int i = 0; i < VECTOR; i++) sum[i] += values[i];
}

// The sums of the first part of each window, of all blocks of a cluster, in its first block.
__device__ __forceinline__ void add_up(float (&sum)[VECTOR], int slot, int part, const Params& p) {
  __shared__ float sums[VECTOR * THREADS];
#pragma unroll
  for (int i = 0; i < VECTOR; i++) sums[i * THREADS + slot] = sum[i];
  const int windows = THREADS >> p.log_parts;
  for (int half = 1 << p.log_parts >> 1; half; half >>= 1) {
    __syncthreads();
    if (part >= half) continue;
#pragma unroll
    for (int i = 0; i < VECTOR; i++) {
      sum[i] += sums[i * THREADS + slot + half * windows];
      sums[i * THREADS + slot] = sum[i];
    }
  }
#if __CUDA_ARCH__ >= 900
  if (p.log_cluster == 0) return;
  asm volatile("barrier.cluster.arrive.release; barrier.cluster.wait.acquire;" ::: "memory");
  const int cluster = 1 << p.log_cluster;
  if (part == 0 && blockIdx.x % cluster == 0) {
    for (int rank = 1; rank < cluster; rank++)
#pragma unroll
      for (int i = 0; i < VECTOR; i++) {
        float other;
        asm volatile("{ .reg .b32 at; mapa.shared::cluster.u32 at, %1, %2; ld.shared::cluster.f32 %0, [at]; }"
                     : "=f"(other)
                     : "r"(shared_address(sums + i * THREADS + slot)), "r"(rank)
                     : "memory");
        sum[i] += other;
      }
  }
  asm volatile("barrier.cluster.arrive; barrier.cluster.wait;" ::: "memory");
#endif
}

extern "C" __global__ void __launch_bounds__(THREADS, OCCUPANCY)
    average_pool(const Element* __restrict__ x, Element* __restrict__ y, const __grid_constant__ Params p) {
  let_next_kernel_start();
  const u32 thread = threadIdx.x, log_windows = LOG_THREADS - p.log_parts, windows = 1 << log_windows;
  const u32 part = p.pitch > 1 ? thread >> log_windows : thread & (1u << p.log_parts) - 1;
  const u32 window = p.pitch > 1 ? thread & windows - 1 : thread >> p.log_parts;
  const u32 block = blockIdx.x >> p.log_cluster, number = (block << log_windows) + window, of_pixel = p.pitch / VECTOR;
  const u32 pixel = p.by_pixel.quotient(number), line = p.by_out_width.quotient(pixel);
  const u32 outer = p.by_out_height.quotient(line);
  const Side down(line - outer * p.out_height, p.height, p.out_height, p.rows, p.down, p.top, p);
  const Side right(pixel - line * p.out_width, p.width, p.out_width, p.columns, p.right, p.left, p);
  const bool is_output = number < (u32)p.vectors;
  const bool is_shared = !ROWS && (p.log_parts > 0 || p.log_cluster > 0);
  float sum[VECTOR] = {};
  wait_for_previous_kernel();
  if (is_output) {
    const Element* const plane =
        x + (long long)outer * p.height * p.width * p.pitch + (number - pixel * of_pixel) * VECTOR;
#if ROWS
    const int top = (line - outer * p.out_height) * p.down - p.top,
              left = (pixel - line * p.out_width) * p.right - p.left;
    Vector here[ROWS * COLUMNS] = {};
#pragma unroll
    for (int i = 0; i < ROWS * COLUMNS; i++) {
      const int row = top + i / COLUMNS, column = left + i % COLUMNS;
      const Element* const from = plane + (long long)(row * p.width) * p.pitch;
      if ((u32)row < (u32)p.height && (u32)column < (u32)p.width) here[i] = load(from + column * p.pitch);
    }
#pragma unroll
    for (int i = 0; i < ROWS * COLUMNS; i++) add(sum, here[i]);
#else
    const int columns = right.end - right.begin;
    int row = down.begin, column = right.begin, rows_on = 0, columns_on = 1;
    if (is_shared) {
      const int step = 1 << p.log_cluster + p.log_parts;
      const int first = (blockIdx.x - (block << p.log_cluster) << p.log_parts) + part;
      rows_on = step / columns, columns_on = step - rows_on * columns;
      row += first / columns, column += first % columns;
    }
    while (row < down.end) {
      Vector here[AT_ONCE] = {};
#pragma unroll
      for (int i = 0; i < AT_ONCE; i++) {
        if (row < down.end) here[i] = load(plane + ((long long)row * p.width + column) * p.pitch);
        row += rows_on, column += columns_on;
        if (column >= right.end) column -= columns, row++;
      }
#pragma unroll
      for (int i = 0; i < AT_ONCE; i++) add(sum, here[i]);
    }
#endif
  }
  if (is_shared) add_up(sum, part * windows + window, part, p);
  if (!is_output || part > 0 || blockIdx.x != block << p.log_cluster) return;
  const float share = 1.f / (p.divisor ? p.divisor : down.counted * right.counted);
#pragma unroll
  for (int i = 0; i < VECTOR; i++) sum[i] *= share;
  *(Vector*)(y + number * (long long)VECTOR) = narrow(sum);
}
