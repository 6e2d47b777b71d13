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
constexpr int64_t kMostHeads = 4;  // query heads that read keys together

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

// scores[g, j] = q[g] . keys[j], for `Heads` query heads and 8 / Heads keys from `first` on. Beyond
// `count` keys the last key is used again; these scores are undefined.
template <int Heads, class T>
LFM2_INLINE void score(const float* q, Rows<const T> keys, int64_t first, int64_t count,
                       int64_t width, float* scores) {
  constexpr int kKeys = kLanes / Heads;
  Lanes sums[kLanes] = {};
  const T* key[kKeys];
  for (int j = 0; j < kKeys; ++j) key[j] = keys[std::min(first + j, count - 1)];
  for (int64_t i = 0; i < width; i += kPair) {
    if constexpr (Heads > kKeys) {
      // The fewer of both stay in registers: here it is the keys.
      Lanes a[kKeys], b[kKeys];
      for (int j = 0; j < kKeys; ++j) load(key[j] + i, a[j], b[j]);
      for (int g = 0; g < Heads; ++g) {
        Lanes even, odd;
        load(q + g * width + i, even, odd);
        for (int j = 0; j < kKeys; ++j) sums[g * kKeys + j] += even * a[j];
        for (int j = 0; j < kKeys; ++j) sums[g * kKeys + j] += odd * b[j];
      }
    } else {
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
  }
  Lanes all;
  sum_lanes(sums, all);
  for (int g = 0; g < Heads; ++g) {
    for (int j = 0; j < kKeys; ++j) scores[g * kBlock + first + j] = all[g * kKeys + j];
  }
}

// sums[g, i] += weights[g, j] * values[j, i] over all j, for `Heads` query heads and 16 * `Parts`
// places from `i` on.
template <int Heads, int Parts, class T>
LFM2_INLINE void weigh(const float* weights, Rows<const T> values, int64_t count, int64_t i,
                       float* const* sums) {
  Lanes sum[Heads][Parts][2];
  for (int g = 0; g < Heads; ++g) {
    for (int p = 0; p < Parts; ++p) load(sums[g] + i + p * kPair, sum[g][p][0], sum[g][p][1]);
  }
  for (int64_t j = 0; j < count; ++j) {
    for (int p = 0; p < Parts; ++p) {
      Lanes a, b;
      load(values[j] + i + p * kPair, a, b);
      for (int g = 0; g < Heads; ++g) {
        sum[g][p][0] += weights[g * kBlock + j] * a;
        sum[g][p][1] += weights[g * kBlock + j] * b;
      }
    }
  }
  for (int g = 0; g < Heads; ++g) {
    for (int p = 0; p < Parts; ++p) store(sum[g][p][0], sum[g][p][1], sums[g] + i + p * kPair);
  }
}

// Scores become weights relative to the largest score so far. Earlier sums are scaled down. Heads
// take turns, so that none waits for its own steps. `scores` has room for whole vectors.
template <int Heads>
LFM2_INLINE void soften(float* scores, int64_t count, int64_t width, float* const* partials) {
  float lanes[Heads][kLanes];
  float best[Heads];
  float shrink[Heads];
  for (int g = 0; g < Heads; ++g) {
    for (int64_t j = count; j % kLanes != 0; ++j) {
      scores[g * kBlock + j] = -std::numeric_limits<float>::infinity();
    }
    for (int i = 0; i < kLanes; ++i) lanes[g][i] = partials[g][width + 1];
  }
  for (int64_t j = 0; j < count; j += kLanes) {
    for (int g = 0; g < Heads; ++g) {
      const float* own = scores + g * kBlock + j;
#pragma omp simd
      for (int i = 0; i < kLanes; ++i) lanes[g][i] = own[i] > lanes[g][i] ? own[i] : lanes[g][i];
    }
  }
  for (int g = 0; g < Heads; ++g) {
    best[g] = lanes[g][0];
    for (int i = 1; i < kLanes; ++i) best[g] = lanes[g][i] > best[g] ? lanes[g][i] : best[g];
    shrink[g] = exponential(partials[g][width + 1] - best[g]);
    for (int i = 0; i < kLanes; ++i) lanes[g][i] = 0;
  }
  for (int64_t j = 0; j < count; j += kLanes) {
    for (int g = 0; g < Heads; ++g) {
      float* own = scores + g * kBlock + j;
#pragma omp simd
      for (int i = 0; i < kLanes; ++i) {
        own[i] = exponential(own[i] - best[g]);
        lanes[g][i] += own[i];
      }
    }
  }
  for (int g = 0; g < Heads; ++g) {
    float* partial = partials[g];
    float sum = 0;
    for (int i = 0; i < kLanes; ++i) sum += lanes[g][i];
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) partial[i] *= shrink[g];
    partial[width] = partial[width] * shrink[g] + sum;
    partial[width + 1] = best[g];
  }
}

// One block of keys and values for `Heads` query heads, each with a partial of its own.
template <int Heads, class T>
LFM2_INLINE void attend(const float* q, Rows<const T> keys, Rows<const T> values, int64_t count,
                        int64_t width, float* scores, float* const* partials) {
  constexpr int kParts = kMostHeads / Heads;
  for (int64_t j = 0; j < count; j += kLanes / Heads) {
    score<Heads>(q, keys, j, count, width, scores);
  }
  soften<Heads>(scores, count, width, partials);
  int64_t i = 0;
  for (; i + kParts * kPair <= width; i += kParts * kPair) {
    weigh<Heads, kParts>(scores, values, count, i, partials);
  }
  for (; i < width; i += kPair) weigh<Heads, 1>(scores, values, count, i, partials);
}

template <class T>
LFM2_INLINE Rows<const T> pad(Rows<const T> rows, int64_t count, int64_t width, int64_t padded,
                              T* to) {
  for (int64_t j = 0; j < count; ++j) std::copy_n(rows[j], width, to + j * padded);
  return {to, padded};
}

// Asks for rows from `first` on ahead of their use; there may be fewer than `last`.
template <class T>
LFM2_INLINE void prefetch(Rows<const T> rows, int64_t first, int64_t last, int64_t width) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t j = first; j < last; ++j) {
    for (int64_t i = 0; i < width; i += kLine) __builtin_prefetch(rows[j] + i);
  }
}

// Leaves one partial_of(padded) in `partials[n * group + g]` of each query head g of each row n that
// sees the split. `scratch` has scratch(rows) floats, `rows` has padding() numbers, which are 0.
//
// Query heads that see the same keys read them together, of one row or of several. A query head's
// sums have the same order in any batch.
template <class T>
LFM2_CLONES void flash_decode(const FlashDecode<T>& op, const Split& split, float* scratch, T* rows,
                              float* const* partials) {
  const int64_t width = op.k.head_dim;
  const int64_t padded = op.padded();
  const int64_t heads = split.rows * op.group;
  const float scale = 1.0f / std::sqrt(static_cast<float>(width));
  float scores[kMostHeads * kBlock];
  const auto keys_from = [&](int64_t at) LFM2_FLAT {
    return Rows<const T>{op.k.row(split.slot, split.kv_head, at), op.k.row_stride};
  };
  const auto values_from = [&](int64_t at) LFM2_FLAT {
    return Rows<const T>{op.v.row(split.slot, split.kv_head, at), op.v.row_stride};
  };
  for (int64_t n = 0; n < heads; ++n) {
    const int64_t row = n / op.group;
    if (split.length + row <= split.first) continue;
    const int64_t head = split.kv_head * op.group + n % op.group;
    Rows<const T> query{op.q[split.row + row] + head * width, width};
    if (width != padded) query = pad(query, 1, width, padded, rows);
    float* q = scratch + n * padded;
    for (int64_t i = 0; i < padded; i += kPair) {
      Lanes first, second;
      load(query[0] + i, first, second);
      store(first * scale, second * scale, q + i);
    }
    std::fill_n(partials[n], padded + 1, 0.0f);
    partials[n][padded + 1] = -std::numeric_limits<float>::infinity();
  }
  for (int64_t position = split.first; position < split.last;) {
    const int64_t rest = op.k.page_size - position % op.k.page_size;
    const int64_t count = std::min({kBlock, rest, split.last - position});
    Rows<const T> keys = keys_from(position);
    Rows<const T> values = values_from(position);
    const int64_t next = position + count;
    const Rows<const T> next_keys = next < split.last ? keys_from(next) : keys;
    const Rows<const T> next_values = next < split.last ? values_from(next) : values;
    if (width != padded) {
      keys = pad(keys, count, width, padded, rows);
      values = pad(values, count, width, padded, rows + kBlock * padded);
    }
    for (int64_t n = 0, together; n < heads; n += together) {
      const float* q = scratch + n * padded;
      const int64_t seen = std::min(count, split.length + n / op.group - position);
      // The last of some heads sees the most.
      const auto all_see = [&](int64_t some) LFM2_FLAT {
        const int64_t last = n + some - 1;
        return last < heads && std::min(count, split.length + last / op.group - position) == seen;
      };
      together = all_see(4) ? 4 : all_see(2) ? 2 : 1;
      if (seen <= 0) continue;
      // The next block arrives meanwhile, a share with each head.
      const int64_t first = kBlock * n / heads;
      const int64_t last = kBlock * (n + together) / heads;
      prefetch(next_keys, first, last, width);
      prefetch(next_values, first, last, width);
      if (together == 4) {
        attend<4>(q, keys, values, seen, padded, scores, partials + n);
      } else if (together == 2) {
        attend<2>(q, keys, values, seen, padded, scores, partials + n);
      } else {
        attend<1>(q, keys, values, seen, padded, scores, partials + n);
      }
    }
    position = next;
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
