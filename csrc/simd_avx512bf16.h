// What attention by AVX512_BF16 shares: pairs of numbers, powers of two, masks. Only files that are
// compiled for it include this.
#pragma once

#include <immintrin.h>

#include "dtypes.h"

namespace lfm2 {
namespace {

LFM2_INLINE __m512bh pairs_of(__m512i words) { return reinterpret_cast<__m512bh>(words); }

// Two neighbouring numbers, in every lane.
LFM2_INLINE __m512i spread(const void* pair) {
  int word;
  std::memcpy(&word, pair, sizeof word);
  return _mm512_set1_epi32(word);
}

// 2^x for x <= 0, within 4 units in the last place; NaN for NaN. The polynomial is (2^r - 1) / r
// for |r| <= 1/2, by interpolation at Chebyshev's points.
LFM2_INLINE __m512 power_of_two(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-200.0f), x);
  const __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 r = x - n;
  __m512 p = _mm512_set1_ps(0x1.5ec866p-10f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0x1.3cbf6p-7f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0x1.c6afeep-5f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0x1.ebfa4cp-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0x1.62e43p-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, n);
}

LFM2_INLINE __mmask16 lanes_before(int64_t count) {
  return count >= 16 ? 0xFFFF : count <= 0 ? 0 : static_cast<__mmask16>((1u << count) - 1);
}

}  // namespace
}  // namespace lfm2
