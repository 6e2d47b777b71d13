// The sums of flash_decode.h by AVX512_BF16, which multiplies pairs and sums them in float.
//
// A score's products lie in the lanes of a vector, with two of its numbers in each. Sixteen scores
// are summed across lanes at once. Weights are rounded to bf16, and values of two keys become pairs.
//
// The whole file is compiled for it, headers included. So it must have no function that the linker
// could use on older processors: all are inlined, except the one with the file's name.
#include "cpu_features.h"

#ifdef LFM2_GCC_X86
#pragma GCC target("arch=x86-64-v4,avx512bf16")
// GCC 12's own header has values that are "used uninitialized".
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include "flash_decode.h"
#include "simd_avx512bf16.h"

namespace lfm2 {
namespace {

constexpr int64_t kWide = 16;  // floats of a vector

// The halves of a, added, and then those of b.
LFM2_INLINE __m512 halves(__m512 a, __m512 b) {
  return _mm512_shuffle_f32x4(a, b, 0x44) + _mm512_shuffle_f32x4(a, b, 0xEE);
}

// The same of quarters, in both halves of a and b.
LFM2_INLINE __m512 quarters(__m512 a, __m512 b) {
  return _mm512_shuffle_f32x4(a, b, 0x88) + _mm512_shuffle_f32x4(a, b, 0xDD);
}

// Lane i of the result is the sum of the lanes of x[i]. All are summed in the same order.
LFM2_INLINE __m512 sum_each(const __m512 (&x)[16]) {
  __m512 four[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    four[i] = quarters(halves(x[i], x[i + 4]), halves(x[i + 8], x[i + 12]));
  }
  const __m512d a = _mm512_castps_pd(_mm512_unpacklo_ps(four[0], four[1]) +
                                     _mm512_unpackhi_ps(four[0], four[1]));
  const __m512d b = _mm512_castps_pd(_mm512_unpacklo_ps(four[2], four[3]) +
                                     _mm512_unpackhi_ps(four[2], four[3]));
  return _mm512_castpd_ps(_mm512_unpacklo_pd(a, b)) + _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
}

// Places of a vector's pairs among 64 numbers of two rows. Sums lie as `place` says.
struct alignas(64) Pairs {
  uint16_t words[32];

  constexpr Pairs() : words() {
    for (int lane = 0; lane < 16; ++lane) {
      words[2 * lane] = static_cast<uint16_t>(place<bf16>(lane));
      words[2 * lane + 1] = static_cast<uint16_t>(32 + place<bf16>(lane));
    }
  }
};
constexpr Pairs kPairs;

// One block of keys and values for `Heads` query heads.
template <int Heads>
struct BlockOf {
  int64_t width;
  float scores[Heads * kBlock];
  uint32_t weights[Heads * kBlock / 2];  // pairs of keys

  // scores[g, j] = q[g] . keys[j]. Beyond `count` keys the last key is used again.
  LFM2_INLINE void score(const bf16* const* q, Rows<const bf16> keys, int64_t count,
                         const Ahead<bf16>& ahead) {
    constexpr int kKeys = static_cast<int>(kWide) / Heads;
    const __m512 scale = _mm512_set1_ps(1.0f / __builtin_sqrtf(static_cast<float>(width)));
    for (int64_t first = 0; first < count; first += kKeys) {
      __m512 dots[16] = {};
      const bf16* key[kKeys];
#pragma GCC unroll 16
      for (int j = 0; j < kKeys; ++j) {
        ahead.fetch(first + j, 0, width);
        key[j] = keys[first + j < count ? first + j : count - 1];
      }
      for (int64_t i = 0; i < width; i += kBf16Vector) {
        __m512bh query[Heads];
#pragma GCC unroll 4
        for (int g = 0; g < Heads; ++g) query[g] = pairs_of(_mm512_loadu_si512(q[g] + i));
#pragma GCC unroll 16
        for (int j = 0; j < kKeys; ++j) {
          const __m512bh numbers = pairs_of(_mm512_loadu_si512(key[j] + i));
#pragma GCC unroll 4
          for (int g = 0; g < Heads; ++g) {
            dots[g * kKeys + j] = _mm512_dpbf16_ps(dots[g * kKeys + j], numbers, query[g]);
          }
        }
      }
      alignas(64) float all[16];
      _mm512_store_ps(all, sum_each(dots) * scale);
#pragma GCC unroll 4
      for (int g = 0; g < Heads; ++g) {
        std::memcpy(scores + g * kBlock + first, all + g * kKeys, kKeys * sizeof(float));
      }
    }
  }

  // Scores become weights relative to the largest score so far. Earlier sums are scaled down.
  LFM2_INLINE void soften(int64_t count, float* const* partials) {
    const __m512 log2e = _mm512_set1_ps(1.44269504f);
#pragma GCC unroll 4
    for (int g = 0; g < Heads; ++g) {
      float* partial = partials[g];
      __m512 own[kBlock / kWide];
      const __m512 least = _mm512_set1_ps(-__builtin_inff());
      __m512 best = _mm512_set1_ps(partial[width + 1]);
#pragma GCC unroll 4
      for (int64_t j = 0; j < kBlock; j += kWide) {
        const __mmask16 there = lanes_before(count - j);
        own[j / kWide] = _mm512_mask_loadu_ps(least, there, scores + g * kBlock + j);
        best = _mm512_max_ps(own[j / kWide], best);
      }
      const float most = _mm512_reduce_max_ps(best);
      const __m512 all = _mm512_set1_ps(most);
      const __m512 shrink = power_of_two((_mm512_set1_ps(partial[width + 1]) - all) * log2e);
      __m512 total = _mm512_setzero_ps();
#pragma GCC unroll 4
      for (int64_t j = 0; j < kBlock; j += kWide) {
        own[j / kWide] = power_of_two((own[j / kWide] - all) * log2e);
        total = total + own[j / kWide];
      }
#pragma GCC unroll 2
      for (int64_t j = 0; j < kBlock; j += 2 * kWide) {
        const __m512bh both = _mm512_cvtne2ps_pbh(own[j / kWide + 1], own[j / kWide]);
        _mm512_storeu_si512(weights + (g * kBlock + j) / 2, reinterpret_cast<__m512i>(both));
      }
      for (int64_t i = 0; i < width; i += kWide) {
        _mm512_storeu_ps(partial + i, _mm512_loadu_ps(partial + i) * shrink);
      }
      partial[width] = partial[width] * _mm512_cvtss_f32(shrink) + _mm512_reduce_add_ps(total);
      partial[width + 1] = most;
    }
  }

  // sums[g] += the weighted values, of 32 * `Parts` numbers from `i` on.
  template <int Parts>
  LFM2_INLINE void weigh(Rows<const bf16> values, int64_t count, int64_t i,
                         const Ahead<bf16>& ahead, float* const* partials) {
    constexpr int kSums = 2 * Parts;
    const __m512i lower = _mm512_load_si512(kPairs.words);
    const __m512i upper = _mm512_add_epi16(lower, _mm512_set1_epi16(16));
    __m512 sums[Heads][kSums];
#pragma GCC unroll 4
    for (int g = 0; g < Heads; ++g) {
#pragma GCC unroll 4
      for (int p = 0; p < kSums; ++p) sums[g][p] = _mm512_loadu_ps(partials[g] + i + p * kWide);
    }
    for (int64_t j = 0; j < count; j += 2) {
      ahead.fetch(j, i, Parts * kBf16Vector);
      ahead.fetch(j + 1, i, Parts * kBf16Vector);
      __m512i pairs[kSums];
#pragma GCC unroll 2
      for (int p = 0; p < Parts; ++p) {
        const int64_t at = i + p * kBf16Vector;
        const __m512i a = _mm512_loadu_si512(values[j] + at);
        // Beyond the last key there may be anything.
        const __m512i b = j + 1 < count ? _mm512_loadu_si512(values[j + 1] + at)
                                        : _mm512_setzero_si512();
        pairs[2 * p] = _mm512_permutex2var_epi16(a, lower, b);
        pairs[2 * p + 1] = _mm512_permutex2var_epi16(a, upper, b);
      }
#pragma GCC unroll 4
      for (int g = 0; g < Heads; ++g) {
        const __m512bh weight = pairs_of(spread(weights + (g * kBlock + j) / 2));
#pragma GCC unroll 4
        for (int p = 0; p < kSums; ++p) {
          sums[g][p] = _mm512_dpbf16_ps(sums[g][p], pairs_of(pairs[p]), weight);
        }
      }
    }
#pragma GCC unroll 4
    for (int g = 0; g < Heads; ++g) {
#pragma GCC unroll 4
      for (int p = 0; p < kSums; ++p) _mm512_storeu_ps(partials[g] + i + p * kWide, sums[g][p]);
    }
  }
};

struct PairSums {
  int64_t width;
  const bf16** queries;

  LFM2_INLINE void take(int64_t n, const bf16* head) { queries[n] = head; }

  LFM2_INLINE Rows<const bf16> whole(Rows<const bf16> block, int64_t, int64_t) { return block; }

  template <int Heads>
  LFM2_INLINE void attend(int64_t n, Rows<const bf16> keys, Rows<const bf16> values, int64_t count,
                          const Ahead<bf16>& ahead_keys, const Ahead<bf16>& ahead_values,
                          float* const* partials) {
    BlockOf<Heads> block;
    block.width = width;
    block.score(queries + n, keys, count, ahead_keys);
    block.soften(count, partials);
    int64_t i = 0;
    for (; i + 2 * kBf16Vector <= width; i += 2 * kBf16Vector) {
      block.template weigh<2>(values, count, i, ahead_values, partials);
    }
    if (i < width) block.template weigh<1>(values, count, i, ahead_values, partials);
  }
};

}  // namespace

void flash_decode_avx512bf16(const FlashDecode<bf16>& op, const Split& split, const bf16** queries,
                             float* const* partials) {
  PairSums sums{op.k.head_dim, queries};
  flash_decode_by(sums, op, split, partials);
}

}  // namespace lfm2
#endif
