// Self-attention (Vaswani et al. 2017, section 3.2.1), in blocks of ROWS positions, so that the scores stay in the
// caches (Dao et al. 2022, arXiv 2205.14135). The backward pass computes the scores again. This file is included once
// for each type of numbers, STORED, with the type of the factors of its products, FACTOR.
//
// qkv: [images, positions, heads * 3 * width], for each head queries, keys, values. positions and width are multiples
// of 16. A matrix product a * b works on units of 4 bytes, which hold UNIT numbers: 1 float, or 2 bfloat16 or float16
// numbers, which the processor multiplies in pairs. b is packed by units: [depth in units, columns]. Vectors multiply
// broadcast units of a by units of b; for tiles see tile_products.h.

#ifndef TILE_MULTIPLY
// c[ROWS, columns] = a[ROWS, depth] * b, b packed. The steps are the distances between rows.
#define MULTIPLY_COLUMNS(COLUMNS)                                                                                      \
    static inline void TYPED(multiply_##COLUMNS)(                                                                      \
        const FACTOR *a, size_t a_step, const uint32_t *b, size_t b_step, float *c, size_t c_step, int units           \
    ) {                                                                                                                \
        for (int first = 0, end; first < units; first = end) {                                                         \
            end = units - first > UNITS_ADDED ? first + UNITS_ADDED : units;                                           \
            vec sums[ROWS][COLUMNS];                                                                                   \
            for (int i = 0; i < ROWS; i++)                                                                             \
                for (int j = 0; j < COLUMNS; j++) sums[i][j] = zero();                                                 \
            for (int unit = first; unit < end; unit++) {                                                               \
                vec packed[COLUMNS];                                                                                   \
                for (int j = 0; j < COLUMNS; j++) packed[j] = get((const float *)b + unit * b_step + j * WIDTH);       \
                _Pragma("GCC unroll 8") for (int i = 0; i < ROWS; i++) {                                               \
                    int32_t bits;                                                                                      \
                    memcpy(&bits, a + i * a_step + UNIT * unit, sizeof bits);                                          \
                    for (int j = 0; j < COLUMNS; j++)                                                                  \
                        sums[i][j] = ADD_PRODUCTS(sums[i][j], packed[j], bits);                                        \
                }                                                                                                      \
            }                                                                                                          \
            for (int i = 0; i < ROWS; i++)                                                                             \
                for (int j = 0; j < COLUMNS; j++) {                                                                    \
                    float *to = c + i * c_step + j * WIDTH;                                                            \
                    vec sum = SUM(sums[i][j]);                                                                         \
                    if (first) sum += get(to);                                                                         \
                    put(to, sum);                                                                                      \
                }                                                                                                      \
        }                                                                                                              \
    }
MULTIPLY_COLUMNS(1)
MULTIPLY_COLUMNS(2)
#undef MULTIPLY_COLUMNS

static inline void TYPED(multiply)(
    const FACTOR *a, size_t a_step, const uint32_t *b, size_t b_step, float *c, size_t c_step, int columns, int depth
) {
    int column = 0, units = depth / UNIT;
    for (; column + 2 * WIDTH <= columns; column += 2 * WIDTH)
        TYPED(multiply_2)(a, a_step, b + column, b_step, c + column, c_step, units);
    if (column < columns) TYPED(multiply_1)(a, a_step, b + column, b_step, c + column, c_step, units);
}
#endif

// Numbers [rows, width] as factors: they themselves, or copies in `room` if factors have a type of their own. These are
// multiplied by a power of two, so that the largest is less than 2^most. `inverse` becomes the inverse of this power.
static inline const FACTOR *TYPED(factors)(
    const STORED *from, size_t *step, FACTOR *room, int rows, int width, int most, float *inverse
) {
#ifdef HALVES
    __m512i largest = _mm512_setzero_si512();
    for (int row = 0; row < rows; row++)
        for (int i = 0; i < width; i += WIDTH) {
            __m256i numbers = _mm256_loadu_si256((const __m256i *)(from + row * *step + i));
            largest = LEVEL(larger)(largest, _mm512_zextsi256_si512(numbers));
        }
    int power = most - 1 - LEVEL(exponent_of_bits)(largest);
    float scale = LEVEL(power)(power);
    *inverse = LEVEL(power)(-power);
    for (int row = 0; row < rows; row++)
        for (int i = 0; i < width; i += WIDTH)
            STORE_FACTOR(room + (size_t)row * width + i, LOAD(from + row * *step + i) * scale);
    *step = width;
    return room;
#else
    *inverse = 1;
    return from;
#endif
}

// Transpose [rows, width] and pack it: a unit holds neighbours in a row. to: [width in units, rows].
static inline void TYPED(pack_columns)(const FACTOR *from, size_t step, uint32_t *to, int rows, int width) {
    LEVEL(turn)(from, step / UNIT, to, rows, rows, width / UNIT);
}

// Pack [rows, width] without transposing: a unit holds neighbours in a column. to: [rows in units, width].
static inline void TYPED(pack_rows)(const FACTOR *from, size_t step, uint32_t *to, int rows, int width) {
    for (int row = 0; row < rows; row += UNIT)
        for (int i = 0; i < width; i += WIDTH) {
            const FACTOR *first = from + row * step + i;
            float *unit = (float *)to + (size_t)row / UNIT * width + i;
            put(unit, PACK(LOAD_FACTOR(first), LOAD_FACTOR(first + (UNIT - 1) * step)));
        }
}

static inline void TYPED(store_rows)(const float *from, STORED *to, size_t step, int width, float factor) {
    for (int row = 0; row < ROWS; row++)
        for (int i = 0; i < width; i += WIDTH) STORE(to + row * step + i, get(from + row * width + i) * factor);
}

// The working memory of each thread, in units of 4 bytes.
static size_t TYPED(forward_room)(size_t positions, size_t width) {
    return positions * ((2 + 3 * COPIES) * width / UNIT + ROWS + ROWS / UNIT) + ROWS * width;
}
static size_t TYPED(backward_room)(size_t positions, size_t width) {
    size_t rows = (5 + 4 * COPIES) * width + positions;
    return positions * (rows / UNIT + 2 * ROWS + 2 * ROWS / UNIT + 1) + ROWS * width;
}
size_t TYPED(attention_room)(size_t positions, size_t width) {
    size_t forward = TYPED(forward_room)(positions, width), backward = TYPED(backward_room)(positions, width);
    return forward > backward ? forward : backward;
}

// out: [images, positions, heads * width]. logsums: [images, heads, positions], the logarithms of the sums of
// exponentials in the softmax, for the backward pass. room: working memory for all threads.
void TYPED(attention_forward)(
    const STORED *qkv, STORED *out, float *logsums, uint32_t *room, int images, int positions, int heads, int width,
    int threads
) {
#ifdef TILE_MULTIPLY
    if (OTHER_SIZES(positions, width)) {
        OTHER(attention_forward)(qkv, out, logsums, room, images, positions, heads, width, threads);
        return;
    }
#endif
    size_t step = (size_t)heads * 3 * width, out_step = (size_t)heads * width;
    size_t copy = (size_t)positions * width, size = copy / UNIT;
    float scale = 1 / sqrtf((float)width);
#pragma omp parallel num_threads(threads)
    {
#ifdef TILE_MULTIPLY
        TILE_CONFIGURE(&whole_tiles);
#endif
        uint32_t *keys = room + omp_get_thread_num() * TYPED(forward_room)(positions, width), *values = keys + size;
        float *scores = (float *)(values + size), *result = scores + ROWS * positions;
        FACTOR *weights = (FACTOR *)(result + ROWS * width), *copies = weights + ROWS * positions;
#pragma omp for collapse(2) schedule(static)
        for (int image = 0; image < images; image++)
            for (int head = 0; head < heads; head++) {
                const STORED *of_head = qkv + (size_t)image * positions * step + (size_t)head * 3 * width;
                STORED *o = out + (size_t)image * positions * out_step + (size_t)head * width;
                float *logsum = logsums + ((size_t)image * heads + head) * positions;
                size_t q_step = step, k_step = step, v_step = step;
                float of_q, of_k, of_v;
                const FACTOR *q = TYPED(factors)(of_head, &q_step, copies, positions, width, 0, &of_q);
                const FACTOR *k = TYPED(factors)(of_head + width, &k_step, copies + copy, positions, width, 0, &of_k);
                const FACTOR *v =
                    TYPED(factors)(of_head + 2 * width, &v_step, copies + 2 * copy, positions, width, 0, &of_v);
                float of_scores = scale * of_q * of_k;
                TYPED(pack_columns)(k, k_step, keys, positions, width);
                TYPED(pack_rows)(v, v_step, values, positions, width);
                for (int first = 0; first < positions; first += ROWS) {
                    TYPED(multiply)(q + first * q_step, q_step, keys, positions, scores, positions, positions, width);
                    // One loop after the other, because the processor can work on several rows only if none waits for
                    // a result of the one before.
                    float top[ROWS], inverse[ROWS];
                    for (int row = 0; row < ROWS; row++) {
                        const float *of_row = scores + row * positions;
                        vec most = get(of_row);
                        for (int i = WIDTH; i < positions; i += WIDTH) most = maximum(most, get(of_row + i));
                        top[row] = LEVEL(largest)(most) * of_scores;
                    }
                    vec sums[ROWS];
                    for (int row = 0; row < ROWS; row++) {
                        sums[row] = zero();
                        for (int i = 0; i < positions; i += WIDTH) {
                            vec weight = EXPONENTIAL(get(scores + row * positions + i) * of_scores - top[row]);
                            sums[row] += weight;
                            STORE_FACTOR(weights + row * positions + i, weight);
                        }
                    }
                    for (int row = 0; row < ROWS; row++) {
                        float total = LEVEL(total)(sums[row]);
                        inverse[row] = of_v / total;
                        logsum[first + row] = top[row] + logf(total);
                    }
                    TYPED(multiply)(weights, positions, values, width, result, width, width, positions);
                    for (int row = 0; row < ROWS; row++)
                        for (int i = 0; i < width; i += WIDTH)
                            STORE(o + (first + row) * out_step + i, get(result + row * width + i) * inverse[row]);
                }
            }
#ifdef TILE_MULTIPLY
        TILE_RELEASE();
#endif
    }
}

#define CHANNELS (ROWS > WIDTH ? ROWS : WIDTH)  // of the gradients of queries that are transposed together

// Compute the gradient of qkv, dqkv, from that of out, dout.
void TYPED(attention_backward)(
    const STORED *dout, const STORED *qkv, const STORED *out, const float *logsums, STORED *dqkv, uint32_t *room,
    int images, int positions, int heads, int width, int threads
) {
#ifdef TILE_MULTIPLY
    if (OTHER_SIZES(positions, width)) {
        OTHER(attention_backward)(dout, qkv, out, logsums, dqkv, room, images, positions, heads, width, threads);
        return;
    }
#endif
    size_t step = (size_t)heads * 3 * width, out_step = (size_t)heads * width;
    size_t copy = (size_t)positions * width, size = copy / UNIT;
    float scale = 1 / sqrtf((float)width);
    // The gradients of scores are at most 2 width 2^most_d; UNITS_ADDED pairs of their products with queries or keys must
    // stay below 65504 in float16.
    int most_d = 8;
    while (ldexpf((float)width, most_d) > 256) most_d--;
#pragma omp parallel num_threads(threads)
    {
#ifdef TILE_MULTIPLY
        TILE_CONFIGURE(&whole_tiles);
#endif
        uint32_t *q_columns = room + omp_get_thread_num() * TYPED(backward_room)(positions, width);
        uint32_t *d_columns = q_columns + size, *q_rows = d_columns + size, *d_rows = q_rows + size;
        FACTOR *k_turned = (FACTOR *)(d_rows + size);     // the transposed keys, [width, positions]
        uint32_t *all_ds = (uint32_t *)k_turned + size;   // the gradients of all scores, packed: [keys in units, queries]
        float *scores = (float *)(all_ds + (size_t)positions * positions / UNIT), *dweights = scores + ROWS * positions;
        _Static_assert(CHANNELS <= 2 * ROWS, "the scores and dweights of ROWS rows must hold those of CHANNELS rows");
        float *inner = dweights + ROWS * positions, *result = inner + positions;
        FACTOR *weights = (FACTOR *)(result + ROWS * width), *ds = weights + ROWS * positions;
        FACTOR *copies = ds + ROWS * positions;
#pragma omp for collapse(2) schedule(static)
        for (int image = 0; image < images; image++)
            for (int head = 0; head < heads; head++) {
                size_t start = (size_t)image * positions * step + (size_t)head * 3 * width;
                size_t out_start = (size_t)image * positions * out_step + (size_t)head * width;
                const STORED *of_head = qkv + start, *of_out = dout + out_start, *o = out + out_start;
                const float *logsum = logsums + ((size_t)image * heads + head) * positions;
                STORED *dq = dqkv + start, *dk = dq + width, *dv = dk + width;
                size_t q_step = step, k_step = step, v_step = step, d_step = out_step;
                float of_q, of_k, of_v, of_d;
                const FACTOR *q = TYPED(factors)(of_head, &q_step, copies, positions, width, 0, &of_q);
                const FACTOR *k = TYPED(factors)(of_head + width, &k_step, copies + copy, positions, width, 0, &of_k);
                const FACTOR *v =
                    TYPED(factors)(of_head + 2 * width, &v_step, copies + 2 * copy, positions, width, 0, &of_v);
                const FACTOR *d =
                    TYPED(factors)(of_out, &d_step, copies + 3 * copy, positions, width, most_d, &of_d);
                float of_scores = scale * of_q * of_k, of_ds = of_v * of_d;
                TYPED(pack_columns)(q, q_step, q_columns, positions, width);
                TYPED(pack_columns)(d, d_step, d_columns, positions, width);
                TYPED(pack_rows)(q, q_step, q_rows, positions, width);
                TYPED(pack_rows)(k, k_step, d_rows, positions, width);
                LEVEL(turn)(d_rows, width, k_turned, positions / UNIT, positions / UNIT, width);
                TYPED(pack_rows)(d, d_step, d_rows, positions, width);
                for (int t = 0; t < positions; t++) {
                    vec sum = zero();
                    for (int i = 0; i < width; i += WIDTH)
                        sum += LOAD(of_out + t * out_step + i) * LOAD(o + t * out_step + i);
                    inner[t] = LEVEL(total)(sum) / of_ds;
                }
                for (int first = 0; first < positions; first += ROWS) {
                    // The scores of ROWS keys, as rows, with all queries, as columns.
                    TYPED(multiply)(
                        k + first * k_step, k_step, q_columns, positions, scores, positions, positions, width
                    );
                    TYPED(multiply)(
                        v + first * v_step, v_step, d_columns, positions, dweights, positions, positions, width
                    );
                    for (int row = 0; row < ROWS; row += UNIT)
                        for (int i = 0; i < positions; i += WIDTH) {
                            vec gradients[UNIT];
                            for (int k = 0; k < UNIT; k++) {
                                size_t at = (size_t)(row + k) * positions + i;
                                vec weight = EXPONENTIAL(get(scores + at) * of_scores - get(logsum + i));
                                gradients[k] = weight * (get(dweights + at) - get(inner + i));
                                STORE_FACTOR(weights + at, weight);
                                STORE_FACTOR(ds + at, gradients[k]);
                            }
                            uint32_t *to = all_ds + (size_t)(first + row) / UNIT * positions + i;
                            put((float *)to, PACK(gradients[0], gradients[UNIT - 1]));
                        }
                    TYPED(multiply)(weights, positions, d_rows, width, result, width, width, positions);
                    TYPED(store_rows)(result, dv + first * step, step, width, of_d);
                    TYPED(multiply)(ds, positions, q_rows, width, result, width, width, positions);
                    TYPED(store_rows)(result, dk + first * step, step, width, scale * of_ds * of_q);
                }
                float factor = scale * of_ds * of_k;
                for (int first = 0; first < width; first += CHANNELS) {
                    // The gradients of CHANNELS channels, as rows, of all queries, as columns.
                    for (int i = 0; i < CHANNELS; i += ROWS) {
                        const FACTOR *rows = k_turned + (size_t)(first + i) * positions;
                        float *to = scores + i * positions;
                        TYPED(multiply)(rows, positions, all_ds, positions, to, positions, positions, positions);
                    }
                    for (int t = 0; t < positions; t += WIDTH) {
                        float turned[WIDTH * CHANNELS];
                        LEVEL(turn)(scores + t, positions, turned, CHANNELS, CHANNELS, WIDTH);
                        for (int i = 0; i < WIDTH * CHANNELS; i += WIDTH)
                            STORE(dq + (t + i / CHANNELS) * step + first + i % CHANNELS, get(turned + i) * factor);
                    }
                }
            }
#ifdef TILE_MULTIPLY
        TILE_RELEASE();
#endif
    }
}

#undef CHANNELS
