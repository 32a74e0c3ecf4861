// Division by what only the host knows, as a multiplication.
#pragma once

// Exact below 2^31 for magic = ceil(2^(31 + shift) / divisor), 2^shift >= divisor.
struct Divisor {
  unsigned magic, shift;
  __device__ __forceinline__ unsigned quotient(unsigned n) const { return __umulhi(2 * n, magic) >> shift; }
};
