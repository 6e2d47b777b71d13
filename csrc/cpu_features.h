// Which compilers can make code for newer x86-64 machines than the one that they build for, and
// which instructions with files of their own, *_avx*.cpp, the machine at hand has.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define LFM2_GCC_X86
#endif

// LFM2_NO_CLONES leaves those files aside, so that the plain bodies are tested on any machine.
#if defined(LFM2_GCC_X86) && !defined(LFM2_NO_CLONES)
#define LFM2_HAS_AVX512BF16 \
  (__builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("x86-64-v4"))
#define LFM2_HAS_AVX512VNNI \
  (__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("x86-64-v4"))
#define LFM2_HAS_AVXVNNI \
  (__builtin_cpu_supports("avxvnni") && __builtin_cpu_supports("x86-64-v3"))
#define LFM2_HAS_AVX2 __builtin_cpu_supports("x86-64-v3")
#else
#define LFM2_HAS_AVX512BF16 false
#define LFM2_HAS_AVX512VNNI false
#define LFM2_HAS_AVXVNNI false
#define LFM2_HAS_AVX2 false
#endif
