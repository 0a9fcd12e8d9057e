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

#ifdef __AVX512F__
// exp(x) = 2^t = 2^whole 2^f, with t = x log2(e), whole <= t < whole + 1, and a polynomial for 2^f. t is at least -126,
// or the result would have less than the usual number of digits, which is slow.
#define EXPONENTIAL(x, POLYNOMIAL)                                                                                     \
    /* If an operand is NaN, max returns the second one, so a NaN in x remains NaN. */                                 \
    vec t = _mm512_max_ps(_mm512_set1_ps(-126), x * 1.44269504f);                                                      \
    vec f = _mm512_reduce_ps(t, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);                                            \
    return _mm512_scalef_ps(POLYNOMIAL, t)

// Exact to a few units in the seventh digit.
static inline vec LEVEL(exponential)(vec x) {
    EXPONENTIAL(x, 1 + f * (0.693146984f + f * (0.240229836f + f * (0.055483342f + f * (0.00967884099f + f *
        (0.00124396879f + f * 0.000217022552f))))));
}
// Exact to 4 digits, more than bfloat16 holds.
static inline vec LEVEL(rough_exponential)(vec x) {
    EXPONENTIAL(x, 0.999925219f + f * (0.695833539f + f * (0.226067159f + f * 0.07802452f)));
}
static inline vec LEVEL(rough_sigmoid)(vec x) { return _mm512_rcp14_ps(1 + LEVEL(rough_exponential)(-x)); }
#undef EXPONENTIAL
#else
// exp(x), exact to a few units in the seventh digit: 2^(x log2(e)) = 2^whole 2^f, with a polynomial for 2^f, where f is
// in [-1/2, 1/2].
static inline vec LEVEL(exponential)(vec x) {
    const float most = 126;
    // If an operand is NaN, these instructions return the second one, so a NaN in x remains NaN.
    x = VECTOR(min_ps)(VECTOR(set1_ps)(most), VECTOR(max_ps)(VECTOR(set1_ps)(-most), x * 1.44269504f));
    vec whole = _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    vec f = x - whole;
    vec p = 1 + f * (0.693147181f + f * (0.240226507f + f * (0.0555041087f + f * (0.00961812911f + f *
            (0.00133335581f + f * 0.000154035304f)))));
    VECTOR_TYPE(i) shifted = VECTOR(slli_epi32)(VECTOR(cvtps_epi32)(whole), 23);
    return (vec)VECTOR(add_epi32)((VECTOR_TYPE(i))p, shifted);
}
static inline vec LEVEL(rough_exponential)(vec x) { return LEVEL(exponential)(x); }
static inline vec LEVEL(rough_sigmoid)(vec x) { return 1 / (1 + LEVEL(exponential)(-x)); }
#endif
static inline vec LEVEL(sigmoid)(vec x) { return 1 / (1 + LEVEL(exponential)(-x)); }

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
    typedef short numbers __attribute__((vector_size(64)));
    numbers both = (numbers)_mm512_cvtne2ps_pbh(second, first);
    return (vec)__builtin_shuffle(both, (numbers){0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                  8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31});
}
#endif

// Transpose a matrix of units of 4 bytes, [rows, columns]. The steps are the distances between rows, in units.
static inline void LEVEL(turn)(const void *from, size_t step, void *to, size_t to_step, int rows, int columns) {
    typedef int indices __attribute__((vector_size(4 * WIDTH)));
    int whole_rows = rows - rows % WIDTH, whole_columns = columns - columns % WIDTH;
    indices own;
    for (int i = 0; i < WIDTH; i++) own[i] = i;
    for (int row = 0; row < whole_rows; row += WIDTH)
        for (int column = 0; column < whole_columns; column += WIDTH) {
            vec v[WIDTH];
            for (int i = 0; i < WIDTH; i++) v[i] = get((const float *)from + (row + i) * step + column);
            // Swap the upper right and lower left quarters of all blocks of 2 x 2, then of 4 x 4, and so on.
            _Pragma("GCC unroll 4") for (int half = 1; half < WIDTH; half *= 2) {
                indices left = own + (((own & half) != 0) & (WIDTH - half)), right = left + half;
                _Pragma("GCC unroll 16") for (int i = 0; i < WIDTH; i++)
                    if (!(i & half)) {
                        vec above = v[i], below = v[i + half];
                        v[i] = __builtin_shuffle(above, below, left);
                        v[i + half] = __builtin_shuffle(above, below, right);
                    }
            }
            for (int i = 0; i < WIDTH; i++) put((float *)to + (column + i) * to_step + row, v[i]);
        }
    for (int row = 0; row < rows; row++)
        for (int column = row < whole_rows ? whole_columns : 0; column < columns; column++)
            memcpy((uint32_t *)to + column * to_step + row, (const uint32_t *)from + row * step + column, 4);
}

#define STORED uint16_t
#define TYPED(name) LEVEL(name##_bf16)
#define LOAD LEVEL(load_bf16)
#define STORE LEVEL(store_bf16)
#define SIGMOID LEVEL(rough_sigmoid)
#define EXPONENTIAL LEVEL(rough_exponential)
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
#define EXPONENTIAL LEVEL(exponential)
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
