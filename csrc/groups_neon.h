// Loads and products that groups.h needs, in NEON. groups_neondot.cpp replaces the products.
//
// Sums of numbers 0 to 15 stay in 16 bits for a whole piece: 8 products of at most 15 * 127 each. Of
// signed numbers two products of at most 128 * 127 fit.
#pragma once

#include <arm_neon.h>

#include "groups.h"

namespace lfm2 {

struct Neon {
  // Four numbers of each of eight rows.
  struct Ints {
    int8x16_t low, high;
  };

  static LFM2_INLINE void keep(const int32x4_t& low, const int32x4_t& high, Places& to) {
    std::memcpy(&to, &low, sizeof low);
    std::memcpy(reinterpret_cast<char*>(&to) + sizeof low, &high, sizeof high);
  }

  static LFM2_INLINE void halves(const uint8_t* from, Lanes& to) {
    const float16x8_t words = vreinterpretq_f16_u8(vld1q_u8(from));
    const float32x4_t floats[2] = {vcvt_f32_f16(vget_low_f16(words)), vcvt_high_f32_f16(words)};
    std::memcpy(&to, floats, sizeof to);
  }

  static LFM2_INLINE void words(const uint8_t* from, Places& to) {
    const uint16x8_t packed = vreinterpretq_u16_u8(vld1q_u8(from));
    keep(vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(packed))),
         vreinterpretq_s32_u32(vmovl_high_u16(packed)), to);
  }

  // Units of four numbers in rows[0..8), each of one step along all eight rows.
  static LFM2_INLINE void nibbles(const uint8_t* from, Ints* rows) {
    const uint8x16_t mask = vdupq_n_u8(15);
    for (int step = 0; step < 4; ++step) {
      const uint8x16_t low = vld1q_u8(from + 32 * step);
      const uint8x16_t high = vld1q_u8(from + 32 * step + 16);
      rows[step] = {vreinterpretq_s8_u8(vandq_u8(low, mask)),
                    vreinterpretq_s8_u8(vandq_u8(high, mask))};
      rows[4 + step] = {vreinterpretq_s8_u8(vshrq_n_u8(low, 4)),
                        vreinterpretq_s8_u8(vshrq_n_u8(high, 4))};
    }
  }

  static LFM2_INLINE void bytes(const uint8_t* from, Ints* rows) {
    for (int step = 0; step < 8; ++step) {
      const auto* units = reinterpret_cast<const int8_t*>(from) + 32 * step;
      rows[step] = {vld1q_s8(units), vld1q_s8(units + 16)};
    }
  }

  // The lower and the upper four bits: of int4 less 8 and times 16, so that sums need no correction.
  template <class F>
  static LFM2_INLINE void split(const uint8x16_t& both, int8x16_t& low, int8x16_t& high) {
    if constexpr (F::kOffset == 8) {
      const int8x16_t numbers = vreinterpretq_s8_u8(veorq_u8(both, vdupq_n_u8(0x88)));
      low = vshlq_n_s8(numbers, 4);
      high = vandq_s8(numbers, vdupq_n_s8(static_cast<int8_t>(0xF0)));
    } else {
      low = vreinterpretq_s8_u8(vandq_u8(both, vdupq_n_u8(15)));
      high = vreinterpretq_s8_u8(vshrq_n_u8(both, 4));
    }
  }

  // Sums of products of these numbers, exactly.
  template <class F>
  static LFM2_INLINE float32x4_t whole(const int32x4_t& products) {
    if constexpr (F::kOffset == 8) return vcvtq_n_f32_s32(products, 4);
    return vcvtq_f32_s32(products);
  }

  // Products of `steps` units, two and two summed by rows.
  template <int steps>
  static LFM2_INLINE void dots(const Ints* rows, const int8_t* token, Places& sums) {
    int32x4_t by_two[4] = {};
    for (int first = 0; first < steps; first += 2) {
      int16x8_t products[4];
      for (int step = first; step < first + 2; ++step) {
        const int8x8_t four = vreinterpret_s8_s32(vdup_n_s32(word_of(token + kDots * step)));
        const int8x16_t all = vcombine_s8(four, four);
        const Ints& row = rows[step];
        if (step == first) {
          products[0] = vmull_s8(vget_low_s8(row.low), four);
          products[1] = vmull_high_s8(row.low, all);
          products[2] = vmull_s8(vget_low_s8(row.high), four);
          products[3] = vmull_high_s8(row.high, all);
        } else {
          products[0] = vmlal_s8(products[0], vget_low_s8(row.low), four);
          products[1] = vmlal_high_s8(products[1], row.low, all);
          products[2] = vmlal_s8(products[2], vget_low_s8(row.high), four);
          products[3] = vmlal_high_s8(products[3], row.high, all);
        }
      }
      for (int i = 0; i < 4; ++i) by_two[i] = vpadalq_s16(by_two[i], products[i]);
    }
    keep(vpaddq_s32(by_two[0], by_two[1]), vpaddq_s32(by_two[2], by_two[3]), sums);
  }

  static LFM2_INLINE void dots_of_nibbles(const Ints* rows, const int8_t* token, Places& sums) {
    dots<8>(rows, token, sums);
  }

  static LFM2_INLINE void dots_of_sixteen(const Ints* rows, const int8_t* token, Places& sums) {
    dots<4>(rows, token, sums);
  }
};

}  // namespace lfm2
