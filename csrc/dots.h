// Dot products of a few tokens with every row of a matrix, whose numbers are each read once.
//
// At one token these are as fast as memory is, if the matrix is read row after row and what comes
// soon is asked for: processors fetch ahead too, but not far enough where memory is fast. Several
// rows at once save loads of many tokens. The order in which a product's terms are summed follows
// from its length alone, so a token's results do not depend on which others run beside it.
#pragma once

#include "cpu_features.h"
#include "dtypes.h"
#include "simd.h"

namespace lfm2 {

// How numbers are multiplied, kNumbers at once: here in float, whatever they are. Of 8-bit integers
// a lane's sum is exact up to 16,640 terms: it is less than 2^24 then.
struct WideStep {
  static constexpr int64_t kNumbers = kPair;
  using Folded = Lanes;
  using Total = float;
  struct Row {
    Lanes first, second;
  };
  using Token = Row;
  struct Sum {
    Lanes first = {}, second = {};
  };

  template <class T>
  static LFM2_INLINE void take(const T* from, Row& into) {
    load(from, into.first, into.second);
  }
  static LFM2_INLINE void add(const Row& row, const Token& token, Sum& sum) {
    sum.first += row.first * token.first;
    sum.second += row.second * token.second;
  }
  static LFM2_INLINE void fold(const Sum& sum, Lanes& lanes) { lanes = sum.first + sum.second; }
  template <class X, class W>
  static LFM2_INLINE float product(X token, W row) {
    return widen(token) * widen(row);
  }
};

// What is asked for lies so many bytes ahead, of a row at a time and of several: the best of 1, 2, 4,
// 16 and 64 KB for one on a Zen 5, whose own fetching was too late where its memory was fast.
constexpr int64_t kBytesAheadOfOne = 2048;
constexpr int64_t kBytesAhead = 16384;

// Adds to the sums of M tokens and R rows what one step's numbers from `k` on give.
template <class Step, int M, int R, class X, class W>
LFM2_INLINE void add_step(Rows<const X> x, Rows<const W> rows, int64_t k, const W* ahead,
                          typename Step::Sum* sums) {
  typename Step::Row weights[R];
  for (int r = 0; r < R; ++r) {
    if (ahead != nullptr) __builtin_prefetch(ahead + k * R + r * Step::kNumbers, 0, 2);
    Step::take(rows[r] + k, weights[r]);
  }
  for (int m = 0; m < M; ++m) {
    typename Step::Token token;
    Step::take(x[m] + k, token);
    for (int r = 0; r < R; ++r) Step::add(weights[r], token, sums[m * R + r]);
  }
}

// sums[m * stride + r] = x[m] . rows[r], for M tokens and R rows of `size` numbers. Asks for R rows
// from `ahead` on.
template <class Step, int M, int R, class X, class W>
LFM2_INLINE void dots_of_block(Rows<const X> x, Rows<const W> rows, int64_t size, const W* ahead,
                               typename Step::Total* sums, int64_t stride) {
  constexpr int64_t kStep = Step::kNumbers;
  const int64_t whole = size / kStep * kStep;
  typename Step::Sum found[M * R];
  // A loop of one sum is so short that going round it shows.
  constexpr int64_t kUnrolled = M * R == 1 ? 2 : 1;
  int64_t k = 0;
  for (; k + kUnrolled * kStep <= whole; k += kUnrolled * kStep) {
    for (int64_t i = 0; i < kUnrolled; ++i) {
      add_step<Step, M, R>(x, rows, k + i * kStep, ahead, found);
    }
  }
  for (; k < whole; k += kStep) add_step<Step, M, R>(x, rows, k, ahead, found);
  for (int first = 0; first < M * R; first += kLanes) {
    typename Step::Folded folded[kLanes] = {};
    typename Step::Total totals[kLanes];
    const int count = M * R - first < kLanes ? M * R - first : kLanes;
    for (int i = 0; i < count; ++i) Step::fold(found[first + i], folded[i]);
    sum_lanes(folded, totals);
    for (int i = 0; i < count; ++i) {
      const int m = (first + i) / R;
      const int r = (first + i) % R;
      typename Step::Total total = totals[i];
      for (int64_t k = whole; k < size; ++k) total += Step::product(x[m][k], rows[r][k]);
      sums[m * stride + r] = total;
    }
  }
}

// The same of M tokens with every row of `weight` from `first` to before `last`.
template <class Step, int M, class X, class W>
LFM2_INLINE void dots_of_tokens(Rows<const X> x, Rows<const W> weight, int64_t size, int64_t first,
                                int64_t last, bool fetch, typename Step::Total* sums,
                                int64_t stride) {
  constexpr int kRowsAtOnce = M <= 2 ? 1 : M == 8 ? 2 : 4;  // as many sums as registers
  constexpr int64_t kAhead =
      (kRowsAtOnce == 1 ? kBytesAheadOfOne : kBytesAhead) / static_cast<int64_t>(sizeof(W));
  int64_t n = first;
  for (; n + kRowsAtOnce <= last; n += kRowsAtOnce) {
    const W* ahead = fetch ? weight[n] + kAhead : nullptr;
    dots_of_block<Step, M, kRowsAtOnce>(x, Rows<const W>{weight[n], weight.stride}, size, ahead,
                                        sums + n - first, stride);
  }
  for (; n < last; ++n) {
    dots_of_block<Step, M, 1, X, W>(x, {weight[n], weight.stride}, size, nullptr, sums + n - first,
                                    stride);
  }
}

// sums[m * stride + n - first] = x[m] . weight[n], eight, four, two and one tokens at a time: the
// rows come from memory once, and then from the cache.
template <class Step, class X, class W>
LFM2_INLINE void dots_with(Rows<const X> x, int64_t tokens, Rows<const W> weight, int64_t size,
                           int64_t first, int64_t last, typename Step::Total* sums,
                           int64_t stride) {
  for (int64_t m = 0; m < tokens;) {
    const Rows<const X> here{x[m], x.stride};
    auto* to = sums + m * stride;
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

// The files dots_*.cpp, each for machines that have what it is named after.
void dots_avx512bf16(Rows<const bf16> x, int64_t tokens, Rows<const bf16> weight, int64_t size,
                     int64_t first, int64_t last, float* sums, int64_t stride);

void dots_avx512vnni(Rows<const int8_t> x, int64_t tokens, Rows<const int8_t> weight, int64_t size,
                     int64_t first, int64_t last, int32_t* sums, int64_t stride);

}  // namespace lfm2
