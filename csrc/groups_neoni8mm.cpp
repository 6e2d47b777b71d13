// The dot products of groups.h by NEON's SMMLA.
//
// Its instruction multiplies two rows by two tokens, eight numbers of each. So rows of a tile are put
// side by side once for all tokens, as tokens are before (`pair_tokens`). Four sums, of two rows by
// two tokens, stay in a register until the end.
#include "cpu_features.h"

#ifdef LFM2_ARM_I8MM
#ifdef __clang__
#pragma STDC FP_CONTRACT OFF
#else
#pragma GCC target("arch=armv8.2-a+i8mm")
#pragma GCC optimize("fp-contract=off")
#endif
#include "groups_neon.h"

namespace lfm2 {
namespace {

constexpr int kPairs = kLanes / 2;  // of rows in a tile
constexpr int kEights = kPiece / 8;

// Units of rows 0 and 1, or 2 and 3, of four rows: those of `a`, each before that of `b`.
LFM2_INLINE uint8x16_t beside(const uint8x16_t& a, const uint8x16_t& b, bool second) {
  const uint32x4_t left = vreinterpretq_u32_u8(a);
  const uint32x4_t right = vreinterpretq_u32_u8(b);
  return vreinterpretq_u8_u32(second ? vzip2q_u32(left, right) : vzip1q_u32(left, right));
}

// Each of eight rows' numbers twice, two rows in a register.
LFM2_INLINE void twice(const Lanes& lanes, float32x4_t* pairs) {
  float32x4_t halves[2];
  std::memcpy(halves, &lanes, sizeof halves);
  pairs[0] = vzip1q_f32(halves[0], halves[0]);
  pairs[1] = vzip2q_f32(halves[0], halves[0]);
  pairs[2] = vzip1q_f32(halves[1], halves[1]);
  pairs[3] = vzip2q_f32(halves[1], halves[1]);
}

// A piece of a tile: numbers 8e to 8e + 7 of two rows in `rows[i][e]`.
template <class F>
struct PiecePairs {
  int8x16_t rows[kPairs][kEights];
  float32x4_t scale[kPairs];
  float32x4_t minimum[kPairs];

  LFM2_INLINE PiecePairs(const uint8_t* numbers, const uint8_t* scales, int64_t p) {
    constexpr int kSteps = F::kBits == 4 ? 2 : 4;
    for (int step = 0; step < kSteps; ++step) {
      for (int i = 0; i < kPairs; ++i) {
        const uint8_t* units = numbers + 64 * step + i / 2 * 16;
        const uint8x16_t both = beside(vld1q_u8(units), vld1q_u8(units + 32), i % 2);
        if constexpr (F::kBits == 4) {
          Neon::split<F>(both, rows[i][step], rows[i][2 + step]);
        } else {
          rows[i][step] = vreinterpretq_s8_u8(both);
        }
      }
    }
    Lanes each[2];
    scales_of<Neon, F>(scales, p, each, each + 1);
    twice(each[0], scale);
    if constexpr (F::kMinimums) twice(each[1], minimum);
  }

  // sums[4 * i ..] += products of rows 2i and 2i + 1 with two tokens: both with 2i first.
  LFM2_INLINE void add(const int8x16_t* tokens, const float32x4_t& by,
                       const float32x4_t& of_numbers, float* sums) const {
    for (int i = 0; i < kPairs; ++i) {
      int32x4_t products = vdupq_n_s32(0);
      for (int e = 0; e < kEights; ++e) products = vmmlaq_s32(products, rows[i][e], tokens[e]);
      const float32x4_t factor = vmulq_f32(scale[i], by);
      float32x4_t sum = vld1q_f32(sums + 4 * i);
      sum = vaddq_f32(sum, vmulq_f32(Neon::whole<F>(products), factor));
      if constexpr (F::kMinimums) sum = vaddq_f32(sum, vmulq_f32(minimum[i], of_numbers));
      vst1q_f32(sums + 4 * i, sum);
    }
  }
};

// [a, b, a, b]
LFM2_INLINE float32x4_t two(const float* from) {
  double both;
  std::memcpy(&both, from, sizeof both);
  return vreinterpretq_f32_f64(vdupq_n_f64(both));
}

// sums[m * kLanes ..] += products of tokens `first` to before `last` with a tile, those of two tokens
// mixed. `together` of them at a time; one alone is its own neighbour.
template <class F, int together>
LFM2_INLINE void add_tile(const GroupTokens& x, const GroupTile& tile, int64_t ahead, int64_t first,
                          int64_t last, float* sums) {
  constexpr int64_t kTileBytes = F::kNumberBytes * kLanes;
  for (int64_t p = 0; first < last && p < x.size / kPiece; ++p) {
    const uint8_t* numbers = tile.numbers + p * kTileBytes;
    for (int64_t i = 0; i < kTileBytes; i += 64) __builtin_prefetch(numbers + ahead + i, 0, 2);
    const PiecePairs<F> piece(numbers, tile.scales, p);
    const int64_t at = p * x.count + first;
    const int8_t* tokens = x.numbers + at * kPiece;
    const float* by = x.scales + at;
    const float* of_numbers = x.sums + at;
    float* to = sums;
    for (int64_t m = first; m < last; m += together) {
      if constexpr (together == 1) {
        int8x16_t both[kEights];
        for (int e = 0; e < kEights; ++e) {
          const int8x8_t eight = vld1_s8(tokens + 8 * e);
          both[e] = vcombine_s8(eight, eight);
        }
        piece.add(both, vdupq_n_f32(*by), vdupq_n_f32(*of_numbers), to);
      } else {
        for (int i = 0; i < together; i += 2) {
          int8x16_t both[kEights];
          for (int e = 0; e < kEights; ++e) both[e] = vld1q_s8(tokens + i * kPiece + 16 * e);
          piece.add(both, two(by + i), two(of_numbers + i), to + i * kLanes);
        }
      }
      tokens += together * kPiece;
      by += together;
      of_numbers += together;
      to += together * kLanes;
    }
  }
}

// As `dots_of_tile`. The sums of two tokens are mixed in their place until the end.
template <class F>
LFM2_INLINE void dots_by_pairs(const GroupTokens& x, const GroupTile& tile, int64_t ahead,
                               Lanes* sums) {
  const int64_t whole = x.count / 8 * 8;
  const int64_t even = x.count / 2 * 2;
  auto* mixed = reinterpret_cast<float*>(sums);
  float alone[2 * kLanes] = {};
  std::memset(mixed, 0, x.count * sizeof *sums);
  add_tile<F, 8>(x, tile, ahead, 0, whole, mixed);
  add_tile<F, 2>(x, tile, ahead, whole, even, mixed + whole * kLanes);
  add_tile<F, 1>(x, tile, ahead, even, x.count, alone);
  for (int64_t m = 0; m < x.count; m += 2) {
    const float* from = m < even ? mixed + m * kLanes : alone;
    const float32x4_t pairs[kPairs] = {vld1q_f32(from), vld1q_f32(from + 4), vld1q_f32(from + 8),
                                       vld1q_f32(from + 12)};
    float* to = mixed + m * kLanes;
    vst1q_f32(to, vuzp1q_f32(pairs[0], pairs[1]));
    vst1q_f32(to + 4, vuzp1q_f32(pairs[2], pairs[3]));
    if (m + 1 < x.count) {
      vst1q_f32(to + 8, vuzp2q_f32(pairs[0], pairs[1]));
      vst1q_f32(to + 12, vuzp2q_f32(pairs[2], pairs[3]));
    }
  }
}

}  // namespace

void groups_neoni8mm(GroupKind kind, const GroupTokens& x, const GroupTile* tiles, int64_t count,
                     int64_t ahead, Lanes* sums) {
  if (!x.paired) return groups_neondot(kind, x, tiles, count, ahead, sums);
  with_format(kind, [&](auto format) LFM2_FLAT {
    using F = decltype(format);
    if constexpr (F::kGroup == kPiece) {
      for (int64_t t = 0; t < count; ++t) {
        dots_by_pairs<F>(x, tiles[t], ahead, sums + t * x.count);
      }
    }
  });
}

}  // namespace lfm2
#endif
