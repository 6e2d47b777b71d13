// Which compilers can make code for newer x86-64 machines than the one that they build for.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define LFM2_GCC_X86
#endif
