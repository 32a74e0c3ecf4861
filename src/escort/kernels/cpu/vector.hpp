// Vectors of the instruction set that a kernel is compiled for (ESCORT_ISA), in the extensions that GCC and Clang
// share.
//
// Kernels use no library code: were an inline function of the standard library compiled here for AVX-512, the linker
// could keep that copy for every machine. For the same reason everything here has internal linkage.
#pragma once

#include <cstdint>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define ESCORT_JOIN2(a, b) a##_##b
#define ESCORT_JOIN(a, b) ESCORT_JOIN2(a, b)
#define ESCORT_TEXT2(a) #a
#define ESCORT_TEXT(a) ESCORT_TEXT2(a)
#define ESCORT_FOR_ISA(name) ESCORT_JOIN(name, ESCORT_ISA)
#define ESCORT_ISA_NAME ESCORT_TEXT(ESCORT_ISA)

// For what runs once per vector: a call would spill the vectors that registers hold.
#define ESCORT_INLINE inline __attribute__((always_inline))

namespace escort {
namespace {

#if defined(__AVX512F__)
constexpr int kBytes = 64, kMaxVectors = 28;  // 32 registers
#elif defined(__AVX2__)
constexpr int kBytes = 32, kMaxVectors = 14;  // 16 registers: one for the weight, one to spare
#elif defined(__aarch64__)
constexpr int kBytes = 16, kMaxVectors = 28;
#else
constexpr int kBytes = 16, kMaxVectors = 12;  // the spare registers hold products where there is no multiply-add
#endif
constexpr int kLanes = kBytes / 4;

// Vectors of N floats: kLanes, or fewer for what is shorter.
template <int N>
struct Floats {
  typedef float Type __attribute__((vector_size(4 * N)));
  typedef float Unaligned __attribute__((vector_size(4 * N), aligned(4), may_alias));
  static Type load(const float* p) { return *reinterpret_cast<const Unaligned*>(p); }
  static void store(float* p, Type v) { *reinterpret_cast<Unaligned*>(p) = v; }
};

typedef Floats<kLanes>::Type Vector;

inline Vector load(const float* p) { return Floats<kLanes>::load(p); }
inline void store(float* p, Vector v) { Floats<kLanes>::store(p, v); }

// Keeps what was loaded in a register, where GCC would rather load it again for each of its uses.
inline Vector in_register(Vector v) {
#if defined(__aarch64__)
  asm("" : "+w"(v));
#elif defined(__AVX512F__)
  asm("" : "+v"(v));
#elif defined(__SSE2__)
  asm("" : "+x"(v));
#endif
  return v;
}

// The larger of two, and the smaller. A NaN in v passes.
#if defined(__AVX512F__)
ESCORT_INLINE Vector at_least(Vector low, Vector v) { return _mm512_max_ps(low, v); }
ESCORT_INLINE Vector at_most(Vector high, Vector v) { return _mm512_min_ps(high, v); }
#elif defined(__AVX2__)
ESCORT_INLINE Vector at_least(Vector low, Vector v) { return _mm256_max_ps(low, v); }
ESCORT_INLINE Vector at_most(Vector high, Vector v) { return _mm256_min_ps(high, v); }
#else
ESCORT_INLINE Vector at_least(Vector low, Vector v) { return v < low ? low : v; }
ESCORT_INLINE Vector at_most(Vector high, Vector v) { return v > high ? high : v; }
#endif

inline int min(int a, int b) { return a < b ? a : b; }

// load_lanes: the lanes of p whose bits are set in `lanes`, and zeros in the others, which are not read.
// store_lanes: the first `count` lanes, at least one; the others are not written.
constexpr int kAllLanes = (1 << kLanes) - 1;
#if defined(__AVX512F__)
ESCORT_INLINE Vector load_lanes(const float* p, int lanes) {
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>(lanes), p);
}
ESCORT_INLINE void store_lanes(float* p, Vector v, int count) {
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>(kAllLanes >> (kLanes - count)), v);
}
#elif defined(__AVX2__)
ESCORT_INLINE Vector load_lanes(const float* p, int lanes) {
  if (lanes == kAllLanes) return load(p);
  const __m256i bits = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  return _mm256_maskload_ps(p, _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(lanes), bits), bits));
}
ESCORT_INLINE void store_lanes(float* p, Vector v, int count) {
  if (count == kLanes) return store(p, v);
  __m128 rest = _mm256_castps256_ps128(v);  // masked stores take dozens of instructions on some processors
  if (count & 4) {
    _mm_storeu_ps(p, rest);
    rest = _mm256_extractf128_ps(v, 1);
    p += 4;
  }
  if (count & 2) {
    _mm_storel_pi(reinterpret_cast<__m64*>(p), rest);
    rest = _mm_movehl_ps(rest, rest);
    p += 2;
  }
  if (count & 1) _mm_store_ss(p, rest);
}
#else
ESCORT_INLINE Vector load_lanes(const float* p, int lanes) {
  if (lanes == kAllLanes) return load(p);
  Vector v = {};
  for (int i = 0; i < kLanes; i++)
    if (lanes >> i & 1) v[i] = p[i];
  return v;
}
ESCORT_INLINE void store_lanes(float* p, Vector v, int count) {
  if (count == kLanes) return store(p, v);
  for (int i = 0; i < count; i++) p[i] = v[i];
}
#endif

// The even lanes of `low` followed by the odd lanes of `high`.
inline Floats<4>::Type pick_evens(Floats<4>::Type low, Floats<4>::Type high) {
  return __builtin_shufflevector(low, high, 0, 2, 5, 7);
}
#if defined(__AVX2__)
inline Floats<8>::Type pick_evens(Floats<8>::Type low, Floats<8>::Type high) {
  return __builtin_shufflevector(low, high, 0, 2, 4, 6, 9, 11, 13, 15);
}
#endif
#if defined(__AVX512F__)
inline Floats<16>::Type pick_evens(Floats<16>::Type low, Floats<16>::Type high) {
  return __builtin_shufflevector(low, high, 0, 2, 4, 6, 8, 10, 12, 14, 17, 19, 21, 23, 25, 27, 29, 31);
}
#endif

}  // namespace
}  // namespace escort
