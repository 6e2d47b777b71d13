// The tiles of flash_prefill.h in float32, for every type and processor.
//
// Up to kPanelVectors vectors of rows are a panel, whose rows are side by side in lanes. So a row's
// largest score and its sums need no exchange between lanes. The keys and values of a block are
// widened once for all panels of a tile. Then both products are those of `multiply`: numbers of the
// block, each spread over a vector, times vectors of the panel, with the sums in registers.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "flash_prefill.h"
#include "simd.h"

namespace lfm2 {

constexpr int kPanelVectors = 3;
constexpr int64_t kPanelRows = kPanelVectors * kLanes;

// Rows of the block's numbers that are multiplied at once by a panel of C vectors. Twelve sums, the
// panel's three vectors and a number fill 16 registers.
template <int C>
constexpr int kResults = C == 1 ? 8 : 4;

// 2^x for x <= 0, within 4 units in the last place; 0 below 2^-126, and NaN for NaN. The polynomial
// is (2^r - 1) / r for |r| <= 1/2, by interpolation at Chebyshev's points.
LFM2_INLINE float power_of_two(float x) {
  constexpr float kToInteger = 0x1.8p23f;  // where a float's last place is worth 1
  const bool vanishes = x < -126.0f;
  x = vanishes ? -126.0f : x;
  const float shifted = x + kToInteger;
  const float r = x - (shifted - kToInteger);
  float p = 0x1.5ec866p-10f;
  p = p * r + 0x1.3cbf6p-7f;
  p = p * r + 0x1.c6afeep-5f;
  p = p * r + 0x1.ebfa4cp-3f;
  p = p * r + 0x1.62e43p-1f;
  p = p * r + 1.0f;
  p = p * from_bits((bits_of(shifted) << 23) + (127u << 23));
  return vanishes ? 0.0f : p;
}

// sums[r][c] += the `count` products of block[r, k] and panel[k][c]
template <int R, int C>
LFM2_INLINE void multiply(const float* panel, const float* block, int64_t row_stride,
                          int64_t stride, int64_t count, Lanes (&sums)[R][C]) {
  for (int64_t k = 0; k < count; ++k) {
    Lanes vectors[C];
#pragma GCC unroll 3
    for (int c = 0; c < C; ++c) load(panel + (k * C + c) * kLanes, vectors[c]);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const float number = block[r * row_stride + k * stride];
#pragma GCC unroll 3
      for (int c = 0; c < C; ++c) sums[r][c] += number * vectors[c];
    }
  }
}

// Rows from `first` on of a tile, in memory of size() floats. Numbers of a head are in the order in
// which `load` gives those of a T.
struct Panel {
  float* queries;  // [width][lanes], scaled
  float* sums;     // [width][lanes]
  float* best;     // [lanes]: largest score so far
  float* totals;   // [lanes]
  float* shrink;   // [lanes]: factor of the earlier sums from a block's scores
  int32_t* seen;   // [lanes]: keys that a row sees
  int64_t first;
  int64_t rows;
  int64_t vectors;

  static LFM2_INLINE int64_t size(int64_t width) { return (2 * width + 4) * kPanelRows; }
};

// Keys and values of a tile's sequence in floats: `count` from `position` on, `width` numbers each.
struct Block {
  int64_t position;
  int64_t count;
  int64_t width;
  const float* keys;
  const float* values;
};

template <class T>
struct FloatTiles {
  using Memory = float;
  static constexpr int64_t kPanels = 3;
  static constexpr int64_t kRows = kPanels * kPanelRows;

  static LFM2_INLINE int64_t padded(int64_t head_dim) {
    return (head_dim + kPair - 1) / kPair * kPair;
  }

  // Floats of scratch memory for a tile: panels, scores, keys, values, and a padded row.
  static LFM2_INLINE int64_t scratch(int64_t head_dim) {
    const int64_t width = padded(head_dim);
    return kPanels * Panel::size(width) + kTileKeys * (kPanelRows + 2 * width) + width;
  }

  // Fills `out` of the tile's rows; `scratch` has scratch() floats.
  static LFM2_CLONES void run(const FlashPrefill<T>& op, const Tile& tile, float* scratch) {
    const int64_t width = padded(op.k.head_dim);
    float* scores = scratch + kPanels * Panel::size(width);
    float* keys = scores + kTileKeys * kPanelRows;
    float* values = keys + kTileKeys * width;
    T* spare = reinterpret_cast<T*>(values + kTileKeys * width);
    Panel panels[kPanels];
    int64_t count = 0;
    for (int64_t first = 0; first < tile.rows; first += kPanelRows) {
      Panel& panel = panels[count];
      set_up(op, tile, first, scratch + count * Panel::size(width), panel);
      take_queries(op, tile, width, spare, panel);
      ++count;
    }
    const int64_t all = tile.keys(tile.rows - 1, op.group);
    for (int64_t position = 0; position < all; position += kTileKeys) {
      const int64_t here = std::min(kTileKeys, all - position);
      widen_rows(op.k, tile, position, here, width, spare, keys);
      widen_rows(op.v, tile, position, here, width, spare, values);
      const Block block{position, here, width, keys, values};
      for (int64_t i = 0; i < count; ++i) {
        if (panels[i].vectors == 3) {
          attend<3>(op, tile, panels[i], block, scores);
        } else if (panels[i].vectors == 2) {
          attend<2>(op, tile, panels[i], block, scores);
        } else {
          attend<1>(op, tile, panels[i], block, scores);
        }
      }
    }
    for (int64_t i = 0; i < count; ++i) give(op, tile, width, panels[i], keys);
  }

 private:
  static LFM2_INLINE void set_up(const FlashPrefill<T>& op, const Tile& tile, int64_t first,
                                 float* memory, Panel& panel) {
    const int64_t width = padded(op.k.head_dim);
    const int64_t rows = std::min(kPanelRows, tile.rows - first);
    const int64_t vectors = (rows + kLanes - 1) / kLanes;
    const int64_t lanes = vectors * kLanes;
    float* best = memory + 2 * width * lanes;
    panel = {memory,           memory + width * lanes, best, best + lanes,
             best + 2 * lanes, reinterpret_cast<int32_t*>(best + 3 * lanes),
             first,            rows,                   vectors};
    std::fill_n(memory, 2 * width * lanes, 0.0f);
    for (int64_t l = 0; l < lanes; ++l) {
      panel.best[l] = -std::numeric_limits<float>::infinity();
      panel.totals[l] = 0;
      const int64_t keys = tile.keys(first + std::min(l, rows - 1), op.group);
      panel.seen[l] = static_cast<int32_t>(keys);
    }
  }

  // A head's numbers as floats, with 0 up to `width`; `spare` has room for them.
  static LFM2_INLINE void widen_row(const T* row, int64_t head_dim, int64_t width, T* spare,
                                    float* to) {
    if (head_dim != width) {
      std::copy_n(row, head_dim, spare);
      std::fill_n(spare + head_dim, width - head_dim, T{});
      row = spare;
    }
    for (int64_t i = 0; i < width; i += kPair) {
      Lanes first, second;
      load(row + i, first, second);
      store(first, second, to + i);
    }
  }

  static LFM2_INLINE void widen_rows(const Pages<const T>& pages, const Tile& tile,
                                     int64_t position, int64_t count, int64_t width, T* spare,
                                     float* to) {
    for (const int64_t last = position + count; position < last;) {
      const int64_t rest = pages.page_size - position % pages.page_size;
      const int64_t here = std::min(rest, last - position);
      const T* rows = pages.row(tile.slot, tile.kv_head, position);
      for (int64_t j = 0; j < here; ++j) {
        widen_row(rows + j * pages.row_stride, pages.head_dim, width, spare, to);
        to += width;
      }
      position += here;
    }
  }

  static LFM2_INLINE void take_queries(const FlashPrefill<T>& op, const Tile& tile, int64_t width,
                                       T* spare, const Panel& panel) {
    // Scores are then exponents of 2.
    const float scale = 1.44269504f / std::sqrt(static_cast<float>(op.k.head_dim));
    const int64_t lanes = panel.vectors * kLanes;
    // The sums' memory holds a row, and is 0 again afterwards.
    for (int64_t row = 0; row < panel.rows; ++row) {
      const T* query = head_of(op, tile, op.q, panel.first + row);
      widen_row(query, op.k.head_dim, width, spare, panel.sums);
      for (int64_t i = 0; i < width; ++i) panel.queries[i * lanes + row] = panel.sums[i] * scale;
    }
    std::fill_n(panel.sums, width, 0.0f);
  }

  // Adds a block of keys and values to a panel of C vectors.
  template <int C>
  static LFM2_INLINE void attend(const FlashPrefill<T>& op, const Tile& tile, const Panel& panel,
                                 const Block& block, float* scores) {
    constexpr int R = kResults<C>;
    constexpr int64_t L = C * kLanes;
    const auto [position, count, width, keys, values] = block;
    if (position >= panel.seen[L - 1]) return;
    for (int64_t j = 0; j < count; j += R) {
      Lanes sums[R][C] = {};
      multiply<R, C>(panel.queries, keys + j * width, width, 1, width, sums);
      for (int r = 0; r < R; ++r) {
        for (int c = 0; c < C; ++c) store(sums[r][c], scores + (j + r) * L + c * kLanes);
      }
    }
    if (position + count > tile.keys(panel.first, op.group)) {
      hide<L>(panel, static_cast<int32_t>(position), count, scores);
    }
    soften<L>(panel, count, scores);
    for (int64_t i = 0; i < width; i += R) {
      Lanes sums[R][C];
      for (int c = 0; c < C; ++c) {
        Lanes shrink;
        load(panel.shrink + c * kLanes, shrink);
        for (int r = 0; r < R; ++r) {
          load(panel.sums + (i + r) * L + c * kLanes, sums[r][c]);
          sums[r][c] *= shrink;
        }
      }
      multiply<R, C>(scores, values + i, 1, width, count, sums);
      for (int r = 0; r < R; ++r) {
        for (int c = 0; c < C; ++c) store(sums[r][c], panel.sums + (i + r) * L + c * kLanes);
      }
    }
  }

  // Keys that a row does not see have a score of -infinity.
  template <int64_t L>
  static LFM2_INLINE void hide(const Panel& panel, int32_t position, int64_t count,
                               float* scores) {
    for (int64_t j = 0; j < count; ++j) {
      const int32_t at = position + static_cast<int32_t>(j);
#pragma omp simd
      for (int64_t l = 0; l < L; ++l) {
        float& score = scores[j * L + l];
        score = at < panel.seen[l] ? score : -std::numeric_limits<float>::infinity();
      }
    }
  }

  // Scores become weights relative to the largest score so far.
  template <int64_t L>
  static LFM2_INLINE void soften(const Panel& panel, int64_t count, float* scores) {
    float best[L];
    float total[L];
    std::copy_n(panel.best, L, best);
    for (int64_t j = 0; j < count; ++j) {
#pragma omp simd
      for (int64_t l = 0; l < L; ++l) {
        const float score = scores[j * L + l];
        best[l] = score > best[l] ? score : best[l];
      }
    }
#pragma omp simd
    for (int64_t l = 0; l < L; ++l) {
      panel.shrink[l] = power_of_two(panel.best[l] - best[l]);
      panel.best[l] = best[l];
      total[l] = panel.totals[l] * panel.shrink[l];
    }
    for (int64_t j = 0; j < count; ++j) {
#pragma omp simd
      for (int64_t l = 0; l < L; ++l) {
        const float weight = power_of_two(scores[j * L + l] - best[l]);
        scores[j * L + l] = weight;
        total[l] += weight;
      }
    }
    std::copy_n(total, L, panel.totals);
  }

  static LFM2_INLINE void give(const FlashPrefill<T>& op, const Tile& tile, int64_t width,
                               const Panel& panel, float* row_sums) {
    const int64_t lanes = panel.vectors * kLanes;
    for (int64_t row = 0; row < panel.rows; ++row) {
      T* out = head_of(op, tile, op.out, panel.first + row);
      for (int64_t i = 0; i < width; ++i) row_sums[i] = panel.sums[i * lanes + row];
      const float total = panel.totals[row];
      for (int64_t i = 0; i < width; i += kPair) {
        T numbers[kPair];
#pragma omp simd
        for (int64_t j = 0; j < kPair; ++j) narrow(row_sums[i + j] / total, numbers[j]);
        for (int64_t j = 0; j < kPair; ++j) {
          if (i + place<T>(j) < op.k.head_dim) out[i + place<T>(j)] = numbers[j];
        }
      }
    }
  }
};

}  // namespace lfm2
