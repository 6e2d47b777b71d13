// The number types of tensors, and the compilation of loops over them.
//
// Every operation widens what it loads to float, computes, and narrows what it stores. `rounded`
// marks the places where the reference rounds to the tensor's type in the middle of a formula.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu_features.h"

// A function under LFM2_CLONES is compiled once for each instruction set, with all inlined
// functions, and the loader takes the best one for the processor. With LFM2_NO_CLONES -march
// decides, so that each instruction set can be tested alone.
#if defined(LFM2_GCC_X86) && defined(__gnu_linux__) && !defined(LFM2_NO_CLONES)
#define LFM2_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define LFM2_CLONES __attribute__((noinline))
#if defined(__x86_64__) && !defined(__AVX2__)
#define LFM2_LACKS_AVX2
#endif
#endif

// A call from a clone would reach code for the oldest processor, so its helpers are inlined.
#ifdef __CUDACC__
#define LFM2_INLINE __host__ __device__ inline __attribute__((always_inline))
#else
#define LFM2_INLINE inline __attribute__((always_inline))
#endif

// The same for a lambda: the compiler does not see that its calls are in a clone.
#define LFM2_FLAT __attribute__((always_inline))

namespace lfm2 {

struct bf16 {
  uint16_t bits;
};

struct fp16 {
  uint16_t bits;
};

LFM2_INLINE uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

LFM2_INLINE float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

LFM2_INLINE float widen(float value) { return value; }

LFM2_INLINE float widen(int8_t value) { return value; }

LFM2_INLINE float widen(bf16 value) { return from_bits(static_cast<uint32_t>(value.bits) << 16); }

// Subnormals come from an integer below a fixed exponent, so that no float is ever subnormal here
// and flush-to-zero modes change nothing.
LFM2_INLINE float widen(fp16 value) {
  const uint32_t shifted = static_cast<uint32_t>(value.bits) << 16;
  const uint32_t sign = shifted & 0x80000000u;
  const uint32_t doubled = shifted << 1;
  const float normal = from_bits((doubled >> 4) + (0xE0u << 23)) * 0x1p-112f;
  const float subnormal = from_bits((doubled >> 17) | (126u << 23)) - 0.5f;
  return from_bits(sign | (doubled < (1u << 27) ? bits_of(subnormal) : bits_of(normal)));
}

LFM2_INLINE void narrow(float value, float& stored) { stored = value; }

LFM2_INLINE void narrow(float value, bf16& stored) {
  const uint32_t bits = bits_of(value);
  const uint32_t even = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  stored.bits = static_cast<uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : even);
}

// Adding a power of two that is 13 bits above the value makes the float unit round it to even where
// half's mantissa ends.
LFM2_INLINE void narrow(float value, fp16& stored) {
  const uint32_t bits = bits_of(value);
  const uint32_t doubled = bits << 1;
  const float magnitude = from_bits(bits & 0x7FFFFFFFu);
  // Values too large for half overflow to infinity here and stay it.
  const float scaled = (magnitude * 0x1p112f) * 0x1p-110f;
  const uint32_t exponent = doubled & 0xFF000000u;
  const uint32_t bias = exponent < 0x71000000u ? 0x71000000u : exponent;
  const uint32_t sum = bits_of(from_bits((bias >> 1) + 0x07800000u) + scaled);
  const uint32_t half = ((sum >> 13) & 0x7C00u) + (sum & 0x0FFFu);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  stored.bits = static_cast<uint16_t>(sign | (doubled > 0xFF000000u ? 0x7E00u : half));
}

template <class T>
LFM2_INLINE T narrowed(float value) {
  T stored;
  narrow(value, stored);
  return stored;
}

// `value` after rounding to a T.
template <class T>
LFM2_INLINE float rounded(float value) {
  return widen(narrowed<T>(value));
}

// A matrix with rows `stride` numbers apart.
template <class T>
struct Rows {
  T* data;
  int64_t stride;

  LFM2_INLINE T* operator[](int64_t row) const { return data + row * stride; }
};

}  // namespace lfm2
