// Dot products of a few tokens with every row of a matrix, whose numbers are each read once.
//
// At one token these are as fast as memory is, if the matrix is read in one direction and asked for
// ahead of time. The order in which a product's terms are summed follows from its length alone, so
// a token's results do not depend on which others run beside it.
#pragma once

#include "lanes.h"
#include "number.h"

namespace lfm2 {

// Products in float, whatever the numbers. `Numbers` are the kNumbers of one step.
template <class T>
struct WideStep {
  static constexpr int64_t kNumbers = kPair;
  struct Numbers {
    Lanes first, second;
  };
  struct Sum {
    Lanes first = {}, second = {};
  };

  static LFM2_INLINE void take(const T* from, Numbers& into) {
    load(from, into.first, into.second);
  }
  static LFM2_INLINE void add(const Numbers& a, const Numbers& b, Sum& sum) {
    sum.first += a.first * b.first;
    sum.second += a.second * b.second;
  }
  static LFM2_INLINE void fold(const Sum& sum, Lanes& lanes) { lanes = sum.first + sum.second; }
};

constexpr int64_t kBytesAhead = 16384;

// sums[m * stride + r] = x[m] . rows[r], for M tokens and R rows of `size` numbers. Asks for R rows
// from `ahead` on.
template <class Step, int M, int R, class T>
LFM2_INLINE void dots_of_block(Rows<const T> x, Rows<const T> rows, int64_t size, const T* ahead,
                               float* sums, int64_t stride) {
  constexpr int64_t kStep = Step::kNumbers;
  const int64_t whole = size / kStep * kStep;
  typename Step::Sum found[M * R];
  for (int64_t k = 0; k < whole; k += kStep) {
    typename Step::Numbers weights[R];
    for (int r = 0; r < R; ++r) {
      if (ahead != nullptr) __builtin_prefetch(ahead + k * R + r * kStep, 0, 2);
      Step::take(rows[r] + k, weights[r]);
    }
    for (int m = 0; m < M; ++m) {
      typename Step::Numbers token;
      Step::take(x[m] + k, token);
      for (int r = 0; r < R; ++r) Step::add(weights[r], token, found[m * R + r]);
    }
  }
  for (int first = 0; first < M * R; first += kLanes) {
    Lanes folded[kLanes] = {};
    float whole_sums[kLanes];
    const int count = M * R - first < kLanes ? M * R - first : kLanes;
    for (int i = 0; i < count; ++i) Step::fold(found[first + i], folded[i]);
    sum_lanes(folded, whole_sums);
    for (int i = 0; i < count; ++i) {
      const int m = (first + i) / R;
      const int r = (first + i) % R;
      float sum = whole_sums[i];
      for (int64_t k = whole; k < size; ++k) sum += widen(x[m][k]) * widen(rows[r][k]);
      sums[m * stride + r] = sum;
    }
  }
}

// The same of M tokens with every row of `weight` from `first` to before `last`.
template <class Step, int M, class T>
LFM2_INLINE void dots_of_tokens(Rows<const T> x, Rows<const T> weight, int64_t size, int64_t first,
                                int64_t last, bool fetch, float* sums, int64_t stride) {
  constexpr int64_t kAhead = kBytesAhead / static_cast<int64_t>(sizeof(T));
  constexpr int kRowsAtOnce = M == 8 ? 2 : 4;  // as many sums as registers
  int64_t n = first;
  for (; n + kRowsAtOnce <= last; n += kRowsAtOnce) {
    const T* ahead = fetch ? weight[n] + kAhead : nullptr;
    dots_of_block<Step, M, kRowsAtOnce>(x, {weight[n], weight.stride}, size, ahead,
                                        sums + n - first, stride);
  }
  for (; n < last; ++n) {
    dots_of_block<Step, M, 1, T>(x, {weight[n], weight.stride}, size, nullptr, sums + n - first,
                                 stride);
  }
}

// sums[m * stride + n - first] = x[m] . weight[n], eight, four, two and one tokens at a time: the rows
// come from memory once, and then from the cache.
template <class Step, class T>
LFM2_INLINE void dots_with(Rows<const T> x, int64_t tokens, Rows<const T> weight, int64_t size,
                           int64_t first, int64_t last, float* sums, int64_t stride) {
  for (int64_t m = 0; m < tokens;) {
    const Rows<const T> here{x[m], x.stride};
    float* to = sums + m * stride;
    const bool fetch = m == 0;
    if (tokens - m >= 8) {
      dots_of_tokens<Step, 8>(here, weight, size, first, last, fetch, to, stride);
      m += 8;
    } else if (tokens - m >= 4) {
      dots_of_tokens<Step, 4>(here, weight, size, first, last, fetch, to, stride);
      m += 4;
    } else if (tokens - m >= 2) {
      dots_of_tokens<Step, 2>(here, weight, size, first, last, fetch, to, stride);
      m += 2;
    } else {
      dots_of_tokens<Step, 1>(here, weight, size, first, last, fetch, to, stride);
      m += 1;
    }
  }
}

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define LFM2_HAS_AVX512BF16 __builtin_cpu_supports("avx512bf16")
#else
#define LFM2_HAS_AVX512BF16 false
#endif

// For machines with AVX512_BF16 alone.
void dots_avx512bf16(Rows<const bf16> x, int64_t tokens, Rows<const bf16> weight, int64_t size,
                     int64_t first, int64_t last, float* sums, int64_t stride);

}  // namespace lfm2
