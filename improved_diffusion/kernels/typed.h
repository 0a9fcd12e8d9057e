// The kernels for numbers of the type STORED. Attention needs an instruction for their products; if there is one, UNIT
// is defined.

#ifdef __AVX512FP16__
#include "halves.h"
#include "winograd.h"
#define AS_STORED 0
#include "pointwise.h"
#define FACTOR uint16_t
#define COPIES 1
#define LOAD_FACTOR LEVEL(get_half)
#define STORE_FACTOR LEVEL(put_half)
#define UNITS_ADDED DEPTH
#define SUM LEVEL(sum_of_pairs)
#include "attention.h"
#include "blocks.h"
#undef add_products_of_halves
#undef HALVES
#undef DEPTH
#undef SCALE_OF_INPUT
#undef SCALE_OF_WEIGHTS
#undef SCALE_OF_GRADIENT
#else
#include "norms.h"
#define PER_UNIT 1
#define LEFT float
#define PUT_LEFT put
#define UNIT_OF(first, second) ((void)(second), (first))
#define LOAD_PART(from, part) LOAD((from) + (part) * WIDTH)
#define COLUMN(part, lane) ((part) * WIDTH + (lane))
#define SCALED(v, scale) ((void)(scale), (v))
#define PRODUCT(a, row, step, b, b_row, m, m_row, depth, start, start_row, factors)                                    \
    ((void)(factors), LEVEL(product)(a, row, step, b, b_row, m, m_row, depth, start, start_row))
#define SUMS float
#define GET_SUMS get
#define PRODUCT_TO_SUMS(a, row, b, b_row, m, m_row, depth, start)                                                      \
    LEVEL(product)(a, row, 1, b, b_row, m, m_row, depth, start, 0)
#include "winograd.h"
#if defined(__AVX512BF16__) && UNIT == 2
#include "pairs.h"
#else
#define AS_STORED (sizeof(STORED) == sizeof(float))
#endif
#include "pointwise.h"
#define FACTOR STORED
#define COPIES 0
#define LOAD_FACTOR LOAD
#define STORE_FACTOR STORE
#define UNITS_ADDED units
#define SUM(sums) (sums)
#ifdef UNIT
#include "attention.h"
#endif
#include "blocks.h"
#if defined(__AVX512BF16__) && __GNUC__ >= 11 && UNIT == 2
#include "tiles.h"
#endif
#endif

#undef STORED
#undef AS_STORED
#undef FACTOR
#undef COPIES
#undef LOAD_FACTOR
#undef STORE_FACTOR
#undef UNITS_ADDED
#undef SUM
#undef PER_UNIT
#undef LEFT
#undef PUT_LEFT
#undef UNIT_OF
#undef LOAD_PART
#undef COLUMN
#undef SCALED
#undef PRODUCT
#undef SUMS
#undef GET_SUMS
#undef PRODUCT_TO_SUMS
#undef TYPED
#undef LOAD
#undef STORE
#undef SIGMOID
#undef EXPONENTIAL
#undef TO_FLOAT
#undef FROM_FLOAT
#undef UNIT
#undef ADD_PRODUCTS
#undef PACK
