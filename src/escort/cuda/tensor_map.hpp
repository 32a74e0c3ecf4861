// Tensor maps (CUtensorMap), which the driver of CUDA makes. What is needed of cuda.h is declared here.
#pragma once

#include <array>
#include <cstdint>
#include <functional>

namespace escort {

using Status = int;  // CUresult
constexpr Status kSuccess = 0;

using EncodeTiled = Status(void* map, int type, uint32_t rank, void* address, const uint64_t* sizes,
                           const uint64_t* strides, const uint32_t* box, const uint32_t* steps, int interleaving,
                           int swizzle, int promotion, int fill);
using EncodeIm2col = Status(void* map, int type, uint32_t rank, void* address, const uint64_t* sizes,
                            const uint64_t* strides, const int* lower, const int* upper, uint32_t channels,
                            uint32_t pixels, const uint32_t* steps, int interleaving, int swizzle, int promotion,
                            int fill);

constexpr uint32_t kRank = 4;
constexpr int kNotInterleaved = 0, kFilledWithZeros = 0;
using Sizes = std::array<uint64_t, kRank>;
using Box = std::array<uint32_t, kRank>;
using Corner = std::array<int, 2>;

// Asks the driver for a map: writes its 128 bytes, for a tensor at an address, of such sizes and strides.
using Encode = std::function<Status(void*, void*, const uint64_t*, const uint64_t*)>;

// Makes a tensor map (CUtensorMap) for each tensor that it is given. Its samples lie one behind the other.
struct TensorMap {
  Encode encode;
  uint64_t element_bytes;
  Sizes sizes;            // of a sample, innermost first
  int samples_along;      // the dimension of `sizes` that grows with each sample
  uint64_t pitch, begin;  // elements from pixel to pixel, of which those from `begin` on are mapped

  uint64_t sample_elements() const { return pitch * sizes[1] * sizes[2] * sizes[3]; }

  Status write(void* map, void* address, uint64_t samples) const {
    Sizes whole = sizes;
    whole[samples_along] *= samples;
    uint64_t strides[kRank - 1], bytes = element_bytes;
    for (uint32_t i = 0; i < kRank - 1; i++) strides[i] = bytes *= i ? whole[i] : pitch;
    return encode(map, static_cast<char*>(address) + begin * element_bytes, whole.data(), strides);
  }
};

// As the fields of the same names of Python's TensorMap; `type`, `swizzle` and `promotion` are the driver's numbers.
struct Tensor {
  int type;
  uint64_t element_bytes;
  Sizes sizes;
  int samples_along, swizzle, promotion;
  uint64_t pitch, begin;
};

inline TensorMap tiled(uintptr_t function, const Tensor& x, const Box& box) {
  const auto encode = [=, ask = reinterpret_cast<EncodeTiled*>(function)](
                          void* map, void* address, const uint64_t* sizes, const uint64_t* strides) {
    constexpr Box steps = {1, 1, 1, 1};
    return ask(map, x.type, kRank, address, sizes, strides, box.data(), steps.data(), kNotInterleaved, x.swizzle,
               x.promotion, kFilledWithZeros);
  };
  return {encode, x.element_bytes, x.sizes, x.samples_along, x.pitch, x.begin};
}

inline TensorMap im2col(uintptr_t function, const Tensor& x, Corner lower, Corner upper, uint32_t channels,
                        uint32_t pixels, const Box& steps) {
  const auto encode = [=, ask = reinterpret_cast<EncodeIm2col*>(function)](
                          void* map, void* address, const uint64_t* sizes, const uint64_t* strides) {
    return ask(map, x.type, kRank, address, sizes, strides, lower.data(), upper.data(), channels, pixels, steps.data(),
               kNotInterleaved, x.swizzle, x.promotion, kFilledWithZeros);
  };
  return {encode, x.element_bytes, x.sizes, x.samples_along, x.pitch, x.begin};
}

}  // namespace escort
