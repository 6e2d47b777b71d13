// Sums of the lanes of NEON registers, several at a time. The including file chooses the target.
#pragma once

#include <arm_neon.h>

#include "dtypes.h"

namespace lfm2 {

LFM2_INLINE float32x4_t pairs_of(const float32x4_t& a, const float32x4_t& b) {
  return vpaddq_f32(a, b);
}

LFM2_INLINE int32x4_t pairs_of(const int32x4_t& a, const int32x4_t& b) { return vpaddq_s32(a, b); }

// to[i] = the sum of the lanes of folded[i], of eight rows
template <class V, class T>
LFM2_INLINE void neon_totals(const V* folded, T* to) {
  for (int i = 0; i < 8; i += 4) {
    const V sums = pairs_of(pairs_of(folded[i], folded[i + 1]),
                            pairs_of(folded[i + 2], folded[i + 3]));
    std::memcpy(to + i, &sums, sizeof sums);
  }
}

}  // namespace lfm2
