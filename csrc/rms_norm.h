// x / sqrt(mean(x^2) + eps) * weight, one row at a time.
#pragma once

#include <cmath>

#include "dtypes.h"
#include "simd.h"

namespace lfm2 {

template <class T>
LFM2_INLINE void rms_norm_row(const T* x, const T* weight, float eps, int64_t width, T* out) {
  const int64_t whole = width / kPair * kPair;
  Lanes sums[2] = {};
  for (int64_t i = 0; i < whole; i += kPair) {
    Lanes first, second;
    load(x + i, first, second);
    sums[0] += first * first;
    sums[1] += second * second;
  }
  sums[0] += sums[1];
  float squares = 0;
  for (int64_t lane = 0; lane < kLanes; ++lane) squares += sums[0][lane];
  for (int64_t i = whole; i < width; ++i) squares += widen(x[i]) * widen(x[i]);
  const float scale = 1.0f / std::sqrt(squares / static_cast<float>(width) + eps);
#pragma omp simd
  for (int64_t i = 0; i < width; ++i) {
    const float normal = rounded<T>(widen(x[i]) * scale);
    narrow(widen(weight[i]) * normal, out[i]);
  }
}

// Rows from `first` to before `last`.
template <class T>
LFM2_CLONES void rms_norm(Rows<const T> x, const T* weight, float eps, int64_t width, Rows<T> out,
                          int64_t first, int64_t last) {
  for (int64_t row = first; row < last; ++row) {
    rms_norm_row(x[row], weight, eps, width, out[row]);
  }
}

// The same of x + delta, which is written to `total`; that may be `x` or `delta` itself.
template <class T>
LFM2_CLONES void add_rms_norm(Rows<const T> x, Rows<const T> delta, const T* weight, float eps,
                              int64_t width, Rows<T> total, Rows<T> out, int64_t first,
                              int64_t last) {
  for (int64_t row = first; row < last; ++row) {
    const T* a = x[row];
    const T* b = delta[row];
    T* sum = total[row];
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) narrow(widen(a[i]) + widen(b[i]), sum[i]);
    rms_norm_row(sum, weight, eps, width, out[row]);
  }
}

}  // namespace lfm2
