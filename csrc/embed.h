// Rows of the embedding for the tokens; 8-bit integers are widened and scaled.
#pragma once

#include <algorithm>

#include "dtypes.h"

namespace lfm2 {

// Tokens from `first` to before `last`.
template <class T>
void embed(const int64_t* tokens, Rows<const T> weight, int64_t width, Rows<T> out, int64_t first,
           int64_t last) {
  for (int64_t t = first; t < last; ++t) std::copy_n(weight[tokens[t]], width, out[t]);
}

template <class T>
LFM2_CLONES void embed_int8(const int64_t* tokens, Rows<const int8_t> weight, const float* scales,
                            int64_t width, Rows<T> out, int64_t first, int64_t last) {
  for (int64_t t = first; t < last; ++t) {
    const int8_t* from = weight[tokens[t]];
    const float scale = scales[tokens[t]];
    T* to = out[t];
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) narrow(widen(from[i]) * scale, to[i]);
  }
}

}  // namespace lfm2
