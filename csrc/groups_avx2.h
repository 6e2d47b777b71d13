// Loads and products that groups.h needs, in AVX2. The files for VNNI replace the products.
//
// Sums of numbers 0 to 15 stay in 16 bits for a whole piece: 16 products of at most 15 * 127 each.
// Of signed numbers |w| is multiplied by the token's number with the sign of w, since one side must
// be unsigned; two products of at most 128 * 127 fit, so each pair of lanes is widened at once.
#pragma once

#include <immintrin.h>

#include "groups.h"

namespace lfm2 {

struct Avx2 {
  using Ints = __m256i;

  static LFM2_INLINE void halves(const uint8_t* from, Lanes& to) {
    to = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  }

  static LFM2_INLINE void words(const uint8_t* from, Places& to) {
    const __m128i packed = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    to = reinterpret_cast<Places>(_mm256_cvtepu16_epi32(packed));
  }

  // Units of four numbers in rows[0..8), each of one step along all eight rows.
  static LFM2_INLINE void nibbles(const uint8_t* from, __m256i* rows) {
    const auto* packed = reinterpret_cast<const __m256i*>(from);
    const __m256i low = _mm256_set1_epi8(15);
    const __m256i a = _mm256_loadu_si256(packed);
    const __m256i b = _mm256_loadu_si256(packed + 1);
    const __m256i c = _mm256_loadu_si256(packed + 2);
    const __m256i d = _mm256_loadu_si256(packed + 3);
    rows[0] = _mm256_and_si256(a, low);
    rows[1] = _mm256_and_si256(b, low);
    rows[2] = _mm256_and_si256(c, low);
    rows[3] = _mm256_and_si256(d, low);
    rows[4] = _mm256_and_si256(_mm256_srli_epi16(a, 4), low);
    rows[5] = _mm256_and_si256(_mm256_srli_epi16(b, 4), low);
    rows[6] = _mm256_and_si256(_mm256_srli_epi16(c, 4), low);
    rows[7] = _mm256_and_si256(_mm256_srli_epi16(d, 4), low);
  }

  static LFM2_INLINE void bytes(const uint8_t* from, __m256i* rows) {
    const auto* steps = reinterpret_cast<const __m256i*>(from);
    rows[0] = _mm256_loadu_si256(steps);
    rows[1] = _mm256_loadu_si256(steps + 1);
    rows[2] = _mm256_loadu_si256(steps + 2);
    rows[3] = _mm256_loadu_si256(steps + 3);
    rows[4] = _mm256_loadu_si256(steps + 4);
    rows[5] = _mm256_loadu_si256(steps + 5);
    rows[6] = _mm256_loadu_si256(steps + 6);
    rows[7] = _mm256_loadu_si256(steps + 7);
  }

  // Four of the token's numbers in every lane.
  static LFM2_INLINE __m256i four(const int8_t* token, int step) {
    return _mm256_set1_epi32(word_of(token + kDots * step));
  }

  // Products of unsigned numbers in a row with a token's, and their sums with more: in 16 bits.
  static LFM2_INLINE __m256i product(const __m256i& row, const __m256i& token) {
    return _mm256_maddubs_epi16(row, token);
  }

  static LFM2_INLINE __m256i plus_product(const __m256i& sum, const __m256i& row,
                                          const __m256i& token) {
    return _mm256_add_epi16(sum, product(row, token));
  }

  static LFM2_INLINE void widen(const __m256i& sum, Places& whole) {
    whole = reinterpret_cast<Places>(_mm256_madd_epi16(sum, _mm256_set1_epi16(1)));
  }

  static LFM2_INLINE void dots_of_nibbles(const __m256i* rows, const int8_t* token, Places& sums) {
    __m256i a = _mm256_maddubs_epi16(rows[0], four(token, 0));
    __m256i b = _mm256_maddubs_epi16(rows[1], four(token, 1));
    a = _mm256_add_epi16(a, _mm256_maddubs_epi16(rows[2], four(token, 2)));
    b = _mm256_add_epi16(b, _mm256_maddubs_epi16(rows[3], four(token, 3)));
    a = _mm256_add_epi16(a, _mm256_maddubs_epi16(rows[4], four(token, 4)));
    b = _mm256_add_epi16(b, _mm256_maddubs_epi16(rows[5], four(token, 5)));
    a = _mm256_add_epi16(a, _mm256_maddubs_epi16(rows[6], four(token, 6)));
    b = _mm256_add_epi16(b, _mm256_maddubs_epi16(rows[7], four(token, 7)));
    const __m256i all = _mm256_madd_epi16(_mm256_add_epi16(a, b), _mm256_set1_epi16(1));
    sums = reinterpret_cast<Places>(all);
  }

  static LFM2_INLINE __m256i products(const __m256i& row, const __m256i& token) {
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(row), _mm256_sign_epi8(token, row));
    return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
  }

  static LFM2_INLINE void dots_of_sixteen(const __m256i* rows, const int8_t* token, Places& sums) {
    const __m256i a = _mm256_add_epi32(products(rows[0], four(token, 0)),
                                       products(rows[1], four(token, 1)));
    const __m256i b = _mm256_add_epi32(products(rows[2], four(token, 2)),
                                       products(rows[3], four(token, 3)));
    sums = reinterpret_cast<Places>(_mm256_add_epi32(a, b));
  }
};

}  // namespace lfm2
