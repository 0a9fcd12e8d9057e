// Group normalisation (Wu & He 2018), with a scale and shift for each image, and SiLU, in channels_last layout. This
// file is included once for each type of numbers, STORED, and each number of channels processed together, BLOCK.
//
// Arrays belong to one image, [positions, channels], unless the comment says otherwise. The first half computes the
// sums of all blocks of an image, because the channels of a group may be in several blocks. The second half writes the
// results.

#define VECTORS (BLOCK / WIDTH)
#define EACH _Pragma("GCC unroll 8") for (int k = 0; k < VECTORS; k++)

// Compute a and b of the channels from `first` on, so that the result before SiLU is x * a + b.
static inline void NAME(coefficients)(
    const STORED *weight, const STORED *bias, const STORED *modulation, const float *mean, const float *rstd,
    struct sizes size, int first, float *a, float *b
) {
    for (int i = 0; i < BLOCK; i++) {
        int c = first + i, group = c / size.width;
        float scale = modulation ? 1 + TO_FLOAT(modulation[c]) : 1;
        float shift = modulation ? TO_FLOAT(modulation[size.channels + c]) : 0;
        a[i] = rstd[group] * TO_FLOAT(weight[c]) * scale;
        b[i] = TO_FLOAT(bias[c]) * scale + shift - mean[group] * a[i];
    }
}

// sums: the means of all channels, then the sums of squared distances from the mean of all channels.
static inline void NAME(measure)(const STORED *x, float *sums, struct sizes size, int first) {
    // The values of the first position are subtracted first, because a large mean would take the precision of the sums.
    vec pivot[VECTORS], s[VECTORS], q[VECTORS];
    EACH pivot[k] = LOAD(x + first + k * WIDTH), s[k] = q[k] = zero();
    for (int t = 1; t < size.positions; t++)
        EACH {
            vec d = LOAD(x + (size_t)t * size.channels + first + k * WIDTH) - pivot[k];
            s[k] += d;
            q[k] += d * d;
        }
    float share = 1.0f / size.positions;
    EACH put(sums + first + k * WIDTH, pivot[k] + s[k] * share);
    EACH put(sums + size.channels + first + k * WIDTH, q[k] - s[k] * s[k] * share);
}

static inline void NAME(normalize)(
    const STORED *x, const STORED *weight, const STORED *bias, const STORED *modulation, STORED *y, float *mean,
    float *rstd, const float *sums, struct sizes size, int first, float epsilon, int activate
) {
    float a[BLOCK], b[BLOCK], means[MAX_GROUPS], rstds[MAX_GROUPS];
    for (int group = first / size.width; group * size.width < first + BLOCK; group++) {
        const float *of_group = sums + group * size.width;
        double sum = 0, square = 0;
        for (int c = 0; c < size.width; c++) sum += of_group[c];
        double middle = sum / size.width;
        for (int c = 0; c < size.width; c++) {
            double off = of_group[c] - middle;
            square += of_group[size.channels + c] + size.positions * off * off;
        }
        means[group] = (float)middle;
        rstds[group] = 1 / sqrtf((float)(square / ((double)size.width * size.positions)) + epsilon);
        if (group * size.width >= first) mean[group] = means[group], rstd[group] = rstds[group];
    }
    NAME(coefficients)(weight, bias, modulation, means, rstds, size, first, a, b);
    vec slope[VECTORS], offset[VECTORS];
    EACH slope[k] = get(a + k * WIDTH), offset[k] = get(b + k * WIDTH);
    for (int t = 0; t < size.positions; t++)
        EACH {
            size_t at = (size_t)t * size.channels + first + k * WIDTH;
            vec v = LOAD(x + at) * slope[k] + offset[k];
            if (activate) v *= SIGMOID(v);
            STORE(y + at, v);
        }
}

// Write the gradient before SiLU into dx. sums: for all channels, the sum of that gradient; then for all channels, the
// sum of its products with x - mean.
static inline void NAME(measure_gradient)(
    const STORED *dy, const STORED *x, const STORED *weight, const STORED *bias, const STORED *modulation,
    const float *mean, const float *rstd, STORED *dx, float *sums, struct sizes size, int first, int activate
) {
    float a[BLOCK], b[BLOCK], means[BLOCK];
    NAME(coefficients)(weight, bias, modulation, mean, rstd, size, first, a, b);
    for (int i = 0; i < BLOCK; i++) means[i] = mean[(first + i) / size.width];
    vec slope[VECTORS], offset[VECTORS], middle[VECTORS], s[VECTORS], q[VECTORS];
    EACH slope[k] = get(a + k * WIDTH), offset[k] = get(b + k * WIDTH), middle[k] = get(means + k * WIDTH);
    EACH s[k] = q[k] = zero();
    for (int t = 0; t < size.positions; t++)
        EACH {
            size_t at = (size_t)t * size.channels + first + k * WIDTH;
            vec value = LOAD(x + at), gradient = LOAD(dy + at);
            if (activate) {
                vec v = value * slope[k] + offset[k], p = SIGMOID(v);
                gradient *= p * (1 + v * (1 - p));
                STORE(dx + at, gradient);
            }
            s[k] += gradient;
            q[k] += gradient * (value - middle[k]);
        }
    EACH put(sums + first + k * WIDTH, s[k]);
    EACH put(sums + size.channels + first + k * WIDTH, q[k]);
}

// Write the gradients of x and of the modulation. above: the gradient before SiLU. more: another gradient of x, which
// is added, or NULL.
static inline void NAME(differentiate)(
    const STORED *above, const STORED *more, const STORED *x, const STORED *weight, const STORED *bias,
    const STORED *modulation, const float *mean, const float *rstd, STORED *dx, STORED *dmodulation,
    const float *sums, struct sizes size, int first
) {
    float a[BLOCK], b[BLOCK], factors[BLOCK], constants[BLOCK];
    NAME(coefficients)(weight, bias, modulation, mean, rstd, size, first, a, b);
    const float *weights = sums + size.channels;
    for (int group = first / size.width; group * size.width < first + BLOCK; group++) {
        // With n = (x - mean) * rstd and its gradient dn: dx = rstd * (dn - average(dn) - n * average(dn * n)).
        double dn = 0, dnn = 0;
        for (int c = group * size.width; c < (group + 1) * size.width; c++) {
            double w = TO_FLOAT(weight[c]) * (modulation ? 1 + TO_FLOAT(modulation[c]) : 1.0f);
            dn += w * sums[c];
            dnn += w * weights[c];
        }
        double r = rstd[group], count = (double)size.width * size.positions, factor = -r * r * r * dnn / count;
        for (int c = group * size.width; c < (group + 1) * size.width; c++)
            if (c >= first && c < first + BLOCK) {
                factors[c - first] = (float)factor;
                constants[c - first] = (float)(-r * dn / count - factor * mean[group]);
            }
    }
    vec slope[VECTORS], factor[VECTORS], constant[VECTORS];
    EACH slope[k] = get(a + k * WIDTH), factor[k] = get(factors + k * WIDTH), constant[k] = get(constants + k * WIDTH);
    for (int t = 0; t < size.positions; t++)
        EACH {
            size_t at = (size_t)t * size.channels + first + k * WIDTH;
            vec gradient = LOAD(above + at) * slope[k] + LOAD(x + at) * factor[k] + constant[k];
            if (more) gradient += LOAD(more + at);
            STORE(dx + at, gradient);
        }
    if (modulation)
        for (int c = first; c < first + BLOCK; c++) {
            float dw = weights[c] * rstd[c / size.width];
            dmodulation[c] = FROM_FLOAT(dw * TO_FLOAT(weight[c]) + sums[c] * TO_FLOAT(bias[c]));
            dmodulation[size.channels + c] = FROM_FLOAT(sums[c]);
        }
}

// If there are enough images for all threads, each thread does both halves of an image, which stays in its caches.
#define BOTH_HALVES(FIRST, SECOND)                                                                                     \
    if (images >= threads) {                                                                                           \
        _Pragma("omp for schedule(static)") for (int n = 0; n < images; n++) {                                         \
            for (int first = 0; first < size.channels; first += BLOCK) FIRST;                                          \
            for (int first = 0; first < size.channels; first += BLOCK) SECOND;                                         \
        }                                                                                                              \
    } else {                                                                                                           \
        _Pragma("omp for collapse(2) schedule(static)") for (int n = 0; n < images; n++)                               \
            for (int first = 0; first < size.channels; first += BLOCK) FIRST;                                          \
        _Pragma("omp for collapse(2) schedule(static)") for (int n = 0; n < images; n++)                               \
            for (int first = 0; first < size.channels; first += BLOCK) SECOND;                                         \
    }

// x, y: [images, positions, channels]. modulation: scales, then shifts, [images, 2 * channels], or NULL. mean, rstd:
// [images, groups], for the backward pass; rstd is 1 / sqrt(variance + epsilon). sums: working memory, [images, 2 *
// channels].
static void NAME(norm_forward)(
    const STORED *x, const STORED *weight, const STORED *bias, const STORED *modulation, STORED *y, float *mean,
    float *rstd, float *sums, int images, struct sizes size, float epsilon, int activate, int threads
) {
    size_t length = (size_t)size.positions * size.channels, pair = 2 * (size_t)size.channels;
#define OWN (modulation ? modulation + n * pair : NULL)
#define STATISTICS mean + (size_t)n * size.groups, rstd + (size_t)n * size.groups
#pragma omp parallel num_threads(threads)
    {
        BOTH_HALVES(
            NAME(measure)(x + n * length, sums + n * pair, size, first),
            NAME(normalize)(
                x + n * length, weight, bias, OWN, y + n * length, STATISTICS, sums + n * pair, size, first, epsilon,
                activate
            )
        )
    }
}

// Compute the gradients of x, weight, bias and modulation from that of y, dy. more: another gradient of x, which is
// added, or NULL. sums: working memory, [images, 2 * channels].
static void NAME(norm_backward)(
    const STORED *dy, const STORED *more, const STORED *x, const STORED *weight, const STORED *bias,
    const STORED *modulation, const float *mean, const float *rstd, STORED *dx, STORED *dweight, STORED *dbias,
    STORED *dmodulation, float *sums, int images, struct sizes size, int activate, int threads
) {
    size_t length = (size_t)size.positions * size.channels, pair = 2 * (size_t)size.channels;
    const STORED *above = activate ? dx : dy;
#pragma omp parallel num_threads(threads)
    {
        BOTH_HALVES(
            NAME(measure_gradient)(
                dy + n * length, x + n * length, weight, bias, OWN, STATISTICS, dx + n * length, sums + n * pair, size,
                first, activate
            ),
            NAME(differentiate)(
                above + n * length, more ? more + n * length : NULL, x + n * length, weight, bias, OWN, STATISTICS,
                dx + n * length, modulation ? dmodulation + n * pair : NULL, sums + n * pair, size, first
            )
        )
#pragma omp for schedule(static)
        for (int c = 0; c < size.channels; c++) {
            float dw = 0, db = 0;
            for (int n = 0; n < images; n++) {
                float scale = modulation ? 1 + TO_FLOAT(modulation[n * pair + c]) : 1;
                dw += sums[n * pair + size.channels + c] * rstd[(size_t)n * size.groups + c / size.width] * scale;
                db += sums[n * pair + c] * scale;
            }
            dweight[c] = FROM_FLOAT(dw);
            dbias[c] = FROM_FLOAT(db);
        }
    }
}

#undef OWN
#undef STATISTICS
#undef BOTH_HALVES
#undef VECTORS
#undef EACH
