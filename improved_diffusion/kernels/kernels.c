// Operations that are slow in PyTorch on a CPU, in C with GCC's vector types, for several generations of processors:
// of x86-64, AVX2, AVX-512 without bfloat16, with bfloat16 and with float16 too, and AMX; of ARM64, NEON without and
// with bfloat16. norm.py, attention.py, convolution.py, fused.py and update.py call them. Without this library,
// PyTorch's operations do the same.

#if !defined(__GNUC__) || defined(__clang__) || !(defined(__x86_64__) || defined(__aarch64__))
#error "written for GCC on x86-64 or ARM64"
#endif

#ifdef __aarch64__
#include <arm_neon.h>
#include <sys/auxv.h>
#else
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#include <limits.h>
#include <math.h>
#include <omp.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define MAX_GROUPS 1024
#define PIECE 4096  // numbers whose squares are summed in float32; the sums of the pieces are added in double
#define POSITIONS 128  // of convolutions with a kernel of size 1, computed together
#define POINTS 36  // numbers of a tile in winograd.h
#define TILES 32  // of winograd.h, computed together: as many as the caches hold
#define GAP 48  // numbers between the matrices of winograd.h, so that they do not compete for places in the caches

struct sizes {
    int positions, channels, groups, width;  // width: channels per group
};
struct conv {
    int images, height, width, in, out;
};
struct place {
    size_t image;
    int top, left;
};
struct adamw {
    float lr, beta1, beta2, rest1, rest2, epsilon, weight_decay, factor;  // rest: 1 - beta; factor: for the gradient
};
struct muon {
    float momentum, factor, keep, rate, a, b, c;  // keep, rate: for the weights and their step; a, b, c: of cpu/muon.py
    int iterations;
};

// A residual block (blocks.h): its input and weights, what is kept for the backward pass, and its result. floats: of both
// normalisations, [images * (groups + channels) * 2] each: means, deviations and working memory. Without skip_weight, the
// input itself is added.
struct residual {
    void *x, *modulation, *norm1_weight, *norm1_bias, *norm2_weight, *norm2_bias, *weight1, *bias1, *weight2, *bias2;
    void *skip_weight, *skip_bias, *h1, *c1, *h2, *skip, *y;
    float *floats, *room;
    int images, height, width, in, out, groups1, groups2, threads;
    float epsilon1, epsilon2;
};
struct residual_gradients {
    void *x, *modulation, *norm1_weight, *norm1_bias, *norm2_weight, *norm2_bias, *weight1, *bias1, *weight2, *bias2;
    void *skip_weight, *skip_bias, *h, *c1, *skip, *y;
};
// A block of attention, in the same way.
struct attending {
    void *x, *norm_weight, *norm_bias, *qkv_weight, *qkv_bias, *proj_weight, *proj_bias, *h, *qkv, *a, *y;
    float *floats, *logsums, *room;
    int images, positions, heads, width, groups, threads;
    float epsilon;
};
struct attending_gradients {
    void *x, *norm_weight, *norm_bias, *qkv_weight, *qkv_bias, *proj_weight, *proj_bias, *h, *qkv, *y;
};

// These are here, before the first generation, because GCC cannot inline what is compiled for a newer processor.
// Numbers in one of the 36 matrices of winograd.h.
static inline size_t winograd_matrix(size_t rows, size_t columns) { return rows * columns + GAP; }
// The first pixel of a tile of 4x4 pixels.
static inline struct place winograd_place(struct conv size, size_t tile) {
    size_t across = size.width / 4, tiles = size.height / 4 * across, number = tile % tiles;
    return (struct place){tile / tiles, (int)(number / across * 4), (int)(number % across * 4)};
}
// A side of a matrix in muon.h, in whole blocks, and the numbers from one row to the next: no multiple of 128 bytes, so
// that rows do not compete for places in the caches.
static inline size_t muon_length(size_t side) { return (side + 31) / 32 * 32; }
static inline size_t muon_row(size_t side) { return muon_length(side) + 16; }
static inline float bf16_to_float(uint16_t value) {
    uint32_t bits = (uint32_t)value << 16;
    float result;
    memcpy(&result, &bits, sizeof result);
    return result;
}
static inline uint16_t float_to_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    if (value != value) return (uint16_t)(bits >> 16 | 0x40);  // rounding could overflow a NaN to zero
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// The hash of the sources that this library was compiled from (see setup.py).
const char *sources(void) { return SOURCES; }

#ifdef __aarch64__

#define LEVEL(name) name##_neon
#include "level.h"
#undef LEVEL

#pragma GCC push_options
#pragma GCC target("arch=armv8.2-a+bf16")
#define LEVEL(name) name##_neonbf16
#include "level.h"
#undef LEVEL
#pragma GCC pop_options

// Whether this processor can run the functions of a generation, given by the end of their names.
int usable(const char *generation) {
    enum { HAS_BF16 = 1 << 14 };  // HWCAP2_BF16 of Linux
    if (!strcmp(generation, "neon")) return 1;
    return !strcmp(generation, "neonbf16") && getauxval(AT_HWCAP2) & HAS_BF16;
}

#else

#if __GNUC__ >= 12
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512fp16,avx2,fma")
#define LEVEL(name) name##_avx512fp16
#include "level.h"
#undef LEVEL
#pragma GCC pop_options
#endif

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")
#define LEVEL(name) name##_avx512bf16
#include "level.h"
#undef LEVEL
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
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

// Whether this processor can run the functions of a generation, given by the end of their names.
__attribute__((target("arch=x86-64"))) int usable(const char *generation) {
    __builtin_cpu_init();
    int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    int avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
    if (!strcmp(generation, "avx2")) return avx2;
    if (!strcmp(generation, "avx512")) return avx512;
    int bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
    if (!strcmp(generation, "avx512bf16")) return bf16;
#if __GNUC__ >= 12
    if (!strcmp(generation, "avx512fp16")) return bf16 && __builtin_cpu_supports("avx512fp16");
#endif
#if __GNUC__ >= 11
    if (!strcmp(generation, "amx_emulated")) return bf16;
    if (!strcmp(generation, "amx"))
        return bf16 && __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") && tiles_work();
#endif
    return 0;
}

#endif
