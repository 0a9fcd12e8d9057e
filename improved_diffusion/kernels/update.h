// The gradient's norm, and AdamW with moving averages and the weights' copy in 16 bits: each number is fetched from
// memory once. Tensors are given as arrays of addresses and sizes; addresses of gradients in 16 bits are marked.

static inline vec LEVEL(load_gradient)(const void *from, size_t at, int is_bf16) {
    return is_bf16 ? LEVEL(load_bf16)((const uint16_t *)from + at) : get((const float *)from + at);
}

void LEVEL(squares)(
    int count, const int64_t *sizes, const void *const *values, const uint8_t *is_bf16, double *squares, int threads
) {
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int i = 0; i < count; i++) {
        double sum = 0;
        for (int64_t start = 0; start < sizes[i]; start += PIECE) {
            int64_t end = start + PIECE < sizes[i] ? start + PIECE : sizes[i], at = start;
            vec part = {0}, other = {0};
            for (; at + 2 * WIDTH <= end; at += 2 * WIDTH) {
                vec v = LEVEL(load_gradient)(values[i], at, is_bf16[i]);
                vec w = LEVEL(load_gradient)(values[i], at + WIDTH, is_bf16[i]);
                part += v * v;
                other += w * w;
            }
            part += other;
            for (int k = 0; k < WIDTH; k++) sum += part[k];
            for (; at < end; at++) {
                float v = is_bf16[i] ? bf16_to_float(((const uint16_t *)values[i])[at]) : ((const float *)values[i])[at];
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
    r.p = p * (1 - s->lr * s->weight_decay) - (s->lr / c1) * (r.m / (VECTOR(sqrt_ps)(r.v) / c2 + s->epsilon));
    return r;
}

// averages: those of the first rate for all tensors, then those of the second, and so on. copies: of the weights in
// 16 bits, NULL where there is none. corrections: 1 - beta1^step and sqrt(1 - beta2^step) of each tensor.
void LEVEL(adamw)(
    int count, const int64_t *sizes, float *const *params, const void *const *gradients, const uint8_t *is_bf16,
    float *const *first, float *const *second, uint16_t *const *copies, int rates, float *const *averages,
    const float *shares, const float *corrections, const struct adamw *settings, int threads
) {
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int i = 0; i < count; i++) {
        float c1 = corrections[2 * i], c2 = corrections[2 * i + 1];
        for (int64_t at = 0; at < sizes[i]; at += WIDTH) {
            int full = at + WIDTH <= sizes[i], left = full ? WIDTH : (int)(sizes[i] - at);
            vec p = {0}, g = {0}, m = {0}, v = {0};
            if (full) {
                p = get(params[i] + at);
                g = LEVEL(load_gradient)(gradients[i], at, is_bf16[i]);
                m = get(first[i] + at);
                v = get(second[i] + at);
            } else
                for (int k = 0; k < left; k++) {
                    p[k] = params[i][at + k];
                    g[k] = is_bf16[i] ? bf16_to_float(((const uint16_t *)gradients[i])[at + k])
                                      : ((const float *)gradients[i])[at + k];
                    m[k] = first[i][at + k];
                    v[k] = second[i][at + k];
                }
            LEVEL(adam_result) r = LEVEL(adam)(p, g, m, v, settings, c1, c2);
            if (full) {
                put(params[i] + at, r.p);
                put(first[i] + at, r.m);
                put(second[i] + at, r.v);
                if (copies[i]) LEVEL(store_bf16)(copies[i] + at, r.p);
            } else
                for (int k = 0; k < left; k++) {
                    params[i][at + k] = r.p[k];
                    first[i][at + k] = r.m[k];
                    second[i][at + k] = r.v[k];
                    if (copies[i]) copies[i][at + k] = float_to_bf16(r.p[k]);
                }
            for (int rate = 0; rate < rates; rate++) {
                float *average = averages[(size_t)rate * count + i] + at;
                if (full) {
                    vec e = get(average);
                    put(average, e + shares[rate] * (r.p - e));
                } else
                    for (int k = 0; k < left; k++) average[k] += shares[rate] * (r.p[k] - average[k]);
            }
        }
    }
}
