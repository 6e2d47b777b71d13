// Dot products of a few tokens with every row of a matrix. Each number of the matrix is read once.
//
// With one token they run at the speed of the memory, if the matrix is read row after row with a
// prefetch. Processors prefetch too, but not far enough if the memory is fast. Tokens are packed
// before (`pack.h`): a group of them is stored step after step, in the form of the product. Lanes
// of eight rows are summed at once. The length of a product alone decides the order of its terms.
// So a token's results do not depend on other tokens.
#pragma once

#include <algorithm>

#include "cpu_features.h"
#include "dtypes.h"
#include "simd.h"

namespace lfm2 {

// Memory of packed tokens. A step multiplies 64 numbers of 8 bits, 32 of 16 bits, or 16 floats of
// one token.
struct alignas(64) Line {
  char bytes[64];
};

// to[i] = the sum of the lanes of folded[i], of eight rows
template <class V, class T>
LFM2_INLINE void totals(const V* folded, T* to) {
  V all;
  sum_lanes(folded, all);
  std::memcpy(to, &all, sizeof all);
}

// The product of kNumbers numbers at once: here in float for every type. With 8-bit integers a
// lane's sum is exact up to 16,640 terms, where it is less than 2^24.
struct WideStep {
  static constexpr int64_t kNumbers = kPair;
  // Tokens at once. Their sums take two registers each, and leave four of AVX2's sixteen.
  static constexpr int kTogether = 6;
  static constexpr int rows_at_once(int) { return 1; }
  using Packed = Line;
  using Folded = Lanes;
  using Total = float;
  struct Row {
    Lanes first, second;
  };
  struct Sum {
    Lanes first, second;
  };

  template <class T>
  static LFM2_INLINE void take(const T* from, Row& into) {
    load(from, into.first, into.second);
  }
  static LFM2_INLINE void add(const Row& row, const Packed& token, Sum& sum) {
    Row numbers;
    load(reinterpret_cast<const float*>(&token), numbers.first, numbers.second);
    sum.first += row.first * numbers.first;
    sum.second += row.second * numbers.second;
  }
  static LFM2_INLINE void fold(const Sum& sum, Lanes& lanes) { lanes = sum.first + sum.second; }
  static LFM2_INLINE void total(const Lanes* folded, float* to) { totals(folded, to); }
};

// The same sums with bfloat16 tokens, widened at the product. For one or two tokens this costs less
// than loading twice the bytes.
struct NarrowStep : WideStep {
  static constexpr int kTogether = 2;
  struct Packed {
    bf16 numbers[kPair];
  };

  static LFM2_INLINE void add(const Row& row, const Packed& token, Sum& sum) {
    Row wide;
    take(token.numbers, wide);
    sum.first += row.first * wide.first;
    sum.second += row.second * wide.second;
  }
};

// Tokens at once, if a sum is one register.
constexpr int kTogether = 8;

// Distance of the prefetch in bytes, for one row at a time and for several. 2 KB was the best of 1,
// 2, 4, 16 and 64 KB for one row on a Zen 5 with fast memory, where its own prefetch was too late.
constexpr int64_t kBytesAheadOfOne = 2048;
constexpr int64_t kBytesAhead = 16384;

LFM2_INLINE int64_t steps_of(int64_t size, int64_t numbers) {
  return (size + numbers - 1) / numbers;
}

// The tokens of group `g`, with `tokens` split into the fewest groups of at most `most`.
LFM2_INLINE int64_t in_group(int64_t g, int64_t tokens, int64_t most) {
  const int64_t groups = (tokens + most - 1) / most;
  return tokens / groups + (g < tokens % groups);
}

// A step of M tokens and R rows. It uses recursion instead of loops, because compilers keep arrays
// in registers only if all indices are constants.
template <class Step, int M, int R, class W>
struct Block {
  typename Step::Row rows[R];
  typename Step::Sum sums[M * R];

  template <int I = 0>
  LFM2_INLINE void clear() {
    if constexpr (I < M * R) {
      sums[I] = typename Step::Sum{};
      clear<I + 1>();
    }
  }

  // Prefetches R steps from `ahead` on.
  template <int I = 0>
  LFM2_INLINE void take(Rows<const W> from, int64_t k, const W* ahead) {
    if constexpr (I < R) {
      if (ahead != nullptr) __builtin_prefetch(ahead + k * R + I * Step::kNumbers, 0, 2);
      Step::take(from[I] + k, rows[I]);
      take<I + 1>(from, k, ahead);
    }
  }

  template <int I = 0>
  LFM2_INLINE void add(const typename Step::Packed* tokens) {
    if constexpr (I < M * R) {
      Step::add(rows[I % R], tokens[I / R], sums[I]);
      add<I + 1>(tokens);
    }
  }

  template <int I = 0>
  LFM2_INLINE void fold(typename Step::Folded* folded) const {
    if constexpr (I < M * R) {
      Step::fold(sums[I], folded[I / R * kLanes + I % R]);
      fold<I + 1>(folded);
    }
  }
};

// folded[m * kLanes + r] = lanes whose sum is x[m] . rows[r], for M tokens and R rows of `size`
// numbers. Prefetches R rows from `ahead` on.
template <class Step, int M, int R, class W>
LFM2_INLINE void dots_of_block(const typename Step::Packed* x, Rows<const W> rows, int64_t size,
                               const W* ahead, typename Step::Folded* folded) {
  constexpr int64_t kStep = Step::kNumbers;
  const int64_t whole = size / kStep * kStep;
  Block<Step, M, R, W> block;
  block.clear();
  int64_t k = 0;
  // A loop over one sum is so short that its overhead matters.
  if constexpr (M * R == 1) {
    for (; k + 2 * kStep <= whole; k += 2 * kStep, x += 2) {
      block.take(rows, k, ahead);
      block.add(x);
      block.take(rows, k + kStep, ahead);
      block.add(x + 1);
    }
  }
  for (; k < whole; k += kStep, x += M) {
    block.take(rows, k, ahead);
    block.add(x);
  }
  if (whole < size) {
    W rest[R * kStep] = {};
    for (int r = 0; r < R; ++r) {
      std::memcpy(rest + r * kStep, rows[r] + whole, (size - whole) * sizeof(W));
    }
    block.take({rest, kStep}, 0, nullptr);
    block.add(x);
  }
  block.fold(folded);
}

// sums[m * stride + n - first] = x[m] . weight[n], for M tokens and rows `first` to before `last`,
// and 0 up to the next multiple of eight rows.
template <class Step, int M, class W>
LFM2_INLINE void dots_of_group(const typename Step::Packed* x, Rows<const W> weight, int64_t size,
                               int64_t first, int64_t last, bool fetch,
                               typename Step::Total* sums, int64_t stride) {
  constexpr int R = Step::rows_at_once(M);
  constexpr int64_t kAhead =
      (R == 1 ? kBytesAheadOfOne : kBytesAhead) / static_cast<int64_t>(sizeof(W));
  typename Step::Folded folded[M * kLanes];
  for (int64_t n = first; n < last; n += kLanes) {
    const int64_t count = std::min(kLanes, last - n);
    int64_t r = 0;
    for (; r + R <= count; r += R) {
      const W* ahead = fetch ? weight[n + r] + kAhead : nullptr;
      dots_of_block<Step, M, R, W>(x, {weight[n + r], weight.stride}, size, ahead, folded + r);
    }
    for (; r < count; ++r) {
      const W* none = nullptr;
      dots_of_block<Step, M, 1, W>(x, {weight[n + r], weight.stride}, size, none, folded + r);
    }
    for (; r < kLanes; ++r) {
      for (int m = 0; m < M; ++m) folded[m * kLanes + r] = typename Step::Folded{};
    }
    for (int m = 0; m < M; ++m) Step::total(folded + m * kLanes, sums + m * stride + n - first);
  }
}

// The same for all packed tokens, a group at a time: rows come from memory once, and then from the
// cache.
template <class Step, class W>
LFM2_INLINE void dots_with(const Line* x, int64_t tokens, Rows<const W> weight, int64_t size,
                           int64_t first, int64_t last, typename Step::Total* sums,
                           int64_t stride) {
  const int64_t steps = steps_of(size, Step::kNumbers);
  int64_t m = 0;
  for (int64_t g = 0; m < tokens; ++g) {
    const int64_t count = in_group(g, tokens, Step::kTogether);
    const auto* here = reinterpret_cast<const typename Step::Packed*>(x) + m * steps;
    auto* to = sums + m * stride;
    const bool fetch = m == 0;
    switch (count) {
#define LFM2_GROUP(M)                                                                         \
  case M:                                                                                     \
    if constexpr (M <= Step::kTogether) {                                                     \
      dots_of_group<Step, M>(here, weight, size, first, last, fetch, to, stride);             \
    }                                                                                         \
    break;
      LFM2_GROUP(1)
      LFM2_GROUP(2)
      LFM2_GROUP(3)
      LFM2_GROUP(4)
      LFM2_GROUP(5)
      LFM2_GROUP(6)
      LFM2_GROUP(7)
      LFM2_GROUP(8)
#undef LFM2_GROUP
    }
    m += count;
  }
}

// The files dots_*.cpp, each for processors with the instructions in its name. For 8-bit integers
// `token_sums` are the sums of each token's numbers.
void dots_avx512bf16(const Line* x, int64_t tokens, Rows<const bf16> weight, int64_t size,
                     int64_t first, int64_t last, float* sums, int64_t stride);

void dots_avx512vnni(const Line* x, const int32_t* token_sums, int64_t tokens,
                     Rows<const int8_t> weight, int64_t size, int64_t first, int64_t last,
                     int32_t* sums, int64_t stride);

void dots_avx2(const Line* x, int64_t tokens, Rows<const int8_t> weight, int64_t size,
               int64_t first, int64_t last, int32_t* sums, int64_t stride);

void dots_neonbf16(const Line* x, int64_t tokens, Rows<const bf16> weight, int64_t size,
                   int64_t first, int64_t last, float* sums, int64_t stride);

void dots_neondot(const Line* x, int64_t tokens, Rows<const int8_t> weight, int64_t size,
                  int64_t first, int64_t last, int32_t* sums, int64_t stride);

// Tokens are packed by twos (`pack_pairs`).
void dots_neoni8mm(const Line* x, int64_t tokens, Rows<const int8_t> weight, int64_t size,
                   int64_t first, int64_t last, int32_t* sums, int64_t stride);

}  // namespace lfm2
