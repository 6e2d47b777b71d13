// Cosines and sines of rotary embedding; both halves of a head are equal.
#pragma once

#include <cmath>

#include "dtypes.h"

namespace lfm2 {

// Tokens from `first` to before `last`; `cos` and `sin` are [tokens, 2 * pairs]. The frequencies of
// a token begin `stride` after those of the token before it; 0 gives all tokens the same.
template <class T>
void rope(const int64_t* positions, const float* inv_freq, int64_t stride, int64_t pairs,
          int64_t first, int64_t last, T* cos, T* sin) {
  for (int64_t t = first; t < last; ++t) {
    const float* frequencies = inv_freq + t * stride;
    T* cos_row = cos + t * 2 * pairs;
    T* sin_row = sin + t * 2 * pairs;
    for (int64_t i = 0; i < pairs; ++i) {
      const float angle = static_cast<float>(positions[t]) * frequencies[i];
      cos_row[i] = cos_row[i + pairs] = narrowed<T>(std::cos(angle));
      sin_row[i] = sin_row[i + pairs] = narrowed<T>(std::sin(angle));
    }
  }
}

}  // namespace lfm2
