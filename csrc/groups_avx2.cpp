// The dot products of groups.h by AVX2.
#include "cpu_features.h"

#ifdef LFM2_GCC_X86
#pragma GCC target("arch=x86-64-v3")
#pragma GCC optimize("fp-contract=off")
#include "groups_avx2.h"
#include "groups_blocks.h"

namespace lfm2 {

void groups_avx2(GroupKind kind, const GroupTokens& x, const GroupTile* tiles, int64_t count,
                 int64_t ahead, Lanes* sums) {
  with_format(kind, [&](auto format) LFM2_FLAT {
    dots_by_blocks<Avx2, decltype(format)>(x, tiles, count, ahead, sums);
  });
}

}  // namespace lfm2
#endif
