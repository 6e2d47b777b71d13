// x @ weight.T for a few tokens, and what is done with each number while it is still at hand.
#pragma once

#include <type_traits>

#include "dots.h"
#include "exponential.h"
#include "number.h"

namespace lfm2 {

// Rows of a matrix that are multiplied before their results are finished, and tokens at once.
constexpr int64_t kChunk = 64;
constexpr int64_t kTokens = 32;

// sums[m * kChunk + n - first] = x[m] . weight[n], for n from `first` to before `last`.
template <class T>
LFM2_CLONES void wide_dots(Rows<const T> x, int64_t tokens, Rows<const T> weight, int64_t size,
                           int64_t first, int64_t last, float* sums) {
  dots_with<WideStep<T>>(x, tokens, weight, size, first, last, sums, kChunk);
}

template <class T>
inline void dots(Rows<const T> x, int64_t tokens, Rows<const T> weight, int64_t size, int64_t first,
                 int64_t last, float* sums) {
  if constexpr (std::is_same_v<T, bf16>) {
    if (LFM2_HAS_AVX512BF16) {
      return dots_avx512bf16(x, tokens, weight, size, first, last, sums, kChunk);
    }
  }
  wide_dots(x, tokens, weight, size, first, last, sums);
}

// out[m][n] = sums + bias; rounded, then added to `residual` where there is one.
template <class T>
LFM2_CLONES void finish_linear(const float* sums, int64_t tokens, const T* bias,
                               Rows<const T> residual, int64_t first, int64_t last, Rows<T> out) {
  for (int64_t m = 0; m < tokens; ++m) {
    const float* from = sums + m * kChunk - first;
    const T* base = residual.data == nullptr ? nullptr : residual[m];
    T* to = out[m];
    for (int64_t n = first; n < last; ++n) {
      float sum = from[n];
      if (bias != nullptr) sum += widen(bias[n]);
      if (base != nullptr) sum = widen(base[n]) + rounded<T>(sum);
      narrow(sum, to[n]);
    }
  }
}

// out[m][n] = silu(gate) * up, each rounded.
template <class T>
LFM2_CLONES void finish_swiglu(const float* gates, const float* ups, int64_t tokens, int64_t first,
                               int64_t last, Rows<T> out) {
  for (int64_t m = 0; m < tokens; ++m) {
    const float* gate = gates + m * kChunk - first;
    const float* up = ups + m * kChunk - first;
    T* to = out[m];
#pragma omp simd
    for (int64_t n = first; n < last; ++n) {
      const float x = rounded<T>(gate[n]);
      narrow(rounded<T>(x / (1.0f + exponential(-x))) * rounded<T>(up[n]), to[n]);
    }
  }
}

}  // namespace lfm2
