// All kernels for one generation of processors. Their names are LEVEL(name); see kernels.c.

#ifdef __aarch64__
#include "neon.h"
#else
#include "x86.h"
#endif

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
    // If an operand is NaN, these return the second one or NaN, so a NaN in x remains NaN.
    x = minimum(zero() + most, maximum(zero() - most, x * 1.44269504f));
    vec whole = LEVEL(nearest)(x), f = x - whole;
    vec p = 1 + f * (0.693147181f + f * (0.240226507f + f * (0.0555041087f + f * (0.00961812911f + f *
            (0.00133335581f + f * 0.000154035304f)))));
    return LEVEL(scale)(p, whole);
}
static inline vec LEVEL(rough_exponential)(vec x) { return LEVEL(exponential)(x); }
static inline vec LEVEL(rough_sigmoid)(vec x) { return LEVEL(rough_reciprocal)(1 + LEVEL(exponential)(-x)); }
#endif
static inline vec LEVEL(sigmoid)(vec x) { return 1 / (1 + LEVEL(exponential)(-x)); }

#ifdef __AVX512F__
static inline float LEVEL(total)(vec v) { return _mm512_reduce_add_ps(v); }
static inline float LEVEL(largest)(vec v) { return _mm512_reduce_max_ps(v); }
#else
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

#include "product.h"

#define STORED uint16_t
#define TYPED(name) LEVEL(name##_bf16)
#define LOAD LEVEL(load_bf16)
#define STORE LEVEL(store_bf16)
#define SIGMOID LEVEL(rough_sigmoid)
#define EXPONENTIAL LEVEL(rough_exponential)
#define TO_FLOAT bf16_to_float
#define FROM_FLOAT float_to_bf16
#ifdef __AVX512FP16__
#define UNIT 2
#define ADD_PRODUCTS add_products_of_halves
#define PACK LEVEL(pack_halves)
#elif defined(add_pair_products)
#define UNIT 2
#define ADD_PRODUCTS add_pair_products
#define PACK LEVEL(pack_pairs)
#endif
#include "typed.h"

#ifndef __AVX512FP16__  // all that does not gain by float16 is in the generation before
#define STORED float
#define TYPED(name) LEVEL(name##_fp32)
#define LOAD get
#define STORE put
#define SIGMOID LEVEL(sigmoid)
#define EXPONENTIAL LEVEL(exponential)
#define TO_FLOAT(x) (x)
#define FROM_FLOAT(x) (x)
#define UNIT 1
#define ADD_PRODUCTS add_products
#define PACK(first, second) (first)
#include "typed.h"

#include "update.h"
#include "muon.h"
#endif

#undef WIDTH
#undef VECTOR
#undef VECTOR_TYPE
#undef HALF
#undef minimum
#undef maximum
#undef square_root
#undef add_products
#undef add_pair_products
#undef broadcast
#undef zero
#undef splat
#undef ROWS
#undef vec
#undef get
#undef put
