// What runs behind the sums of a convolution: residual add and activation. For kernels, which are compiled once per
// instruction set.
//
// Infinities and NaN give what torch makes of them: silu, gelu and hardswish of -inf are NaN, as a factor of 0 is.
// Other results are within a few units in the last place, down to where e^-88 counts as 0.
#pragma once

#include "activation.hpp"
#include "vector.hpp"

namespace escort {
namespace {

typedef int32_t Integers __attribute__((vector_size(kBytes)));

constexpr int32_t kSign = INT32_MIN;

// e^v of numbers that are not positive, as scale * (1 + fraction). Near 0 the fraction is exact where e^v - 1 is not.
struct Exponential {
  Vector scale, fraction;

  ESCORT_INLINE explicit Exponential(Vector v) {
    v = at_least(Vector{} - 88.0f, v);
    // Adding 1.5 * 2^23 leaves no room for digits behind the point: the last bits are v / ln 2, rounded.
    const Vector rounded = v * 1.44269504f + 12582912.0f;
    const Vector n = rounded - 12582912.0f;
    scale = (Vector)(((Integers)rounded << 23) + (127 << 23));     // 2^n by its bits; 2^-127 becomes 0
    const Vector r = (v - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts, the first of which has few bits
    // (e^r - 1 - r) / r^2 for |r| <= ln 2 / 2, to 3e-9 of e^r: least squares, weighted until the errors were level.
    const Vector tail = (((1.3814467e-3f * r + 8.3687808e-3f) * r + 4.1668393e-2f) * r + 0.16666520f) * r + 0.49999994f;
    fraction = r * r * tail + r;
  }

  ESCORT_INLINE Vector value() const { return scale * fraction + scale; }
};

ESCORT_INLINE Vector minus_abs(Vector v) { return (Vector)((Integers)v | kSign); }

// 1 + e^-v, which a sigmoid is the inverse of: as in Exponential, but to 1.1e-7. Infinite below -89 or so.
ESCORT_INLINE Vector sigmoid_divisor(Vector v) {
  v = at_most(Vector{} + 87.0f, at_least(Vector{} - 89.0f, v));
  const Vector rounded = v * -1.44269504f + 12582912.0f;
  const Vector n = rounded - 12582912.0f;
  const Vector scale = (Vector)(((Integers)rounded << 23) + (127 << 23));
  const Vector r = n * 2.12194440e-4f - (n * 0.693359375f + v);
  Vector e = ((8.31248256e-3f * r + 4.18905587e-2f) * r + 0.166671163f) * r + 0.499992287f;
  e = (e * r + 1.0f) * r + 1.0f;
  return scale * e + 1.0f;
}

ESCORT_INLINE Vector sigmoid(Vector v) { return 1.0f / sigmoid_divisor(v); }

ESCORT_INLINE Vector tanh(Vector v) {
  const Exponential e(2.0f * minus_abs(v));
  const Vector less = e.scale * e.fraction + (e.scale - 1.0f);  // e^-2|v| - 1, to its last digits
  const Vector size = less / (less + 2.0f);
  return (Vector)(((Integers)size & ~kSign) | ((Integers)v & kSign));
}

// The share of a standard normal distribution below v. Its tail is e^(-v^2 / 2) t p(t) with t = 1 / (1 + 0.3 |v|),
// where p was found like the polynomial above, to 1.3e-7 of the result.
ESCORT_INLINE Vector normal(Vector v) {
  const Vector t = 1.0f / (1.0f - 0.3f * minus_abs(v));
  Vector p = 0.0359317549f * t - 0.158276081f;
  p = p * t + 0.208206728f;
  p = p * t - 0.0553939454f;
  p = p * t + 0.129469246f;
  p = p * t + 0.0996374786f;
  p = p * t + 0.120798357f;
  p = p * t + 0.119626388f;
  const Vector tail = Exponential(v * v * -0.5f).value() * (p * t);
  return v < 0.0f ? tail : 1.0f - tail;
}

ESCORT_INLINE Vector hardsigmoid(Vector v) {
  return at_most(Vector{} + 6.0f, at_least(Vector{}, v + 3.0f)) * (1.0f / 6.0f);
}

// An activation where that only bounds; others leave a vector as it is.
ESCORT_INLINE Vector bounded(Vector v, Activation bound) {
  if (bound != Activation::relu && bound != Activation::relu6) return v;
  v = at_least(Vector{}, v);
  return bound == Activation::relu6 ? at_most(Vector{} + 6.0f, v) : v;
}

// Calls use(function) with the activation as a function from a vector to a vector.
template <class Use>
inline void with_function(Epilogue epilogue, const Use& use) {
  switch (epilogue.activation) {
    case Activation::none:
      return use([](Vector v) { return v; });
    case Activation::relu:
      return use([](Vector v) { return bounded(v, Activation::relu); });
    case Activation::relu6:
      return use([](Vector v) { return bounded(v, Activation::relu6); });
    case Activation::leaky_relu:
    case Activation::prelu:
      return use([slope = epilogue.slope](Vector v) { return v < 0.0f ? v * slope : v; });
    case Activation::sigmoid:
      return use([](Vector v) { return sigmoid(v); });
    case Activation::tanh:
      return use([](Vector v) { return tanh(v); });
    case Activation::silu:
      return use([](Vector v) { return v / sigmoid_divisor(v); });
    case Activation::gelu:
      return use([](Vector v) { return v * normal(v); });
    case Activation::gelu_tanh:  // v (1 + tanh u) / 2 = v sigmoid(2u)
      return use([](Vector v) { return v / sigmoid_divisor(v * (1.59576912f + 0.0713548163f * (v * v))); });
    case Activation::hardsigmoid:
      return use([](Vector v) { return hardsigmoid(v); });
    case Activation::hardswish:
      return use([](Vector v) { return v * hardsigmoid(v); });
  }
}

template <class Function>
ESCORT_INLINE void activate_line(float* values, int64_t count, const Function& function) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(values + i, function(load(values + i)));
  if (const int left = static_cast<int>(count - i))
    store_lanes(values + i, function(load_lanes(values + i, (1 << left) - 1)), left);
}

// Activates `count` numbers in place. Constants are loaded once for all of them.
__attribute__((noinline, unused)) void activate(float* values, int64_t count, Epilogue epilogue) {
  with_function(epilogue, [&](const auto& function) { activate_line(values, count, function); });
}

// The bounded sum of a vector and a residual, which may be null; of its first `count` lanes, which are written to y.
ESCORT_INLINE Vector finish(Vector sum, const float* residual, Activation bound) {
  return bounded(residual ? sum + load(residual) : sum, bound);
}
ESCORT_INLINE void finish_lanes(float* y, Vector sum, const float* residual, int count, Activation bound) {
  if (residual) sum += load_lanes(residual, (1 << count) - 1);
  store_lanes(y, bounded(sum, bound), count);
}

}  // namespace
}  // namespace escort
