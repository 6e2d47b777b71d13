// Matrices in groups: the format of groups.h that two tensors hold, and the rows of a matrix.
#pragma once

#include <algorithm>
#include <vector>

#include "checks.h"
#include "groups.h"

namespace lfm2 {

// A matrix [rows, size] in groups.
struct GroupMatrix {
  GroupKind kind;
  const uint8_t* numbers;
  const uint8_t* scales;
  int64_t rows;
  int64_t size;
  int64_t number_bytes;  // of a row
  int64_t scale_bytes;   // of a row

  // Rows 8 * `t` and after, if all eight are there.
  LFM2_INLINE GroupTile tile(int64_t t) const {
    return {numbers + t * kLanes * number_bytes, scales + t * kLanes * scale_bytes};
  }
};

// The matrix in `weight` and `scales`, by their types and shapes. Fails for an unknown format.
inline GroupMatrix group_matrix_of(const Tensor& weight, const Tensor& scales, int64_t rows,
                                   int64_t size) {
  STD_TORCH_CHECK(size % kPiece == 0, "rows of ", size, " numbers are not whole groups of ",
                  kPiece);
  const bool nibbles = weight.scalar_type() == ScalarType::Byte;
  expect_packed(weight, "weight", nibbles ? ScalarType::Byte : ScalarType::Char,
                {rows, nibbles ? size / 2 : size});
  expect_packed(scales, "scales", scales.scalar_type(), {rows, -1});
  const ScalarType words = scales.scalar_type();
  const int64_t bytes = scales.size(1) * (words == ScalarType::Byte ? 1
                                          : words == ScalarType::Half ? 2 : 4);
  for (const GroupKind kind : kGroupKinds) {
    bool fits = false;
    int64_t number_bytes = 0;
    with_format(kind, [&](auto format) {
      using F = decltype(format);
      const ScalarType wanted = F::kBytes ? ScalarType::Byte
                                : F::kScales == Scales::kHalf ? ScalarType::Half
                                                              : ScalarType::Float;
      fits = F::kBits == (nibbles ? 4 : 8) && words == wanted && F::scale_bytes(size) == bytes &&
             (!F::kBytes || size % kSuper == 0);
      number_bytes = F::number_bytes(size);
    });
    if (fits) {
      const auto* from = static_cast<const uint8_t*>(weight.const_data_ptr());
      const auto* by = static_cast<const uint8_t*>(scales.const_data_ptr());
      return {kind, from, by, rows, size, number_bytes, bytes};
    }
  }
  STD_TORCH_CHECK(false, "scales of width ", scales.size(1), " fit no format of groups");
}

// The last rows, fewer than eight, filled up with zeros. Empty if there are none.
class LastTile {
 public:
  explicit LastTile(const GroupMatrix& matrix) {
    const int64_t count = matrix.rows % kLanes;
    if (count == 0) return;
    const GroupTile tile = matrix.tile(matrix.rows / kLanes);
    spread(tile.numbers, count, matrix.number_bytes, kDots, numbers_);
    bool words = false;
    with_format(matrix.kind, [&](auto format) {
      words = decltype(format)::kScales == Scales::kFloat;
    });
    spread(tile.scales, count, matrix.scale_bytes, words ? 4 : 2, scales_);
  }

  GroupTile tile() const { return {numbers_.data(), scales_.data()}; }

 private:
  // Units of `count` rows, as units of eight.
  static void spread(const uint8_t* from, int64_t count, int64_t bytes, int64_t unit,
                     std::vector<uint8_t>& to) {
    to.resize(bytes * kLanes);
    for (int64_t k = 0; k < bytes / unit; ++k) {
      std::copy_n(from + k * unit * count, unit * count, to.data() + k * unit * kLanes);
    }
  }

  std::vector<uint8_t> numbers_;
  std::vector<uint8_t> scales_;
};

// A row's numbers are rounded before a minimum is added, as the formats say.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC push_options
#pragma GCC optimize("fp-contract=off")
#endif

// Row `row` of a matrix, as numbers.
template <class T>
void widen_row(const GroupMatrix& matrix, int64_t row, T* to) {
  const int64_t first = row / kLanes * kLanes;
  const int64_t lanes = std::min(kLanes, matrix.rows - first);
  const int64_t lane = row - first;
  const uint8_t* numbers = matrix.numbers + first * matrix.number_bytes;
  const uint8_t* scales = matrix.scales + first * matrix.scale_bytes;
  const auto unit_of = [&](const uint8_t* from, int64_t unit, int64_t size) {
    return from + (unit * lanes + lane) * size;
  };
  with_format(matrix.kind, [&](auto format) {
    using F = decltype(format);
    const auto half = [&](int64_t unit) {
      fp16 word;
      std::memcpy(&word, unit_of(scales, unit, 2), sizeof word);
      return widen(word);
    };
    const auto scale_of = [&](int64_t g, int64_t word) {
      if constexpr (F::kBytes) {
        constexpr int64_t kCount = kSuper / F::kGroup;
        const int64_t unit = g / kCount * F::kBlockBytes / 2;
        const int64_t byte = word * kCount + g % kCount;
        const uint8_t small = unit_of(scales, unit + F::kWords + byte / 2, 2)[byte % 2];
        const bool is_signed = F::kScales == Scales::kSignedByte;
        return half(unit + word) *
               (is_signed ? static_cast<float>(static_cast<int8_t>(small)) : small);
      } else if constexpr (F::kScales == Scales::kHalf) {
        return half(g * F::kWords + word);
      } else {
        float value;
        std::memcpy(&value, unit_of(scales, g * F::kWords + word, 4), sizeof value);
        return value;
      }
    };
    for (int64_t g = 0; g < matrix.size / F::kGroup; ++g) {
      const float scale = scale_of(g, 0);
      const float minimum = F::kMinimums ? scale_of(g, F::kMinimums ? 1 : 0) : 0.0f;
      for (int64_t i = 0; i < F::kGroup; ++i) {
        const int64_t k = g * F::kGroup + i;
        int32_t number;
        if constexpr (F::kBits == 4) {
          const int64_t low = k / kPiece * 16 + k % 16;
          const uint8_t both = unit_of(numbers, low / kDots, kDots)[low % kDots];
          number = (k % kPiece < 16 ? both & 15 : both >> 4) - F::kOffset;
        } else {
          number = static_cast<int8_t>(unit_of(numbers, k / kDots, kDots)[k % kDots]);
        }
        const float product = static_cast<float>(number) * scale;
        narrow(F::kMinimums ? product + minimum : product, to[k]);
      }
    }
  });
}

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC pop_options
#endif

}  // namespace lfm2
