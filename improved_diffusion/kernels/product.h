// Products of matrices, a small block at a time.

// m[ROWS][2 * WIDTH] = start + a b, written by PUT as numbers of type TO. A unit of a or b has 4 bytes, and ADD adds
// products of units. The units of a lie `row` and `step` apart, the rows of b, m and start `b_row`, `m_row` and
// `start_row`. start: NULL for zeros; it may be m.
#define PRODUCT_OF(NAME, ADD, TO, PUT)                                                                                 \
    static inline void LEVEL(NAME)(                                                                                    \
        const float *a, size_t row, size_t step, const float *b, size_t b_row, TO *m, size_t m_row, int depth,         \
        const float *start, size_t start_row                                                                           \
    ) {                                                                                                                \
        vec sums[ROWS][2];                                                                                             \
        _Pragma("GCC unroll 16") for (int r = 0; r < ROWS; r++) {                                                      \
            sums[r][0] = start ? get(start + r * start_row) : zero();                                                  \
            sums[r][1] = start ? get(start + r * start_row + WIDTH) : zero();                                          \
        }                                                                                                              \
        for (int d = 0; d < depth; d++) {                                                                              \
            vec left = get(b + d * b_row), right = get(b + d * b_row + WIDTH);                                         \
            _Pragma("GCC unroll 16") for (int r = 0; r < ROWS; r++) {                                                  \
                int32_t unit;                                                                                          \
                memcpy(&unit, a + r * row + d * step, sizeof unit);                                                    \
                sums[r][0] = ADD(sums[r][0], left, unit);                                                              \
                sums[r][1] = ADD(sums[r][1], right, unit);                                                             \
            }                                                                                                          \
        }                                                                                                              \
        _Pragma("GCC unroll 16") for (int r = 0; r < ROWS; r++) {                                                      \
            PUT(m + r * m_row, sums[r][0]);                                                                            \
            PUT(m + r * m_row + WIDTH, sums[r][1]);                                                                    \
        }                                                                                                              \
    }
PRODUCT_OF(product, add_products, float, put)
#ifdef __AVX512BF16__  // of pairs of bfloat16 numbers
PRODUCT_OF(product_of_pairs, add_pair_products, float, put)
PRODUCT_OF(product_of_pairs_in_bf16, add_pair_products, uint16_t, LEVEL(store_bf16))
#endif
#undef PRODUCT_OF
