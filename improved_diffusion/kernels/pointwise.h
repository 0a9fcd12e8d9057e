// Convolutions with a kernel of size 1: products of the positions [positions, in] and the weights [out, in]. It is
// included once for each type, STORED. AS_STORED: whether left factors and results have this type.

#ifdef HALVES
// The power of two for factors whose largest is less than 2^(exponent + 1): 128 products stay below 65504.
#define SCALE_OF_FACTOR(exponent) (3 - (exponent))
#endif

// Numbers as left factors.
static inline void TYPED(to_left)(const STORED *from, LEFT *to, size_t numbers, float scale) {
    for (size_t i = 0; i < numbers; i += WIDTH) PUT_LEFT(to + i, SCALED(LOAD(from + i), scale));
}
// Rows of `columns` numbers in units of PER_UNIT rows, [units, columns]. If rows are missing in the last unit, zeros
// complete it.
static inline void TYPED(to_units)(const STORED *from, float *to, int columns, int first, int count, float scale) {
    for (int row = first; row < first + count; row += PER_UNIT)
        for (int c = 0; c < columns; c += WIDTH) {
            const STORED *at = from + (size_t)row * columns + c;
            vec above = SCALED(LOAD(at), scale), below = zero();
            if (row + PER_UNIT - 1 < first + count) below = SCALED(LOAD(at + (PER_UNIT - 1) * columns), scale);
            put(to + (size_t)row / PER_UNIT * columns + c, UNIT_OF(above, below));
        }
}
// The same in panels of 2 * WIDTH columns, [panels, POSITIONS / PER_UNIT, 2 * WIDTH].
static inline void TYPED(to_panels)(const STORED *from, float *to, int columns, int first, int count, float scale) {
    for (int row = first; row < first + count; row += PER_UNIT)
        for (int c = 0; c < columns; c += WIDTH) {
            int panel = c / (2 * WIDTH), part = c / WIDTH % 2;
            const STORED *at = from + (size_t)row * columns + panel * 2 * WIDTH;
            float *unit = to + ((size_t)panel * POSITIONS + row) / PER_UNIT * 2 * WIDTH + part * WIDTH;
            vec above = SCALED(LOAD_PART(at, part), scale), below = zero();
            if (row + PER_UNIT - 1 < first + count)
                below = SCALED(LOAD_PART(at + (PER_UNIT - 1) * columns, part), scale);
            put(unit, UNIT_OF(above, below));
        }
}

// The weights, [in, out], or [out, in] if `backward`, in units of PER_UNIT rows and panels of 2 * WIDTH columns:
// [panels, units, 2 * WIDTH].
static void TYPED(pointwise_weights)(const STORED *weight, float *to, int in, int out, int backward, float scale) {
    int rows = backward ? out : in, columns = backward ? in : out, panel = 2 * WIDTH;
#pragma omp for schedule(static)
    for (int number = 0; number < columns / WIDTH; number++) {
        int block = number / 2 * panel, part = number % 2;
        float *panel_at = to + (size_t)block * rows / PER_UNIT + part * WIDTH;
        for (int first = 0; first < rows; first += WIDTH) {
            float numbers[WIDTH * WIDTH], turned[WIDTH * WIDTH];
            for (int r = 0; r < WIDTH; r++) {
                if (backward) put(turned + r * WIDTH, LOAD_PART(weight + (size_t)(first + r) * in + block, part));
                else put(numbers + r * WIDTH, LOAD(weight + (size_t)(block + COLUMN(part, r)) * in + first));
            }
            if (!backward) LEVEL(turn)(numbers, WIDTH, turned, WIDTH, WIDTH, WIDTH);
            for (int r = 0; r < WIDTH; r += PER_UNIT) {
                vec above = get(turned + r * WIDTH), below = get(turned + (r + PER_UNIT - 1) * WIDTH);
                float *at = panel_at + (size_t)(first + r) / PER_UNIT * panel;
                put(at, UNIT_OF(SCALED(above, scale), SCALED(below, scale)));
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
        TYPED(pointwise_weights)(weight, weights, in, out, backward, of_weights);
        float *v = weights + (size_t)in * out + omp_get_thread_num() * (size_t)POSITIONS * (in + out);
        float *m = v + (size_t)POSITIONS * rows;
#pragma omp for schedule(static)
        for (int block = 0; block < blocks; block++) {
            int first = block * POSITIONS, count = positions - first < POSITIONS ? positions - first : POSITIONS;
            // Rows behind the last position hold old numbers, and nobody reads what comes of them.
            int own = !AS_STORED || count % ROWS;
            const STORED *from = x + (size_t)first * rows;
            const float *a = own ? v : (const float *)from;
            SUMS *to = own ? (SUMS *)m : (SUMS *)y + (size_t)first * columns;
#ifdef HALVES
            // Each position has a power of its own, so that an image comes out the same in any batch.
            for (int row = 0; row < count; row++) {
                size_t at = (size_t)row * rows;
                int power = SCALE_OF_FACTOR(LEVEL(exponent)(from + at, rows)) - LEVEL(spare)(rows);
                factors[row] = LEVEL(power)(-power - SCALE_OF_FACTOR(exponent));
                TYPED(to_left)(from + at, (LEFT *)v + at, rows, LEVEL(power)(power));
            }
#else
            if (own) TYPED(to_left)(from, (LEFT *)v, (size_t)count * rows, 1);
#endif
            for (int column = 0; column < columns; column += 2 * WIDTH)
                for (int row = 0; row < count; row += ROWS)
                    PRODUCT_TO_SUMS(
                        a + (size_t)row * rows / PER_UNIT, rows / PER_UNIT,
                        weights + (size_t)column * rows / PER_UNIT, 2 * WIDTH, to + (size_t)row * columns + column,
                        columns, rows / PER_UNIT, bias ? offset + column : NULL
                    );
            for (int row = 0; own && row < count; row++)
                for (int c = 0; c < columns; c += WIDTH) {
                    size_t at = (size_t)row * columns + c;
                    vec sum = SCALED(GET_SUMS(to + at), factors[row]);
#ifdef HALVES
                    if (bias) sum += get(offset + c);
#endif
                    STORE(y + (size_t)first * columns + at, sum);
                }
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
        float factors[ROWS];
        for (int first = 0; first < positions; first += POSITIONS) {
            int count = positions - first < POSITIONS ? positions - first : POSITIONS;
            const STORED *x_at = x + (size_t)first * in, *dy_at = dy + (size_t)first * out;
            const float *d = direct ? (const float *)dy_at : converted;
            float x_scale = 1, dy_scale = 1;
#ifdef HALVES
            int x_power = SCALE_OF_FACTOR(LEVEL(exponent)(x_at, (size_t)count * in));
            int dy_power = SCALE_OF_FACTOR(LEVEL(exponent)(dy_at, (size_t)count * out));
            x_scale = LEVEL(power)(x_power);
            dy_scale = LEVEL(power)(dy_power);
            for (int row = 0; row < ROWS; row++) factors[row] = LEVEL(power)(-x_power - dy_power);
#endif
#pragma omp for schedule(static)
            for (int start = 0; start < count; start += SHARE) {
                int part = count - start < SHARE ? count - start : SHARE;
                TYPED(to_panels)(x_at, v, in, start, part, x_scale);
                if (!direct) TYPED(to_units)(dy_at, converted, out, start, part, dy_scale);
            }
#pragma omp for schedule(static) nowait
            for (int c = 0; c < out; c += WIDTH) {
                vec sum = zero();
                for (int row = 0; row < count; row++) sum += LOAD(dy_at + (size_t)row * out + c);
                put(total + c, get(total + c) + sum);
            }
#pragma omp for schedule(static)
            for (int column = 0; column < in; column += 2 * WIDTH)
                for (int row = 0; row < out; row += ROWS) {
                    float *at = weights + (size_t)row * in + column;
                    PRODUCT(
                        d + row, 1, out, v + (size_t)column * POSITIONS / PER_UNIT, 2 * WIDTH, at, in,
                        (count + PER_UNIT - 1) / PER_UNIT, first ? at : NULL, in, factors
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
