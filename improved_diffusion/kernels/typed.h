// The kernels for numbers of the type STORED. Attention needs an instruction for their products; if there is one, UNIT
// is defined.

#include "norms.h"
#include "winograd.h"
#include "pointwise.h"
#ifdef UNIT
#include "attention.h"
#endif
#if defined(__AVX512BF16__) && __GNUC__ >= 11 && UNIT == 2
#include "tiles.h"
#endif

#undef STORED
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
