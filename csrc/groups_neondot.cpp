// The dot products of groups.h by NEON's SDOT.
#include "cpu_features.h"

#ifdef LFM2_ARM_DOT
#ifdef __clang__
#pragma STDC FP_CONTRACT OFF
#else
#pragma GCC target("arch=armv8.2-a+dotprod")
#pragma GCC optimize("fp-contract=off")
#endif
#include "groups_neon.h"

namespace lfm2 {
namespace {

struct NeonDot : Neon {
  // Adds the products of four units with sixteen numbers of the token.
  static LFM2_INLINE void add(const Ints* rows, const int8x16_t& token, int32x4_t& low,
                              int32x4_t& high) {
    low = vdotq_laneq_s32(low, rows[0].low, token, 0);
    high = vdotq_laneq_s32(high, rows[0].high, token, 0);
    low = vdotq_laneq_s32(low, rows[1].low, token, 1);
    high = vdotq_laneq_s32(high, rows[1].high, token, 1);
    low = vdotq_laneq_s32(low, rows[2].low, token, 2);
    high = vdotq_laneq_s32(high, rows[2].high, token, 2);
    low = vdotq_laneq_s32(low, rows[3].low, token, 3);
    high = vdotq_laneq_s32(high, rows[3].high, token, 3);
  }

  static LFM2_INLINE void dots_of_nibbles(const Ints* rows, const int8_t* token, Places& sums) {
    int32x4_t low = vdupq_n_s32(0);
    int32x4_t high = low;
    add(rows, vld1q_s8(token), low, high);
    add(rows + 4, vld1q_s8(token + 16), low, high);
    keep(low, high, sums);
  }

  static LFM2_INLINE void dots_of_sixteen(const Ints* rows, const int8_t* token, Places& sums) {
    int32x4_t low = vdupq_n_s32(0);
    int32x4_t high = low;
    add(rows, vld1q_s8(token), low, high);
    keep(low, high, sums);
  }
};

// Of a format with groups of 32: a piece of a tile, in registers for all tokens.
template <class F>
struct Piece {
  Neon::Ints rows[8];
  float32x4_t scale[2], minimum[2];

  LFM2_INLINE Piece(const uint8_t* numbers, const uint8_t* scales, int64_t p) {
    if constexpr (F::kBits == 4) {
      for (int step = 0; step < 4; ++step) {
        const uint8_t* units = numbers + 32 * step;
        Neon::split<F>(vld1q_u8(units), rows[step].low, rows[4 + step].low);
        Neon::split<F>(vld1q_u8(units + 16), rows[step].high, rows[4 + step].high);
      }
    } else {
      Neon::bytes(numbers, rows);
    }
    Lanes each[2];
    scales_of<Neon, F>(scales, p, each, each + 1);
    std::memcpy(scale, each, sizeof scale);
    if constexpr (F::kMinimums) std::memcpy(minimum, each + 1, sizeof minimum);
  }

  // to[0..8) += products with a token, whose scale and sum are in lane I.
  template <int I>
  LFM2_INLINE void add(const int8_t* token, const float32x4_t& by, const float32x4_t& of_numbers,
                       float* to) const {
    int32x4_t products[2] = {vdupq_n_s32(0), vdupq_n_s32(0)};
    NeonDot::add(rows, vld1q_s8(token), products[0], products[1]);
    NeonDot::add(rows + 4, vld1q_s8(token + 16), products[0], products[1]);
    for (int i = 0; i < 2; ++i) {
      const float32x4_t factor = vmulq_laneq_f32(scale[i], by, I);
      float32x4_t sum = vaddq_f32(vld1q_f32(to + 4 * i),
                                  vmulq_f32(Neon::whole<F>(products[i]), factor));
      if constexpr (F::kMinimums) {
        sum = vaddq_f32(sum, vmulq_laneq_f32(minimum[i], of_numbers, I));
      }
      vst1q_f32(to + 4 * i, sum);
    }
  }
};

// sums[m * kLanes ..] += products of tokens `first` to before `last` with a tile, `together` of them
// at a time.
template <class F, int together>
LFM2_INLINE void add_tile(const GroupTokens& x, const GroupTile& tile, int64_t ahead, int64_t first,
                          int64_t last, float* sums) {
  constexpr int64_t kTileBytes = F::kNumberBytes * kLanes;
  for (int64_t p = 0; first < last && p < x.size / kPiece; ++p) {
    const uint8_t* numbers = tile.numbers + p * kTileBytes;
    for (int64_t i = 0; i < kTileBytes; i += 64) __builtin_prefetch(numbers + ahead + i, 0, 2);
    const Piece<F> piece(numbers, tile.scales, p);
    const int64_t at = p * x.count + first;
    const int8_t* tokens = x.numbers + at * kPiece;
    const float* by = x.scales + at;
    const float* of_numbers = x.sums + at;
    float* to = sums;
    for (int64_t m = first; m < last; m += together) {
      if constexpr (together == 4) {
        const float32x4_t scales = vld1q_f32(by);
        const float32x4_t wholes = vld1q_f32(of_numbers);
        piece.template add<0>(tokens, scales, wholes, to);
        piece.template add<1>(tokens + kPiece, scales, wholes, to + kLanes);
        piece.template add<2>(tokens + 2 * kPiece, scales, wholes, to + 2 * kLanes);
        piece.template add<3>(tokens + 3 * kPiece, scales, wholes, to + 3 * kLanes);
      } else {
        piece.template add<0>(tokens, vdupq_n_f32(*by), vdupq_n_f32(*of_numbers), to);
      }
      tokens += together * kPiece;
      by += together;
      of_numbers += together;
      to += together * kLanes;
    }
  }
}

// As `dots_of_tile`.
template <class F>
LFM2_INLINE void dots_by_fours(const GroupTokens& x, const GroupTile& tile, int64_t ahead,
                               Lanes* sums) {
  const int64_t fours = x.count / 4 * 4;
  auto* all = reinterpret_cast<float*>(sums);
  std::memset(all, 0, x.count * sizeof *sums);
  add_tile<F, 4>(x, tile, ahead, 0, fours, all);
  add_tile<F, 1>(x, tile, ahead, fours, x.count, all + fours * kLanes);
}

template <class F>
LFM2_INLINE void dots_of_some(const GroupTokens& x, const GroupTile* tiles, int64_t count,
                              int64_t ahead, Lanes* sums) {
  if constexpr (F::kGroup == kPiece) {
    if (x.count > 1) {
      for (int64_t t = 0; t < count; ++t) {
        dots_by_fours<F>(x, tiles[t], ahead, sums + t * x.count);
      }
      return;
    }
  }
  dots_of_tiles<NeonDot, F>(x, tiles, count, ahead, sums);
}

}  // namespace

void groups_neondot(GroupKind kind, const GroupTokens& x, const GroupTile* tiles, int64_t count,
                    int64_t ahead, Lanes* sums) {
  with_format(kind, [&](auto format) LFM2_FLAT {
    dots_of_some<decltype(format)>(x, tiles, count, ahead, sums);
  });
}

}  // namespace lfm2
#endif
