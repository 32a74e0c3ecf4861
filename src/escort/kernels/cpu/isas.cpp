#include "isas.hpp"

#include <stdexcept>

namespace escort {

const std::vector<Kernels>& supported() {
  static const std::vector<Kernels> all = [] {
    std::vector<Kernels> isas;
#ifdef ESCORT_HAVE_AVX512
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq"))
      isas.push_back({&direct_avx512, &depthwise_avx512, pool_avx512, &lines_avx512, swap_channels_avx512});
#endif
#ifdef ESCORT_HAVE_AVX2
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
      isas.push_back({&direct_avx2, &depthwise_avx2, pool_avx2, &lines_avx2, swap_channels_avx2});
#endif
#ifdef ESCORT_HAVE_NEON  // which every AArch64 has
    isas.push_back({&direct_neon, &depthwise_neon, pool_neon, &lines_neon, swap_channels_neon});
#endif
#ifdef ESCORT_HAVE_GENERIC
    isas.push_back({&direct_generic, &depthwise_generic, pool_generic, &lines_generic, swap_channels_generic});
#endif
    return isas;
  }();
  return all;
}

const Kernels& find_isa(const std::string& name) {
  for (const Kernels& isa : supported())
    if (name == isa.direct->name) return isa;
  throw std::invalid_argument("instruction set '" + name + "' is not available on this machine");
}

const Lines& lines() { return *supported().front().lines; }

}  // namespace escort
