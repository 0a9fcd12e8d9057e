// Convolutions with a kernel of size 1: products of the positions [positions, in] and the weights [out, in]. It is
// included once for each type, STORED.

#ifdef HALVES
// The power of two for factors whose largest is less than 2^(exponent + 1): DEPTH products stay below 65504.
#define SCALE_OF_FACTOR(exponent) (4 - (exponent))
#endif

// Numbers as left factors.
static inline void TYPED(to_left)(const STORED *from, LEFT *to, size_t numbers, float scale) {
    for (size_t i = 0; i < numbers; i += WIDTH) PUT_LEFT(to + i, SCALED(LOAD(from + i), scale));
}
// Rows of `columns` numbers as right factors, in panels of 2 * WIDTH columns, [panels, POSITIONS, 2 * WIDTH].
static inline void TYPED(to_panels)(
    const STORED *from, RIGHT *to, int columns, int first, int count, float scale
) {
    for (int row = first; row < first + count; row++)
        for (int c = 0; c < columns; c += WIDTH) {
            int panel = c / (2 * WIDTH);
            RIGHT *at = to + ((size_t)panel * POSITIONS + row) * 2 * WIDTH + c % (2 * WIDTH);
            PUT_RIGHT(at, SCALED(LOAD(from + (size_t)row * columns + c), scale));
        }
}

// The weights in panels of 2 * WIDTH columns, [panels, rows, 2 * WIDTH]: [in, out], or [out, in] if `backward`.
static void TYPED(pointwise_weights)(const STORED *weight, RIGHT *to, int in, int out, int backward, float scale) {
    int rows = backward ? out : in, columns = backward ? in : out, panel = 2 * WIDTH;
#pragma omp for schedule(static)
    for (int column = 0; column < columns; column += WIDTH) {
        RIGHT *panel_at = to + (size_t)(column / panel) * rows * panel + column % panel;
        for (int first = 0; first < rows; first += WIDTH) {
            float numbers[WIDTH * WIDTH], turned[WIDTH * WIDTH];
            for (int r = 0; r < WIDTH; r++) {
                size_t at = backward ? (size_t)(first + r) * in + column : (size_t)(column + r) * in + first;
                put(numbers + r * WIDTH, LOAD(weight + at));
            }
            if (!backward) LEVEL(turn)(numbers, WIDTH, turned, WIDTH, WIDTH, WIDTH);
            for (int r = 0; r < WIDTH; r++) {
                vec v = get((backward ? numbers : turned) + r * WIDTH);
                PUT_RIGHT(panel_at + (size_t)(first + r) * panel, SCALED(v, scale));
            }
        }
    }
}

// The working memory of the functions below, in numbers of 4 bytes.
size_t TYPED(pointwise_room)(size_t in, size_t out, size_t threads) {
    return in * out + out + threads * POSITIONS * (in + out);
}

// y = x times the transpose of weight, plus bias; or, if `backward`, the gradient of x from that of y, where x and y
// change places in the arguments.
// x: [positions, in]. weight: [out, in]. bias: [out], or NULL. y: [positions, out]. in and out are multiples of 32.
// room: working memory, of the size pointwise_room.
void TYPED(pointwise_forward)(
    const STORED *x, const STORED *weight, const STORED *bias, STORED *y, float *room, int positions, int in, int out,
    int backward, int threads
) {
    int rows = backward ? out : in, columns = backward ? in : out, blocks = (positions + POSITIONS - 1) / POSITIONS;
    int direct = sizeof(STORED) == sizeof(float);  // no numbers to convert
    float *offset = room, *weights = room + out;
    for (int c = 0; bias && c < out; c += WIDTH) put(offset + c, LOAD(bias + c));
    float of_weights = 1;  // scale of the weights
#ifdef HALVES
    int exponent = LEVEL(exponent)(weight, (size_t)in * out);
    of_weights = LEVEL(power)(SCALE_OF_FACTOR(exponent));
#endif
#pragma omp parallel num_threads(threads)
    {
        float factors[POSITIONS] = {0};
        TYPED(pointwise_weights)(weight, (RIGHT *)weights, in, out, backward, of_weights);
        float *v = weights + (size_t)in * out + omp_get_thread_num() * (size_t)POSITIONS * (in + out);
        float *m = v + (size_t)POSITIONS * rows;
#pragma omp for schedule(static)
        for (int block = 0; block < blocks; block++) {
            int first = block * POSITIONS, count = positions - first < POSITIONS ? positions - first : POSITIONS;
            // Rows behind the last position hold old numbers, and nobody reads what comes of them.
            int own = !direct || count % PRODUCT_ROWS;
            const STORED *from = x + (size_t)first * rows;
            const LEFT *a = own ? (LEFT *)v : (const LEFT *)from;
            float *to = own ? m : (float *)y + (size_t)first * columns;
#ifdef HALVES
            // Each position has a power of its own, so that an image comes out the same in any batch.
            for (int row = 0; row < count; row++) {
                int power = SCALE_OF_FACTOR(LEVEL(exponent)(from + (size_t)row * rows, rows));
                factors[row] = LEVEL(power)(-power - SCALE_OF_FACTOR(exponent));
                size_t at = (size_t)row * rows;
                TYPED(to_left)(from + at, (LEFT *)v + at, rows, LEVEL(power)(power));
            }
#else
            if (own) TYPED(to_left)(from, v, (size_t)count * rows, 1);
#endif
            for (int column = 0; column < columns; column += PRODUCT_COLUMNS)
                for (int row = 0; row < count; row += PRODUCT_ROWS)
                    PRODUCT(
                        a + (size_t)row * rows, rows, 1, (RIGHT *)weights + (size_t)column * rows, 2 * WIDTH,
                        to + (size_t)row * columns + column, columns, rows, bias ? offset + column : NULL, 0,
                        factors + row, columns - column, (size_t)2 * WIDTH * rows
                    );
            for (size_t i = 0; own && i < (size_t)count * columns; i += WIDTH)
                STORE(y + (size_t)first * columns + i, get(m + i));
        }
    }
}

// The gradients of weight and bias from x and the gradient of y. The arguments are those of pointwise_forward.
void TYPED(pointwise_backward)(
    const STORED *x, const STORED *dy, STORED *dweight, STORED *dbias, float *room, int positions, int in, int out,
    int threads
) {
    float *total = memset(room, 0, out * sizeof(float)), *weights = room + out;
    float *v = weights + (size_t)in * out, *converted = v + (size_t)POSITIONS * in;
    int direct = sizeof(STORED) == sizeof(float);
    enum { SHARE = POSITIONS / 4 };  // positions that a thread converts at a time
#pragma omp parallel num_threads(threads)
    {
        float factors[PRODUCT_ROWS];
        for (int first = 0; first < positions; first += POSITIONS) {
            int count = positions - first < POSITIONS ? positions - first : POSITIONS;
            const STORED *x_at = x + (size_t)first * in, *dy_at = dy + (size_t)first * out;
            const LEFT *d = direct ? (const LEFT *)dy_at : (LEFT *)converted;
            float x_scale = 1, dy_scale = 1;
#ifdef HALVES
            int x_power = SCALE_OF_FACTOR(LEVEL(exponent)(x_at, (size_t)count * in));
            int dy_power = SCALE_OF_FACTOR(LEVEL(exponent)(dy_at, (size_t)count * out));
            x_scale = LEVEL(power)(x_power);
            dy_scale = LEVEL(power)(dy_power);
            for (int row = 0; row < PRODUCT_ROWS; row++) factors[row] = LEVEL(power)(-x_power - dy_power);
#endif
#pragma omp for schedule(static)
            for (int start = 0; start < count; start += SHARE) {
                int part = count - start < SHARE ? count - start : SHARE;
                size_t at = (size_t)start * out;
                TYPED(to_panels)(x_at, (RIGHT *)v, in, start, part, x_scale);
                if (!direct) TYPED(to_left)(dy_at + at, (LEFT *)converted + at, (size_t)part * out, dy_scale);
            }
#pragma omp for schedule(static) nowait
            for (int c = 0; c < out; c += WIDTH) {
                vec sum = zero();
                for (int row = 0; row < count; row++) sum += LOAD(dy_at + (size_t)row * out + c);
                put(total + c, get(total + c) + sum);
            }
#pragma omp for schedule(static)
            for (int column = 0; column < in; column += PRODUCT_COLUMNS)
                for (int row = 0; row < out; row += PRODUCT_ROWS) {
                    float *at = weights + (size_t)row * in + column;
                    PRODUCT(
                        d + row, 1, out, (RIGHT *)v + (size_t)column * POSITIONS, 2 * WIDTH, at, in, count,
                        first ? at : NULL, in, factors, in - column, (size_t)2 * WIDTH * POSITIONS
                    );
                }
        }
#pragma omp for schedule(static)
        for (int row = 0; row < out; row++)
            for (int c = 0; c < in; c += WIDTH)
                STORE(dweight + (size_t)row * in + c, get(weights + (size_t)row * in + c));
#pragma omp for schedule(static)
        for (int c = 0; c < out; c += WIDTH) STORE(dbias + c, get(total + c));
    }
}

#undef SCALE_OF_FACTOR
