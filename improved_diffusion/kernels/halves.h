// Products in float16 for winograd.h, pointwise.h and attention.h, of numbers stored in bfloat16: twice as fast as in
// float32 where a processor has instructions for them (Intel, from Sapphire Rapids on). At most DEPTH products, in
// attention DEPTH pairs, are added in float16, and these sums in float32. float16 holds 11 bits of a number where
// bfloat16 holds 8, but nothing above 65504, and less of a number below 2^-14. So the numbers are multiplied by powers
// of two before, and their products by the inverse after.

// A left factor is there twice, because a broadcast of 4 bytes takes no arithmetic unit, and one of 2 bytes does.
#define LEFT uint32_t
#define RIGHT uint16_t
#define HALVES
#define PRODUCT_ROWS 8
#define PRODUCT_COLUMNS 64
#define PRODUCT LEVEL(product_of_halves)
#define PUT_LEFT LEVEL(put_left)
#define PUT_RIGHT LEVEL(put_right)
#define SCALED(v, scale) ((v) * (scale))
#define DEPTH 32  // products that are added in float16
// The powers of two that the numbers are multiplied by, if the largest is less than 2^(exponent + 1). `to_points` makes
// it at most 28 times as large, twice `weights_to_points` 1.93 and `gradients_to_points` 66.1 times. After this, left
// factors of outputs are at most 14, their right factors at most 31, so that DEPTH products stay below 65504.
#define SCALE_OF_INPUT(exponent) (-2 - (exponent))
#define SCALE_OF_WEIGHTS(exponent) (3 - (exponent))
#define SCALE_OF_GRADIENT(exponent) (-3 - (exponent))

static inline float LEVEL(power)(int exponent) {
    uint32_t bits = (uint32_t)(127 + exponent) << 23;
    float result;
    memcpy(&result, &bits, sizeof result);
    return result;
}
// Per place, the larger one of the bits in `most` and of the absolute bfloat16 numbers.
static inline __m512i LEVEL(larger)(__m512i most, __m512i numbers) {
    return _mm512_max_epu16(most, _mm512_and_si512(numbers, _mm512_set1_epi16(0x7fff)));
}
// The exponent of the largest of these numbers, within what keeps the powers above finite. If one is not finite, neither
// are the results that use the power.
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
// The exponents of the largest numbers in tiles and `border` pixels around them.
static inline void TYPED(exponents_of_tiles)(
    const uint16_t *x, int border, int *exponents, struct conv size, int channels, size_t first, int count
) {
    for (int tile = 0; tile < count; tile++) {
        struct place place = winograd_place(size, first + tile);
        __m512i most = _mm512_setzero_si512();
        for (int i = place.top - border; i < place.top + 4 + border; i++)
            for (int j = place.left - border; j < place.left + 4 + border; j++) {
                if (i < 0 || i >= size.height || j < 0 || j >= size.width) continue;
                const uint16_t *from = x + ((place.image * size.height + i) * size.width + j) * channels;
                for (int c = 0; c < channels; c += 32) most = LEVEL(larger)(most, _mm512_loadu_si512(from + c));
            }
        exponents[tile] = LEVEL(exponent_of_bits)(most);
    }
}

static inline void LEVEL(put_right)(uint16_t *to, vec v) { _mm256_storeu_si256((__m256i *)to, _mm512_cvtps_ph(v, 0)); }
// Pairs of float16 numbers, those of the first vector in the lower halves.
static inline vec LEVEL(pack_halves)(vec first, vec second) {
    __m512i low = _mm512_cvtepu16_epi32(_mm512_cvtps_ph(first, 0));
    __m512i high = _mm512_cvtepu16_epi32(_mm512_cvtps_ph(second, 0));
    return (vec)_mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}
static inline void LEVEL(put_left)(uint32_t *to, vec v) { put((float *)to, LEVEL(pack_halves)(v, v)); }

// For attention.h: float16 numbers, and products of pairs of them, each added on its own.
static inline vec LEVEL(get_half)(const uint16_t *from) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)from));
}
static inline vec LEVEL(sum_of_pairs)(vec pairs) {
    __m512h turned = (__m512h)_mm512_rol_epi32((__m512i)pairs, 16);
    return _mm512_cvtph_ps(_mm512_cvtepi32_epi16((__m512i)_mm512_add_ph((__m512h)pairs, turned)));
}
#define add_products_of_halves(sum, v, f)                                                                              \
    (vec)_mm512_fmadd_ph((__m512h)(v), (__m512h)broadcast(f), (__m512h)(sum))

// `product`, with its result multiplied by the factor of its row before `start` is added; and for `panels` panels of
// 32 columns, where those of b lie `b_next` apart.
static inline __attribute__((always_inline)) void LEVEL(product_of_panels)(
    const uint32_t *a, size_t row, size_t step, const uint16_t *b, size_t b_row, float *m, size_t m_row, int depth,
    const float *start, size_t start_row, const float *factors, int panels, size_t b_next
) {
    for (int first = 0; first < depth; first += DEPTH) {
        int end = depth - first < DEPTH ? depth : first + DEPTH;
        __m512h sums[PRODUCT_ROWS][2];
        _Pragma("GCC unroll 16") for (int r = 0; r < PRODUCT_ROWS; r++) sums[r][0] = sums[r][1] = _mm512_setzero_ph();
        for (int d = first; d < end; d++) {
            __m512h right[2];
            _Pragma("GCC unroll 2") for (int p = 0; p < panels; p++)
                right[p] = _mm512_loadu_ph(b + d * b_row + p * b_next);
            _Pragma("GCC unroll 16") for (int r = 0; r < PRODUCT_ROWS; r++) {
                __m512h left = (__m512h)_mm512_set1_epi32(a[r * row + d * step]);
                _Pragma("GCC unroll 2") for (int p = 0; p < panels; p++)
                    sums[r][p] = _mm512_fmadd_ph(left, right[p], sums[r][p]);
            }
        }
        const float *before = first ? m : start;
        size_t before_row = first ? m_row : start_row;
        _Pragma("GCC unroll 16") for (int r = 0; r < PRODUCT_ROWS; r++)
            _Pragma("GCC unroll 2") for (int p = 0; p < panels; p++) {
                __m512i bits = (__m512i)sums[r][p];
                vec low = factors[r] * _mm512_cvtph_ps(_mm512_castsi512_si256(bits));
                vec high = factors[r] * _mm512_cvtph_ps(_mm512_extracti64x4_epi64(bits, 1));
                if (before) {
                    low += get(before + r * before_row + 2 * p * WIDTH);
                    high += get(before + r * before_row + (2 * p + 1) * WIDTH);
                }
                put(m + r * m_row + 2 * p * WIDTH, low);
                put(m + r * m_row + (2 * p + 1) * WIDTH, high);
            }
    }
}
static inline void LEVEL(product_of_halves)(
    const uint32_t *a, size_t row, size_t step, const uint16_t *b, size_t b_row, float *m, size_t m_row, int depth,
    const float *start, size_t start_row, const float *factors, int columns, size_t b_next
) {
    if (columns > 32)
        LEVEL(product_of_panels)(a, row, step, b, b_row, m, m_row, depth, start, start_row, factors, 2, b_next);
    else LEVEL(product_of_panels)(a, row, step, b, b_row, m, m_row, depth, start, start_row, factors, 1, b_next);
}
