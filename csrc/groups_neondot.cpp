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

}  // namespace

void groups_neondot(GroupKind kind, const GroupTokens& x, const GroupTile& tile, int64_t ahead,
                    Lanes* sums) {
  with_format(kind, [&](auto format) LFM2_FLAT {
    dots_of_tile<NeonDot, decltype(format)>(x, tile, ahead, sums);
  });
}

}  // namespace lfm2
#endif
