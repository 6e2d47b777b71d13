// x @ weight.T for a few tokens, with further work on each number while it is in a register.
#pragma once

#include <type_traits>
#include <vector>

#include "dots.h"
#include "dtypes.h"
#include "exp.h"
#include "group_matrix.h"
#include "groups.h"
#include "pack.h"

namespace lfm2 {

// Rows of a matrix that are multiplied before their results are finished.
constexpr int64_t kChunk = 64;

// sums[m * kChunk + n - first] = x[m] . weight[n], for n from `first` to before `last`.
template <class Step, class T>
LFM2_CLONES void wide_dots(const Line* x, int64_t tokens, Rows<const T> weight, int64_t size,
                           int64_t first, int64_t last, float* sums) {
  dots_with<Step>(x, tokens, weight, size, first, last, sums, kChunk);
}

// sums[m] = the sum of the numbers of token m
LFM2_CLONES inline void sum_numbers(Rows<const int8_t> x, int64_t tokens, int64_t size,
                                    int32_t* sums) {
  for (int64_t m = 0; m < tokens; ++m) {
    const int8_t* from = x[m];
    int32_t sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t k = 0; k < size; ++k) sum += from[k];
    sums[m] = sum;
  }
}

// sums[m * kChunk + i] = products * token_scales[m] * row_scales[first + i]
template <class P>
LFM2_CLONES void scale(const P* products, const float* token_scales, const float* row_scales,
                       int64_t tokens, int64_t first, int64_t last, float* sums) {
  for (int64_t m = 0; m < tokens; ++m) {
    const float by = token_scales[m];
    for (int64_t i = 0; i < last - first; ++i) {
      const float product = static_cast<float>(products[m * kChunk + i]);
      sums[m * kChunk + i] = product * (by * row_scales[first + i]);
    }
  }
}

// The fastest code of dots.h for this machine; null if that is the plain code.
using Bf16Dots = void (*)(const Line* x, int64_t tokens, Rows<const bf16> weight, int64_t size,
                          int64_t first, int64_t last, float* sums, int64_t stride);
using Int8Dots = void (*)(const Line* x, int64_t tokens, Rows<const int8_t> weight, int64_t size,
                          int64_t first, int64_t last, int32_t* sums, int64_t stride);

inline Bf16Dots bf16_dots() {
  if (LFM2_HAS_AVX512BF16) return &dots_avx512bf16;
  return LFM2_HAS_ARM_BF16 ? &dots_neonbf16 : nullptr;
}

// For one or two tokens SDOT reads a row as fast as the memory, and needs no second row.
inline bool by_pairs(int64_t tokens) { return LFM2_HAS_ARM_I8MM && tokens > 2; }

inline Int8Dots int8_dots(int64_t tokens) {
  if (LFM2_HAS_AVX2) return &dots_avx2;
  if (by_pairs(tokens)) return &dots_neoni8mm;
  return LFM2_HAS_ARM_DOT ? &dots_neondot : nullptr;
}

// Tokens and the matrix that multiplies them, both in floats of one type.
template <class T>
class Dense {
 public:
  Dense(Rows<const T> x, int64_t tokens, Rows<const T> weight, int64_t size)
      : tokens_(tokens), weight_(weight), size_(size) {
    lines_.resize(tokens * steps_of(size, WideStep::kNumbers));
    if constexpr (std::is_same_v<T, bf16>) {
      constexpr int64_t kPairs = sizeof(Line) / sizeof(bf16);
      if (bf16_dots() != nullptr) {
        pack<kPairs>(x, tokens, size, kTogether, lines_.data());
        return;
      }
      if (tokens <= NarrowStep::kTogether) {
        pack<kPair>(x, tokens, size, NarrowStep::kTogether, lines_.data());
        return;
      }
    }
    pack_wide(x, tokens, size, lines_.data());
  }

  // sums[m * kChunk + n - first] = x[m] . weight[n]
  void dots(int64_t first, int64_t last, float* sums) const {
    const Line* x = lines_.data();
    if constexpr (std::is_same_v<T, bf16>) {
      if (const Bf16Dots body = bf16_dots()) {
        return body(x, tokens_, weight_, size_, first, last, sums, kChunk);
      }
      if (tokens_ <= NarrowStep::kTogether) {
        return wide_dots<NarrowStep>(x, tokens_, weight_, size_, first, last, sums);
      }
    }
    wide_dots<WideStep>(x, tokens_, weight_, size_, first, last, sums);
  }

 private:
  int64_t tokens_;
  Rows<const T> weight_;
  int64_t size_;
  std::vector<Line> lines_;
};

// The same in 8-bit integers, with a scale for each token and each row.
class Int8 {
 public:
  Int8(Rows<const int8_t> x, const float* token_scales, int64_t tokens, Rows<const int8_t> weight,
       const float* row_scales, int64_t size)
      : token_scales_(token_scales),
        tokens_(tokens),
        weight_(weight),
        row_scales_(row_scales),
        size_(size),
        body_(int8_dots(tokens)) {
    const int64_t padded = by_pairs(tokens) ? (tokens + 1) / 2 * 2 : tokens;
    const int64_t numbers = body_ == nullptr ? WideStep::kNumbers : sizeof(Line);
    lines_.resize(padded * steps_of(size, numbers));
    if (body_ == nullptr) {
      pack_wide(x, tokens, size, lines_.data());
    } else if (by_pairs(tokens)) {
      pack_pairs(x, tokens, size, lines_.data());
    } else {
      pack<sizeof(Line)>(x, tokens, size, kTogether, lines_.data());
    }
    if (LFM2_HAS_AVX512VNNI) {
      token_sums_.resize(tokens);
      sum_numbers(x, tokens, size, token_sums_.data());
    }
  }

  // sums[m * kChunk + n - first] = x[m] . weight[n], scaled
  void dots(int64_t first, int64_t last, float* sums) const {
    const Line* x = lines_.data();
    if (body_ == nullptr) {
      wide_dots<WideStep>(x, tokens_, weight_, size_, first, last, sums);
      return scale(sums, token_scales_, row_scales_, tokens_, first, last, sums);
    }
    int32_t products[kTokens * kChunk];
    if (LFM2_HAS_AVX512VNNI) {
      dots_avx512vnni(x, token_sums_.data(), tokens_, weight_, size_, first, last, products,
                      kChunk);
    } else {
      body_(x, tokens_, weight_, size_, first, last, products, kChunk);
    }
    scale(products, token_scales_, row_scales_, tokens_, first, last, sums);
  }

 private:
  const float* token_scales_;
  int64_t tokens_;
  Rows<const int8_t> weight_;
  const float* row_scales_;
  int64_t size_;
  Int8Dots body_;
  std::vector<Line> lines_;
  std::vector<int32_t> token_sums_;
};

// The fastest code of groups.h for this processor.
inline GroupDots group_dots() {
  if (LFM2_HAS_AVX512VNNI) return &groups_avx512vnni;
  if (LFM2_HAS_AVXVNNI) return &groups_avxvnni;
  if (LFM2_HAS_AVX2) return &groups_avx2;
  if (LFM2_HAS_ARM_I8MM && LFM2_HAS_ARM_DOT) return &groups_neoni8mm;
  if (LFM2_HAS_ARM_DOT) return &groups_neondot;
  return LFM2_HAS_NEON ? &groups_neon : &groups_plain;
}

// For one token SDOT reads a tile as fast. SMMLA would need other sums for groups of sixteen.
inline bool groups_by_pairs(GroupKind kind, int64_t tokens) {
  const bool sixteen = kind == GroupKind::kQ6_K || kind == GroupKind::kWide;
  return LFM2_HAS_ARM_I8MM && LFM2_HAS_ARM_DOT && tokens > 1 && !sixteen;
}

// The same of a matrix in groups, and of tokens rounded in groups.
class Grouped {
 public:
  Grouped(const GroupTokens& x, const GroupMatrix& matrix, const LastTile& last)
      : x_(x), matrix_(matrix), last_(last), dots_(group_dots()) {}

  // sums[m * kChunk + n - first] = x[m] . weight[n]
  void dots(int64_t first, int64_t last, float* sums) const {
    constexpr int64_t kTiles = kChunk / kLanes + 1;
    GroupTile tiles[kTiles] = {};
    Lanes of_tiles[kTiles * kTokens];
    const int64_t base = first / kLanes;
    const int64_t count = (last + kLanes - 1) / kLanes - base;
    for (int64_t t = 0; t < count; ++t) {
      const bool whole = (base + t + 1) * kLanes <= matrix_.rows;
      tiles[t] = whole ? matrix_.tile(base + t) : last_.tile();
    }
    dots_(matrix_.kind, x_, tiles, count, kBytesAhead, of_tiles);
    for (int64_t t = 0; t < count; ++t) {
      const int64_t row = (base + t) * kLanes;
      const int64_t from = std::max(first, row);
      const int64_t lanes = std::min(last, row + kLanes) - from;
      for (int64_t m = 0; m < x_.count; ++m) {
        const Lanes& of_tile = of_tiles[t * x_.count + m];
        float* to = sums + m * kChunk + from - first;
        if (lanes == kLanes) {
          store(of_tile, to);
        } else {
          std::memcpy(to, reinterpret_cast<const float*>(&of_tile) + from - row,
                      lanes * sizeof(float));
        }
      }
    }
  }

 private:
  const GroupTokens& x_;
  const GroupMatrix& matrix_;
  const LastTile& last_;
  GroupDots dots_;
};

// out[m][n] = sums + bias, rounded, then added to `residual` if there is one.
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

// out[m][n] = products * token_scales[m] * row_scales[n] + bias, of whole rows from `first` to
// before `last`.
template <class T>
LFM2_CLONES void finish_products(Rows<const int32_t> products, const float* token_scales,
                                 const float* row_scales, const T* bias, int64_t width,
                                 int64_t first, int64_t last, Rows<T> out) {
  for (int64_t m = first; m < last; ++m) {
    const int32_t* from = products[m];
    T* to = out[m];
    for (int64_t n = 0; n < width; ++n) {
      float sum = static_cast<float>(from[n]) * (token_scales[m] * row_scales[n]);
      if (bias != nullptr) sum += widen(bias[n]);
      narrow(sum, to[n]);
    }
  }
}

}  // namespace lfm2
