// Products on tensor cores, a warp at a time, from compute capability 8.0 on.
// STORAGE   0: float multiplied as TF32, 1: fp16, 2: bf16
#pragma once

typedef unsigned int u32;

// sum += a b for 16 rows of a, 8 columns of b and 8 words of both along what is summed: words of one float or of two
// 16-bit elements. With g = lane / 4 and t = lane % 4 a lane has
//   a    rows g, g + 8 of word t, then the same of word t + 4
//   b    column g of words t, t + 4
//   sum  row g of columns 2 t, 2 t + 1, then row g + 8
__device__ __forceinline__ void multiply_add(float (&sum)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
#if STORAGE == 0
#define MMA "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32"
#elif STORAGE == 1
#define MMA "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"
#else
#define MMA "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
#endif
  asm volatile(MMA " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// The nearest number that TF32 has; tensor cores drop the other bits.
__device__ __forceinline__ u32 rounded_to_tf32(u32 bits) {
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(__uint_as_float(bits)));
  return bits;
}

// The same of half as many words: a's first two, and b's first.
__device__ __forceinline__ void multiply_add8(float (&sum)[4], u32 a0, u32 a1, u32 b) {
#if STORAGE == 0
#define MMA8 "mma.sync.aligned.m16n8k4.row.col.f32.tf32.tf32.f32"
#elif STORAGE == 1
#define MMA8 "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32"
#else
#define MMA8 "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32"
#endif
  asm volatile(MMA8 " {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
               : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
               : "r"(a0), "r"(a1), "r"(b));
}

// The words of a, in their order, from shared memory: lane % 8 says of which row the lane's address is, whose first
// word lies there and the next three behind it, and lane / 8 to which of a lane's words it belongs.
__device__ __forceinline__ void load_words(u32 (&words)[4], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(address)
               : "memory");
}

// The first two of them, by the addresses of the first 16 lanes.
__device__ __forceinline__ void load_words8(u32 (&words)[2], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(words[0]), "=r"(words[1])
               : "r"(address)
               : "memory");
}
