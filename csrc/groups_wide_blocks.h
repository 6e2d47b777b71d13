// Blocks of several tokens by four tiles of 4-bit numbers, by VNNI on 64 bytes: the same bits as
// `dots_of_tile` of groups.h. Its `Isa` has what needs AVX-512, so that tests can emulate that.
//
// A vector has the rows of two tiles. The unpacked numbers of a piece, sixteen vectors, stay in
// registers for all tokens, and so do the eight sums of a block.
#pragma once

#include "groups_blocks.h"

namespace lfm2 {

// Sixteen floats and integers: those of two tiles' rows.
typedef float WideLanes __attribute__((vector_size(64)));
typedef int32_t WidePlaces __attribute__((vector_size(64)));

constexpr int64_t kWideTiles = 4;  // of a block, two in a vector

// sums[m][v] += products of a piece of Q tokens with four tiles. `at` is the first token's place
// among all pieces.
template <class Isa, class F, int Q>
LFM2_INLINE void add_wide_block(const WidePlaces (&rows)[8][2], const WideLanes* scale,
                                const WideLanes* minimum, const GroupTokens& x, int64_t at,
                                WideLanes (*sums)[2]) {
  const int8_t* tokens = x.numbers + at * kPiece;
  WidePlaces products[Q][2];
#pragma GCC unroll 4
  for (int m = 0; m < Q; ++m) {
    const int32_t begin = F::kOffset == 8 ? -x.eights[at + m] : 0;
    products[m][0] = products[m][1] = WidePlaces{} + begin;
  }
#pragma GCC unroll 8
  for (int step = 0; step < 8; ++step) {
#pragma GCC unroll 4
    for (int m = 0; m < Q; ++m) {
      const int32_t word = word_of(tokens + m * kPiece + kDots * step);
      const WidePlaces token = WidePlaces{} + word;
      for (int v = 0; v < 2; ++v) Isa::add_products(rows[step][v], token, products[m][v]);
    }
  }
#pragma GCC unroll 4
  for (int m = 0; m < Q; ++m) {
    for (int v = 0; v < 2; ++v) {
      const WideLanes floats = __builtin_convertvector(products[m][v], WideLanes);
      sums[m][v] += floats * (scale[v] * x.scales[at + m]);
      if constexpr (F::kMinimums) sums[m][v] += minimum[v] * x.sums[at + m];
    }
  }
}

// sums[t * x.count + m] = the dot products of token m with tile t of four, of at most kTokens.
template <class Isa, class F>
LFM2_INLINE void dots_of_four_tiles(const GroupTokens& x, const GroupTile* tiles, Lanes* sums) {
  static_assert(F::kBits == 4 && F::kGroup == kPiece);
  constexpr int64_t kTileBytes = F::kNumberBytes * kLanes;
  // Bytes to the same piece of the next four tiles, which is prefetched. A shorter distance would end
  // in the next tile near the end of each tile, and the four tiles are read side by side.
  const int64_t next = kWideTiles * kTileBytes * (x.size / kPiece);
  WideLanes wide[kTokens][2];
  for (int64_t m = 0; m < x.count; ++m) wide[m][0] = wide[m][1] = WideLanes{};
  for (int64_t p = 0; p < x.size / kPiece; ++p) {
    WidePlaces rows[8][2];
    WideLanes scale[2];
    WideLanes minimum[2];
    for (int v = 0; v < 2; ++v) {
      const uint8_t* numbers[2];
      Lanes scales[2][2];
      Lanes minimums[2][2];
      for (int t = 0; t < 2; ++t) {
        const GroupTile& tile = tiles[2 * v + t];
        numbers[t] = tile.numbers + p * kTileBytes;
        for (int64_t i = 0; i < kTileBytes; i += 64) {
          __builtin_prefetch(numbers[t] + next + i, 0, 2);
        }
        scales_of<Isa, F>(tile.scales, p, scales[t], minimums[t]);
      }
      for (int64_t step = 0; step < 4; ++step) {
        WidePlaces both;
        Isa::join(numbers[0] + 32 * step, numbers[1] + 32 * step, both);
        rows[step][v] = both & 0x0F0F0F0F;
        rows[4 + step][v] = both >> 4 & 0x0F0F0F0F;
      }
      Isa::join(scales[0], scales[1], scale[v]);
      if constexpr (F::kMinimums) Isa::join(minimums[0], minimums[1], minimum[v]);
    }
    const int64_t at = p * x.count;
    int64_t m = 0;
    for (; m + 4 <= x.count; m += 4) {
      add_wide_block<Isa, F, 4>(rows, scale, minimum, x, at + m, wide + m);
    }
    if (m + 2 <= x.count) {
      add_wide_block<Isa, F, 2>(rows, scale, minimum, x, at + m, wide + m);
      m += 2;
    }
    if (m < x.count) add_wide_block<Isa, F, 1>(rows, scale, minimum, x, at + m, wide + m);
  }
  for (int64_t m = 0; m < x.count; ++m) {
    for (int64_t t = 0; t < kWideTiles; ++t) {
      const char* half = reinterpret_cast<const char*>(&wide[m][t / 2]) + t % 2 * sizeof(Lanes);
      std::memcpy(sums + t * x.count + m, half, sizeof(Lanes));
    }
  }
}

// As `GroupDots`: tiles by fours where the format and the tokens allow it. One token waits for the
// memory alone, which is faster with one tile after the other.
template <class Isa, class F>
LFM2_INLINE void dots_by_wide_blocks(const GroupTokens& x, const GroupTile* tiles, int64_t count,
                                     int64_t ahead, Lanes* sums) {
  int64_t t = 0;
  if constexpr (F::kBits == 4) {
    const bool fits = x.count > 1 && x.count <= kTokens;
    for (; fits && t + kWideTiles <= count; t += kWideTiles) {
      dots_of_four_tiles<Isa, F>(x, tiles + t, sums + t * x.count);
    }
  }
  dots_by_blocks<Isa, F>(x, tiles + t, count - t, ahead, sums + t * x.count);
}

}  // namespace lfm2
