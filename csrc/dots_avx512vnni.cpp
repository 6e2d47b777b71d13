// The dot products of dots.h of 8-bit integers by AVX512_VNNI, exactly.
//
// Its instruction needs one unsigned side: w + 128 is multiplied, and 128 times the sum of the
// token's numbers is subtracted again. As in the other file of this kind, everything here is
// inlined.
#include "cpu_features.h"

#ifdef LFM2_GCC_X86
#pragma GCC target("arch=x86-64-v4,avx512vnni")
#include <immintrin.h>

#include "dots.h"

namespace lfm2 {
namespace {

typedef int32_t Wide __attribute__((vector_size(64)));

struct QuadStep {
  static constexpr int64_t kNumbers = 64;
  static constexpr int kTogether = lfm2::kTogether;
  static constexpr int rows_at_once(int tokens) { return tokens <= 2 ? 1 : 2; }
  using Packed = Line;
  using Folded = Places;
  using Total = int32_t;
  struct Row {
    __m512i unsigned_bytes;
  };
  struct Sum {
    __m512i lanes;
  };

  static LFM2_INLINE void take(const int8_t* from, Row& into) {
    into.unsigned_bytes = _mm512_xor_si512(_mm512_loadu_si512(from), _mm512_set1_epi8(-128));
  }
  static LFM2_INLINE void add(const Row& row, const Line& token, Sum& sum) {
    sum.lanes = _mm512_dpbusd_epi32(sum.lanes, row.unsigned_bytes, _mm512_load_si512(&token));
    asm("" : "+v"(sum.lanes));  // stays in its register: GCC 12 copies all sums otherwise
  }
  static LFM2_INLINE void fold(const Sum& sum, Places& lanes) {
    const Wide all = reinterpret_cast<Wide>(sum.lanes);
    lanes = __builtin_shufflevector(all, all, 0, 1, 2, 3, 4, 5, 6, 7) +
            __builtin_shufflevector(all, all, 8, 9, 10, 11, 12, 13, 14, 15);
  }
  static LFM2_INLINE void total(const Places* folded, int32_t* to) { totals(folded, to); }
};

}  // namespace

void dots_avx512vnni(const Line* x, const int32_t* token_sums, int64_t tokens,
                     Rows<const int8_t> weight, int64_t size, int64_t first, int64_t last,
                     int32_t* sums, int64_t stride) {
  dots_with<QuadStep>(x, tokens, weight, size, first, last, sums, stride);
  for (int64_t m = 0; m < tokens; ++m) {
    const int32_t sum = 128 * token_sums[m];
    for (int64_t n = 0; n < last - first; ++n) sums[m * stride + n] -= sum;
  }
}

}  // namespace lfm2
#endif
