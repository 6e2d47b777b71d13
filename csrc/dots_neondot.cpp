// The dot products of dots.h of 8-bit integers by NEON's SDOT, exactly.
//
// As in the other files of this kind, everything here is inlined.
#include "cpu_features.h"

#ifdef LFM2_ARM_DOT
#ifdef LFM2_GCC_ARM
#pragma GCC target("arch=armv8.2-a+dotprod")
#endif
#include <arm_neon.h>

#include "dots.h"
#include "neon_totals.h"

namespace lfm2 {
namespace {

struct DotStep {
  static constexpr int64_t kNumbers = 64;
  static constexpr int kTogether = lfm2::kTogether;
  static constexpr int rows_at_once(int) { return 2; }
  using Packed = Line;
  using Folded = int32x4_t;
  using Total = int32_t;
  struct Row {
    int8x16_t a, b, c, d;
  };
  struct Sum {
    int32x4_t lanes;
  };

  static LFM2_INLINE void take(const int8_t* from, Row& into) {
    into = {vld1q_s8(from), vld1q_s8(from + 16), vld1q_s8(from + 32), vld1q_s8(from + 48)};
  }
  static LFM2_INLINE void add(const Row& row, const Line& token, Sum& sum) {
    const auto* numbers = reinterpret_cast<const int8_t*>(&token);
    sum.lanes = vdotq_s32(sum.lanes, row.a, vld1q_s8(numbers));
    sum.lanes = vdotq_s32(sum.lanes, row.b, vld1q_s8(numbers + 16));
    sum.lanes = vdotq_s32(sum.lanes, row.c, vld1q_s8(numbers + 32));
    sum.lanes = vdotq_s32(sum.lanes, row.d, vld1q_s8(numbers + 48));
  }
  static LFM2_INLINE void fold(const Sum& sum, int32x4_t& lanes) { lanes = sum.lanes; }
  static LFM2_INLINE void total(const int32x4_t* folded, int32_t* to) { neon_totals(folded, to); }
};

}  // namespace

void dots_neondot(const Line* x, int64_t tokens, Rows<const int8_t> weight, int64_t size,
                  int64_t first, int64_t last, int32_t* sums, int64_t stride) {
  dots_with<DotStep>(x, tokens, weight, size, first, last, sums, stride);
}

}  // namespace lfm2
#endif
