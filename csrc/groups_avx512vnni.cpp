// The dot products of groups.h by AVX512_VNNI.
#include "cpu_features.h"

#ifdef LFM2_GCC_X86
#pragma GCC target("arch=x86-64-v4,avx512vnni")
#pragma GCC optimize("fp-contract=off")
#include <immintrin.h>

#define LFM2_DPBUSD _mm256_dpbusd_epi32
#include "groups_vnni.h"
#include "groups_wide_blocks.h"

namespace lfm2 {
namespace {

struct WideVnni : Vnni {
  // 32 bytes from one place, and 32 from another.
  template <class V>
  static LFM2_INLINE void join(const void* first, const void* second, V& both) {
    const __m256i low = _mm256_loadu_si256(static_cast<const __m256i*>(first));
    const __m256i high = _mm256_loadu_si256(static_cast<const __m256i*>(second));
    both = reinterpret_cast<V>(_mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1));
  }

  static LFM2_INLINE void add_products(const WidePlaces& row, const WidePlaces& token,
                                       WidePlaces& sum) {
    sum = reinterpret_cast<WidePlaces>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sum),
                                                           reinterpret_cast<__m512i>(row),
                                                           reinterpret_cast<__m512i>(token)));
  }
};

}  // namespace

void groups_avx512vnni(GroupKind kind, const GroupTokens& x, const GroupTile* tiles, int64_t count,
                       int64_t ahead, Lanes* sums) {
  with_format(kind, [&](auto format) LFM2_FLAT {
    dots_by_wide_blocks<WideVnni, decltype(format)>(x, tiles, count, ahead, sums);
  });
}

}  // namespace lfm2
#endif
