// Convolutions with a kernel of size 1: products of the positions [positions, in] and the weights [out, in]. They are
// computed in float, whatever the type of the numbers. It is included once for each type, STORED.

// Numbers as float.
static inline void TYPED(to_float)(const STORED *from, float *to, size_t numbers) {
    for (size_t i = 0; i < numbers; i += WIDTH) put(to + i, LOAD(from + i));
}
// Rows of `columns` numbers as float, in panels of 2 * WIDTH columns, [panels, POSITIONS, 2 * WIDTH].
static inline void TYPED(to_panels)(const STORED *from, float *to, int columns, int first, int count) {
    for (int row = first; row < first + count; row++)
        for (int c = 0; c < columns; c += 2 * WIDTH) {
            float *at = to + ((size_t)c * POSITIONS + (size_t)row * 2 * WIDTH);
            put(at, LOAD(from + (size_t)row * columns + c));
            put(at + WIDTH, LOAD(from + (size_t)row * columns + c + WIDTH));
        }
}

// The weights in panels of 2 * WIDTH columns, [panels, rows, 2 * WIDTH]: [in, out], or [out, in] if `backward`.
static void TYPED(pointwise_weights)(const STORED *weight, float *to, int in, int out, int backward) {
    int rows = backward ? out : in, columns = backward ? in : out, panel = 2 * WIDTH;
#pragma omp for schedule(static)
    for (int column = 0; column < columns; column += WIDTH) {
        float *panel_at = to + (size_t)(column / panel) * rows * panel + column % panel;
        for (int first = 0; first < rows; first += WIDTH) {
            float numbers[WIDTH * WIDTH];
            for (int r = 0; r < WIDTH; r++) {
                size_t at = backward ? (size_t)(first + r) * in + column : (size_t)(column + r) * in + first;
                put(numbers + r * WIDTH, LOAD(weight + at));
            }
            if (!backward) {
                LEVEL(turn)(numbers, WIDTH, panel_at + (size_t)first * panel, panel, WIDTH, WIDTH);
                continue;
            }
            for (int r = 0; r < WIDTH; r++) put(panel_at + (size_t)(first + r) * panel, get(numbers + r * WIDTH));
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
    if (bias) TYPED(to_float)(bias, offset, out);
#pragma omp parallel num_threads(threads)
    {
        TYPED(pointwise_weights)(weight, weights, in, out, backward);
        float *v = weights + (size_t)in * out + omp_get_thread_num() * (size_t)POSITIONS * (in + out);
        float *m = v + (size_t)POSITIONS * rows;
#pragma omp for schedule(static)
        for (int block = 0; block < blocks; block++) {
            int first = block * POSITIONS, count = positions - first < POSITIONS ? positions - first : POSITIONS;
            // Rows behind the last position hold old numbers, and nobody reads what comes of them.
            int own = !direct || count % ROWS;
            const float *a = own ? v : (const float *)x + (size_t)first * rows;
            float *to = own ? m : (float *)y + (size_t)first * columns;
            if (own) TYPED(to_float)(x + (size_t)first * rows, v, (size_t)count * rows);
            for (int column = 0; column < columns; column += 2 * WIDTH)
                for (int row = 0; row < count; row += ROWS)
                    LEVEL(product)(
                        a + (size_t)row * rows, rows, 1, weights + (size_t)column * rows, 2 * WIDTH,
                        to + (size_t)row * columns + column, columns, rows, bias ? offset + column : NULL, 0
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
        for (int first = 0; first < positions; first += POSITIONS) {
            int count = positions - first < POSITIONS ? positions - first : POSITIONS;
            const STORED *x_at = x + (size_t)first * in, *dy_at = dy + (size_t)first * out;
            const float *d = direct ? (const float *)dy_at : converted;
#pragma omp for schedule(static)
            for (int start = 0; start < count; start += SHARE) {
                int part = count - start < SHARE ? count - start : SHARE;
                size_t at = (size_t)start * out;
                TYPED(to_panels)(x_at, v, in, start, part);
                if (!direct) TYPED(to_float)(dy_at + at, converted + at, (size_t)part * out);
            }
#pragma omp for schedule(static) nowait
            for (int c = 0; c < out; c += WIDTH) {
                vec sum = zero();
                for (int row = 0; row < count; row++) sum += get(d + (size_t)row * out + c);
                put(total + c, get(total + c) + sum);
            }
#pragma omp for schedule(static)
            for (int column = 0; column < in; column += 2 * WIDTH)
                for (int row = 0; row < out; row += ROWS) {
                    float *at = weights + (size_t)row * in + column;
                    LEVEL(product)(
                        d + row, 1, out, v + (size_t)column * POSITIONS, 2 * WIDTH, at, in, count,
                        first ? at : NULL, in
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
