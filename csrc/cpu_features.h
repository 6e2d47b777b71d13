// Compilers that can make code for newer processors than their target, and the instructions of this
// machine for which there are separate files, *_avx*.cpp and *_neon*.cpp.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define LFM2_GCC_X86
#endif

// On AArch64 GCC makes code for any processor, other compilers only for their target.
#if defined(__aarch64__) && defined(__GNUC__) && !defined(__clang__)
#define LFM2_GCC_ARM
#endif
#if defined(LFM2_GCC_ARM) || (defined(__aarch64__) && defined(__ARM_FEATURE_DOTPROD))
#define LFM2_ARM_DOT
#endif
#if defined(LFM2_GCC_ARM) || (defined(__aarch64__) && defined(__ARM_FEATURE_MATMUL_INT8))
#define LFM2_ARM_I8MM
#endif
#if defined(LFM2_GCC_ARM) || (defined(__aarch64__) && defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC))
#define LFM2_ARM_BF16
#endif

#if defined(LFM2_GCC_ARM) && defined(__linux__)
#include <sys/auxv.h>
#endif

// LFM2_NO_CLONES ignores those files, so that the plain code is tested on any processor.
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

// Every AArch64 has NEON.
#if defined(__aarch64__) && !defined(LFM2_NO_CLONES)
#define LFM2_HAS_NEON true
#else
#define LFM2_HAS_NEON false
#endif
#if defined(LFM2_GCC_ARM) && defined(__linux__) && !defined(LFM2_NO_CLONES)
// Bits of the kernel's capabilities, as numbers: older headers have no names for them.
#define LFM2_HAS_ARM_DOT ((getauxval(AT_HWCAP) >> 20 & 1) != 0)
#define LFM2_HAS_ARM_I8MM ((getauxval(AT_HWCAP2) >> 13 & 1) != 0)
#define LFM2_HAS_ARM_BF16 ((getauxval(AT_HWCAP2) >> 14 & 1) != 0)
#else
#if defined(__aarch64__) && defined(__ARM_FEATURE_DOTPROD) && !defined(LFM2_NO_CLONES)
#define LFM2_HAS_ARM_DOT true
#else
#define LFM2_HAS_ARM_DOT false
#endif
#if defined(__aarch64__) && defined(__ARM_FEATURE_MATMUL_INT8) && !defined(LFM2_NO_CLONES)
#define LFM2_HAS_ARM_I8MM true
#else
#define LFM2_HAS_ARM_I8MM false
#endif
#if defined(__aarch64__) && defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC) && \
    !defined(LFM2_NO_CLONES)
#define LFM2_HAS_ARM_BF16 true
#else
#define LFM2_HAS_ARM_BF16 false
#endif
#endif
