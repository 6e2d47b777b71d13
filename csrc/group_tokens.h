// Tokens for groups.h: rounded to 8 bits in groups of 32, laid out piece after piece.
#pragma once

#include <vector>

#include "groups.h"

namespace lfm2 {

// Memory of `GroupTokens`.
struct GroupScratch {
  int64_t count, size;
  std::vector<int8_t> numbers;
  std::vector<float> scales, sums, half_sums;
  std::vector<int32_t> eights;

  GroupScratch(int64_t tokens, int64_t size)
      : count(tokens),
        size(size),
        numbers(tokens * size),
        scales(tokens * size / kPiece),
        sums(scales.size()),
        half_sums(2 * scales.size()),
        eights(scales.size()) {}

  GroupTokens tokens() const {
    return {count, size, numbers.data(), scales.data(), eights.data(), sums.data(),
            half_sums.data()};
  }
};

// Largest magnitude of 32 numbers, as the bits of a float, so that NaN is larger than infinity.
template <class T>
LFM2_INLINE uint32_t largest_magnitude(const T* from) {
  uint32_t lanes[kLanes] = {};
  for (int64_t k = 0; k < kPiece; k += kLanes) {
#pragma omp simd
    for (int64_t i = 0; i < kLanes; ++i) {
      const uint32_t magnitude = bits_of(widen(from[k + i])) & 0x7FFFFFFFu;
      lanes[i] = magnitude > lanes[i] ? magnitude : lanes[i];
    }
  }
  uint32_t largest = 0;
  for (int64_t i = 0; i < kLanes; ++i) largest = lanes[i] > largest ? lanes[i] : largest;
  return largest;
}

// to = round(from * factor), and the sum of each half
template <class T>
LFM2_INLINE void round_piece(const T* from, float factor, int8_t* to, int32_t* halves) {
  int32_t rounded[kPiece];
#pragma omp simd
  for (int64_t i = 0; i < kPiece; ++i) {
    rounded[i] = static_cast<int32_t>(__builtin_rintf(widen(from[i]) * factor));
  }
#pragma omp simd
  for (int64_t i = 0; i < kPiece; ++i) to[i] = static_cast<int8_t>(rounded[i]);
  for (int64_t half = 0; half < 2; ++half) {
    int32_t lanes[kLanes];
    const int32_t* here = rounded + 16 * half;
#pragma omp simd
    for (int64_t i = 0; i < kLanes; ++i) lanes[i] = here[i] + here[i + kLanes];
    for (int64_t i = 0; i < kLanes; ++i) halves[half] += lanes[i];
  }
}

// round(x * 127 / max|x|) of each 32 numbers of tokens `first` to before `last`, and what else
// their products need. A group with an infinity or a NaN has a scale of NaN. `x` begins with token
// `first`. Each step is done for a whole token, so that no group waits for another.
template <class T>
LFM2_CLONES void round_groups(Rows<const T> x, int64_t first, int64_t last, GroupScratch& into) {
  const int64_t count = into.count;
  const int64_t pieces = into.size / kPiece;
  // Bytes may be part of anything, so the compiler would read `into` again after each of them.
  int8_t* const numbers = into.numbers.data();
  float* const scales = into.scales.data();
  float* const sums = into.sums.data();
  float* const half_sums = into.half_sums.data();
  int32_t* const eights = into.eights.data();
  std::vector<float> factors(2 * pieces);
  float* by_piece = factors.data() + pieces;
  for (int64_t m = first; m < last; ++m) {
    const T* from = x[m - first];
    for (int64_t p = 0; p < pieces; ++p) {
      factors[p] = from_bits(largest_magnitude(from + p * kPiece));
    }
#pragma omp simd
    for (int64_t p = 0; p < pieces; ++p) {
      const bool finite = bits_of(factors[p]) < 0x7F800000u;
      const float most = finite ? factors[p] : 0.0f;
      // A smaller number would make the factor infinite, and is negligible beside the smallest
      // normal.
      factors[p] = most > 1e-35f ? 127.0f / most : 0.0f;
      by_piece[p] = finite ? most / 127.0f : from_bits(0x7FC00000u);
    }
    for (int64_t p = 0; p < pieces; ++p) {
      const int64_t at = p * count + m;
      const float factor = factors[p];
      const float scale = by_piece[p];
      int8_t* to = numbers + at * kPiece;
      int32_t halves[2] = {};
      if (scale == scale) {
        round_piece(from + p * kPiece, factor, to, halves);
      } else {
        std::memset(to, 0, kPiece);
      }
      for (int64_t half = 0; half < 2; ++half) {
        half_sums[2 * at + half] = static_cast<float>(halves[half]) * scale;
      }
      scales[at] = scale;
      eights[at] = 8 * (halves[0] + halves[1]);
      sums[at] = static_cast<float>(halves[0] + halves[1]) * scale;
    }
  }
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
