// C * causal_conv(B * x), depthwise, with the window of past B * x kept by position modulo `ring`.
#pragma once

#include <algorithm>
#include <vector>

#include "dtypes.h"
#include "sequence.h"

namespace lfm2 {

// Channels that are computed together: their taps, as floats, fit into the first-level cache.
constexpr int64_t kConvTile = 128;

template <class T>
struct GatedConv {
  Rows<const T> bcx;  // [tokens, 3 * hidden]: B, C and x side by side
  const T* weight;    // [hidden, width], newest tap last
  const T* bias;      // [hidden], or null
  T* window;          // [slots, ring, hidden]
  int64_t slot_stride;
  int64_t ring_stride;
  int64_t ring;
  int64_t hidden;
  int64_t width;
  Rows<T> out;  // [tokens, hidden]
};

template <class T>
LFM2_INLINE void conv_taps(const GatedConv<T>& conv, int64_t channel, int64_t tile, float* taps) {
  const T* weight = conv.weight + channel * conv.width;
  for (int64_t i = 0; i < tile; ++i) {
    for (int64_t tap = 0; tap < conv.width; ++tap) {
      taps[tap * kConvTile + i] = widen(weight[i * conv.width + tap]);
    }
  }
}

// All old rows of these channels are read before the first new one is written, and no other thread
// touches them. `past` holds B * x of the last `width` positions, each at its position modulo that.
template <class T>
LFM2_INLINE void conv_sequence(const GatedConv<T>& conv, const Sequence& sequence, int64_t channel,
                               int64_t tile, const float* taps, float* past) {
  const int64_t width = conv.width;
  T* window = conv.window + sequence.slot * conv.slot_stride + channel;
  for (int64_t source = sequence.position - width + 1; source < sequence.position; ++source) {
    float* wide = past + (source + width) % width * kConvTile;
    if (source < 0) {
      std::fill_n(wide, tile, 0.0f);
    } else {
      const T* old = window + source % conv.ring * conv.ring_stride;
#pragma omp simd
      for (int64_t i = 0; i < tile; ++i) wide[i] = widen(old[i]);
    }
  }
  for (int64_t n = 0; n < sequence.count; ++n) {
    const int64_t position = sequence.position + n;
    const T* b = conv.bcx[sequence.token + n] + channel;
    const T* c = b + conv.hidden;
    const T* x = c + conv.hidden;
    float* newest = past + position % width * kConvTile;
#pragma omp simd
    for (int64_t i = 0; i < tile; ++i) newest[i] = rounded<T>(widen(b[i]) * widen(x[i]));
    if (n >= sequence.count - conv.ring) {
      T* kept = window + position % conv.ring * conv.ring_stride;
#pragma omp simd
      for (int64_t i = 0; i < tile; ++i) narrow(newest[i], kept[i]);
    }
    float sums[kConvTile] = {};
    for (int64_t tap = 0; tap < width; ++tap) {
      const float* source = past + (position + 1 + tap) % width * kConvTile;
      const float* factor = taps + tap * kConvTile;
#pragma omp simd
      for (int64_t i = 0; i < tile; ++i) sums[i] += factor[i] * source[i];
    }
    if (conv.bias) {
      const T* bias = conv.bias + channel;
#pragma omp simd
      for (int64_t i = 0; i < tile; ++i) sums[i] += widen(bias[i]);
    }
    T* out = conv.out[sequence.token + n] + channel;
#pragma omp simd
    for (int64_t i = 0; i < tile; ++i) narrow(widen(c[i]) * rounded<T>(sums[i]), out[i]);
  }
}

inline int64_t conv_tiles(int64_t hidden) { return (hidden + kConvTile - 1) / kConvTile; }

// Tasks from `first` to before `last` of conv_tiles(hidden) * count, all sequences of a tile in a
// row.
template <class T>
LFM2_CLONES void gated_conv(const GatedConv<T>& conv, const Sequence* sequences, int64_t count,
                            int64_t first, int64_t last) {
  std::vector<float> scratch(2 * conv.width * kConvTile);
  float* taps = scratch.data();
  float* past = taps + conv.width * kConvTile;
  for (int64_t task = first; task < last; ++task) {
    const int64_t channel = task / count * kConvTile;
    const int64_t tile = std::min(kConvTile, conv.hidden - channel);
    if (task == first || task % count == 0) conv_taps(conv, channel, tile, taps);
    conv_sequence(conv, sequences[task % count], channel, tile, taps, past);
  }
}

}  // namespace lfm2
