// All kernels for one generation of processors. Their names are LEVEL(name); see kernels.c.

#ifdef __AVX512F__
#define WIDTH 16
#define VECTOR(operation) _mm512_##operation
#define VECTOR_TYPE(suffix) __m512##suffix
#define HALF __m256i
#define ROWS 8  // rows of a matrix product that are computed together; more would not fit in the registers
#else
#define WIDTH 8
#define VECTOR(operation) _mm256_##operation
#define VECTOR_TYPE(suffix) __m256##suffix
#define HALF __m128i
#define ROWS 4
#endif
#define vec VECTOR_TYPE()
#define get VECTOR(loadu_ps)
#define put VECTOR(storeu_ps)
#define zero VECTOR(setzero_ps)

static inline vec LEVEL(load_bf16)(const uint16_t *from) {
    HALF bits;
    memcpy(&bits, from, sizeof bits);
    return (vec)VECTOR(slli_epi32)(VECTOR(cvtepu16_epi32)(bits), 16);
}
static inline void LEVEL(store_bf16)(uint16_t *to, vec v) {
#if defined(__AVX512BF16__)
    HALF bits = (HALF)_mm512_cvtneps_pbh(v);
#elif defined(__AVX512F__)
    __m512i wide = (__m512i)v, last = _mm512_and_si512(_mm512_srli_epi32(wide, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(wide, _mm512_add_epi32(last, _mm512_set1_epi32(0x7fff))), 16);
    // Rounding could overflow a NaN to zero.
    __m512i nan = _mm512_or_si512(_mm512_srli_epi32(wide, 16), _mm512_set1_epi32(0x40));
    HALF bits = _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), nan));
#else
    __m256i wide = (__m256i)v, last = _mm256_and_si256(_mm256_srli_epi32(wide, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(wide, _mm256_add_epi32(last, _mm256_set1_epi32(0x7fff))), 16);
    __m256i nan = _mm256_or_si256(_mm256_srli_epi32(wide, 16), _mm256_set1_epi32(0x40));
    wide = _mm256_blendv_epi8(rounded, nan, (__m256i)_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    HALF bits = _mm_packus_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
#endif
    memcpy(to, &bits, sizeof bits);
}

// exp(x), exact to a few units in the seventh digit: 2^(x log2(e)) = 2^whole 2^f, with a polynomial for 2^f, where f is
// in [-1/2, 1/2].
static inline vec LEVEL(exponential)(vec x) {
    const float most = 126;
    // If an operand is NaN, these instructions return the second one, so a NaN in x remains NaN.
    x = VECTOR(min_ps)(VECTOR(set1_ps)(most), VECTOR(max_ps)(VECTOR(set1_ps)(-most), x * 1.44269504f));
#ifdef __AVX512F__
    vec whole = _mm512_roundscale_ps(x, 0);
#else
    vec whole = _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#endif
    vec f = x - whole;
    vec p = 1 + f * (0.693147181f + f * (0.240226507f + f * (0.0555041087f + f * (0.00961812911f + f *
            (0.00133335581f + f * 0.000154035304f)))));
    VECTOR_TYPE(i) shifted = VECTOR(slli_epi32)(VECTOR(cvtps_epi32)(whole), 23);
    return (vec)VECTOR(add_epi32)((VECTOR_TYPE(i))p, shifted);
}
static inline vec LEVEL(sigmoid)(vec x) { return 1 / (1 + LEVEL(exponential)(-x)); }
static inline vec LEVEL(rough_sigmoid)(vec x) {
#ifdef __AVX512F__
    return _mm512_rcp14_ps(1 + LEVEL(exponential)(-x));  // exact to 4 digits, more than bfloat16 holds
#else
    return LEVEL(sigmoid)(x);
#endif
}

static inline float LEVEL(total)(vec v) {
    float parts[WIDTH], sum = 0;
    put(parts, v);
    for (int k = 0; k < WIDTH; k++) sum += parts[k];
    return sum;
}
static inline float LEVEL(largest)(vec v) {
    float parts[WIDTH];
    put(parts, v);
    float most = parts[0];
    for (int k = 1; k < WIDTH; k++) most = parts[k] > most ? parts[k] : most;
    return most;
}
#ifdef __AVX512BF16__
// Convert two vectors to bfloat16 and pack them as pairs, with the numbers of the first in the lower halves.
static inline vec LEVEL(pack_pairs)(vec first, vec second) {
    __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(first));
    __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(second));
    return (vec)_mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}
#endif

#define STORED uint16_t
#define TYPED(name) LEVEL(name##_bf16)
#define LOAD LEVEL(load_bf16)
#define STORE LEVEL(store_bf16)
#define SIGMOID LEVEL(rough_sigmoid)
#define TO_FLOAT bf16_to_float
#define FROM_FLOAT float_to_bf16
#ifdef __AVX512BF16__
#define UNIT 2
#define ADD_PRODUCTS(sum, a, b) _mm512_dpbf16_ps(sum, (__m512bh)(a), (__m512bh)(b))
#define PACK LEVEL(pack_pairs)
#endif
#include "typed.h"

#define STORED float
#define TYPED(name) LEVEL(name##_fp32)
#define LOAD get
#define STORE put
#define SIGMOID LEVEL(sigmoid)
#define TO_FLOAT(x) (x)
#define FROM_FLOAT(x) (x)
#define UNIT 1
#define ADD_PRODUCTS(sum, a, b) VECTOR(fmadd_ps)(a, b, sum)
#define PACK(first, second) (first)
#include "typed.h"

#include "update.h"

#undef WIDTH
#undef VECTOR
#undef VECTOR_TYPE
#undef HALF
#undef zero
#undef ROWS
#undef vec
#undef get
#undef put
