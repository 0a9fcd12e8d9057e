// The norm of a gradient, and AdamW with moving averages and bfloat16 copies of the weights. Every number is read from
// memory once. Tensors are given as arrays of addresses and sizes.

// A gradient is the sum of one or two parts; if there is one, the second address is NULL. kinds: 1 if the first part is
// bfloat16, plus 2 if the second part is.
static inline vec LEVEL(load_part)(const void *from, int is_bf16, size_t at) {
    return is_bf16 ? LEVEL(load_bf16)((const uint16_t *)from + at) : get((const float *)from + at);
}
static inline vec LEVEL(load_gradient)(const void *part, const void *other, int kinds, size_t at) {
    vec g = LEVEL(load_part)(part, kinds & 1, at);
    if (other) g += LEVEL(load_part)(other, kinds & 2, at);
    return g;
}
static inline float LEVEL(part_at)(const void *from, int is_bf16, size_t at) {
    return is_bf16 ? bf16_to_float(((const uint16_t *)from)[at]) : ((const float *)from)[at];
}
static inline float LEVEL(gradient_at)(const void *part, const void *other, int kinds, size_t at) {
    float g = LEVEL(part_at)(part, kinds & 1, at);
    return other ? g + LEVEL(part_at)(other, kinds & 2, at) : g;
}

// Of a tensor of `size` numbers, how many a vector holds from number `at` on.
static inline int LEVEL(count)(int64_t at, int64_t size) { return at + WIDTH <= size ? WIDTH : (int)(size - at); }
// Vectors of which only the first `count` numbers are read or written.
static inline vec LEVEL(get_some)(const float *from, int count) {
    if (count == WIDTH) return get(from);
    vec v = {0};
    for (int k = 0; k < count; k++) v[k] = from[k];
    return v;
}
static inline void LEVEL(put_some)(float *to, vec v, int count) {
    if (count == WIDTH) put(to, v);
    else
        for (int k = 0; k < count; k++) to[k] = v[k];
}
static inline vec LEVEL(gradient_of)(const void *part, const void *other, int kinds, size_t at, int count) {
    if (count == WIDTH) return LEVEL(load_gradient)(part, other, kinds, at);
    vec v = {0};
    for (int k = 0; k < count; k++) v[k] = LEVEL(gradient_at)(part, other, kinds, at + k);
    return v;
}
// Write weights from number `at` on, to their bfloat16 copy, if it is not NULL, and into their averages, of which
// those of different rates are `apart` in the array.
static inline void LEVEL(put_weights)(
    vec p, int64_t at, int count, float *weights, uint16_t *copy, int rates, float *const *averages, size_t apart,
    const float *shares
) {
    LEVEL(put_some)(weights + at, p, count);
    if (copy && count == WIDTH) LEVEL(store_bf16)(copy + at, p);
    else if (copy)
        for (int k = 0; k < count; k++) copy[at + k] = float_to_bf16(p[k]);
    for (int rate = 0; rate < rates; rate++) {
        float *average = averages[rate * apart] + at;
        vec e = LEVEL(get_some)(average, count);
        LEVEL(put_some)(average, e + shares[rate] * (p - e), count);
    }
}

// squares: for each tensor from number `begin` to `end` - 1, the sum of the squares of its gradient.
void LEVEL(squares)(
    int begin, int end, const int64_t *sizes, const void *const *parts, const void *const *others, const uint8_t *kinds,
    double *squares
) {
    for (int i = begin; i < end; i++) {
        double sum = 0;
        for (int64_t start = 0; start < sizes[i]; start += PIECE) {
            int64_t stop = start + PIECE < sizes[i] ? start + PIECE : sizes[i], at = start;
            vec part = {0}, other = {0};
            for (; at + 2 * WIDTH <= stop; at += 2 * WIDTH) {
                vec v = LEVEL(load_gradient)(parts[i], others[i], kinds[i], at);
                vec w = LEVEL(load_gradient)(parts[i], others[i], kinds[i], at + WIDTH);
                part += v * v;
                other += w * w;
            }
            part += other;
            for (int k = 0; k < WIDTH; k++) sum += part[k];
            for (; at < stop; at++) {
                float v = LEVEL(gradient_at)(parts[i], others[i], kinds[i], at);
                sum += (double)v * v;
            }
        }
        squares[i] = sum;
    }
}

typedef struct {
    vec m, v, p;
} LEVEL(adam_result);

static inline LEVEL(adam_result) LEVEL(adam)(vec p, vec g, vec m, vec v, const struct adamw *s, float c1, float c2) {
    LEVEL(adam_result) r;
    g *= s->factor;
    r.m = m + s->rest1 * (g - m);
    r.v = v * s->beta2 + s->rest2 * (g * g);
    r.p = p * (1 - s->lr * s->weight_decay) - (s->lr / c1) * (r.m / (square_root(r.v) / c2 + s->epsilon));
    return r;
}

// Update the tensors from number `begin` to `end` - 1 by AdamW (Loshchilov & Hutter 2019). first, second: the moments.
// averages: those of the first rate for all `count` tensors, then those of the second, and so on. shares: 1 - decay of
// each rate. copies: the bfloat16 copies of the weights, or NULL. corrections: for each tensor, 1 - beta1^step and
// sqrt(1 - beta2^step).
void LEVEL(adamw)(
    int begin, int end, int count, const int64_t *sizes, float *const *params, const void *const *parts,
    const void *const *others, const uint8_t *kinds, float *const *first, float *const *second, uint16_t *const *copies,
    int rates, float *const *averages, const float *shares, const float *corrections, const struct adamw *settings
) {
    for (int i = begin; i < end; i++) {
        float c1 = corrections[2 * i], c2 = corrections[2 * i + 1];
        for (int64_t at = 0; at < sizes[i]; at += WIDTH) {
            int left = LEVEL(count)(at, sizes[i]);
            LEVEL(adam_result) r = LEVEL(adam)(
                LEVEL(get_some)(params[i] + at, left), LEVEL(gradient_of)(parts[i], others[i], kinds[i], at, left),
                LEVEL(get_some)(first[i] + at, left), LEVEL(get_some)(second[i] + at, left), settings, c1, c2
            );
            LEVEL(put_some)(first[i] + at, r.m, left);
            LEVEL(put_some)(second[i] + at, r.v, left);
            LEVEL(put_weights)(r.p, at, left, params[i], copies[i], rates, averages + i, count, shares);
        }
    }
}
