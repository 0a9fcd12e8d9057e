// Products of bfloat16 numbers for pointwise.h, as they are stored: where a processor has instructions for pairs of them,
// they need no conversion, and are twice as fast as in float32 (AMD, from Zen 4 on). The sums are in float32. Minimal
// filtering stays in float32: bfloat16 would round the numbers between its steps too coarsely.

#undef PER_UNIT
#undef LEFT
#undef PUT_LEFT
#undef UNIT_OF
#undef PRODUCT
#undef SUMS
#undef GET_SUMS
#undef PRODUCT_TO_SUMS
#define AS_STORED 1
#define PER_UNIT 2
#define LEFT STORED
#define PUT_LEFT STORE
#define UNIT_OF PACK
#define PRODUCT(a, row, step, b, b_row, m, m_row, depth, start, start_row, factors)                                    \
    ((void)(factors), LEVEL(product_of_pairs)(a, row, step, b, b_row, m, m_row, depth, start, start_row))
#define SUMS STORED
#define GET_SUMS LOAD
#define PRODUCT_TO_SUMS(a, row, b, b_row, m, m_row, depth, start)                                                      \
    LEVEL(product_of_pairs_in_bf16)(a, row, 1, b, b_row, m, m_row, depth, start, 0)
