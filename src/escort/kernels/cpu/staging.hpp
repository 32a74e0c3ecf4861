// Copies of input rows into scratch memory. For kernels, which are compiled once per instruction set.
#pragma once

#include "vector.hpp"

namespace escort {
namespace {

// Rows that lie a pitch apart.
template <class T>
struct PitchedRows {
  T* first;
  int64_t pitch;
};

// Copies rows of n floats, N or more, that lie Stride apart, 1 or 2. The last vector of a row overlaps the one before
// it.
template <int N, int Stride>
void copy_vectors(PitchedRows<float> to, PitchedRows<const float> from, int rows, int n) {
  using Part = Floats<N>;
  for (; rows > 0; rows--, to.first += to.pitch, from.first += from.pitch) {
    const float* p = from.first;
    const auto move = [&](int i) {
      // The second load of every second value starts one early, so that nothing behind the last value is read.
      Part::store(to.first + i,
                  Stride == 1 ? Part::load(p + i) : pick_evens(Part::load(p + 2 * i), Part::load(p + 2 * i + N - 1)));
    };
    for (int i = 0; i < n - N; i += N) move(i);
    move(n - N);
  }
}

template <int Stride>
void copy_by(PitchedRows<float> to, PitchedRows<const float> from, int rows, int n) {
  if (n >= kLanes) return copy_vectors<kLanes, Stride>(to, from, rows, n);
  if constexpr (kLanes > 8)
    if (n >= 8) return copy_vectors<8, Stride>(to, from, rows, n);
  if constexpr (kLanes > 4)
    if (n >= 4) return copy_vectors<4, Stride>(to, from, rows, n);
  for (; rows > 0; rows--, to.first += to.pitch, from.first += from.pitch)
    for (int i = 0; i < n; i++) to.first[i] = from.first[i * Stride];
}

// Copies rows of n floats that lie `stride` apart. What lies behind the last one of a row is not touched.
inline void copy_rows(PitchedRows<float> to, PitchedRows<const float> from, int rows, int n, int stride) {
  if (stride == 1) return copy_by<1>(to, from, rows, n);
  if (stride == 2) return copy_by<2>(to, from, rows, n);
  for (; rows > 0; rows--, to.first += to.pitch, from.first += from.pitch)
    for (int i = 0; i < n; i++) to.first[i] = from.first[int64_t(i) * stride];
}

// The even or the odd lanes of two vectors that lie side by side.
inline Floats<4>::Type even_lanes(Floats<4>::Type a, Floats<4>::Type b) {
  return __builtin_shufflevector(a, b, 0, 2, 4, 6);
}
inline Floats<4>::Type odd_lanes(Floats<4>::Type a, Floats<4>::Type b) {
  return __builtin_shufflevector(a, b, 1, 3, 5, 7);
}
#if defined(__AVX2__)
inline Floats<8>::Type even_lanes(Floats<8>::Type a, Floats<8>::Type b) {
  return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14);
}
inline Floats<8>::Type odd_lanes(Floats<8>::Type a, Floats<8>::Type b) {
  return __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15);
}
#endif
#if defined(__AVX512F__)
inline Floats<16>::Type even_lanes(Floats<16>::Type a, Floats<16>::Type b) {
  return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
}
inline Floats<16>::Type odd_lanes(Floats<16>::Type a, Floats<16>::Type b) {
  return __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
}
#endif

// Deals rows of 2 n floats, n being N or more, to `evens` and, so far from there, the odd ones.
template <int N>
void split_vectors(PitchedRows<float> evens, int64_t odds, PitchedRows<const float> from, int rows, int n) {
  using Part = Floats<N>;
  for (; rows > 0; rows--, evens.first += evens.pitch, from.first += from.pitch) {
    const auto move = [&](int i) {
      const auto low = Part::load(from.first + 2 * i), high = Part::load(from.first + 2 * i + N);
      Part::store(evens.first + i, even_lanes(low, high));
      Part::store(evens.first + odds + i, odd_lanes(low, high));
    };
    for (int i = 0; i < n - N; i += N) move(i);
    move(n - N);
  }
}

template <int Least = 4>  // a template, so that vectors which the instruction set lacks are not compiled
void split_pairs(PitchedRows<float> evens, int64_t odds, PitchedRows<const float> from, int rows, int n) {
  if (n >= kLanes) return split_vectors<kLanes>(evens, odds, from, rows, n);
  if constexpr (kLanes > 2 * Least)
    if (n >= 2 * Least) return split_vectors<2 * Least>(evens, odds, from, rows, n);
  if constexpr (kLanes > Least)
    if (n >= Least) return split_vectors<Least>(evens, odds, from, rows, n);
  for (; rows > 0; rows--, evens.first += evens.pitch, from.first += from.pitch)
    for (int i = 0; i < n; i++) evens.first[i] = from.first[2 * i], evens.first[odds + i] = from.first[2 * i + 1];
}

// Deals rows of `width` floats to `evens` and, so far from there, the odd ones.
inline void split_rows(PitchedRows<float> evens, int64_t odds, PitchedRows<const float> from, int rows, int width) {
  split_pairs(evens, odds, from, rows, width / 2);
  for (int row = 0; width % 2 == 1 && row < rows; row++)
    evens.first[row * evens.pitch + width / 2] = from.first[row * from.pitch + width - 1];
}

inline void copy(float* to, const float* from, int n) { copy_by<1>({to, 0}, {from, 0}, 1, n); }

}  // namespace
}  // namespace escort
