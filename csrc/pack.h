// Tokens made ready for dots.h: groups of them, step after step.
#pragma once

#include <algorithm>

#include "dots.h"

namespace lfm2 {

// lines[m * steps + k * M + i] = step k of token m + i, for a group of M tokens from m on; as they
// are, filled up with zeros.
template <class T>
void pack(Rows<const T> x, int64_t tokens, int64_t size, Line* lines) {
  constexpr int64_t kNumbers = sizeof(Line) / sizeof(T);
  const int64_t steps = steps_of(size, kNumbers);
  for (int64_t g = 0, m = 0; m < tokens; m += in_group(g++, tokens, kTogether)) {
    const int64_t count = in_group(g, tokens, kTogether);
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t k = 0; k < steps; ++k) {
        Line line = {};
        const int64_t left = std::min(kNumbers, size - k * kNumbers);
        std::memcpy(&line, x[m + i] + k * kNumbers, left * sizeof(T));
        lines[m * steps + k * count + i] = line;
      }
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
