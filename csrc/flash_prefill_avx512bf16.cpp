// The tiles of flash_prefill.h by AVX512_BF16, which multiplies pairs and sums them in float.
//
// Rows are side by side in the lanes of vectors, so that a row's largest score and its sums need no
// exchange between lanes. A key's pairs are read from its page, each for all rows at once. Only
// values are interleaved first, two keys at a time, to become pairs too.
//
// The whole file is compiled for it, headers included. So it must have no function that the linker
// could use on older processors: all are inlined, except the one with the file's name.
#include "cpu_features.h"

#ifdef LFM2_GCC_X86
#pragma GCC target("arch=x86-64-v4,avx512bf16")
// GCC 12's own header has values that are "used uninitialized".
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include "flash_prefill.h"
#include "simd_avx512bf16.h"

namespace lfm2 {
namespace {

// The pairs (a, b) of every lane, rounded to bf16.
LFM2_INLINE __m512i paired(__m512 a, __m512 b) {
  const __m512i order =
      _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                       21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(order, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(b, a)));
}

// Lane i of x[j] goes to lane j of x[i]: squares of 8, 4, 2 and 1 change places.
LFM2_INLINE void transpose(__m512i (&x)[16]) {
  const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
#pragma GCC unroll 4
  for (int size = 8; size > 0; size /= 2) {
    const __m512i by = _mm512_set1_epi32(size);
    const __mmask16 high = _mm512_test_epi32_mask(lane, by);
    const __m512i upper = _mm512_mask_add_epi32(lane, high, lane, _mm512_set1_epi32(16 - size));
    const __m512i lower = _mm512_xor_si512(upper, by);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
      if (i & size) continue;
      const __m512i a = x[i], b = x[i + size];
      x[i] = _mm512_permutex2var_epi32(a, upper, b);
      x[i + size] = _mm512_permutex2var_epi32(a, lower, b);
    }
  }
}

LFM2_INLINE __mmask32 numbers_before(int64_t count) {
  return count >= 32 ? 0xFFFFFFFFu : count <= 0 ? 0 : (1u << count) - 1;
}

// A tile of up to Vectors * 16 rows. For each vector of rows kResults scores or numbers are
// computed at once: the most sums that fit into registers, and a divisor of 16.
template <int Vectors>
struct TileOf {
  static constexpr int kResults = Vectors == 3 ? 4 : 16 / Vectors;

  const FlashPrefill<bf16>& op;
  const Tile& tile;
  int64_t pairs;
  int64_t padded;
  Line* queries;     // [pairs][Vectors]: pairs of a head's numbers
  Line* scores;      // [kTileKeys][Vectors]: floats
  Line* weights;     // [kTileKeys / 2][Vectors]: pairs of keys
  uint32_t* values;  // [kTileKeys / 2][padded]: pairs of keys
  Line* sums;        // [padded][Vectors]: floats
  __m512 best[Vectors];
  __m512 totals[Vectors];
  __m512 shrink[Vectors];  // factors of the earlier sums from a block's scores
  __m512i seen[Vectors];   // number of keys that a row sees

  LFM2_INLINE TileOf(const FlashPrefill<bf16>& op, const Tile& tile, Line* scratch)
      : op(op), tile(tile), pairs(op.k.head_dim / 2), padded(Bf16Tiles::padded(op.k.head_dim)) {
    queries = scratch;
    scores = queries + pairs * Vectors;
    weights = scores + kTileKeys * Vectors;
    sums = weights + kTileKeys / 2 * Vectors;
    values = sums[padded * Vectors].words;
    alignas(64) int32_t keys[Vectors * 16];
    for (int64_t row = 0; row < Vectors * 16; ++row) {
      keys[row] = static_cast<int32_t>(tile.keys(row < tile.rows ? row : tile.rows - 1, op.group));
    }
    for (int c = 0; c < Vectors; ++c) {
      best[c] = _mm512_set1_ps(-__builtin_inff());
      totals[c] = _mm512_setzero_ps();
      seen[c] = _mm512_load_si512(keys + 16 * c);
    }
    for (int64_t i = 0; i < padded * Vectors; ++i) _mm512_store_ps(sums + i, _mm512_setzero_ps());
  }

  template <class T>
  LFM2_INLINE T* head(Rows<T> rows, int64_t row) const {
    return head_of(op, tile, rows, row);
  }

  LFM2_INLINE void take_queries() {
    for (int c = 0; c < Vectors; ++c) {
      for (int64_t i = 0; i < pairs; i += 16) {
        __m512i x[16];
#pragma GCC unroll 16
        for (int lane = 0; lane < 16; ++lane) {
          const int64_t row = 16 * c + lane;
          x[lane] = row < tile.rows ? _mm512_maskz_loadu_epi32(lanes_before(pairs - i),
                                                               head(op.q, row) + 2 * i)
                                    : _mm512_setzero_si512();
        }
        transpose(x);
#pragma GCC unroll 16
        for (int j = 0; j < 16; ++j) {
          if (i + j < pairs) _mm512_store_si512(queries + (i + j) * Vectors + c, x[j]);
        }
      }
    }
  }

  // Rows of `pages` from `position` on. Beyond `count` the last row is used again.
  LFM2_INLINE void find(const Pages<const bf16>& pages, int64_t position, int64_t count,
                        const bf16** found) const {
    const bf16* row = nullptr;
    for (int64_t j = 0; j < kTileKeys; ++j) {
      if (j < count) {
        const bool begins = j == 0 || (position + j) % pages.page_size == 0;
        row = begins ? pages.row(tile.slot, tile.kv_head, position + j) : row + pages.row_stride;
      }
      found[j] = row;
    }
  }

  // Scores of `count` keys from `position` on, and the largest ones. Keys that a row does not
  // see have -infinity, with those beyond the last row's.
  LFM2_INLINE void score(const bf16* const* keys, int64_t position, int64_t count) {
    const bool crosses = position + count > tile.keys(0, op.group);
    for (int64_t j = 0; j < count; j += kResults) {
      __m512 dots[kResults][Vectors] = {};
      for (int64_t i = 0; i < pairs; ++i) {
        __m512bh query[Vectors];
#pragma GCC unroll 4
        for (int c = 0; c < Vectors; ++c) {
          query[c] = pairs_of(_mm512_load_si512(queries + i * Vectors + c));
        }
#pragma GCC unroll 16
        for (int r = 0; r < kResults; ++r) {
          const __m512bh key = pairs_of(spread(keys[j + r] + 2 * i));
#pragma GCC unroll 4
          for (int c = 0; c < Vectors; ++c) {
            dots[r][c] = _mm512_dpbf16_ps(dots[r][c], key, query[c]);
          }
        }
      }
#pragma GCC unroll 16
      for (int r = 0; r < kResults; ++r) {
        const __m512i at = _mm512_set1_epi32(static_cast<int32_t>(position + j + r));
#pragma GCC unroll 4
        for (int c = 0; c < Vectors; ++c) {
          __m512 dot = dots[r][c];
          if (crosses) {
            const __mmask16 sees = _mm512_cmpgt_epi32_mask(seen[c], at);
            dot = _mm512_mask_mov_ps(_mm512_set1_ps(-__builtin_inff()), sees, dot);
          }
          _mm512_store_ps(scores + (j + r) * Vectors + c, dot);
          best[c] = _mm512_max_ps(best[c], dot);
        }
      }
    }
  }

  // Scores become weights relative to the largest score so far; `before` is the previous one.
  LFM2_INLINE void soften(const __m512 (&before)[Vectors], int64_t count) {
    const float scale = 1.44269504f / __builtin_sqrtf(static_cast<float>(2 * pairs));
    const __m512 by = _mm512_set1_ps(scale);
    for (int c = 0; c < Vectors; ++c) {
      const __m512 most = best[c] * by;
      shrink[c] = power_of_two((before[c] - best[c]) * by);
      __m512 total = totals[c] * shrink[c];
      for (int64_t j = 0; j < count; j += 2) {
        const Line* pair = scores + j * Vectors + c;
        const __m512 a = power_of_two(_mm512_fmsub_ps(_mm512_load_ps(pair), by, most));
        const __m512 b = power_of_two(_mm512_fmsub_ps(_mm512_load_ps(pair + Vectors), by, most));
        total = total + (a + b);
        _mm512_store_si512(weights + j / 2 * Vectors + c, paired(a, b));
      }
      totals[c] = total;
    }
  }

  // Values of two keys become pairs; those beyond `count` are 0.
  LFM2_INLINE void interleave(const bf16* const* rows, int64_t count, int64_t rounded) {
    const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40,
                                         8, 39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    for (int64_t j = 0; j < rounded; j += 2) {
      uint32_t* to = values + j / 2 * padded;
      for (int64_t i = 0; i < padded; i += 32) {
        const __mmask32 there = numbers_before(2 * pairs - i);
        const __m512i a = _mm512_maskz_loadu_epi16(j < count ? there : 0, rows[j] + i);
        const __m512i b = _mm512_maskz_loadu_epi16(j + 1 < count ? there : 0, rows[j + 1] + i);
        _mm512_store_si512(to + i, _mm512_permutex2var_epi16(a, low, b));
        if (i + 16 < padded) {
          _mm512_store_si512(to + i + 16, _mm512_permutex2var_epi16(a, high, b));
        }
      }
    }
  }

  // sums = sums * shrink + the weighted values of `count` keys
  LFM2_INLINE void weigh(int64_t count) {
    for (int64_t i = 0; i < padded; i += kResults) {
      __m512 sum[kResults][Vectors];
#pragma GCC unroll 16
      for (int r = 0; r < kResults; ++r) {
#pragma GCC unroll 4
        for (int c = 0; c < Vectors; ++c) {
          sum[r][c] = _mm512_load_ps(sums + (i + r) * Vectors + c) * shrink[c];
        }
      }
      for (int64_t j = 0; j < count / 2; ++j) {
        __m512bh weight[Vectors];
#pragma GCC unroll 4
        for (int c = 0; c < Vectors; ++c) {
          weight[c] = pairs_of(_mm512_load_si512(weights + j * Vectors + c));
        }
#pragma GCC unroll 16
        for (int r = 0; r < kResults; ++r) {
          const __m512bh value = pairs_of(spread(values + j * padded + i + r));
#pragma GCC unroll 4
          for (int c = 0; c < Vectors; ++c) {
            sum[r][c] = _mm512_dpbf16_ps(sum[r][c], value, weight[c]);
          }
        }
      }
#pragma GCC unroll 16
      for (int r = 0; r < kResults; ++r) {
#pragma GCC unroll 4
        for (int c = 0; c < Vectors; ++c) {
          _mm512_store_ps(sums + (i + r) * Vectors + c, sum[r][c]);
        }
      }
    }
  }

  LFM2_INLINE void give() const {
    for (int c = 0; c < Vectors; ++c) {
      const __m512 by = _mm512_set1_ps(1.0f) / totals[c];
      for (int64_t i = 0; i < pairs; i += 16) {
        __m512i x[16];
#pragma GCC unroll 16
        for (int j = 0; j < 16; ++j) {
          const Line* pair = sums + 2 * (i + j) * Vectors + c;
          x[j] = i + j < pairs ? paired(_mm512_load_ps(pair) * by,
                                        _mm512_load_ps(pair + Vectors) * by)
                               : _mm512_setzero_si512();
        }
        transpose(x);
#pragma GCC unroll 16
        for (int lane = 0; lane < 16; ++lane) {
          const int64_t row = 16 * c + lane;
          if (row < tile.rows) {
            _mm512_mask_storeu_epi32(head(op.out, row) + 2 * i, lanes_before(pairs - i), x[lane]);
          }
        }
      }
    }
  }

  LFM2_INLINE void run() {
    take_queries();
    const int64_t all = tile.keys(tile.rows - 1, op.group);
    const bf16* rows[kTileKeys];
    for (int64_t position = 0; position < all; position += kTileKeys) {
      const int64_t count = all - position < kTileKeys ? all - position : kTileKeys;
      const int64_t rounded = (count + kResults - 1) / kResults * kResults;
      __m512 before[Vectors];
      for (int c = 0; c < Vectors; ++c) before[c] = best[c];
      find(op.k, position, count, rows);
      score(rows, position, rounded);
      soften(before, rounded);
      find(op.v, position, count, rows);
      interleave(rows, count, rounded);
      weigh(rounded);
    }
    give();
  }
};

}  // namespace

void flash_prefill_avx512bf16(const FlashPrefill<bf16>& op, const Tile& tile, Line* scratch) {
  switch ((tile.rows + 15) / 16) {
    case 1:
      return TileOf<1>(op, tile, scratch).run();
    case 2:
      return TileOf<2>(op, tile, scratch).run();
    case 3:
      return TileOf<3>(op, tile, scratch).run();
    default:
      return TileOf<4>(op, tile, scratch).run();
  }
}

}  // namespace lfm2
#endif
