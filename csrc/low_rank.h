// Low-rank changes of a few tokens' products, by an adapter of each token.
#pragma once

#include <algorithm>

#include "dtypes.h"
#include "simd.h"

namespace lfm2 {

// Rows of a `down` matrix that are multiplied together, and columns of `up` that are summed.
constexpr int64_t kLowRows = 4;
constexpr int64_t kLowColumns = 32;

// Changes of one matrix: A adapters of rank R, the first of zeros, of N rows in parts and K columns.
template <class T>
struct LowRank {
  const T* down;  // [A, parts, R, K]
  const T* up;    // [A, R, N]
  const T* gain;  // [A, N]
  const T* shift;  // [A, N]
  const int64_t* ends;  // [parts]
  const T* bias;  // [N] or null
  int64_t parts, rank, rows, columns;

  LFM2_INLINE int64_t low() const { return parts * rank; }
};

// sums[i] = x . matrix[i], each added up in one order for every `count`
template <class T>
LFM2_INLINE void few_dots(const T* x, const T* matrix, int64_t count, int64_t size, float* sums) {
  Lanes made[kLowRows][2] = {};
  const int64_t whole = size / kPair * kPair;
  for (int64_t k = 0; k < whole; k += kPair) {
    Lanes first, second;
    load(x + k, first, second);
    for (int64_t i = 0; i < count; ++i) {
      Lanes own, next;
      load(matrix + i * size + k, own, next);
      made[i][0] += first * own;
      made[i][1] += second * next;
    }
  }
  for (int64_t i = 0; i < count; ++i) {
    const Lanes both = made[i][0] + made[i][1];
    float sum = 0;
    for (int64_t lane = 0; lane < kLanes; ++lane) sum += both[lane];
    for (int64_t k = whole; k < size; ++k) sum += widen(x[k]) * widen(matrix[i * size + k]);
    sums[i] = sum;
  }
}

// low[m * R + r] = down[entries[t]][r] . x[t], where m counts parts of tokens, from `first` to
// before `last`.
template <class T>
LFM2_CLONES void low_down(Rows<const T> x, const int64_t* entries, const LowRank<T>& change,
                          float* low, int64_t first, int64_t last) {
  const int64_t rank = change.rank, size = change.columns;
  for (int64_t m = first; m < last; ++m) {
    const int64_t token = m / change.parts;
    const int64_t entry = entries[token];
    if (entry == 0) continue;
    const T* matrix = change.down + (entry * change.parts + m % change.parts) * rank * size;
    for (int64_t r = 0; r < rank; r += kLowRows) {
      float* sums = low + m * rank + r;
      if (rank - r >= kLowRows) {
        few_dots(x[token], matrix + r * size, kLowRows, size, sums);
      } else {
        few_dots(x[token], matrix + r * size, rank - r, size, sums);
      }
    }
  }
}

// to[n] += gain * (to - bias) + sum of low * up + shift, for `count` columns
template <class T>
LFM2_INLINE void few_ups(const float* low, const T* up, int64_t rank, int64_t stride,
                         const T* gain, const T* shift, const T* bias, int64_t count, T* to) {
  float sums[kLowColumns] = {};
  for (int64_t r = 0; r < rank; ++r) {
    if (low[r] == 0) continue;  // an adapter of less than the largest rank
    const float by = low[r];
    const T* from = up + r * stride;
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) sums[i] += by * widen(from[i]);
  }
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const float product = widen(to[i]);
    const float plain = bias == nullptr ? product : product - widen(bias[i]);
    narrow(product + (widen(gain[i]) * plain + sums[i] + widen(shift[i])), to[i]);
  }
}

// The same of out[t], for columns from `first` to before `last`.
template <class T>
LFM2_CLONES void low_up(const float* low, const int64_t* entries, const LowRank<T>& change,
                        int64_t tokens, Rows<T> out, int64_t first, int64_t last) {
  const int64_t rank = change.rank, rows = change.rows;
  for (int64_t t = 0; t < tokens; ++t) {
    const int64_t entry = entries[t];
    if (entry == 0) continue;
    const T* up = change.up + entry * rank * rows;
    const T* gain = change.gain + entry * rows;
    const T* shift = change.shift + entry * rows;
    int64_t begin = 0;
    for (int64_t part = 0; part < change.parts; begin = change.ends[part++]) {
      const float* by = low + (t * change.parts + part) * rank;
      const int64_t end = std::min(last, change.ends[part]);
      for (int64_t n = std::max(first, begin); n < end; n += kLowColumns) {
        const T* bias = change.bias == nullptr ? nullptr : change.bias + n;
        T* to = out[t] + n;
        if (end - n >= kLowColumns) {
          few_ups(by, up + n, rank, rows, gain + n, shift + n, bias, kLowColumns, to);
        } else {
          few_ups(by, up + n, rank, rows, gain + n, shift + n, bias, end - n, to);
        }
      }
    }
  }
}

}  // namespace lfm2
