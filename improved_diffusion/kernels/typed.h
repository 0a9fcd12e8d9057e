// The kernels for numbers of the type STORED. Attention needs an instruction for their products; if there is one, UNIT
// is defined.

#ifdef __AVX512FP16__
#include "halves.h"
#include "winograd.h"
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
#define WINOGRAD_ROWS ROWS
#define WINOGRAD_COLUMNS (2 * WIDTH)
#define WINOGRAD_PRODUCT(a, row, step, b, b_row, m, m_row, depth, start, start_row, factors, columns, b_next)          \
    ((void)(factors), LEVEL(product)(a, row, step, b, b_row, m, m_row, depth, start, start_row))
#include "winograd.h"
#include "pointwise.h"
#ifdef UNIT
#include "attention.h"
#endif
#if defined(__AVX512BF16__) && __GNUC__ >= 11 && UNIT == 2
#include "tiles.h"
#endif
#endif

#undef STORED
#undef LEFT
#undef RIGHT
#undef PUT_LEFT
#undef PUT_RIGHT
#undef SCALED
#undef WINOGRAD_ROWS
#undef WINOGRAD_COLUMNS
#undef WINOGRAD_PRODUCT
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
