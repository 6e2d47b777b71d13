// Tokens packed for dots.h: groups of them, step after step.
#pragma once

#include <algorithm>

#include "dots.h"

namespace lfm2 {

// packed[m * steps + k * M + i] = step k of token m + i, for a group of M tokens from m on. Numbers
// are unchanged and padded with zeros. A step has kNumbers.
template <int64_t kNumbers, class T>
void pack(Rows<const T> x, int64_t tokens, int64_t size, int64_t most, Line* packed) {
  const int64_t steps = steps_of(size, kNumbers);
  T* to = reinterpret_cast<T*>(packed);
  for (int64_t g = 0, m = 0; m < tokens; m += in_group(g++, tokens, most)) {
    const int64_t count = in_group(g, tokens, most);
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t k = 0; k < steps; ++k) {
        T step[kNumbers] = {};
        const int64_t left = std::min(kNumbers, size - k * kNumbers);
        std::memcpy(step, x[m + i] + k * kNumbers, left * sizeof(T));
        std::memcpy(to + (m * steps + k * count + i) * kNumbers, step, sizeof step);
      }
    }
  }
}

// The same by twos, for dots_neoni8mm.cpp: sixteen numbers of a token are two runs of eight, and the
// second token's lie after the first one's. A token without another is beside zeros.
inline void pack_pairs(Rows<const int8_t> x, int64_t tokens, int64_t size, Line* packed) {
  constexpr int64_t kRun = 8;
  const int64_t runs = 2 * steps_of(size, 2 * kRun);
  auto* to = reinterpret_cast<int8_t*>(packed);
  for (int64_t m = 0; m < (tokens + 1) / 2 * 2; ++m) {
    for (int64_t r = 0; r < runs; ++r) {
      int8_t run[kRun] = {};
      const int64_t left = std::min(kRun, size - r * kRun);
      if (m < tokens && left > 0) std::memcpy(run, x[m] + r * kRun, left);
      std::memcpy(to + ((m / 2 * runs + r) * 2 + m % 2) * kRun, run, sizeof run);
    }
  }
}

// The same in floats, for `WideStep`, in the order in which numbers of their type are loaded.
template <class T>
LFM2_CLONES void pack_wide(Rows<const T> x, int64_t tokens, int64_t size, Line* lines) {
  const int64_t steps = steps_of(size, kPair);
  for (int64_t g = 0, m = 0; m < tokens; m += in_group(g++, tokens, WideStep::kTogether)) {
    const int64_t count = in_group(g, tokens, WideStep::kTogether);
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t k = 0; k < steps; ++k) {
        T rest[kPair] = {};
        const T* from = x[m + i] + k * kPair;
        const int64_t left = size - k * kPair;
        if (left < kPair) {
          std::memcpy(rest, from, left * sizeof(T));
          from = rest;
        }
        Lanes first, second;
        load(from, first, second);
        store(first, second, reinterpret_cast<float*>(lines + m * steps + k * count + i));
      }
    }
  }
}

}  // namespace lfm2
