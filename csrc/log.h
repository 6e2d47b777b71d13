// ln x without branches or calls, so that loops over it are vectorised.
#pragma once

#include "dtypes.h"

namespace lfm2 {

// Within 2 units in the last place, of positive numbers that are neither subnormal nor infinite.
//
// x = 2^n (1 + t) with 1 + t from sqrt(1/2) to sqrt(2), and ln(1 + t) is Cephes' polynomial.
LFM2_INLINE float logarithm(float x) {
  constexpr uint32_t kRootHalf = 0x3F3504F3u;
  const int32_t n = static_cast<int32_t>(bits_of(x) - kRootHalf) >> 23;
  const float whole = static_cast<float>(n);
  const float t = from_bits(bits_of(x) - (static_cast<uint32_t>(n) << 23)) - 1.0f;
  const float square = t * t;
  float p = 7.0376836292e-2f;
  p = p * t - 1.1514610310e-1f;
  p = p * t + 1.1676998740e-1f;
  p = p * t - 1.2420140846e-1f;
  p = p * t + 1.4249322787e-1f;
  p = p * t - 1.6668057665e-1f;
  p = p * t + 2.0000714765e-1f;
  p = p * t - 2.4999993993e-1f;
  p = p * t + 3.3333331174e-1f;
  p = p * t * square;
  p = p - whole * 2.12194440e-4f;
  p = p - 0.5f * square;
  return t + p + whole * 0.693359375f;
}

}  // namespace lfm2
