// The dot products of groups.h by NEON.
#include "cpu_features.h"

#ifdef __aarch64__
#ifdef __clang__
#pragma STDC FP_CONTRACT OFF
#else
#pragma GCC optimize("fp-contract=off")
#endif
#include "groups_neon.h"

namespace lfm2 {

void groups_neon(GroupKind kind, const GroupTokens& x, const GroupTile* tiles, int64_t count,
                 int64_t ahead, Lanes* sums) {
  with_format(kind, [&](auto format) LFM2_FLAT {
    dots_of_tiles<Neon, decltype(format)>(x, tiles, count, ahead, sums);
  });
}

}  // namespace lfm2
#endif
