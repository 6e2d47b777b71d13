// The vectors of simd.h for GCC on AArch64: each is two registers.
//
// `load` gives numbers of every type in their order.
#pragma once

#include <arm_neon.h>

#include "dtypes.h"
#include "neon_totals.h"

namespace lfm2 {

constexpr int64_t kLanes = 8;
constexpr int64_t kPair = 2 * kLanes;  // numbers that one load takes

template <class T>
struct Pair {
  typedef T Half __attribute__((vector_size(16)));
  Half low, high;

  LFM2_INLINE T operator[](int64_t i) const { return i < 4 ? low[i] : high[i - 4]; }

  LFM2_INLINE friend Pair operator+(const Pair& a, const Pair& b) {
    return {a.low + b.low, a.high + b.high};
  }
  LFM2_INLINE friend Pair operator*(const Pair& a, const Pair& b) {
    return {a.low * b.low, a.high * b.high};
  }
  LFM2_INLINE friend Pair operator*(const Pair& a, T b) { return {a.low * b, a.high * b}; }
  LFM2_INLINE friend Pair operator*(T a, const Pair& b) { return b * a; }
  LFM2_INLINE friend Pair operator&(const Pair& a, T b) { return {a.low & b, a.high & b}; }
  LFM2_INLINE friend Pair operator<<(const Pair& a, int b) { return {a.low << b, a.high << b}; }
  LFM2_INLINE friend Pair operator>>(const Pair& a, int b) { return {a.low >> b, a.high >> b}; }
  LFM2_INLINE Pair& operator+=(const Pair& b) { return *this = *this + b; }
  LFM2_INLINE Pair& operator*=(const Pair& b) { return *this = *this * b; }
  LFM2_INLINE Pair& operator-=(T b) {
    low -= b;
    high -= b;
    return *this;
  }
};

using Lanes = Pair<float>;
using Places = Pair<int32_t>;

LFM2_INLINE void load(const float* from, Lanes& lanes) {
  lanes = {vld1q_f32(from), vld1q_f32(from + 4)};
}

LFM2_INLINE void load(const void* from, Lanes& lanes) {
  load(static_cast<const float*>(from), lanes);
}

LFM2_INLINE void to_floats(const Places& integers, Lanes& floats) {
  floats = {vcvtq_f32_s32(integers.low), vcvtq_f32_s32(integers.high)};
}

LFM2_INLINE void load(const float* from, Lanes& first, Lanes& second) {
  load(from, first);
  load(from + kLanes, second);
}

// Eight bfloat16 or halves, as floats.
LFM2_INLINE void widen(const uint16x8_t& words, bf16, Lanes& lanes) {
  lanes = {reinterpret_cast<float32x4_t>(vshll_n_u16(vget_low_u16(words), 16)),
           reinterpret_cast<float32x4_t>(vshll_high_n_u16(words, 16))};
}

LFM2_INLINE void widen(const uint16x8_t& words, fp16, Lanes& lanes) {
  const auto halves = reinterpret_cast<float16x8_t>(words);
  lanes = {vcvt_f32_f16(vget_low_f16(halves)), vcvt_high_f32_f16(halves)};
}

template <class T>
LFM2_INLINE void load(const T* from, Lanes& first, Lanes& second) {
  const auto* words = reinterpret_cast<const uint16_t*>(from);
  widen(vld1q_u16(words), T{}, first);
  widen(vld1q_u16(words + kLanes), T{}, second);
}

LFM2_INLINE void load(const int8_t* from, Lanes& first, Lanes& second) {
  const int8x16_t bytes = vld1q_s8(from);
  const int16x8_t low = vmovl_s8(vget_low_s8(bytes));
  const int16x8_t high = vmovl_high_s8(bytes);
  to_floats({vmovl_s16(vget_low_s16(low)), vmovl_high_s16(low)}, first);
  to_floats({vmovl_s16(vget_low_s16(high)), vmovl_high_s16(high)}, second);
}

LFM2_INLINE void store(const Lanes& lanes, float* to) {
  vst1q_f32(to, lanes.low);
  vst1q_f32(to + 4, lanes.high);
}

LFM2_INLINE void store(const Lanes& first, const Lanes& second, float* to) {
  store(first, to);
  store(second, to + kLanes);
}

// Which of sixteen numbers lane `i` of both vectors holds: they are in their order.
template <class T>
LFM2_INLINE constexpr int64_t place(int64_t i) {
  return i;
}

// sums[i] = the sum of the lanes of v[i], eight vectors
template <class T>
LFM2_INLINE void sum_lanes(const Pair<T>* v, Pair<T>& sums) {
  typename Pair<T>::Half quads[8];
  for (int i = 0; i < 8; ++i) quads[i] = v[i].low + v[i].high;
  for (int i = 0; i < 4; ++i) quads[i] = pairs_of(quads[2 * i], quads[2 * i + 1]);
  sums = {pairs_of(quads[0], quads[1]), pairs_of(quads[2], quads[3])};
}

}  // namespace lfm2
