// The dot products of dots.h of 8-bit integers by AVX2, exactly.
//
// Its instruction needs one unsigned side and sums pairs in 16 bits. So |w| is multiplied by the
// token's number with the sign of w, and two products of at most 128 * 127 fit. A token's numbers
// are never -128, because its sign cannot be changed. As in the other files of this kind,
// everything here is inlined.
#include "cpu_features.h"

#ifdef LFM2_GCC_X86
#pragma GCC target("arch=x86-64-v3")
#include <immintrin.h>

#include "dots.h"

namespace lfm2 {
namespace {

struct SignStep {
  static constexpr int64_t kNumbers = 64;
  static constexpr int kTogether = lfm2::kTogether;
  static constexpr int rows_at_once(int) { return 1; }
  using Packed = Line;
  using Folded = Places;
  using Total = int32_t;
  struct Row {
    __m256i first, second;
  };
  struct Sum {
    __m256i lanes;
  };

  static LFM2_INLINE void take(const int8_t* from, Row& into) {
    const auto* halves = reinterpret_cast<const __m256i*>(from);
    into.first = _mm256_loadu_si256(halves);
    into.second = _mm256_loadu_si256(halves + 1);
  }
  static LFM2_INLINE void add(const Row& row, const Line& token, Sum& sum) {
    const auto* halves = reinterpret_cast<const __m256i*>(&token);
    add_half(row.first, _mm256_load_si256(halves), sum);
    add_half(row.second, _mm256_load_si256(halves + 1), sum);
  }
  // Sums of four products each.
  static LFM2_INLINE void add_half(const __m256i& row, const __m256i& token, Sum& sum) {
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(row), _mm256_sign_epi8(token, row));
    const __m256i fours = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
    sum.lanes = _mm256_add_epi32(sum.lanes, fours);
  }
  static LFM2_INLINE void fold(const Sum& sum, Places& lanes) {
    lanes = reinterpret_cast<Places>(sum.lanes);
  }
  static LFM2_INLINE void total(const Places* folded, int32_t* to) { totals(folded, to); }
};

}  // namespace

void dots_avx2(const Line* x, int64_t tokens, Rows<const int8_t> weight, int64_t size,
               int64_t first, int64_t last, int32_t* sums, int64_t stride) {
  dots_with<SignStep>(x, tokens, weight, size, first, last, sums, stride);
}

}  // namespace lfm2
#endif
