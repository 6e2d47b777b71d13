// The sums of flash_decode.h for every type: in float, eight at a time.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "dtypes.h"
#include "exp.h"
#include "flash_decode.h"
#include "simd.h"

namespace lfm2 {

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
                       const Ahead<T>& ahead, float* const* sums) {
  Lanes sum[Heads][Parts][2];
  for (int g = 0; g < Heads; ++g) {
    for (int p = 0; p < Parts; ++p) load(sums[g] + i + p * kPair, sum[g][p][0], sum[g][p][1]);
  }
  for (int64_t j = 0; j < count; ++j) {
    ahead.fetch(j, i, Parts * kPair);
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
                        int64_t width, const Ahead<T>& ahead_keys, const Ahead<T>& ahead_values,
                        float* const* partials) {
  constexpr int kParts = kMostHeads / Heads;
  constexpr int kKeys = kLanes / Heads;
  float scores[Heads * kBlock];
  for (int64_t j = 0; j < count; j += kKeys) {
    for (int n = 0; n < kKeys; ++n) ahead_keys.fetch(j + n, 0, width);
    score<Heads>(q, keys, j, count, width, scores);
  }
  soften<Heads>(scores, count, width, partials);
  int64_t i = 0;
  for (; i + kParts * kPair <= width; i += kParts * kPair) {
    weigh<Heads, kParts>(scores, values, count, i, ahead_values, partials);
  }
  for (; i < width; i += kPair) weigh<Heads, 1>(scores, values, count, i, ahead_values, partials);
}

template <class T>
LFM2_INLINE Rows<const T> pad(Rows<const T> rows, int64_t count, int64_t width, int64_t padded,
                              T* to) {
  for (int64_t j = 0; j < count; ++j) std::copy_n(rows[j], width, to + j * padded);
  return {to, padded};
}

// The sums of any type, in float. `scratch` has scratch(rows) floats, `rows` has padding() numbers,
// which are 0.
template <class T>
struct FloatSums {
  const FlashDecode<T>& op;
  float* scratch;
  T* rows;
  int64_t width;
  int64_t padded;

  // Takes query head `n` of a split.
  LFM2_INLINE void take(int64_t n, const T* head) {
    const float scale = 1.0f / std::sqrt(static_cast<float>(width));
    Rows<const T> query{head, width};
    if (width != padded) query = pad(query, 1, width, padded, rows);
    float* q = scratch + n * padded;
    for (int64_t i = 0; i < padded; i += kPair) {
      Lanes first, second;
      load(query[0] + i, first, second);
      store(first * scale, second * scale, q + i);
    }
  }

  // Makes rows of a block whole vectors; `place` is 0 for keys and 1 for values.
  LFM2_INLINE Rows<const T> whole(Rows<const T> block, int64_t count, int64_t place) {
    return width == padded ? block
                           : pad(block, count, width, padded, rows + place * kBlock * padded);
  }

  // Adds a block of keys and values to the partials of query heads `n` and after.
  template <int Heads>
  LFM2_INLINE void attend(int64_t n, Rows<const T> keys, Rows<const T> values, int64_t count,
                          const Ahead<T>& ahead_keys, const Ahead<T>& ahead_values,
                          float* const* partials) {
    lfm2::attend<Heads>(scratch + n * padded, keys, values, count, padded, ahead_keys, ahead_values,
                        partials);
  }
};

// `flash_decode_by` of the sums of any type, whose memory `scratch` and `rows` are.
template <class T>
LFM2_CLONES void flash_decode(const FlashDecode<T>& op, const Split& split, float* scratch, T* rows,
                              float* const* partials) {
  FloatSums<T> sums{op, scratch, rows, op.k.head_dim, op.padded()};
  flash_decode_by(sums, op, split, partials);
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
