// Vectors of numbers, and operations on them, for x86-64: AVX-512 or AVX2. neon.h has the same names for ARM64.

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
#define splat VECTOR(set1_ps)
#define minimum VECTOR(min_ps)
#define maximum VECTOR(max_ps)
#define square_root VECTOR(sqrt_ps)
// v * f + sum, for each number of the vector v and one float f, which is given by its bits.
#define broadcast(bits) VECTOR(set1_epi32)(bits)
#define add_products(sum, v, f) VECTOR(fmadd_ps)(v, (vec)broadcast(f), sum)

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

#ifndef __AVX512F__
// The nearest whole numbers.
static inline vec LEVEL(nearest)(vec x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// x * 2^power, for whole powers and normal numbers x.
static inline vec LEVEL(scale)(vec x, vec power) {
    return (vec)_mm256_add_epi32((__m256i)x, _mm256_slli_epi32(_mm256_cvtps_epi32(power), 23));
}
static inline vec LEVEL(rough_reciprocal)(vec x) { return 1 / x; }
#endif

#ifdef __AVX512BF16__
// Convert two vectors to bfloat16 and pack them as pairs, with the numbers of the first in the lower halves.
static inline vec LEVEL(pack_pairs)(vec first, vec second) {
    typedef short numbers __attribute__((vector_size(64)));
    numbers both = (numbers)_mm512_cvtne2ps_pbh(second, first);
    return (vec)__builtin_shuffle(both, (numbers){0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                  8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31});
}
// Pairs of numbers of 16 bits, those of the first in the lower halves.
static inline vec LEVEL(pairs)(const uint16_t *first, const uint16_t *second) {
    __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)first));
    __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)second));
    return (vec)_mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}
// add_products for pairs of bfloat16 numbers, whose two products are added.
#define add_pair_products(sum, v, f) _mm512_dpbf16_ps(sum, (__m512bh)(v), (__m512bh)broadcast(f))
#endif
