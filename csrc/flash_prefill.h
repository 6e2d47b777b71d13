// Causal attention of many tokens per sequence over its pages, a KV head's query heads together.
//
// The queries of a KV head are rows: token after token, with the heads of its group. A tile is some
// of them. It runs once over the keys that its last row sees, kTileKeys at a time from
// position 0 on. For each row it keeps the weighted sum of the values, the sum of the weights, and
// the largest score so far, to which the weights are relative. (Dao, 2023) A row's position decides
// its keys and the order of its sums. So, with finite values, its bits do not depend on other rows
// or on the chunks of a prompt. (A weight of 0 times an infinity is NaN.)
#pragma once

#include "cpu_features.h"
#include "dtypes.h"
#include "pages.h"

namespace lfm2 {

template <class T>
struct FlashPrefill {
  Rows<const T> q;  // [tokens, heads * head_dim]
  Pages<const T> k;
  Pages<const T> v;
  int64_t group;  // query heads per KV head
  Rows<T> out;    // [tokens, heads * head_dim]
};

// Some rows of one sequence and one KV head.
struct Tile {
  int64_t slot;
  int64_t kv_head;
  int64_t position;  // of the sequence's first token in this step
  int64_t token;     // that token's row in q and out
  int64_t first;     // the first row of the tile, counted from that token's first head
  int64_t rows;

  // Number of keys that row `row` of the tile sees.
  LFM2_INLINE int64_t keys(int64_t row, int64_t group) const {
    return position + (first + row) / group + 1;
  }
};

// Beginning of a row's head in q or out.
template <class T, class N>
LFM2_INLINE N* head_of(const FlashPrefill<T>& op, const Tile& tile, Rows<N> rows, int64_t row) {
  const int64_t at = tile.first + row;
  const int64_t head = tile.kv_head * op.group + at % op.group;
  return rows[tile.token + at / op.group] + head * op.k.head_dim;
}

// Keys that a tile reads at a time.
constexpr int64_t kTileKeys = 64;

// Size of a cache line and of a vector.
struct alignas(64) Line {
  uint32_t words[16];
};

// flash_prefill_avx512bf16.cpp, for processors with its instructions; no other thread uses it.
// Fills `out` of the tile's rows; `scratch` has Bf16Tiles::scratch() lines.
void flash_prefill_avx512bf16(const FlashPrefill<bf16>& op, const Tile& tile, Line* scratch);

struct Bf16Tiles {
  using Memory = Line;
  static constexpr int64_t kRows = 64;

  static LFM2_INLINE int64_t padded(int64_t head_dim) { return (head_dim + 15) / 16 * 16; }

  // Lines of scratch memory for a tile.
  static LFM2_INLINE int64_t scratch(int64_t head_dim) {
    constexpr int64_t kVectors = kRows / 16;
    const int64_t queries = head_dim / 2 * kVectors;
    const int64_t scores = kTileKeys * kVectors;
    const int64_t weights = kTileKeys / 2 * kVectors;
    const int64_t values = kTileKeys / 2 * padded(head_dim) / 16;
    const int64_t sums = padded(head_dim) * kVectors;
    return queries + scores + weights + values + sums;
  }

  static LFM2_INLINE void run(const FlashPrefill<bf16>& op, const Tile& tile, Line* scratch) {
    // Checked again, so that nothing refers to it if it was not compiled.
    if (LFM2_HAS_AVX512BF16) flash_prefill_avx512bf16(op, tile, scratch);
  }
};

}  // namespace lfm2
