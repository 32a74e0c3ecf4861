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

inline void copy(float* to, const float* from, int n) { copy_by<1>({to, 0}, {from, 0}, 1, n); }

}  // namespace
}  // namespace escort
