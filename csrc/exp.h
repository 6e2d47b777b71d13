// e^x without branches or calls, so that loops over it are vectorised.
#pragma once

#include "dtypes.h"

namespace lfm2 {

// 2^n for n from -1022 to 1023.
LFM2_INLINE double power_of_two(int64_t n) {
  const uint64_t bits = static_cast<uint64_t>(n + 1023) << 52;
  double value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Within 1.5 units in the last place; 0 and infinity beyond float's range, NaN for NaN.
//
// x = n ln 2 + r with |r| <= ln 2 / 2, and e^r is Cephes' polynomial. Scaling by 2^n takes two
// factors, since 2^128 and the powers of subnormal results are no floats themselves.
LFM2_INLINE float exponential(float x) {
  constexpr float kToInteger = 0x1.8p23f;  // where a float's last place is worth 1
  x = x < -104.0f ? -104.0f : x;
  x = x > 89.0f ? 89.0f : x;
  const float shifted = x * 1.44269504f + kToInteger;
  const float n = shifted - kToInteger;
  float r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const int32_t power = static_cast<int32_t>(bits_of(shifted) - bits_of(kToInteger));
  const int32_t half = power >> 1;
  const float first = from_bits(static_cast<uint32_t>(half + 127) << 23);
  const float second = from_bits(static_cast<uint32_t>(power - half + 127) << 23);
  return p * first * second;
}

// For x <= 0, as probabilities need it: within 2 units in the last place, 0 below -708.
LFM2_INLINE double exponential(double x) {
  constexpr double kToInteger = 0x1.8p52;
  const bool vanishes = x < -708.0;
  x = vanishes ? -708.0 : x;
  const double shifted = x * 1.4426950408889634 + kToInteger;
  const double n = shifted - kToInteger;
  double r = x - n * 0x1.62e42feep-1;
  r = r - n * 0x1.a39ef35793c76p-33;
  double p = 1.0 / 6227020800.0;
  p = p * r + 1.0 / 479001600.0;
  p = p * r + 1.0 / 39916800.0;
  p = p * r + 1.0 / 3628800.0;
  p = p * r + 1.0 / 362880.0;
  p = p * r + 1.0 / 40320.0;
  p = p * r + 1.0 / 5040.0;
  p = p * r + 1.0 / 720.0;
  p = p * r + 1.0 / 120.0;
  p = p * r + 1.0 / 24.0;
  p = p * r + 1.0 / 6.0;
  p = p * r + 0.5;
  p = p * (r * r) + r + 1.0;
  int64_t bits;
  int64_t zero;
  std::memcpy(&bits, &shifted, sizeof bits);
  std::memcpy(&zero, &kToInteger, sizeof zero);
  return vanishes ? 0.0 : p * power_of_two(bits - zero);
}

}  // namespace lfm2
