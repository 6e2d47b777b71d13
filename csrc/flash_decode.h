// Attention of one query per row over its pages, all query heads of a KV head together. Adjacent
// rows of one slot read its keys together, each up to its own length.
//
// A context is cut into splits of kSplit keys, for any length and number of threads, so that a
// row's sums depend only on the row. A split writes for each query head the weighted sum of its
// values, the sum of the weights, and the largest score, to which the weights are relative.
// `combine` adds the splits up. (Dao et al., 2023) The sums themselves are made by
// flash_decode_floats.h, or by flash_decode_avx512bf16.cpp where the processor has its instructions.
#pragma once

#include "dtypes.h"
#include "pages.h"
#include "simd.h"

namespace lfm2 {

constexpr int64_t kSplit = 512;
constexpr int64_t kBlock = 64;  // keys whose scores are kept at once
constexpr int64_t kMostHeads = 4;  // query heads that read keys together

LFM2_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

inline int64_t splits_of(int64_t length) { return (length + kSplit - 1) / kSplit; }

// Floats of a split's result per query head, with rows of length `width`.
LFM2_INLINE int64_t partial_of(int64_t width) { return width + 2; }

template <class T>
struct FlashDecode {
  Rows<const T> q;  // [rows, heads * head_dim]
  Pages<const T> k;
  Pages<const T> v;
  int64_t group;  // query heads per KV head

  // Rows are computed as whole vectors, with floats in their order. Rows of other sizes are padded.
  LFM2_INLINE int64_t padded() const { return (k.head_dim + kPair - 1) / kPair * kPair; }
  int64_t scratch(int64_t rows) const { return rows * group * padded(); }
  int64_t padding() const { return k.head_dim == padded() ? 0 : 2 * kBlock * padded(); }
};

// One part of a slot's context, for one KV head and rows of that slot, each a token longer than the
// one before.
struct Split {
  int64_t row;     // the first
  int64_t rows;
  int64_t length;  // context of the first row
  int64_t slot;
  int64_t kv_head;
  int64_t first;
  int64_t last;  // of the last row
};

// Rows of the next block, which arrive while this one is computed. Too many requests at once would
// wait for each other, so each row of this block asks for one of them.
template <class T>
struct Ahead {
  Rows<const T> rows;
  int64_t count;

  // Asks for row `j`, if there is one, from place `i` to before `i + size`.
  LFM2_INLINE void fetch(int64_t j, int64_t i, int64_t size) const {
    constexpr int64_t kLine = 64 / sizeof(T);
    if (j >= count) return;
    for (int64_t k = i; k < i + size; k += kLine) __builtin_prefetch(rows[j] + k);
  }
};

// Leaves one partial_of(padded) in `partials[n * group + g]` of each query head g of each row n that
// sees the split. `sums` takes the query heads, and adds up blocks of keys and values.
//
// Query heads that see the same keys read them together, of one row or of several. A query head's
// sums have the same order in any batch.
template <class T, class Sums>
LFM2_INLINE void flash_decode_by(Sums& sums, const FlashDecode<T>& op, const Split& split,
                                 float* const* partials) {
  const int64_t width = op.k.head_dim;
  const int64_t padded = op.padded();
  const int64_t heads = split.rows * op.group;
  const auto keys_from = [&](int64_t at) LFM2_FLAT {
    return Rows<const T>{op.k.row(split.slot, split.kv_head, at), op.k.row_stride};
  };
  const auto values_from = [&](int64_t at) LFM2_FLAT {
    return Rows<const T>{op.v.row(split.slot, split.kv_head, at), op.v.row_stride};
  };
  for (int64_t n = 0; n < heads; ++n) {
    const int64_t row = n / op.group;
    if (split.length + row <= split.first) continue;
    sums.take(n, op.q[split.row + row] + (split.kv_head * op.group + n % op.group) * width);
    for (int64_t i = 0; i <= padded; ++i) partials[n][i] = 0.0f;
    partials[n][padded + 1] = -__builtin_inff();
  }
  for (int64_t position = split.first; position < split.last;) {
    const int64_t rest = op.k.page_size - position % op.k.page_size;
    const int64_t count = smaller(smaller(kBlock, rest), split.last - position);
    const Rows<const T> keys = sums.whole(keys_from(position), count, 0);
    const Rows<const T> values = sums.whole(values_from(position), count, 1);
    const int64_t next = position + count;
    const int64_t left = next < split.last ? smaller(split.last - next, kBlock) : 0;
    const Rows<const T> next_keys = left > 0 ? keys_from(next) : keys;
    const Rows<const T> next_values = left > 0 ? values_from(next) : values;
    for (int64_t n = 0, together; n < heads; n += together) {
      const int64_t seen = smaller(count, split.length + n / op.group - position);
      // The last of some heads sees the most.
      const auto all_see = [&](int64_t some) LFM2_FLAT {
        const int64_t last = n + some - 1;
        return last < heads && smaller(count, split.length + last / op.group - position) == seen;
      };
      together = all_see(4) ? 4 : all_see(2) ? 2 : 1;
      if (seen <= 0) continue;
      // A share of the next block arrives with each head.
      const int64_t first = left * n / heads;
      const int64_t share = left * (n + together) / heads - first;
      const Ahead<T> ahead_keys{{next_keys[first], next_keys.stride}, share};
      const Ahead<T> ahead_values{{next_values[first], next_values.stride}, share};
      float* const* own = partials + n;
      if (together == 4) {
        sums.template attend<4>(n, keys, values, seen, ahead_keys, ahead_values, own);
      } else if (together == 2) {
        sums.template attend<2>(n, keys, values, seen, ahead_keys, ahead_values, own);
      } else {
        sums.template attend<1>(n, keys, values, seen, ahead_keys, ahead_values, own);
      }
    }
    position = next;
  }
}

// flash_decode_avx512bf16.cpp, for processors with its instructions and heads of whole kBf16Vectors.
// `queries` has room for the query heads of all rows of the split.
constexpr int64_t kBf16Vector = 32;
void flash_decode_avx512bf16(const FlashDecode<bf16>& op, const Split& split, const bf16** queries,
                             float* const* partials);

}  // namespace lfm2
