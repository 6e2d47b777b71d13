// Eight floats at a time, for sums that must stay in registers; the compiler turns these vectors
// into the registers that the processor has. They are passed by reference: by value, they would be
// part of a calling convention that differs between instruction sets.
#pragma once

#include "dtypes.h"

// GCC for AArch64 keeps vectors in memory that are longer than a register: there they are pairs.
#if defined(__aarch64__) && !defined(__clang__)
#include "simd_pairs.h"
#else

// Lanes of two vectors, by number, those of the second after those of the first. GCC 11 has only
// its own name for it, clang only the other one.
#if defined(__clang__) || __GNUC__ >= 12
#define LFM2_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define LFM2_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, lfm2::Places{__VA_ARGS__})
#endif

namespace lfm2 {

typedef float Lanes __attribute__((vector_size(32)));
typedef uint32_t Words __attribute__((vector_size(32)));
typedef int32_t Places __attribute__((vector_size(32)));
// The same in memory, anywhere.
typedef float LooseLanes __attribute__((vector_size(32), aligned(4), may_alias));
typedef uint32_t LooseWords __attribute__((vector_size(32), aligned(2), may_alias));
typedef int32_t LooseQuads __attribute__((vector_size(16), aligned(1), may_alias));

constexpr int64_t kLanes = 8;
constexpr int64_t kPair = 2 * kLanes;  // numbers of one load

LFM2_INLINE void load(const void* from, Lanes& lanes) {
  lanes = *reinterpret_cast<const LooseLanes*>(from);
}

LFM2_INLINE void to_floats(const Places& integers, Lanes& floats) {
  floats = __builtin_convertvector(integers, Lanes);
}

// Sixteen numbers in two vectors, in the cheapest order for their type. 16-bit types are loaded as
// words of two neighbours, so one vector has the even places and one the odd places.
LFM2_INLINE void load(const float* from, Lanes& first, Lanes& second) {
  first = *reinterpret_cast<const LooseLanes*>(from);
  second = *reinterpret_cast<const LooseLanes*>(from + kLanes);
}

LFM2_INLINE void load(const bf16* from, Lanes& even, Lanes& odd) {
  const Words words = *reinterpret_cast<const LooseWords*>(from);
  even = reinterpret_cast<Lanes>(words << 16);
  odd = reinterpret_cast<Lanes>(words & 0xFFFF0000u);
}

// `widen(fp16)`, of halves in the upper 16 bits of words whose lower bits are 0.
LFM2_INLINE void widen(const Words& shifted, Lanes& wide) {
  const Words doubled = shifted << 1;
  const Lanes normal = reinterpret_cast<Lanes>((doubled >> 4) + (0xE0u << 23)) * 0x1p-112f;
  const Lanes subnormal = reinterpret_cast<Lanes>((doubled >> 17) | (126u << 23)) - 0.5f;
  const Words magnitude = doubled < (1u << 27) ? reinterpret_cast<Words>(subnormal)
                                               : reinterpret_cast<Words>(normal);
  wide = reinterpret_cast<Lanes>((shifted & 0x80000000u) | magnitude);
}

LFM2_INLINE void load(const fp16* from, Lanes& even, Lanes& odd) {
  const Words words = *reinterpret_cast<const LooseWords*>(from);
  widen(words << 16, even);
  widen(words & 0xFFFF0000u, odd);
}

// A word has four numbers, so a vector has the first of every word and then the second, or the
// third and then the fourth. A direct conversion of eight bytes takes some thirty instructions in
// GCC 12.
LFM2_INLINE void load(const int8_t* from, Lanes& first, Lanes& second) {
  // A copy: through a reference the compiler would assume alignment.
  const LooseQuads q = *reinterpret_cast<const LooseQuads*>(from);
  const Places words = {q[0], q[1], q[2], q[3], q[0], q[1], q[2], q[3]};
  first = __builtin_convertvector((words << Places{24, 24, 24, 24, 16, 16, 16, 16}) >> 24, Lanes);
  second = __builtin_convertvector((words << Places{8, 8, 8, 8, 0, 0, 0, 0}) >> 24, Lanes);
}

LFM2_INLINE void store(const Lanes& lanes, float* to) {
  *reinterpret_cast<LooseLanes*>(to) = lanes;
}

LFM2_INLINE void store(const Lanes& first, const Lanes& second, float* to) {
  store(first, to);
  store(second, to + kLanes);
}

// Inverse of the order of `load`: the place of lane `i` of both vectors among the sixteen numbers.
template <class T>
LFM2_INLINE constexpr int64_t place(int64_t i) {
  return sizeof(T) == sizeof(float) ? i : i < kLanes ? 2 * i : 2 * (i - kLanes) + 1;
}

// sums[i] = the sum of the lanes of v[i], eight vectors, which are Lanes or Places
template <class V>
LFM2_INLINE void sum_lanes(const V* v, V& sums) {
  V pairs[4];
  V quads[2];
  for (int i = 0; i < 4; ++i) {
    const V &a = v[2 * i], &b = v[2 * i + 1];
    pairs[i] = LFM2_SHUFFLE(a, b, 0, 8, 2, 10, 4, 12, 6, 14) +
               LFM2_SHUFFLE(a, b, 1, 9, 3, 11, 5, 13, 7, 15);
  }
  for (int i = 0; i < 2; ++i) {
    const V &a = pairs[2 * i], &b = pairs[2 * i + 1];
    quads[i] = LFM2_SHUFFLE(a, b, 0, 1, 8, 9, 4, 5, 12, 13) +
               LFM2_SHUFFLE(a, b, 2, 3, 10, 11, 6, 7, 14, 15);
  }
  sums = LFM2_SHUFFLE(quads[0], quads[1], 0, 1, 2, 3, 8, 9, 10, 11) +
         LFM2_SHUFFLE(quads[0], quads[1], 4, 5, 6, 7, 12, 13, 14, 15);
}

}  // namespace lfm2
#endif
