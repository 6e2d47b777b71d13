// Blocks of several tokens by two tiles of 4-bit numbers, for AVX2 and VNNI: the same bits as
// `dots_of_tile` of groups.h, which takes a token at a time.
//
// A block's sums stay in registers for a whole piece. Numbers are unpacked once for all tokens. A
// token at a time waits for the long way from a product to its sum, because the processor keeps too
// few instructions at once to begin the next tokens meanwhile.
#pragma once

#include <immintrin.h>

#include "groups.h"

namespace lfm2 {

// Makes the compiler keep `value` as it is here. GCC would multiply a whole block first, and would
// then run out of registers.
LFM2_INLINE void pin(__m256i& value) { asm("" : "+x"(value)); }

// Two tiles' numbers of a piece, unpacked: steps of four numbers of all eight rows.
struct Unpacked {
  __m256i steps[8][2];
};

// sums[t * x.count + m] += products of piece `p` of Q tokens from `first` on with two tiles
template <class Isa, class F, int Q>
LFM2_INLINE void add_block(const Unpacked& rows, const Lanes* scale, const Lanes* minimum,
                           const GroupTokens& x, int64_t p, int64_t first, Lanes* sums) {
  const int64_t at = p * x.count + first;
  const int8_t* tokens = x.numbers + at * kPiece;
  asm("" : "+r"(tokens));  // else each of the block's addresses is kept in a register of its own
  __m256i products[Q][2];
#pragma GCC unroll 8
  for (int step = 0; step < 8; ++step) {
    __m256i row[2] = {rows.steps[step][0], rows.steps[step][1]};
    pin(row[0]);
    pin(row[1]);
#pragma GCC unroll 4
    for (int m = 0; m < Q; ++m) {
      __m256i token = Isa::four(tokens + m * kPiece, step);
      pin(token);
      for (int t = 0; t < 2; ++t) {
        __m256i& sum = products[m][t];
        sum = step == 0 ? Isa::product(row[t], token) : Isa::plus_product(sum, row[t], token);
        pin(sum);
      }
    }
  }
#pragma GCC unroll 4
  for (int m = 0; m < Q; ++m) {
    for (int t = 0; t < 2; ++t) {
      Places whole;
      Isa::widen(products[m][t], whole);
      if constexpr (F::kOffset == 8) whole -= x.eights[at + m];
      Lanes floats;
      to_floats(whole, floats);
      Lanes& sum = sums[t * x.count + first + m];
      sum += floats * (scale[t] * x.scales[at + m]);
      if constexpr (F::kMinimums) sum += minimum[t] * x.sums[at + m];
    }
  }
}

// sums[t * x.count + m] = the dot products of token m with tile t of two, for two tokens or more.
template <class Isa, class F>
LFM2_INLINE void dots_of_two_tiles(const GroupTokens& x, const GroupTile* tiles, int64_t ahead,
                                   Lanes* sums) {
  static_assert(F::kBits == 4 && F::kGroup == kPiece);
  constexpr int64_t kTileBytes = F::kNumberBytes * kLanes;
  // Tokens in blocks of four. The last ones are two, three or five, never one alone.
  const int64_t fours = x.count % 4 == 1 ? x.count - 5 : x.count / 4 * 4;
  for (int64_t i = 0; i < 2 * x.count; ++i) sums[i] = Lanes{};
  for (int64_t p = 0; p < x.size / kPiece; ++p) {
    Unpacked rows;
    Lanes scale[2];
    Lanes minimum[2];
    for (int t = 0; t < 2; ++t) {
      const uint8_t* numbers = tiles[t].numbers + p * kTileBytes;
      for (int64_t i = 0; i < kTileBytes; i += 64) __builtin_prefetch(numbers + ahead + i, 0, 2);
      __m256i steps[8];
      Isa::nibbles(numbers, steps);
      for (int step = 0; step < 8; ++step) rows.steps[step][t] = steps[step];
      scales_of<Isa, F>(tiles[t].scales, p, scale + t, minimum + t);
    }
    int64_t m = 0;
    for (; m < fours; m += 4) add_block<Isa, F, 4>(rows, scale, minimum, x, p, m, sums);
    if (x.count - m == 3 || x.count - m == 5) {
      add_block<Isa, F, 3>(rows, scale, minimum, x, p, m, sums);
      m += 3;
    }
    if (m < x.count) add_block<Isa, F, 2>(rows, scale, minimum, x, p, m, sums);
  }
}

// As `GroupDots`: tiles by twos where the format and the tokens allow it.
template <class Isa, class F>
LFM2_INLINE void dots_by_blocks(const GroupTokens& x, const GroupTile* tiles, int64_t count,
                                int64_t ahead, Lanes* sums) {
  int64_t t = 0;
  if constexpr (F::kBits == 4) {
    for (; x.count > 1 && t + 2 <= count; t += 2) {
      dots_of_two_tiles<Isa, F>(x, tiles + t, ahead, sums + t * x.count);
    }
  }
  dots_of_tiles<Isa, F>(x, tiles + t, count - t, ahead, sums + t * x.count);
}

}  // namespace lfm2
