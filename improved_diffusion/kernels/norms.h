// Normalisation of images with numbers of the type STORED. LOAD and STORE convert WIDTH of them to and from float.

#define BLOCK 64
#define NAME(name) TYPED(name##_64)
#include "norm.h"
#undef BLOCK
#undef NAME
#define BLOCK 32
#define NAME(name) TYPED(name##_32)
#include "norm.h"
#undef BLOCK
#undef NAME

void TYPED(norm_forward)(
    const STORED *x, const STORED *weight, const STORED *bias, const STORED *modulation, STORED *y, float *mean,
    float *rstd, float *sums, int images, int positions, int channels, int groups, float epsilon, int activate,
    int threads
) {
    struct sizes size = {positions, channels, groups, channels / groups};
    (channels % 64 ? TYPED(norm_forward_32) : TYPED(norm_forward_64))(
        x, weight, bias, modulation, y, mean, rstd, sums, images, size, epsilon, activate, threads
    );
}

void TYPED(norm_backward)(
    const STORED *dy, const STORED *more, const STORED *x, const STORED *weight, const STORED *bias, const STORED *modulation,
    const float *mean, const float *rstd, STORED *dx, STORED *dweight, STORED *dbias, STORED *dmodulation,
    float *sums, int images, int positions, int channels, int groups, int activate, int threads
) {
    struct sizes size = {positions, channels, groups, channels / groups};
    (channels % 64 ? TYPED(norm_backward_32) : TYPED(norm_backward_64))(
        dy, more, x, weight, bias, modulation, mean, rstd, dx, dweight, dbias, dmodulation, sums, images, size, activate,
        threads
    );
}
