// 3x3 convolutions with padding 1 by Winograd's minimal filtering F(4x4, 3x3) (Lavin & Gray 2016, arXiv 1509.09308): 36
// products for 16 outputs, where the definition takes 144. It is included once for each type of numbers, STORED.
//
// Along one dimension, the convolution of 6 inputs d with 3 weights g gives the 4 outputs A [(G g) * (B d)], where *
// multiplies elements. A, B and G evaluate and interpolate polynomials at 0, +-P, +-Q and infinity. For these P and Q
// the rounding errors are twice those of the definition; for the usual 1 and 2 they are four times as large.
//
// An image [height, width, channels] is cut into tiles of 4x4 outputs. Each tile has 36 numbers per channel, so a
// convolution is 36 products of matrices [tiles, in] and [in, out]. The gradients are products of the same kind.

#define P 0.625f
#define Q 1.5f
#define P2 (P * P)
#define Q2 (Q * Q)
#define AT_0 (1 / (P2 * Q2))  // what G divides by
#define AT_P (1 / (2 * P2 * (P2 - Q2)))
#define AT_Q (1 / (2 * Q2 * (Q2 - P2)))

// B d: 6 numbers from 6.
static inline void TYPED(to_points)(const vec d[6], vec t[6]) {
    vec even = d[4] - Q2 * d[2], odd = P * (d[3] - Q2 * d[1]);
    t[0] = P2 * Q2 * d[0] - (P2 + Q2) * d[2] + d[4];
    t[1] = even + odd;
    t[2] = even - odd;
    even = d[4] - P2 * d[2], odd = Q * (d[3] - P2 * d[1]);
    t[3] = even + odd;
    t[4] = even - odd;
    t[5] = P2 * Q2 * d[1] - (P2 + Q2) * d[3] + d[5];
}
// A m: 4 outputs from 6 products.
static inline void TYPED(from_points)(const vec m[6], vec y[4]) {
    vec sum = m[1] + m[2], difference = m[1] - m[2], sum2 = m[3] + m[4], difference2 = m[3] - m[4];
    y[0] = m[0] + sum + sum2;
    y[1] = P * difference + Q * difference2;
    y[2] = P2 * sum + Q2 * sum2;
    y[3] = P2 * P * difference + Q2 * Q * difference2 + m[5];
}
// The transpose of A: 6 numbers from the gradients of 4 outputs.
static inline void TYPED(gradients_to_points)(const vec y[4], vec t[6]) {
    vec even = y[0] + P2 * y[2], odd = P * y[1] + P2 * P * y[3];
    t[0] = y[0];
    t[1] = even + odd;
    t[2] = even - odd;
    even = y[0] + Q2 * y[2], odd = Q * y[1] + Q2 * Q * y[3];
    t[3] = even + odd;
    t[4] = even - odd;
    t[5] = y[3];
}
// G g: 6 numbers from 3 weights.
static inline void TYPED(weights_to_points)(const vec g[3], vec t[6]) {
    vec even = AT_P * g[0] + AT_P * P2 * g[2], odd = AT_P * P * g[1];
    t[0] = AT_0 * g[0];
    t[1] = even + odd;
    t[2] = even - odd;
    even = AT_Q * g[0] + AT_Q * Q2 * g[2], odd = AT_Q * Q * g[1];
    t[3] = even + odd;
    t[4] = even - odd;
    t[5] = g[2];
}
// The transpose of G: the gradients of 3 weights.
static inline void TYPED(weights_from_points)(const vec t[6], vec g[3]) {
    vec sum = AT_P * (t[1] + t[2]), difference = AT_P * (t[1] - t[2]);
    vec sum2 = AT_Q * (t[3] + t[4]), difference2 = AT_Q * (t[3] - t[4]);
    g[0] = AT_0 * t[0] + sum + sum2;
    g[1] = P * difference + Q * difference2;
    g[2] = P2 * sum + Q2 * sum2 + t[5];
}

// The 36 matrices of weights, [in, out] each, in units of PER_UNIT rows and panels of 2 * WIDTH columns: [panels,
// units, 2 * WIDTH]. Those of the gradient of the input are [out, in], of the weights turned by 180 degrees.
// weight: [out, 3, 3, in].
static void TYPED(winograd_weights)(const STORED *weight, float *to, struct conv size, int backward, float scale) {
    int rows = backward ? size.out : size.in, columns = backward ? size.in : size.out, panel = 2 * WIDTH;
    size_t matrix = winograd_matrix(rows / PER_UNIT, columns);
#pragma omp for schedule(static)
    for (int block = 0; block < columns; block += panel)
        for (int number = 0; number < 2 * rows / WIDTH; number++) {
            // The parts of a row of a panel one after the other, because they may share a line of the cache.
            int first = number / 2 * WIDTH, part = number % 2;
            float turned[9][WIDTH * WIDTH];
            for (int tap = 0; tap < 9; tap++) {
                if (backward) {
                    for (int r = 0; r < WIDTH; r++) {
                        const STORED *from = weight + ((size_t)(first + r) * 9 + tap) * size.in + block;
                        put(turned[8 - tap] + r * WIDTH, LOAD_PART(from, part));
                    }
                } else {
                    float rows_of_out[WIDTH * WIDTH];
                    for (int r = 0; r < WIDTH; r++) {
                        size_t column = block + COLUMN(part, r);
                        put(rows_of_out + r * WIDTH, LOAD(weight + (column * 9 + tap) * size.in + first));
                    }
                    LEVEL(turn)(rows_of_out, WIDTH, turned[tap], WIDTH, WIDTH, WIDTH);
                }
            }
            for (int r = 0; r < WIDTH; r += PER_UNIT) {
                float *at = to + ((size_t)block * rows + (size_t)(first + r) * panel) / PER_UNIT + part * WIDTH;
                vec half[PER_UNIT][6][3];
                for (int k = 0; k < PER_UNIT; k++)
                    for (int j = 0; j < 3; j++) {
                        vec g[3], t[6];
                        for (int i = 0; i < 3; i++) g[i] = get(turned[3 * i + j] + (r + k) * WIDTH);
                        TYPED(weights_to_points)(g, t);
                        for (int i = 0; i < 6; i++) half[k][i][j] = SCALED(t[i], scale);
                    }
                for (int i = 0; i < 6; i++) {
                    vec t[PER_UNIT][6];
                    for (int k = 0; k < PER_UNIT; k++) TYPED(weights_to_points)(half[k][i], t[k]);
                    for (int j = 0; j < 6; j++) put(at + (6 * i + j) * matrix, UNIT_OF(t[0][j], t[PER_UNIT - 1][j]));
                }
            }
        }
}

// Where the 36 pixels of a tile lie. nothing: zeros, for what lies outside the image.
static inline void TYPED(pixels_of_tile)(
    const STORED *x, const STORED *nothing, struct conv size, int channels, size_t tile, const STORED *pixels[POINTS]
) {
    struct place place = winograd_place(size, tile);
    int top = place.top - 1, left = place.left - 1;
    for (int i = 0; i < 6; i++)
        for (int j = 0; j < 6; j++) {
            int inside = top + i >= 0 && top + i < size.height && left + j >= 0 && left + j < size.width;
            size_t pixel = (place.image * size.height + top + i) * size.width + left + j;
            pixels[6 * i + j] = inside ? x + pixel * channels : nothing;
        }
}

// The 36 numbers of `count` tiles from number `first` on as left factors, [36][count, channels].
// x: [images, height, width, channels]. nothing: `channels` zeros.
static inline void TYPED(tiles_of_input)(
    const STORED *x, const STORED *nothing, float *to, const float *scales, struct conv size, int channels,
    size_t first, int count
) {
    size_t matrix = winograd_matrix(TILES, channels / PER_UNIT);
    for (int tile = 0; tile < count; tile++) {
        const STORED *pixels[POINTS];
        TYPED(pixels_of_tile)(x, nothing, size, channels, first + tile, pixels);
        for (int c = 0; c < channels; c += WIDTH) {
            vec half[6][6];
            for (int j = 0; j < 6; j++) {
                vec d[6], t[6];
                for (int i = 0; i < 6; i++) d[i] = LOAD(pixels[6 * i + j] + c);
                TYPED(to_points)(d, t);
                for (int i = 0; i < 6; i++) half[i][j] = t[i];
            }
            for (int i = 0; i < 6; i++) {
                vec t[6];
                TYPED(to_points)(half[i], t);
                for (int j = 0; j < 6; j++) {
                    LEFT *at = (LEFT *)(to + (6 * i + j) * matrix) + (size_t)tile * channels + c;
                    PUT_LEFT(at, SCALED(t[j], scales[tile]));
                }
            }
        }
    }
}

// As `tiles_of_input`, as right factors: in units of PER_UNIT tiles, [36][units, channels]. If tiles are missing in the
// last unit, zeros complete it.
static inline void TYPED(units_of_input)(
    const STORED *x, const STORED *nothing, float *to, float scale, struct conv size, int channels, size_t first,
    int count
) {
    size_t matrix = winograd_matrix(TILES, channels);
    for (int tile = 0; tile < count; tile += PER_UNIT) {
        const STORED *pixels[PER_UNIT][POINTS];
        for (int k = 0; k < PER_UNIT; k++)
            if (tile + k < count) TYPED(pixels_of_tile)(x, nothing, size, channels, first + tile + k, pixels[k]);
            else for (int i = 0; i < POINTS; i++) pixels[k][i] = nothing;
        for (int c = 0; c < channels; c += WIDTH) {
            float *at = to + (size_t)tile / PER_UNIT * channels + c;
            int panel = c / (2 * WIDTH) * 2 * WIDTH, part = c / WIDTH % 2;
            vec half[PER_UNIT][6][6];
            for (int k = 0; k < PER_UNIT; k++)
                for (int j = 0; j < 6; j++) {
                    vec d[6], t[6];
                    for (int i = 0; i < 6; i++) d[i] = LOAD_PART(pixels[k][6 * i + j] + panel, part);
                    TYPED(to_points)(d, t);
                    for (int i = 0; i < 6; i++) half[k][i][j] = SCALED(t[i], scale);
                }
            for (int i = 0; i < 6; i++) {
                vec t[PER_UNIT][6];
                for (int k = 0; k < PER_UNIT; k++) TYPED(to_points)(half[k][i], t[k]);
                for (int j = 0; j < 6; j++) put(at + (6 * i + j) * matrix, UNIT_OF(t[0][j], t[PER_UNIT - 1][j]));
            }
        }
    }
}

// As `units_of_input`, for the gradient of the output, as left factors. sums: the sums of its numbers in each tile,
// [count, channels].
static inline void TYPED(units_of_gradient)(
    const STORED *dy, const STORED *nothing, float *to, float scale, float *sums, struct conv size,
    int channels, size_t first, int count
) {
    size_t matrix = winograd_matrix(TILES, channels);
    for (int tile = 0; tile < count; tile += PER_UNIT) {
        const STORED *from[PER_UNIT];
        size_t across[PER_UNIT];  // from one pixel to the next
        for (int k = 0; k < PER_UNIT; k++) {
            struct place place = winograd_place(size, first + tile + k);
            size_t pixel = (place.image * size.height + place.top) * size.width + place.left;
            from[k] = tile + k < count ? dy + pixel * channels : nothing;
            across[k] = tile + k < count ? channels : 0;
        }
        for (int c = 0; c < channels; c += WIDTH) {
            float *at = to + (size_t)tile / PER_UNIT * channels + c;
            vec half[PER_UNIT][6][4];
            for (int k = 0; k < PER_UNIT; k++) {
                vec sum = zero();
                for (int j = 0; j < 4; j++) {
                    vec d[4], t[6];
                    for (int i = 0; i < 4; i++) d[i] = LOAD(from[k] + (i * size.width + j) * across[k] + c);
                    sum += (d[0] + d[1]) + (d[2] + d[3]);
                    TYPED(gradients_to_points)(d, t);
                    for (int i = 0; i < 6; i++) half[k][i][j] = SCALED(t[i], scale);
                }
                put(sums + (size_t)(tile + k) * channels + c, sum);
            }
            for (int i = 0; i < 6; i++) {
                vec t[PER_UNIT][6];
                for (int k = 0; k < PER_UNIT; k++) TYPED(gradients_to_points)(half[k][i], t[k]);
                for (int j = 0; j < 6; j++) put(at + (6 * i + j) * matrix, UNIT_OF(t[0][j], t[PER_UNIT - 1][j]));
            }
        }
    }
}

// The outputs of `count` tiles from their products, [36][count, channels], which are multiplied by the factor of their
// tile.
static inline void TYPED(outputs_of_tiles)(
    const SUMS *from, const float *factors, const STORED *bias, STORED *y, struct conv size, int channels,
    size_t first, int count
) {
    size_t matrix = PER_UNIT * winograd_matrix(TILES, channels / PER_UNIT);
    for (int tile = 0; tile < count; tile++) {
        struct place place = winograd_place(size, first + tile);
        STORED *to = y + ((place.image * size.height + place.top) * size.width + place.left) * channels;
        for (int c = 0; c < channels; c += WIDTH) {
            const SUMS *at = from + (size_t)tile * channels + c;
            vec half[4][6], offset = bias ? LOAD(bias + c) : zero();
            for (int j = 0; j < 6; j++) {
                vec m[6], t[4];
                for (int i = 0; i < 6; i++) m[i] = GET_SUMS(at + (6 * i + j) * matrix);
                TYPED(from_points)(m, t);
                for (int i = 0; i < 4; i++) half[i][j] = t[i];
            }
            for (int i = 0; i < 4; i++) {
                vec t[4];
                TYPED(from_points)(half[i], t);
                for (int j = 0; j < 4; j++)
                    STORE(to + ((size_t)i * size.width + j) * channels + c, SCALED(t[j], factors[tile]) + offset);
            }
        }
    }
}

// The working memory of the functions below, in numbers of 4 bytes.
size_t TYPED(conv3x3_room)(size_t height, size_t width, size_t in, size_t out, size_t threads) {
    (void)height, (void)width;
    size_t of_thread = winograd_matrix(TILES, in) + winograd_matrix(TILES, out), nothing = in > out ? in : out;
    return nothing + (PER_UNIT * TILES + 1) * out + POINTS * (winograd_matrix(in, out) + threads * of_thread);
}

// y = the convolution of x with weight, plus bias; or, if `backward`, the gradient of x from that of y, where x and y
// change places in the arguments.
// x: [images, height, width, in]. weight: [out, 3, 3, in]. bias: [out], or NULL. y: [images, height, width, out].
// height and width are multiples of 4, in and out of 32. room: working memory, of the size conv3x3_room.
void TYPED(conv3x3_forward)(
    const STORED *x, const STORED *weight, const STORED *bias, STORED *y, float *room, int images, int height,
    int width, int in, int out, int backward, int threads
) {
    struct conv size = {images, height, width, in, out};
    int rows = backward ? out : in, columns = backward ? in : out;
    size_t tiles = (size_t)images * (height / 4) * (width / 4), blocks = (tiles + TILES - 1) / TILES;
    size_t of_weights = winograd_matrix(rows / PER_UNIT, columns);
    size_t of_input = winograd_matrix(TILES, rows / PER_UNIT), of_output = winograd_matrix(TILES, columns / PER_UNIT);
    const STORED *nothing = memset(room, 0, rows * sizeof(float));
    float *weights = room + rows;
    float of_all = 1;  // scale of the weights
#ifdef HALVES
    int exponent = LEVEL(exponent)(weight, (size_t)9 * in * out);
    of_all = LEVEL(power)(SCALE_OF_WEIGHTS(exponent));
#endif
#pragma omp parallel num_threads(threads)
    {
        float scales[TILES], factors[TILES] = {0};
        TYPED(winograd_weights)(weight, weights, size, backward, of_all);
        float *v = weights + POINTS * (of_weights + omp_get_thread_num() * (of_input + of_output));
        float *m = v + POINTS * of_input;
#ifdef HALVES
        size_t known = images, numbers = (size_t)height * width * rows;
        int power = 0;
#endif
#pragma omp for schedule(static)
        for (size_t block = 0; block < blocks; block++) {
            size_t first = block * TILES;
            int count = tiles - first < TILES ? (int)(tiles - first) : TILES;
#ifdef HALVES
            // Each image has a power of its own, so that it comes out the same in any batch.
            for (int tile = 0; tile < count; tile++) {
                size_t image = winograd_place(size, first + tile).image;
                if (image != known) {
                    known = image;
                    power = SCALE_OF_INPUT(LEVEL(exponent)(x + image * numbers, numbers)) - LEVEL(spare)(rows);
                }
                scales[tile] = LEVEL(power)(power);
                factors[tile] = LEVEL(power)(-power - SCALE_OF_WEIGHTS(exponent));
            }
#endif
            TYPED(tiles_of_input)(x, nothing, v, scales, size, rows, first, count);
            for (int point = 0; point < POINTS; point++)
                for (int column = 0; column < columns; column += 2 * WIDTH)
                    // Rows behind the last tile hold old numbers, and nobody reads what comes of them.
                    for (int row = 0; row < count; row += ROWS)
                        PRODUCT_TO_SUMS(
                            v + point * of_input + (size_t)row * rows / PER_UNIT, rows / PER_UNIT,
                            weights + point * of_weights + (size_t)column * rows / PER_UNIT, 2 * WIDTH,
                            (SUMS *)(m + point * of_output) + (size_t)row * columns + column, columns,
                            rows / PER_UNIT, NULL
                        );
            TYPED(outputs_of_tiles)((SUMS *)m, factors, bias, y, size, columns, first, count);
        }
    }
}

// The gradients of weight and bias from x and the gradient of y. The arguments are those of conv3x3_forward.
void TYPED(conv3x3_backward)(
    const STORED *x, const STORED *dy, STORED *dweight, STORED *dbias, float *room, int images, int height, int width,
    int in, int out, int threads
) {
    struct conv size = {images, height, width, in, out};
    int tiles = images * (height / 4) * (width / 4);
    size_t of_weights = winograd_matrix(in, out), of_input = winograd_matrix(TILES, in);
    size_t of_output = winograd_matrix(TILES, out);
    size_t zeros = in > out ? in : out;
    const STORED *nothing = memset(room, 0, zeros * sizeof(float));
    float *total = memset(room + zeros, 0, out * sizeof(float)), *sums = total + out;
    float *weights = sums + PER_UNIT * TILES * out;
    float *v = weights + POINTS * of_weights, *d = v + POINTS * of_input;
    // Tiles that are turned together, and that a thread turns at a time.
    enum { TOGETHER = PER_UNIT * TILES, SHARE = TOGETHER / 4 };
#ifdef HALVES
    size_t pixels = (size_t)height * width;
    int most_x = INT_MIN, most_dy = INT_MIN;
#endif
#pragma omp parallel num_threads(threads)
    {
        float x_scale = 1, dy_scale = 1, factors[ROWS];
#ifdef HALVES
#pragma omp for schedule(static) reduction(max : most_x, most_dy)
        for (int image = 0; image < images; image++) {
            int of_x = LEVEL(exponent)(x + image * pixels * in, pixels * in);
            int of_dy = LEVEL(exponent)(dy + image * pixels * out, pixels * out);
            most_x = of_x > most_x ? of_x : most_x;
            most_dy = of_dy > most_dy ? of_dy : most_dy;
        }
        int x_power = SCALE_OF_INPUT(most_x), dy_power = SCALE_OF_GRADIENT(most_dy);
        x_scale = LEVEL(power)(x_power);
        dy_scale = LEVEL(power)(dy_power);
        for (int row = 0; row < ROWS; row++) factors[row] = LEVEL(power)(-x_power - dy_power);
#endif
        for (int first = 0; first < tiles; first += TOGETHER) {
            int count = tiles - first < TOGETHER ? tiles - first : TOGETHER;
#pragma omp for schedule(static)
            for (int start = 0; start < count; start += SHARE) {
                int part = count - start < SHARE ? count - start : SHARE;
                size_t unit = start / PER_UNIT;
                TYPED(units_of_input)(x, nothing, v + unit * in, x_scale, size, in, first + start, part);
                TYPED(units_of_gradient)(
                    dy, nothing, d + unit * out, dy_scale, sums + (size_t)start * out, size, out, first + start, part
                );
            }
#pragma omp for schedule(static) nowait
            for (int k = 0; k < out; k += WIDTH) {
                vec sum = get(total + k);
                for (int tile = 0; tile < count; tile++) sum += get(sums + (size_t)tile * out + k);
                put(total + k, sum);
            }
#pragma omp for schedule(static)
            for (int point = 0; point < POINTS; point++)
                for (int column = 0; column < in; column += 2 * WIDTH)
                    for (int row = 0; row < out; row += ROWS) {
                        float *at = weights + point * of_weights + (size_t)row * in + column;
                        PRODUCT(
                            d + point * of_output + row, 1, out, v + point * of_input + column, in, at, in,
                            (count + PER_UNIT - 1) / PER_UNIT, first ? at : NULL, in, factors
                        );
                    }
        }
#pragma omp for schedule(static)
        for (int k = 0; k < out; k++)
            for (int c = 0; c < in; c += WIDTH) {
                const float *at = weights + (size_t)k * in + c;
                vec half[3][6];
                for (int j = 0; j < 6; j++) {
                    vec t[6], g[3];
                    for (int i = 0; i < 6; i++) t[i] = get(at + (6 * i + j) * of_weights);
                    TYPED(weights_from_points)(t, g);
                    for (int i = 0; i < 3; i++) half[i][j] = g[i];
                }
                for (int i = 0; i < 3; i++) {
                    vec g[3];
                    TYPED(weights_from_points)(half[i], g);
                    for (int j = 0; j < 3; j++) STORE(dweight + ((size_t)k * 9 + 3 * i + j) * in + c, g[j]);
                }
            }
#pragma omp for schedule(static)
        for (int k = 0; k < out; k += WIDTH) STORE(dbias + k, get(total + k));
    }
}

#undef P
#undef Q
#undef P2
#undef Q2
#undef AT_0
#undef AT_P
#undef AT_Q
