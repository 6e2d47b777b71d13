// The dot products of groups.h in plain code, for processors that no other file is for.
#include "cpu_features.h"

#ifdef __clang__
#pragma STDC FP_CONTRACT OFF
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#endif
#include "groups.h"

namespace lfm2 {
namespace {

struct Plain {
  struct Ints {
    int8_t numbers[kDots * kLanes];
  };

  static LFM2_INLINE void halves(const uint8_t* from, Lanes& to) {
    float each[kLanes];
    for (int r = 0; r < kLanes; ++r) {
      fp16 word;
      std::memcpy(&word, from + 2 * r, sizeof word);
      each[r] = widen(word);
    }
    std::memcpy(&to, each, sizeof to);
  }

  static LFM2_INLINE void words(const uint8_t* from, Places& to) {
    int32_t each[kLanes];
    for (int r = 0; r < kLanes; ++r) each[r] = from[2 * r] | from[2 * r + 1] << 8;
    std::memcpy(&to, each, sizeof to);
  }

  static LFM2_INLINE void nibbles(const uint8_t* from, Ints* rows) {
    for (int step = 0; step < 4; ++step) {
      for (int i = 0; i < kDots * kLanes; ++i) {
        const uint8_t both = from[step * kDots * kLanes + i];
        rows[step].numbers[i] = static_cast<int8_t>(both & 15);
        rows[4 + step].numbers[i] = static_cast<int8_t>(both >> 4);
      }
    }
  }

  static LFM2_INLINE void bytes(const uint8_t* from, Ints* rows) {
    std::memcpy(rows, from, 8 * sizeof(Ints));
  }

  static LFM2_INLINE void dots(const Ints* rows, int steps, const int8_t* token, Places& sums) {
    int32_t each[kLanes] = {};
    for (int step = 0; step < steps; ++step) {
      for (int r = 0; r < kLanes; ++r) {
        for (int i = 0; i < kDots; ++i) {
          each[r] += rows[step].numbers[kDots * r + i] * token[kDots * step + i];
        }
      }
    }
    std::memcpy(&sums, each, sizeof sums);
  }

  static LFM2_INLINE void dots_of_nibbles(const Ints* rows, const int8_t* token, Places& sums) {
    dots(rows, 8, token, sums);
  }

  static LFM2_INLINE void dots_of_sixteen(const Ints* rows, const int8_t* token, Places& sums) {
    dots(rows, 4, token, sums);
  }
};

}  // namespace

void groups_plain(GroupKind kind, const GroupTokens& x, const GroupTile* tiles, int64_t count,
                  int64_t ahead, Lanes* sums) {
  with_format(kind, [&](auto format) LFM2_FLAT {
    dots_of_tiles<Plain, decltype(format)>(x, tiles, count, ahead, sums);
  });
}

}  // namespace lfm2
