// Attention of one query per row over its pages, all query heads of a KV head together. Adjacent
// rows of one slot read its keys together, each up to its own length.
//
// A context is cut into splits of kSplit keys, for any length and number of threads, so that a
// row's sums depend only on the row. A split writes for each query head the weighted sum of its
// values, the sum of the weights, and the largest score, to which the weights are relative.
// `combine` adds the splits up. (Dao et al., 2023)
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "dtypes.h"
#include "exp.h"
#include "pages.h"
#include "simd.h"

namespace lfm2 {

constexpr int64_t kSplit = 512;
constexpr int64_t kBlock = 64;  // keys whose scores are kept at once

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
  int64_t padded() const { return (k.head_dim + kPair - 1) / kPair * kPair; }
  int64_t scratch(int64_t rows) const { return group * (rows * padded() + kBlock); }
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

// scores[g, j] = q[g] . keys[j], for `Heads` heads and 8 / Heads keys from `first` on. Beyond
// `count` keys the last key is used again; these scores are undefined.
template <int Heads, class T>
LFM2_INLINE void score(const float* q, Rows<const T> keys, int64_t first, int64_t count,
                       int64_t width, float* scores) {
  constexpr int kKeys = kLanes / Heads;
  Lanes sums[kLanes] = {};
  const T* key[kKeys];
  for (int j = 0; j < kKeys; ++j) key[j] = keys[std::min(first + j, count - 1)];
  for (int64_t i = 0; i < width; i += kPair) {
    Lanes query[Heads][2];
    for (int g = 0; g < Heads; ++g) load(q + g * width + i, query[g][0], query[g][1]);
    for (int j = 0; j < kKeys; ++j) {
      Lanes a, b;
      load(key[j] + i, a, b);
      for (int g = 0; g < Heads; ++g) {
        sums[g * kKeys + j] += query[g][0] * a;
        sums[g * kKeys + j] += query[g][1] * b;
      }
    }
  }
  Lanes all;
  sum_lanes(sums, all);
  for (int g = 0; g < Heads; ++g) {
    for (int j = 0; j < kKeys; ++j) scores[g * kBlock + first + j] = all[g * kKeys + j];
  }
}

// sums[g] += weights[g, j] * values[j], for `Heads` heads and `Values` values from `first` on.
template <int Heads, int Values, class T>
LFM2_INLINE void weigh(const float* weights, Rows<const T> values, int64_t first, int64_t width,
                       float* sums) {
  const int64_t stride = partial_of(width);
  for (int64_t i = 0; i < width; i += kPair) {
    Lanes sum[Heads][2];
    for (int g = 0; g < Heads; ++g) load(sums + g * stride + i, sum[g][0], sum[g][1]);
    for (int j = 0; j < Values; ++j) {
      Lanes a, b;
      load(values[first + j] + i, a, b);
      for (int g = 0; g < Heads; ++g) {
        sum[g][0] += weights[g * kBlock + first + j] * a;
        sum[g][1] += weights[g * kBlock + first + j] * b;
      }
    }
    for (int g = 0; g < Heads; ++g) store(sum[g][0], sum[g][1], sums + g * stride + i);
  }
}

// Scores become weights relative to the largest score so far. Earlier sums are scaled down.
LFM2_INLINE void soften(float* scores, int64_t count, int64_t width, float* partial) {
  float& total = partial[width];
  float& best = partial[width + 1];
  float now = best;
#pragma omp simd reduction(max : now)
  for (int64_t j = 0; j < count; ++j) now = scores[j] > now ? scores[j] : now;
  const float shrink = exponential(best - now);
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < count; ++j) {
    scores[j] = exponential(scores[j] - now);
    sum += scores[j];
  }
#pragma omp simd
  for (int64_t i = 0; i < width; ++i) partial[i] *= shrink;
  total = total * shrink + sum;
  best = now;
}

// One block of keys and values for `Heads` query heads.
template <int Heads, class T>
LFM2_INLINE void attend(const float* q, Rows<const T> keys, Rows<const T> values, int64_t count,
                        int64_t width, float* scores, float* partials) {
  constexpr int kKeys = kLanes / Heads;
  constexpr int kValues = 4;
  for (int64_t j = 0; j < count; j += kKeys) {
    score<Heads>(q, keys, j, count, width, scores);
  }
  for (int g = 0; g < Heads; ++g) {
    soften(scores + g * kBlock, count, width, partials + g * partial_of(width));
  }
  int64_t j = 0;
  for (; j + kValues <= count; j += kValues) {
    weigh<Heads, kValues>(scores, values, j, width, partials);
  }
  for (; j < count; ++j) weigh<Heads, 1>(scores, values, j, width, partials);
}

template <class T>
LFM2_INLINE Rows<const T> pad(Rows<const T> rows, int64_t count, int64_t width, int64_t padded,
                              T* to) {
  for (int64_t j = 0; j < count; ++j) std::copy_n(rows[j], width, to + j * padded);
  return {to, padded};
}

// Leaves one partial_of(padded) per query head of the group in `partials[i]` of each row i that sees
// the split. `scratch` has scratch(rows) floats, `rows` has padding() numbers, which are 0.
template <class T>
LFM2_CLONES void flash_decode(const FlashDecode<T>& op, const Split& split, float* scratch, T* rows,
                              float* const* partials) {
  const int64_t width = op.k.head_dim;
  const int64_t padded = op.padded();
  const float scale = 1.0f / std::sqrt(static_cast<float>(width));
  float* scores = scratch + split.rows * op.group * padded;
  for (int64_t n = 0; n < split.rows; ++n) {
    if (split.length + n <= split.first) continue;
    const T* query = op.q[split.row + n] + split.kv_head * op.group * width;
    for (int64_t g = 0; g < op.group; ++g) {
      Rows<const T> row{query + g * width, width};
      if (width != padded) row = pad(row, 1, width, padded, rows);
      float* q = scratch + (n * op.group + g) * padded;
      for (int64_t i = 0; i < padded; i += kPair) {
        Lanes first, second;
        load(row[0] + i, first, second);
        store(first * scale, second * scale, q + i);
      }
      float* partial = partials[n] + g * partial_of(padded);
      std::fill_n(partial, padded + 1, 0.0f);
      partial[padded + 1] = -std::numeric_limits<float>::infinity();
    }
  }
  for (int64_t position = split.first; position < split.last;) {
    const int64_t rest = op.k.page_size - position % op.k.page_size;
    const int64_t count = std::min({kBlock, rest, split.last - position});
    Rows<const T> keys{op.k.row(split.slot, split.kv_head, position), op.k.row_stride};
    Rows<const T> values{op.v.row(split.slot, split.kv_head, position), op.v.row_stride};
    if (width != padded) {
      keys = pad(keys, count, width, padded, rows);
      values = pad(values, count, width, padded, rows + kBlock * padded);
    }
    for (int64_t n = 0; n < split.rows; ++n) {
      const int64_t seen = std::min(count, split.length + n - position);
      if (seen <= 0) continue;
      const float* q = scratch + n * op.group * padded;
      int64_t g = 0;
      for (; g + 2 <= op.group; g += 2) {
        attend<2>(q + g * padded, keys, values, seen, padded, scores + g * kBlock,
                  partials[n] + g * partial_of(padded));
      }
      if (g < op.group) {
        attend<1>(q + g * padded, keys, values, seen, padded, scores + g * kBlock,
                  partials[n] + g * partial_of(padded));
      }
    }
    position += count;
  }
}

// `partials` of a query head's splits are `stride` apart; `out` is its head_dim numbers.
template <class T>
LFM2_CLONES void combine(const float* partials, int64_t splits, int64_t stride, int64_t width,
                         int64_t padded, float* sums, T* out) {
  float best = -std::numeric_limits<float>::infinity();
  for (int64_t s = 0; s < splits; ++s) best = std::max(best, partials[s * stride + padded + 1]);
  std::fill_n(sums, padded, 0.0f);
  float total = 0;
  for (int64_t s = 0; s < splits; ++s) {
    const float* partial = partials + s * stride;
    const float shrink = exponential(partial[padded + 1] - best);
    total += shrink * partial[padded];
#pragma omp simd
    for (int64_t i = 0; i < padded; ++i) sums[i] += shrink * partial[i];
  }
  for (int64_t i = 0; i < padded; i += kPair) {
    T row[kPair];
#pragma omp simd
    for (int64_t j = 0; j < kPair; ++j) narrow(sums[i + j] / total, row[j]);
    for (int64_t j = 0; j < kPair; ++j) {
      if (i + place<T>(j) < width) out[i + place<T>(j)] = row[j];
    }
  }
}

}  // namespace lfm2
