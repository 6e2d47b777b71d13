// From logits to a token, one row of the vocabulary at a time, as in lfm2_fast/ops/sampling.py.
#pragma once

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <utility>
#include <vector>

#include "dtypes.h"
#include "exp.h"
#include "gumbel.h"

namespace lfm2 {

constexpr float kCut = -std::numeric_limits<float>::infinity();  // the score of dropped tokens
constexpr int64_t kScan = 128;  // scores that are looked at together

// The token of a row whose best score is NaN or infinite.
constexpr int64_t kNoToken = -1;

// Orders floats as integers, with -0 equal to 0 and NaN above all, as torch does.
LFM2_INLINE int32_t rank(float value) {
  const int32_t bits = static_cast<int32_t>(bits_of(value + 0.0f));
  const int32_t order = bits ^ ((bits >> 31) & 0x7FFFFFFF);
  return value != value ? std::numeric_limits<int32_t>::max() : order;
}

LFM2_INLINE float value_of(int32_t order) {
  return from_bits(static_cast<uint32_t>(order ^ ((order >> 31) & 0x7FFFFFFF)));
}

template <class T>
LFM2_INLINE int32_t best_rank(const T* values, int64_t first, int64_t last) {
  int32_t best = std::numeric_limits<int32_t>::min();
#pragma omp simd reduction(max : best)
  for (int64_t i = first; i < last; ++i) {
    const int32_t order = rank(widen(values[i]));
    best = order > best ? order : best;
  }
  return best;
}

// The first of the largest, or kNoToken.
template <class T>
LFM2_CLONES int64_t best_token(const T* values, int64_t count) {
  int32_t best = std::numeric_limits<int32_t>::min();
  int64_t place = 0;
  for (int64_t first = 0; first < count; first += kScan) {
    const int32_t found = best_rank(values, first, std::min(first + kScan, count));
    if (found > best) {
      best = found;
      place = first;
    }
  }
  if (!std::isfinite(value_of(best))) return kNoToken;
  while (rank(widen(values[place])) != best) ++place;
  return place;
}

template <class T>
LFM2_CLONES void penalize(const T* logits, const bool* seen, float penalty, int64_t count,
                          float* scores) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const float logit = widen(logits[i]);
    const float punished = logit < 0 ? logit * penalty : logit / penalty;
    scores[i] = seen[i] ? punished : logit;
  }
}

LFM2_INLINE float largest(const float* scores, int64_t count) {
  float best = kCut;
#pragma omp simd reduction(max : best)
  for (int64_t i = 0; i < count; ++i) best = scores[i] > best ? scores[i] : best;
  return best;
}

LFM2_INLINE void cut_below(float bound, int64_t count, float* scores) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) scores[i] = scores[i] < bound ? kCut : scores[i];
}

// Keeps the k best and all ties with the last of them. The k-th best of the blocks' best is no
// better than the k-th best of all, so a small k leaves only a few scores to choose from.
LFM2_INLINE void keep_top_k(int64_t k, int64_t count, float* scores) {
  if (k <= 0 || k >= count) return;
  std::vector<int32_t> blocks;
  std::vector<int32_t> ranks;
  const auto kth_best = [k](std::vector<int32_t> from) {
    std::nth_element(from.begin(), from.begin() + (k - 1), from.end(), std::greater<int32_t>());
    return from[k - 1];
  };
  blocks.reserve(count / kScan + 1);
  for (int64_t first = 0; first < count; first += kScan) {
    blocks.push_back(best_rank(scores, first, std::min(first + kScan, count)));
  }
  const bool few = k <= static_cast<int64_t>(blocks.size());
  const int32_t bound = few ? kth_best(blocks) : std::numeric_limits<int32_t>::min();
  for (size_t block = 0; block < blocks.size(); ++block) {
    if (blocks[block] < bound) continue;
    const int64_t first = static_cast<int64_t>(block) * kScan;
    for (int64_t i = first; i < std::min(first + kScan, count); ++i) {
      if (rank(scores[i]) >= bound) ranks.push_back(rank(scores[i]));
    }
  }
  const int32_t kth = kth_best(std::move(ranks));
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) scores[i] = rank(scores[i]) < kth ? kCut : scores[i];
}

// Drops the worst scores, with at most 1 - p of the mass in all; of equal scores the first are
// dropped first. Bisection finds the cut until a few scores are left to sort.
LFM2_INLINE void keep_top_p(double p, int64_t count, float* scores) {
  constexpr int64_t kFew = 256;
  const float limit = static_cast<float>(1.0 - p);
  const float best = largest(scores, count);
  std::vector<double> mass(count);
  float worst = best;
  double total = 0;
#pragma omp simd reduction(+ : total) reduction(min : worst)
  for (int64_t i = 0; i < count; ++i) {
    mass[i] = exponential(static_cast<double>(scores[i]) - static_cast<double>(best));
    total += mass[i];
    worst = scores[i] > kCut && scores[i] < worst ? scores[i] : worst;
  }
  const double* const part = mass.data();
  // Only the comparison is in float, as Hugging Face's is: of ten equal scores, p = 0.9 cuts one.
  const auto goes = [=](double tail) { return static_cast<float>(tail / total) <= limit; };

  // All scores below `low` are dropped, not all below `high`. `below` is the mass below `low`.
  float low = worst;
  float high = std::nextafter(best, std::numeric_limits<float>::infinity());
  double below = 0;
  int64_t between = count;
  while (between > kFew) {
    const float middle = low + (high - low) / 2;
    if (!(middle > low && middle < high)) break;
    double under = 0;
    int64_t number = 0;
    int64_t upper = 0;
#pragma omp simd reduction(+ : under, number, upper)
    for (int64_t i = 0; i < count; ++i) {
      under += scores[i] < middle ? part[i] : 0.0;
      number += scores[i] >= low && scores[i] < middle;
      upper += scores[i] >= middle && scores[i] < high;
    }
    const bool cut = goes(under);
    below = cut ? under : below;
    between = cut ? upper : number;
    (cut ? low : high) = middle;
  }
  std::vector<std::pair<float, int64_t>> last;
  for (int64_t i = 0; i < count; ++i) {
    if (scores[i] >= low && scores[i] < high) last.emplace_back(scores[i], i);
  }
  std::sort(last.begin(), last.end());
  cut_below(low, count, scores);
  const bool with_best = high > best;
  for (size_t i = 0; i + with_best < last.size(); ++i) {
    below += part[last[i].second];
    if (!goes(below)) break;
    scores[last[i].second] = kCut;
  }
}

struct Warp {
  float temperature;
  int64_t top_k;  // 0: all
  double top_p;
  double min_p;
};

template <class T>
LFM2_CLONES void warp(const T* logits, const Warp& by, int64_t count, float* scores) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) scores[i] = widen(logits[i]) / by.temperature;
  keep_top_k(by.top_k, count, scores);
  if (by.top_p < 1.0) keep_top_p(by.top_p, count, scores);
  if (by.min_p > 0.0) {
    cut_below(largest(scores, count) + static_cast<float>(std::log(by.min_p)), count, scores);
  }
}

// The first token with the largest sum of score and noise, which is a draw by softmax; kNoToken if
// softmax is undefined. Noise is bounded, and larger words give smaller noise. So a block with a
// low best score needs no words, and a block with only high words needs no logarithms.
LFM2_CLONES inline int64_t draw(const float* scores, const Place& place, int64_t count) {
  constexpr float kRounding = 1e-5f;  // more than the error of the noise
  const float best = value_of(best_rank(scores, 0, count));
  if (!std::isfinite(best)) return kNoToken;
  uint32_t words[kNoiseBlock];
  float sums[kNoiseBlock];
  float most = kLeastNoise;  // the best token's sum is larger
  int64_t token = kNoToken;
  for (int64_t first = 0; first < count; first += kNoiseBlock) {
    const float* block = scores + first;
    const int64_t size = std::min(kNoiseBlock, count - first);
    const float lead = largest(block, size) - best;
    if (lead + kMostNoise <= most) continue;
    philox(place, first, words);
    uint32_t least = 0xFFFFFFFFu;
#pragma omp simd reduction(min : least)
    for (int64_t i = 0; i < kNoiseBlock; ++i) least = words[i] < least ? words[i] : least;
    if (lead + gumbel(least) + kRounding <= most) continue;
    float top = kCut;
#pragma omp simd reduction(max : top)
    for (int64_t i = 0; i < size; ++i) {
      sums[i] = block[i] - best + gumbel(words[i]);
      top = sums[i] > top ? sums[i] : top;
    }
    if (top <= most) continue;
    most = top;
    token = first + (std::find(sums, sums + size, top) - sums);
  }
  return token;
}

}  // namespace lfm2
