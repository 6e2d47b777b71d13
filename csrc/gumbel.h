// Gumbel noise, a function of seed, row, position and token, as in lfm2_fast/ops/sampling.py.
#pragma once

#include "dtypes.h"
#include "log.h"

namespace lfm2 {

// Inputs of the noise of a row's tokens.
struct Place {
  int64_t seed;
  int64_t row;
  int64_t position;
};

constexpr int64_t kNoiseBlock = 128;           // tokens whose noise is computed together
constexpr int64_t kCounters = kNoiseBlock / 4;  // each gives four words
// Beyond all noise: of the words 2^32 - 1 and 0 it is -3.130 and 22.874.
constexpr float kLeastNoise = -3.131f;
constexpr float kMostNoise = 22.875f;

LFM2_INLINE uint32_t upper_product(uint32_t a, uint32_t b) {
  return static_cast<uint32_t>((uint64_t{a} * b) >> 32);
}

// Words of the tokens from `first`, a multiple of 4, on: token t has word t % 4 of Philox-4x32-10
// (Salmon et al., 2011) with the seed as key and counter (position, row, t / 4, 0). GCC 12 makes
// faster code for two products of halves than for one product that is split.
LFM2_INLINE void philox(const Place& place, int64_t first, uint32_t* words) {
  uint32_t c0[kCounters];
  uint32_t c1[kCounters];
  uint32_t c2[kCounters];
  uint32_t c3[kCounters];
  for (int64_t i = 0; i < kCounters; ++i) {
    c0[i] = static_cast<uint32_t>(place.position);
    c1[i] = static_cast<uint32_t>(place.row);
    c2[i] = static_cast<uint32_t>(first / 4 + i);
    c3[i] = 0;
  }
  uint32_t k0 = static_cast<uint32_t>(place.seed);
  uint32_t k1 = static_cast<uint32_t>(place.seed >> 32);
  for (int round = 0; round < 10; ++round) {
#pragma omp simd
    for (int64_t i = 0; i < kCounters; ++i) {
      const uint32_t a = c0[i];
      const uint32_t b = c2[i];
      c0[i] = upper_product(b, 0xCD9E8D57u) ^ c1[i] ^ k0;
      c1[i] = b * 0xCD9E8D57u;
      c2[i] = upper_product(a, 0xD2511F53u) ^ c3[i] ^ k1;
      c3[i] = a * 0xD2511F53u;
    }
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
#pragma omp simd
  for (int64_t i = 0; i < kCounters; ++i) {
    words[4 * i] = c0[i];
    words[4 * i + 1] = c1[i];
    words[4 * i + 2] = c2[i];
    words[4 * i + 3] = c3[i];
  }
}

// -ln(1 - u) of u = (word + 1/2) / 2^32, exponentially distributed. The smallest one decides a
// draw, so a small u must keep all its digits: the rounding error of 1 - u is added again. For a
// large u, 1 - u is made from the inverted word.
LFM2_INLINE float exponential_variate(uint32_t word) {
  const bool upper = word > 0x7FFFFFFFu;
  const int32_t lower = static_cast<int32_t>(upper ? ~word : word);
  const float part = (static_cast<float>(lower) + 0.5f) * 0x1p-32f;
  const float rest = upper ? part : 1.0f - part;
  const float lost = upper ? 0.0f : (rest - 1.0f) + part;
  return lost - logarithm(rest);
}

// Within 1.2e-6.
LFM2_INLINE float gumbel(uint32_t word) { return -logarithm(exponential_variate(word)); }

}  // namespace lfm2
