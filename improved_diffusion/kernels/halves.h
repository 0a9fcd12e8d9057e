// Products in float16 for winograd.h, pointwise.h and attention.h, of numbers stored in bfloat16: twice as fast as in
// float32 where a processor has instructions for them (Intel, from Sapphire Rapids on). At most DEPTH of them are added
// one after the other. Longer sums have parts, which are added in float16 too where a convolution is evaluated, and in
// float32 elsewhere. float16 holds 11 bits of a number where bfloat16 holds 8, but nothing above 65504, and less of a
// number below 2^-14. So the numbers are multiplied by powers of two before, and their products by the inverse after.

// A unit of 4 bytes holds two neighbours along the sums. Their products are added to two sums, and these to each other
// at the end. In a panel of 32 columns, the even ones come first, so that the sums lie in order after this.
#define HALVES
#define PER_UNIT 2
#define LEFT uint16_t
#define PUT_LEFT LEVEL(put_half)
#define UNIT_OF LEVEL(pack_halves)
#define LOAD_PART(from, part) (vec)_mm512_maskz_loadu_epi16(0xaaaaaaaa, (from) + (part) - 1)
#define COLUMN(part, lane) (2 * (lane) + (part))
#define PRODUCT LEVEL(product_of_halves)
#define SUMS uint16_t
#define GET_SUMS LEVEL(get_half)
#define PRODUCT_TO_SUMS(a, row, b, b_row, m, m_row, units, start)                                                      \
    ((void)(start), LEVEL(product_to_halves)(a, row, b, b_row, m, m_row, units))
#define SCALED(v, scale) ((v) * (scale))
#define DEPTH 32  // products that are added one after the other
// The powers of two that the numbers are multiplied by, if the largest is less than 2^(exponent + 1). `to_points` makes
// it at most 28 times as large, twice `weights_to_points` 1.93 and `gradients_to_points` 66.1 times. After this, left
// factors of outputs are at most 14, their right factors at most 31, so that 128 products stay below 65504.
#define SCALE_OF_INPUT(exponent) (-2 - (exponent))
#define SCALE_OF_WEIGHTS(exponent) (3 - (exponent))
#define SCALE_OF_GRADIENT(exponent) (-3 - (exponent))

static inline float LEVEL(power)(int exponent) {
    uint32_t bits = (uint32_t)(127 + exponent) << 23;
    float result;
    memcpy(&result, &bits, sizeof result);
    return result;
}
// By how many powers of two left factors must be smaller, so that `depth` products stay below 65504 if 128 do.
static inline int LEVEL(spare)(int depth) {
    int spare = 0;
    while (depth > 128 << spare) spare++;
    return spare;
}
// Per place, the larger one of the bits in `most` and of the absolute bfloat16 numbers.
static inline __m512i LEVEL(larger)(__m512i most, __m512i numbers) {
    return _mm512_max_epu16(most, _mm512_and_si512(numbers, _mm512_set1_epi16(0x7fff)));
}
// The exponent of the largest of these numbers, within what keeps the powers above finite. If one is not finite, the
// results that it reaches are not either.
static inline int LEVEL(exponent_of_bits)(__m512i most) {
    __m256i half = _mm256_max_epu16(_mm512_castsi512_si256(most), _mm512_extracti64x4_epi64(most, 1));
    __m128i quarter = _mm_max_epu16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    // There is an instruction for the smallest only.
    __m128i inverse = _mm_minpos_epu16(_mm_xor_si128(quarter, _mm_set1_epi16(-1)));
    int exponent = ((0xffff - _mm_extract_epi16(inverse, 0)) >> 7) - 127;
    return exponent < -50 ? -50 : exponent > 50 ? 50 : exponent;
}
static inline int LEVEL(exponent)(const uint16_t *from, size_t numbers) {
    __m512i most = _mm512_setzero_si512();
    for (size_t i = 0; i < numbers; i += 32) most = LEVEL(larger)(most, _mm512_loadu_si512(from + i));
    return LEVEL(exponent_of_bits)(most);
}
static inline void LEVEL(put_half)(uint16_t *to, vec v) { _mm256_storeu_si256((__m256i *)to, _mm512_cvtps_ph(v, 0)); }
static inline vec LEVEL(get_half)(const uint16_t *from) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)from));
}
// Pairs of float16 numbers, those of the first vector in the lower halves.
static inline vec LEVEL(pack_halves)(vec first, vec second) {
    __m512i low = _mm512_cvtepu16_epi32(_mm512_cvtps_ph(first, 0));
    __m512i high = _mm512_cvtepu16_epi32(_mm512_cvtps_ph(second, 0));
    return (vec)_mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

// For attention.h: products of pairs, each added on its own.
static inline vec LEVEL(sum_of_pairs)(vec pairs) {
    __m512h turned = (__m512h)_mm512_rol_epi32((__m512i)pairs, 16);
    return _mm512_cvtph_ps(_mm512_cvtepi32_epi16((__m512i)_mm512_add_ph((__m512h)pairs, turned)));
}
#define add_products_of_halves(sum, v, f)                                                                              \
    (vec)_mm512_fmadd_ph((__m512h)(v), (__m512h)broadcast(f), (__m512h)(sum))

// ROWS rows and a panel of columns of the product of a and b, as far as `units` go.
static inline __attribute__((always_inline)) void LEVEL(sums_of_halves)(
    const uint32_t *a, size_t row, size_t step, const float *b, size_t b_row, int units, __m512h result[ROWS]
) {
    __m512h sums[ROWS][2];
    _Pragma("GCC unroll 16") for (int r = 0; r < ROWS; r++) sums[r][0] = sums[r][1] = _mm512_setzero_ph();
    for (int unit = 0; unit < units; unit++) {
        __m512h even = (__m512h)get(b + unit * b_row), odd = (__m512h)get(b + unit * b_row + WIDTH);
        _Pragma("GCC unroll 16") for (int r = 0; r < ROWS; r++) {
            __m512h left = (__m512h)broadcast(a[r * row + unit * step]);
            sums[r][0] = _mm512_fmadd_ph(left, even, sums[r][0]);
            sums[r][1] = _mm512_fmadd_ph(left, odd, sums[r][1]);
        }
    }
    const __mmask32 upper = 0xaaaaaaaa;
    _Pragma("GCC unroll 16") for (int r = 0; r < ROWS; r++) {
        __m512i even = (__m512i)sums[r][0], odd = (__m512i)sums[r][1];
        __m512i first = _mm512_mask_blend_epi16(upper, even, _mm512_slli_epi32(odd, 16));
        __m512i second = _mm512_mask_blend_epi16(upper, _mm512_srli_epi32(even, 16), odd);
        result[r] = _mm512_add_ph((__m512h)first, (__m512h)second);
    }
}
// `product`, with its result multiplied by the factor of its row before `start` is added. The arguments count units.
static inline void LEVEL(product_of_halves)(
    const void *a, size_t row, size_t step, const float *b, size_t b_row, float *m, size_t m_row, int units,
    const float *start, size_t start_row, const float *factors
) {
    for (int first = 0; first < units; first += DEPTH) {
        __m512h sums[ROWS];
        LEVEL(sums_of_halves)(
            (const uint32_t *)a + first * step, row, step, b + first * b_row, b_row,
            units - first < DEPTH ? units - first : DEPTH, sums
        );
        const float *before = first ? m : start;
        size_t before_row = first ? m_row : start_row;
        _Pragma("GCC unroll 16") for (int r = 0; r < ROWS; r++) {
            vec low = factors[r] * _mm512_cvtph_ps(_mm512_castsi512_si256((__m512i)sums[r]));
            vec high = factors[r] * _mm512_cvtph_ps(_mm512_extracti64x4_epi64((__m512i)sums[r], 1));
            if (before) {
                low += get(before + r * before_row);
                high += get(before + r * before_row + WIDTH);
            }
            put(m + r * m_row, low);
            put(m + r * m_row + WIDTH, high);
        }
    }
}
// The same in float16 and without factors, for units of a that lie side by side. m_row counts numbers.
static inline void LEVEL(product_to_halves)(
    const void *a, size_t row, const float *b, size_t b_row, uint16_t *m, size_t m_row, int units
) {
    for (int first = 0; first < units; first += DEPTH) {
        __m512h sums[ROWS];
        LEVEL(sums_of_halves)(
            (const uint32_t *)a + first, row, 1, b + first * b_row, b_row,
            units - first < DEPTH ? units - first : DEPTH, sums
        );
        _Pragma("GCC unroll 16") for (int r = 0; r < ROWS; r++) {
            if (first) sums[r] = _mm512_add_ph(sums[r], _mm512_loadu_ph(m + r * m_row));
            _mm512_storeu_ph(m + r * m_row, sums[r]);
        }
    }
}
