// Operations that PyTorch has no fast version of on a CPU. Plain C with GCC's vectors, for two generations of
// processors: AVX2, and AVX-512 with 16-bit conversions. norm.py, attention.py and update.py call them. Where this
// file is not compiled, PyTorch does the same.

#if !defined(__GNUC__) || defined(__clang__) || !defined(__x86_64__)
#error "written for GCC on x86-64"
#endif

#include <immintrin.h>
#include <math.h>
#include <omp.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define MAX_GROUPS 1024
#define PIECE 4096  // squares are summed up in float32 within it

struct sizes {
    int positions, channels, groups, width;  // width: channels of a group
};
struct adamw {
    float lr, beta1, beta2, rest1, rest2, epsilon, weight_decay, factor;  // rest: 1 - beta; factor: of the gradient
};

static inline float bf16_to_float(uint16_t value) {
    uint32_t bits = (uint32_t)value << 16;
    float result;
    memcpy(&result, &bits, sizeof result);
    return result;
}
static inline uint16_t float_to_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    if (value != value) return (uint16_t)(bits >> 16 | 0x40);  // rounding could carry a NaN over to zero
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")
#define LEVEL(name) name##_avx512
#include "level.h"
#undef LEVEL
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define LEVEL(name) name##_avx2
#include "level.h"
#undef LEVEL
#pragma GCC pop_options

// What this was compiled from: setup.py's hash of the sources.
const char *sources(void) { return SOURCES; }

// Which of them this processor can run: the newest generation, 2 or 1, or 0 for none.
__attribute__((target("arch=x86-64"))) int processor_level(void) {
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 0;
    return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") ? 2 : 1;
}
