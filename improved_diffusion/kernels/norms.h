// Normalisation of images with numbers of the type STORED. LOAD and STORE convert WIDTH of them to and from float.

#define BLOCK 32
#define NAME(name) TYPED(name##_32)
#include "norm.h"
#undef BLOCK
#undef NAME
#if WIDTH == 4  // 64 channels would not fit in the registers
#define BLOCKED(name) TYPED(name##_32)
#else
#define BLOCK 64
#define NAME(name) TYPED(name##_64)
#include "norm.h"
#undef BLOCK
#undef NAME
#define BLOCKED(name) (channels % 64 ? TYPED(name##_32) : TYPED(name##_64))
#endif

void TYPED(norm_forward)(
    const STORED *x, const STORED *weight, const STORED *bias, const STORED *modulation, STORED *y, float *mean,
    float *rstd, float *sums, int images, int positions, int channels, int groups, float epsilon, int activate,
    int threads
) {
    struct sizes size = {positions, channels, groups, channels / groups};
    BLOCKED(norm_forward)(
        x, weight, bias, modulation, y, mean, rstd, sums, images, size, epsilon, activate, threads
    );
}

void TYPED(norm_backward)(
    const STORED *dy, const STORED *more, const STORED *x, const STORED *weight, const STORED *bias,
    const STORED *modulation, const float *mean, const float *rstd, STORED *dx, STORED *dweight, STORED *dbias,
    STORED *dmodulation, float *sums, int images, int positions, int channels, int groups, int activate, int threads
) {
    struct sizes size = {positions, channels, groups, channels / groups};
    BLOCKED(norm_backward)(
        dy, more, x, weight, bias, modulation, mean, rstd, dx, dweight, dbias, dmodulation, sums, images, size,
        activate, threads
    );
}

#undef BLOCKED
