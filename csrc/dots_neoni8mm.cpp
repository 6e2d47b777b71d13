// The dot products of dots.h of 8-bit integers by NEON's SMMLA, exactly.
//
// Its instruction multiplies two rows by two tokens, eight numbers of each. So tokens are packed by
// twos (`pack_pairs`), and rows are put side by side as they are read. As in the other files of this
// kind, everything here is inlined.
#include "cpu_features.h"

#ifdef LFM2_ARM_I8MM
#ifdef LFM2_GCC_ARM
#pragma GCC target("arch=armv8.2-a+i8mm")
#endif
#include <arm_neon.h>

#include "dots.h"

namespace lfm2 {
namespace {

constexpr int64_t kSixteen = 16;  // numbers of a row in a register
constexpr int kRows = 4;          // at once, two and two

// Numbers 0 to 7 of two rows, and 8 to 15 of both.
struct TwoRows {
  int8x16_t low, high;
};

LFM2_INLINE TwoRows beside(const int8_t* a, const int8_t* b) {
  const int64x2_t first = vreinterpretq_s64_s8(vld1q_s8(a));
  const int64x2_t second = vreinterpretq_s64_s8(vld1q_s8(b));
  return {vreinterpretq_s8_s64(vzip1q_s64(first, second)),
          vreinterpretq_s8_s64(vzip2q_s64(first, second))};
}

// sums[p][i] += products of pair p of the tokens with rows 2i and 2i + 1, from number `k` on.
template <int P>
LFM2_INLINE void add(const TwoRows* rows, const int8_t* pairs, int64_t pair, int64_t k,
                     int32x4_t (*sums)[kRows / 2]) {
  for (int p = 0; p < P; ++p) {
    const int8_t* tokens = pairs + p * pair + 2 * k;
    const int8x16_t low = vld1q_s8(tokens);
    const int8x16_t high = vld1q_s8(tokens + kSixteen);
    for (int i = 0; i < kRows / 2; ++i) {
      sums[p][i] = vmmlaq_s32(sums[p][i], rows[i].low, low);
      sums[p][i] = vmmlaq_s32(sums[p][i], rows[i].high, high);
    }
  }
}

// P pairs of tokens by all rows, four at a time; a row that is not there is the last one again.
template <int P>
LFM2_INLINE void dots_of_pairs(const int8_t* pairs, int64_t tokens, Rows<const int8_t> weight,
                               int64_t size, int64_t first, int64_t last, bool fetch,
                               int32_t* sums, int64_t stride) {
  const int64_t pair = 2 * steps_of(size, kSixteen) * kSixteen;
  const int64_t whole = size / kSixteen * kSixteen;
  for (int64_t n = first; n < last; n += kRows) {
    const int8_t* row[kRows];
    for (int i = 0; i < kRows; ++i) row[i] = weight[std::min(n + i, last - 1)];
    int32x4_t products[P][kRows / 2] = {};
    for (int64_t k = 0; k < whole; k += kSixteen) {
      // A cache line every fourth time, of each row.
      if (fetch) __builtin_prefetch(row[k / kSixteen % kRows] + k / 64 * 64 + kBytesAhead, 0, 2);
      const TwoRows rows[kRows / 2] = {beside(row[0] + k, row[1] + k),
                                       beside(row[2] + k, row[3] + k)};
      add<P>(rows, pairs, pair, k, products);
    }
    if (whole < size) {
      int8_t rest[kRows][kSixteen] = {};
      for (int i = 0; i < kRows; ++i) std::memcpy(rest[i], row[i] + whole, size - whole);
      const TwoRows rows[kRows / 2] = {beside(rest[0], rest[1]), beside(rest[2], rest[3])};
      add<P>(rows, pairs, pair, whole, products);
    }
    for (int p = 0; p < P; ++p) {
      for (int i = 0; i < kRows; ++i) {
        int32_t of_rows[4];
        vst1q_s32(of_rows, products[p][i / 2]);
        for (int t = 0; t < 2; ++t) {
          const int64_t m = 2 * p + t;
          if (m < tokens && n + i < last) {
            sums[m * stride + n + i - first] = of_rows[i % 2 * 2 + t];
          }
        }
      }
    }
  }
}

}  // namespace

void dots_neoni8mm(const Line* x, int64_t tokens, Rows<const int8_t> weight, int64_t size,
                   int64_t first, int64_t last, int32_t* sums, int64_t stride) {
  const int64_t pair = 2 * steps_of(size, kSixteen) * kSixteen;
  constexpr int64_t kMost = 8;
  for (int64_t m = 0; m < tokens; m += kMost) {
    const auto* pairs = reinterpret_cast<const int8_t*>(x) + m / 2 * pair;
    const int64_t here = std::min(kMost, tokens - m);
    int32_t* to = sums + m * stride;
    const bool fetch = m == 0;
    switch ((here + 1) / 2) {
      case 1:
        dots_of_pairs<1>(pairs, here, weight, size, first, last, fetch, to, stride);
        break;
      case 2:
        dots_of_pairs<2>(pairs, here, weight, size, first, last, fetch, to, stride);
        break;
      case 3:
        dots_of_pairs<3>(pairs, here, weight, size, first, last, fetch, to, stride);
        break;
      default:
        dots_of_pairs<4>(pairs, here, weight, size, first, last, fetch, to, stride);
    }
  }
}

}  // namespace lfm2
#endif
