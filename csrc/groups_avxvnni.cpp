// The dot products of groups.h by AVX_VNNI.
#include "cpu_features.h"

#ifdef LFM2_GCC_X86
#pragma GCC target("arch=x86-64-v3,avxvnni")
#pragma GCC optimize("fp-contract=off")
#include <immintrin.h>

#define LFM2_DPBUSD _mm256_dpbusd_avx_epi32
#include "groups_blocks.h"
#include "groups_vnni.h"

namespace lfm2 {

void groups_avxvnni(GroupKind kind, const GroupTokens& x, const GroupTile* tiles, int64_t count,
                    int64_t ahead, Lanes* sums) {
  with_format(kind, [&](auto format) LFM2_FLAT {
    dots_by_blocks<Vnni, decltype(format)>(x, tiles, count, ahead, sums);
  });
}

}  // namespace lfm2
#endif
