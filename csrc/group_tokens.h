// Tokens for groups.h: rounded to 8 bits in groups of 32, laid out piece after piece.
#pragma once

#include <vector>

#include "groups.h"

namespace lfm2 {

// Memory of `GroupTokens`.
struct GroupScratch {
  std::vector<int8_t> numbers;
  std::vector<float> scales, sums, half_sums;
  std::vector<int32_t> eights;

  GroupScratch(int64_t tokens, int64_t size)
      : numbers(tokens * size),
        scales(tokens * size / kPiece),
        sums(scales.size()),
        half_sums(2 * scales.size()),
        eights(scales.size()) {}

  GroupTokens tokens(int64_t count, int64_t size) const {
    return {count, size, numbers.data(), scales.data(), eights.data(), sums.data(),
            half_sums.data()};
  }
};

// round(x * 127 / max|x|) of each 32 numbers, and what else their products need. A group with an
// infinity or a NaN has a scale of NaN.
template <class T>
LFM2_CLONES void round_groups(Rows<const T> x, int64_t count, int64_t size, int8_t* numbers,
                              float* scales, int32_t* eights, float* sums, float* half_sums) {
  for (int64_t m = 0; m < count; ++m) {
    for (int64_t p = 0; p < size / kPiece; ++p) {
      const T* from = x[m] + p * kPiece;
      const int64_t at = p * count + m;
      int8_t* to = numbers + at * kPiece;
      float wide[kPiece];
      // As integers, so that NaN is larger than infinity.
      uint32_t largest = 0;
#pragma omp simd reduction(max : largest)
      for (int64_t i = 0; i < kPiece; ++i) {
        wide[i] = widen(from[i]);
        const uint32_t magnitude = bits_of(wide[i]) & 0x7FFFFFFFu;
        largest = magnitude > largest ? magnitude : largest;
      }
      const bool finite = largest < 0x7F800000u;
      const float most = from_bits(finite ? largest : 0);
      // A smaller number would make the factor infinite, and is negligible beside the smallest
      // normal.
      const float factor = most > 1e-35f ? 127.0f / most : 0.0f;
      const float scale = finite ? most / 127.0f : from_bits(0x7FC00000u);
      int32_t halves[2] = {};
      for (int64_t half = 0; half < 2; ++half) {
        int32_t sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 16 * half; i < 16 * half + 16; ++i) {
          const float number = finite ? wide[i] : 0.0f;
          const auto rounded = static_cast<int32_t>(__builtin_rintf(number * factor));
          to[i] = static_cast<int8_t>(rounded);
          sum += rounded;
        }
        halves[half] = sum;
        half_sums[2 * at + half] = static_cast<float>(sum) * scale;
      }
      scales[at] = scale;
      eights[at] = 8 * (halves[0] + halves[1]);
      sums[at] = static_cast<float>(halves[0] + halves[1]) * scale;
    }
  }
}

template <class T>
void round_groups(Rows<const T> x, int64_t count, int64_t size, GroupScratch& into) {
  round_groups(x, count, size, into.numbers.data(), into.scales.data(), into.eights.data(),
               into.sums.data(), into.half_sums.data());
}

// The same tokens, with the numbers of two mixed: eight of the first, eight of the second, and so on.
// A last one without another stays as it is.
inline GroupTokens pair_tokens(const GroupTokens& x, GroupScratch& scratch) {
  constexpr int64_t kRun = 8;
  for (int64_t p = 0; p < x.size / kPiece; ++p) {
    for (int64_t m = 0; m + 1 < x.count; m += 2) {
      int8_t* both = scratch.numbers.data() + (p * x.count + m) * kPiece;
      int8_t mixed[2 * kPiece];
      for (int64_t k = 0; k < kPiece; k += kRun) {
        std::memcpy(mixed + 2 * k, both + k, kRun);
        std::memcpy(mixed + 2 * k + kRun, both + kPiece + k, kRun);
      }
      std::memcpy(both, mixed, sizeof mixed);
    }
  }
  GroupTokens paired = x;
  paired.paired = true;
  return paired;
}

}  // namespace lfm2
