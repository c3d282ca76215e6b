/* The loops for processors of level x86-64-v3 (AVX2 and what came with it); module.c uses them where they can run. */
#include "core.h"

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,bmi,bmi2,popcnt"))), apply_to = function)
#else
#pragma GCC target("avx2,bmi,bmi2,popcnt")
#endif

#define WITH_AVX2
#define LEVEL "x86-64-v3"
#define LOOPS loops_x86_64_v3
#include "loops/all.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif

#else
typedef int not_for_this_architecture;
#endif
