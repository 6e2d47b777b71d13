// The dot products of dots.h by AVX512_BF16, which multiplies pairs and sums them in float.
//
// The whole file is compiled for it, headers included. So it must have no function that the linker
// could use on older processors: all are inlined, except the one with the file's name.
#include "cpu_features.h"

#ifdef LFM2_GCC_X86
#pragma GCC target("arch=x86-64-v4,avx512bf16")
#include <immintrin.h>

#include "dots.h"

namespace lfm2 {
namespace {

struct PairStep {
  static constexpr int64_t kNumbers = 32;
  static constexpr int kTogether = lfm2::kTogether;
  static constexpr int rows_at_once(int tokens) { return tokens <= 2 ? 1 : 2; }
  using Packed = Line;
  using Folded = Lanes;
  using Total = float;
  struct Row {
    __m512bh pairs;
  };
  struct Sum {
    __m512 lanes;
  };

  static LFM2_INLINE void take(const bf16* from, Row& into) {
    into.pairs = reinterpret_cast<__m512bh>(_mm512_loadu_si512(from));
  }
  static LFM2_INLINE void add(const Row& row, const Line& token, Sum& sum) {
    const auto pairs = reinterpret_cast<__m512bh>(_mm512_load_si512(&token));
    sum.lanes = _mm512_dpbf16_ps(sum.lanes, row.pairs, pairs);
  }
  static LFM2_INLINE void fold(const Sum& sum, Lanes& lanes) {
    const __m512 all = sum.lanes;
    lanes = __builtin_shufflevector(all, all, 0, 1, 2, 3, 4, 5, 6, 7) +
            __builtin_shufflevector(all, all, 8, 9, 10, 11, 12, 13, 14, 15);
  }
  static LFM2_INLINE void total(const Lanes* folded, float* to) { totals(folded, to); }
};

}  // namespace

void dots_avx512bf16(const Line* x, int64_t tokens, Rows<const bf16> weight, int64_t size,
                     int64_t first, int64_t last, float* sums, int64_t stride) {
  dots_with<PairStep>(x, tokens, weight, size, first, last, sums, stride);
}

}  // namespace lfm2
#endif
