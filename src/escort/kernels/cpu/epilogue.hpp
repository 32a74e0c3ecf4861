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

  explicit Exponential(Vector v) {
    v = v < -88.0f ? Vector{} - 88.0f : v;
    // Adding 1.5 * 2^23 leaves no room for digits behind the point: the last bits are v / ln 2, rounded.
    const Vector rounded = v * 1.44269504f + 12582912.0f;
    const Vector n = rounded - 12582912.0f;
    scale = (Vector)(((Integers)rounded << 23) + (127 << 23));     // 2^n by its bits; 2^-127 becomes 0
    const Vector r = (v - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts, the first of which has few bits
    // (e^r - 1 - r) / r^2 for |r| <= ln 2 / 2, to 3e-9 of e^r: least squares, weighted until the errors were level.
    const Vector tail = (((1.3814467e-3f * r + 8.3687808e-3f) * r + 4.1668393e-2f) * r + 0.16666520f) * r + 0.49999994f;
    fraction = r * r * tail + r;
  }

  Vector value() const { return scale * fraction + scale; }
};

inline Vector minus_abs(Vector v) { return (Vector)((Integers)v | kSign); }

inline Vector sigmoid(Vector v) {
  const Vector e = Exponential(minus_abs(v)).value();  // of the negative argument, which cannot overflow
  return (v < 0.0f ? e : Vector{} + 1.0f) / (e + 1.0f);
}

inline Vector tanh(Vector v) {
  const Exponential e(2.0f * minus_abs(v));
  const Vector less = e.scale * e.fraction + (e.scale - 1.0f);  // e^-2|v| - 1, to its last digits
  const Vector size = less / (less + 2.0f);
  return (Vector)(((Integers)size & ~kSign) | ((Integers)v & kSign));
}

// The share of a standard normal distribution below v. Its tail is e^(-v^2 / 2) t p(t) with t = 1 / (1 + 0.3 |v|),
// where p was found like the polynomial above, to 1.3e-7 of the result.
inline Vector normal(Vector v) {
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

inline Vector hardsigmoid(Vector v) {
  v += 3.0f;
  v = v < 0.0f ? Vector{} : v;
  v = v > 6.0f ? Vector{} + 6.0f : v;
  return v * (1.0f / 6.0f);
}

// An activation of a vector or a float where that only bounds; others leave it as it is.
template <class T>
inline T bounded(T v, Activation bound) {
  if (bound != Activation::relu && bound != Activation::relu6) return v;
  const T zero = T{};
  v = v < zero ? zero : v;
  if (bound == Activation::relu6) {
    const T six = T{} + 6.0f;
    v = v > six ? six : v;
  }
  return v;
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
      return use([](Vector v) { return v * sigmoid(v); });
    case Activation::gelu:
      return use([](Vector v) { return v * normal(v); });
    case Activation::gelu_tanh:  // v (1 + tanh u) / 2 = v sigmoid(2u)
      return use([](Vector v) { return v * sigmoid(v * (1.59576912f + 0.0713548163f * (v * v))); });
    case Activation::hardsigmoid:
      return use([](Vector v) { return hardsigmoid(v); });
    case Activation::hardswish:
      return use([](Vector v) { return v * hardsigmoid(v); });
  }
}

// Activates `count` numbers in place. Constants are loaded once for all of them.
__attribute__((noinline, unused)) void activate(float* values, int64_t count, Epilogue epilogue) {
  with_function(epilogue, [&](const auto& function) {
    if (count < kLanes) {
      float few[kLanes] = {};
      for (int64_t i = 0; i < count; i++) few[i] = values[i];
      store(few, function(load(few)));
      for (int64_t i = 0; i < count; i++) values[i] = few[i];
      return;
    }
    const Vector last = load(values + count - kLanes);  // overlaps the vector before, and is loaded ahead of it
    for (int64_t i = 0; i + kLanes <= count; i += kLanes) store(values + i, function(load(values + i)));
    store(values + count - kLanes, function(last));
  });
}

// The bounded sum of a vector and a residual, which may be null; of its first `count` lanes, which are written to y.
inline Vector finish(Vector sum, const float* residual, Activation bound) {
  return bounded(residual ? sum + load(residual) : sum, bound);
}
inline void finish_lanes(float* y, Vector sum, const float* residual, int count, Activation bound) {
  if (residual) sum += load_lanes(residual, (1 << count) - 1);
  store_lanes(y, bounded(sum, bound), count);
}

}  // namespace
}  // namespace escort
