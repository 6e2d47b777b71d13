// Products that groups.h needs, in VNNI, 32 bytes at a time. LFM2_DPBUSD names the instruction, for
// which AVX_VNNI and AVX512_VNNI have different names.
#pragma once

#include "groups_avx2.h"

namespace lfm2 {

struct Vnni : Avx2 {
  // The same in 32 bits.
  static LFM2_INLINE __m256i product(const __m256i& row, const __m256i& token) {
    return LFM2_DPBUSD(_mm256_setzero_si256(), row, token);
  }

  static LFM2_INLINE __m256i plus_product(const __m256i& sum, const __m256i& row,
                                          const __m256i& token) {
    return LFM2_DPBUSD(sum, row, token);
  }

  static LFM2_INLINE void widen(const __m256i& sum, Places& whole) {
    whole = reinterpret_cast<Places>(sum);
  }

  static LFM2_INLINE void dots_of_nibbles(const __m256i* rows, const int8_t* token, Places& sums) {
    __m256i a = LFM2_DPBUSD(_mm256_setzero_si256(), rows[0], four(token, 0));
    __m256i b = LFM2_DPBUSD(_mm256_setzero_si256(), rows[1], four(token, 1));
    a = LFM2_DPBUSD(a, rows[2], four(token, 2));
    b = LFM2_DPBUSD(b, rows[3], four(token, 3));
    a = LFM2_DPBUSD(a, rows[4], four(token, 4));
    b = LFM2_DPBUSD(b, rows[5], four(token, 5));
    a = LFM2_DPBUSD(a, rows[6], four(token, 6));
    b = LFM2_DPBUSD(b, rows[7], four(token, 7));
    sums = reinterpret_cast<Places>(_mm256_add_epi32(a, b));
  }

  static LFM2_INLINE __m256i add(const __m256i& sum, const __m256i& row, const __m256i& token) {
    return LFM2_DPBUSD(sum, _mm256_abs_epi8(row), _mm256_sign_epi8(token, row));
  }

  static LFM2_INLINE void dots_of_sixteen(const __m256i* rows, const int8_t* token, Places& sums) {
    __m256i a = add(_mm256_setzero_si256(), rows[0], four(token, 0));
    __m256i b = add(_mm256_setzero_si256(), rows[1], four(token, 1));
    a = add(a, rows[2], four(token, 2));
    b = add(b, rows[3], four(token, 3));
    sums = reinterpret_cast<Places>(_mm256_add_epi32(a, b));
  }
};

}  // namespace lfm2
