// Dot products of tokens with rows of a matrix in groups: integers with a scale, and sometimes a
// minimum, for each group along a row (lfm2_fast/weights/formats.py).
//
// Eight rows lie side by side, so that a lane is a row: no lanes are summed, and scales are vectors.
// A tile is these eight rows. Tokens are rounded to 8 bits too, in groups of 32. Sums within a group
// are integers. Groups are added in their order, and products are rounded before they are added. So
// every implementation gives the same bits, and the bits of a token do not depend on other tokens.
//
// Each file groups_*.cpp has an implementation for the instructions in its name. They are compiled
// without fused multiplication and addition, which would round once where others round twice.
// Everything here that they call is inlined.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu_features.h"
#include "dtypes.h"
#include "simd.h"

namespace lfm2 {

constexpr int64_t kPiece = 32;  // numbers of a token that share a scale
constexpr int64_t kSuper = 256;  // numbers of a row that share the float16 words of kBytes
constexpr int kDots = 4;        // numbers of a row in a unit, which lies in one lane

// Tokens that are multiplied at once, at most. Their sums fit in the first-level cache.
constexpr int64_t kTokens = 64;

// Storage of scales and minimums: float16, float32, or bytes beside float16 words.
enum class Scales { kHalf, kFloat, kByte, kSignedByte };

template <int bits, int64_t group, Scales scales, bool minimums, int offset>
struct GroupFormat {
  static constexpr int kBits = bits;
  static constexpr int64_t kGroup = group;
  static constexpr Scales kScales = scales;
  static constexpr bool kMinimums = minimums;
  static constexpr int kOffset = offset;
  static constexpr bool kBytes = scales == Scales::kByte || scales == Scales::kSignedByte;
  static constexpr int64_t kWords = 1 + minimums;
  // Bytes of a row's numbers in a piece.
  static constexpr int64_t kNumberBytes = kPiece * bits / 8;
  // Bytes of a row's scales and minimums: in a block if they are bytes, else in a piece.
  static constexpr int64_t kBlockBytes = kWords * (2 + kSuper / group);
  static constexpr int64_t kScaleBytes =
      kWords * (kPiece / group) * (scales == Scales::kHalf ? 2 : 4);

  static constexpr int64_t number_bytes(int64_t size) { return size / kPiece * kNumberBytes; }
  static constexpr int64_t scale_bytes(int64_t size) {
    return kBytes ? size / kSuper * kBlockBytes : size / kPiece * kScaleBytes;
  }
};

using Int4 = GroupFormat<4, 32, Scales::kHalf, false, 8>;
using Q4_1 = GroupFormat<4, 32, Scales::kHalf, true, 0>;
using Q4_K = GroupFormat<4, 32, Scales::kByte, true, 0>;
using Q8_0 = GroupFormat<8, 32, Scales::kHalf, false, 0>;
using Q5_1 = GroupFormat<8, 32, Scales::kHalf, true, 0>;
using Q5_K = GroupFormat<8, 32, Scales::kByte, true, 0>;
using Q6_K = GroupFormat<8, 16, Scales::kSignedByte, false, 0>;
using Wide = GroupFormat<8, 16, Scales::kFloat, true, 0>;

enum class GroupKind { kInt4, kQ4_1, kQ4_K, kQ8_0, kQ5_1, kQ5_K, kQ6_K, kWide };
constexpr GroupKind kGroupKinds[] = {GroupKind::kInt4, GroupKind::kQ4_1, GroupKind::kQ4_K,
                                     GroupKind::kQ8_0, GroupKind::kQ5_1, GroupKind::kQ5_K,
                                     GroupKind::kQ6_K, GroupKind::kWide};

// Calls `body` with the format of that kind.
template <class Body>
LFM2_INLINE void with_format(GroupKind kind, const Body& body) {
  switch (kind) {
    case GroupKind::kInt4:
      return body(Int4{});
    case GroupKind::kQ4_1:
      return body(Q4_1{});
    case GroupKind::kQ4_K:
      return body(Q4_K{});
    case GroupKind::kQ8_0:
      return body(Q8_0{});
    case GroupKind::kQ5_1:
      return body(Q5_1{});
    case GroupKind::kQ5_K:
      return body(Q5_K{});
    case GroupKind::kQ6_K:
      return body(Q6_K{});
    case GroupKind::kWide:
      return body(Wide{});
  }
}

// Tokens in pieces of 32 numbers: those of all tokens, then the next piece of all.
struct GroupTokens {
  int64_t count;
  int64_t size;
  const int8_t* numbers;    // [pieces, count, 32]
  const float* scales;      // [pieces, count]
  const int32_t* eights;    // the same: eight times the sum of the numbers
  const float* sums;        // the same: the sum of the numbers times their scale
  const float* half_sums;   // [pieces, count, 2]: that of each half
  bool paired = false;      // numbers of two tokens are mixed by eights (`pair_tokens`)
};

// Eight rows of a matrix.
struct GroupTile {
  const uint8_t* numbers;
  const uint8_t* scales;
};

LFM2_INLINE int32_t word_of(const void* from) {
  int32_t word;
  std::memcpy(&word, from, sizeof word);
  return word;
}

// The first or second byte of eight words of 16 bits, one of each row, as floats.
template <class Isa, bool is_signed>
LFM2_INLINE void byte_lanes(const uint8_t* from, int64_t second, Lanes& to) {
  Places wide;
  Isa::words(from, wide);
  if constexpr (is_signed) {
    wide = second ? (wide << 16) >> 24 : (wide << 24) >> 24;
  } else {
    wide = second ? wide >> 8 : wide & 0xFF;
  }
  to_floats(wide, to);
}

// Scales of the groups of piece `p`, and their minimums: one of each, or of each half.
template <class Isa, class F>
LFM2_INLINE void scales_of(const uint8_t* from, int64_t p, Lanes* scale, Lanes* minimum) {
  constexpr int64_t kCount = kPiece / F::kGroup;
  if constexpr (F::kBytes) {
    constexpr int64_t kPieces = kSuper / kPiece;
    constexpr bool kSigned = F::kScales == Scales::kSignedByte;
    const uint8_t* block = from + p / kPieces * F::kBlockBytes * kLanes;
    const uint8_t* small = block + 2 * F::kWords * kLanes;
    const int64_t first = p % kPieces * kCount;
    Lanes factor;
    Isa::halves(block, factor);
    for (int64_t i = 0; i < kCount; ++i) {
      const int64_t g = first + i;
      byte_lanes<Isa, kSigned>(small + g / 2 * 2 * kLanes, g % 2, scale[i]);
      scale[i] *= factor;
    }
    if constexpr (F::kMinimums) {
      const uint8_t* more = small + kSuper / F::kGroup * kLanes;
      Isa::halves(block + 2 * kLanes, factor);
      for (int64_t i = 0; i < kCount; ++i) {
        const int64_t g = first + i;
        byte_lanes<Isa, kSigned>(more + g / 2 * 2 * kLanes, g % 2, minimum[i]);
        minimum[i] *= factor;
      }
    }
  } else {
    constexpr int64_t kWordBytes = F::kScales == Scales::kHalf ? 2 : 4;
    const uint8_t* words = from + p * F::kScaleBytes * kLanes;
    for (int64_t i = 0; i < kCount; ++i) {
      const uint8_t* here = words + i * F::kWords * kWordBytes * kLanes;
      if constexpr (F::kScales == Scales::kHalf) {
        Isa::halves(here, scale[i]);
        if constexpr (F::kMinimums) Isa::halves(here + 2 * kLanes, minimum[i]);
      } else {
        load(here, scale[i]);
        load(here + 4 * kLanes, minimum[i]);
      }
    }
  }
}

// sum += products of a piece of one token, `at` of all pieces
template <class Isa, class F>
LFM2_INLINE void add_piece(const typename Isa::Ints* rows, const Lanes* scale,
                           const Lanes* minimum, const GroupTokens& x, int64_t at, Lanes& sum) {
  const int8_t* token = x.numbers + at * kPiece;
  const float by = x.scales[at];
  Places products;
  Lanes floats;
  if constexpr (F::kGroup == 16) {
    for (int i = 0; i < 2; ++i) {
      Isa::dots_of_sixteen(rows + 4 * i, token + 16 * i, products);
      to_floats(products, floats);
      sum += floats * (scale[i] * by);
      if constexpr (F::kMinimums) sum += minimum[i] * x.half_sums[2 * at + i];
    }
  } else {
    if constexpr (F::kBits == 4) {
      Isa::dots_of_nibbles(rows, token, products);
      if constexpr (F::kOffset == 8) products -= x.eights[at];
    } else {
      Places more;
      Isa::dots_of_sixteen(rows, token, products);
      Isa::dots_of_sixteen(rows + 4, token + 16, more);
      products += more;
    }
    to_floats(products, floats);
    sum += floats * (scale[0] * by);
    if constexpr (F::kMinimums) sum += minimum[0] * x.sums[at];
  }
}

// sums[m] = the dot products of token m with the tile's rows. Prefetches `ahead` bytes further.
template <class Isa, class F>
LFM2_INLINE void dots_of_tile(const GroupTokens& x, const GroupTile& tile, int64_t ahead,
                              Lanes* sums) {
  constexpr int64_t kTileBytes = F::kNumberBytes * kLanes;
  const int64_t pieces = x.size / kPiece;
  Lanes only{};
  if (x.count > 1) {
    for (int64_t m = 0; m < x.count; ++m) sums[m] = Lanes{};
  }
  for (int64_t p = 0; p < pieces; ++p) {
    const uint8_t* numbers = tile.numbers + p * kTileBytes;
    for (int64_t i = 0; i < kTileBytes; i += 64) {
      __builtin_prefetch(numbers + ahead + i, 0, 2);
    }
    typename Isa::Ints rows[8];
    if constexpr (F::kBits == 4) {
      Isa::nibbles(numbers, rows);
    } else {
      Isa::bytes(numbers, rows);
    }
    Lanes scale[2];
    Lanes minimum[2];
    scales_of<Isa, F>(tile.scales, p, scale, minimum);
    if (x.count == 1) {
      add_piece<Isa, F>(rows, scale, minimum, x, p, only);
    } else {
      for (int64_t m = 0; m < x.count; ++m) {
        add_piece<Isa, F>(rows, scale, minimum, x, p * x.count + m, sums[m]);
      }
    }
  }
  if (x.count == 1) sums[0] = only;
}

// sums[t * x.count + m] = the dot products of token m with tile t of `count`.
template <class Isa, class F>
LFM2_INLINE void dots_of_tiles(const GroupTokens& x, const GroupTile* tiles, int64_t count,
                               int64_t ahead, Lanes* sums) {
  for (int64_t t = 0; t < count; ++t) {
    dots_of_tile<Isa, F>(x, tiles[t], ahead, sums + t * x.count);
  }
}

// The bodies, each as `dots_of_tiles`.
using GroupDots = void (*)(GroupKind kind, const GroupTokens& x, const GroupTile* tiles,
                           int64_t count, int64_t ahead, Lanes* sums);
void groups_plain(GroupKind, const GroupTokens&, const GroupTile*, int64_t, int64_t, Lanes*);
void groups_avx2(GroupKind, const GroupTokens&, const GroupTile*, int64_t, int64_t, Lanes*);
void groups_avxvnni(GroupKind, const GroupTokens&, const GroupTile*, int64_t, int64_t, Lanes*);
void groups_avx512vnni(GroupKind, const GroupTokens&, const GroupTile*, int64_t, int64_t, Lanes*);
void groups_neon(GroupKind, const GroupTokens&, const GroupTile*, int64_t, int64_t, Lanes*);
void groups_neondot(GroupKind, const GroupTokens&, const GroupTile*, int64_t, int64_t, Lanes*);
void groups_neoni8mm(GroupKind, const GroupTokens&, const GroupTile*, int64_t, int64_t, Lanes*);

}  // namespace lfm2
