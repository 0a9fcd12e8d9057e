// The kernels for numbers of the type STORED. Attention needs an instruction for their products; if there is one, UNIT
// is defined.

#ifdef __AVX512FP16__
#include "halves.h"
#include "winograd.h"
#include "pointwise.h"
#define FACTOR uint16_t
#define COPIES 1
#define LOAD_FACTOR LEVEL(get_half)
#define STORE_FACTOR LEVEL(put_right)
#define UNITS_ADDED DEPTH
#define SUM LEVEL(sum_of_pairs)
#include "attention.h"
#undef add_products_of_halves
#undef HALVES
#undef DEPTH
#undef SCALE_OF_INPUT
#undef SCALE_OF_WEIGHTS
#undef SCALE_OF_GRADIENT
#else
#include "norms.h"
#define LEFT float
#define RIGHT float
#define PUT_LEFT put
#define PUT_RIGHT put
#define SCALED(v, scale) ((void)(scale), (v))
#define PRODUCT_ROWS ROWS
#define PRODUCT_COLUMNS (2 * WIDTH)
#define PRODUCT(a, row, step, b, b_row, m, m_row, depth, start, start_row, factors, columns, b_next)                   \
    ((void)(factors), LEVEL(product)(a, row, step, b, b_row, m, m_row, depth, start, start_row))
#include "winograd.h"
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
#if defined(__AVX512BF16__) && __GNUC__ >= 11 && UNIT == 2
#include "tiles.h"
#endif
#endif

#undef STORED
#undef FACTOR
#undef COPIES
#undef LOAD_FACTOR
#undef STORE_FACTOR
#undef UNITS_ADDED
#undef SUM
#undef LEFT
#undef RIGHT
#undef PUT_LEFT
#undef PUT_RIGHT
#undef SCALED
#undef PRODUCT_ROWS
#undef PRODUCT_COLUMNS
#undef PRODUCT
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
