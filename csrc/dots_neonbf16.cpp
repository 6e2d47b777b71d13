// The dot products of dots.h by NEON's BFDOT, which multiplies pairs and sums them in float.
//
// As in the other files of this kind, everything here is inlined.
#include "cpu_features.h"

#ifdef LFM2_ARM_BF16
#ifdef LFM2_GCC_ARM
#pragma GCC target("arch=armv8.2-a+bf16")
#endif
#include <arm_neon.h>

#include "dots.h"
#include "neon_totals.h"

namespace lfm2 {
namespace {

struct BfdotStep {
  static constexpr int64_t kNumbers = 32;
  static constexpr int kTogether = lfm2::kTogether;
  static constexpr int rows_at_once(int) { return 1; }
  using Packed = Line;
  using Folded = float32x4_t;
  using Total = float;
  struct Row {
    bfloat16x8_t a, b, c, d;
  };
  // Two, so that one product need not wait for the one before it.
  struct Sum {
    float32x4_t first, second;
  };

  static LFM2_INLINE bfloat16x8_t eight(const void* from) {
    return reinterpret_cast<bfloat16x8_t>(vld1q_u16(static_cast<const uint16_t*>(from)));
  }
  static LFM2_INLINE void take(const bf16* from, Row& into) {
    into = {eight(from), eight(from + 8), eight(from + 16), eight(from + 24)};
  }
  static LFM2_INLINE void add(const Row& row, const Line& token, Sum& sum) {
    const char* numbers = token.bytes;
    sum.first = vbfdotq_f32(sum.first, row.a, eight(numbers));
    sum.second = vbfdotq_f32(sum.second, row.b, eight(numbers + 16));
    sum.first = vbfdotq_f32(sum.first, row.c, eight(numbers + 32));
    sum.second = vbfdotq_f32(sum.second, row.d, eight(numbers + 48));
  }
  static LFM2_INLINE void fold(const Sum& sum, float32x4_t& lanes) {
    lanes = vaddq_f32(sum.first, sum.second);
  }
  static LFM2_INLINE void total(const float32x4_t* folded, float* to) { neon_totals(folded, to); }
};

}  // namespace

void dots_neonbf16(const Line* x, int64_t tokens, Rows<const bf16> weight, int64_t size,
                   int64_t first, int64_t last, float* sums, int64_t stride) {
  dots_with<BfdotStep>(x, tokens, weight, size, first, last, sums, stride);
}

}  // namespace lfm2
#endif
