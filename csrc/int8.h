// Tokens in 8-bit integers: round(x * 127 / max|x|), a scale for each.
#pragma once

#include "dtypes.h"

namespace lfm2 {

// Rows from `first` to before `last`. A row with an infinity or a NaN has a scale of NaN.
template <class T>
LFM2_CLONES void quantize(Rows<const T> x, int64_t width, Rows<int8_t> out, float* scales,
                          int64_t first, int64_t last) {
  for (int64_t row = first; row < last; ++row) {
    const T* from = x[row];
    int8_t* to = out[row];
    // As integers, so that NaN is larger than infinity.
    uint32_t largest = 0;
#pragma omp simd reduction(max : largest)
    for (int64_t i = 0; i < width; ++i) {
      const uint32_t magnitude = bits_of(widen(from[i])) & 0x7FFFFFFFu;
      largest = magnitude > largest ? magnitude : largest;
    }
    const bool finite = largest < 0x7F800000u;
    const float most = from_bits(finite ? largest : 0);
    // A smaller number would make the factor infinite, and is negligible beside the smallest
    // normal.
    const float factor = most > 1e-35f ? 127.0f / most : 0.0f;
    scales[row] = finite ? most / 127.0f : from_bits(0x7FC00000u);
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) {
      to[i] = static_cast<int8_t>(
          static_cast<int32_t>(__builtin_rintf((finite ? widen(from[i]) : 0.0f) * factor)));
    }
  }
}

}  // namespace lfm2
