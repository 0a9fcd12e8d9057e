// Muon (Jordan et al. 2024): the momentum of a weight matrix is made nearly orthogonal, and added to the weights.
// cpu/muon.py has the equations.

enum { LEVEL(DEPTH) = 256 };  // products of matrices that are added at a time: what they read stays in the caches

// c[rows][columns] = a b. A number of a lies at a + r * row + d * step; the rows of b are `b_row` apart, those of c
// `c_row`. rows and columns are multiples of 32. If `symmetric`, c equals its transpose, and half of it is computed.
static void LEVEL(multiply)(
    const float *a, size_t row, size_t step, const float *b, size_t b_row, float *c, size_t c_row, int rows,
    int columns, int depth, int symmetric
) {
    for (int column = 0; column < columns; column += 2 * WIDTH)
        for (int d = 0; d < depth; d += LEVEL(DEPTH)) {
            int part = depth - d < LEVEL(DEPTH) ? depth - d : LEVEL(DEPTH);
            int last = symmetric ? column / 32 * 32 + 32 : rows;
            for (int r = 0; r < last; r += ROWS) {
                float *at = c + r * c_row + column;
                const float *start = d ? at : NULL;
                LEVEL(product)(
                    a + r * row + d * step, row, step, b + d * b_row + column, b_row, at, c_row, part, start, c_row
                );
            }
        }
    for (int r = 32; symmetric && r < rows; r += 32)
        for (int column = 0; column < r; column += 32)
            LEVEL(turn)(c + column * c_row + r, c_row, c + r * c_row + column, c_row, 32, 32);
}
static inline void LEVEL(multiply_symmetric)(const float *a, const float *b, float *c, int size) {
    size_t row = muon_row(size);
    LEVEL(multiply)(a, row, 1, b, row, c, row, size, size, size, 1);
}

// high[long side][row of the short side] = the matrix [rows, columns] with its longer side as rows. Zeros fill
// the rest.
static void LEVEL(to_high)(const float *matrix, float *high, int rows, int columns, size_t row) {
    int length = rows > columns ? rows : columns;
    memset(high, 0, muon_length(length) * row * sizeof *high);
    if (rows <= columns) LEVEL(turn)(matrix, columns, high, row, rows, columns);
    else
        for (int r = 0; r < rows; r++) memcpy(high + r * row, matrix + (size_t)r * columns, columns * sizeof *high);
}
static void LEVEL(from_high)(const float *high, float *matrix, int rows, int columns, size_t row) {
    if (rows <= columns) LEVEL(turn)(high, row, matrix, columns, columns, rows);
    else
        for (int r = 0; r < rows; r++) memcpy(matrix + (size_t)r * columns, high + r * row, columns * sizeof *high);
}

// Move the singular values of a matrix [rows, columns] near 1, in place.
static void LEVEL(orthogonalize)(float *matrix, int rows, int columns, const struct muon *s, float *room) {
    int size = (int)muon_length(rows < columns ? rows : columns);
    size_t length = muon_length(rows < columns ? columns : rows), row = muon_row(size), square = size * row;
    float *high = room, *result = high + length * row;
    float *gram = result + length * row, *factor = gram + square, *product = factor + square, *other = product + square;
    LEVEL(to_high)(matrix, high, rows, columns, row);
    LEVEL(multiply)(high, 1, row, high, row, gram, row, size, size, (int)length, 1);
    float trace = 0;
    for (int i = 0; i < size; i++) trace += gram[i * row + i];
    float norm = sqrtf(trace) + 1e-7f;
    for (size_t i = 0; i < square; i += WIDTH) put(gram + i, get(gram + i) / (norm * norm));
    for (int iteration = 0; iteration < s->iterations; iteration++) {
        LEVEL(multiply_symmetric)(gram, gram, factor, size);
        for (size_t i = 0; i < square; i += WIDTH) put(factor + i, s->b * get(gram + i) + s->c * get(factor + i));
        for (int i = 0; i < size; i++) factor[i * row + i] += s->a;
        if (iteration) LEVEL(multiply_symmetric)(factor, product, other, size);
        else memcpy(other, factor, square * sizeof *factor);
        float *before = product;
        product = other, other = before;
        if (iteration + 1 == s->iterations) break;
        LEVEL(multiply_symmetric)(gram, factor, other, size);
        LEVEL(multiply_symmetric)(other, factor, gram, size);
    }
    for (size_t i = 0; i < square; i += WIDTH) put(product + i, get(product + i) / norm);
    LEVEL(multiply)(high, row, 1, product, row, result, row, (int)length, size, size, 0);
    LEVEL(from_high)(result, matrix, rows, columns, row);
}

// The working memory of muon, in numbers of 4 bytes.
size_t LEVEL(muon_room)(size_t rows, size_t columns) {
    size_t length = muon_length(rows < columns ? columns : rows), side = rows < columns ? rows : columns;
    return muon_length(rows * columns) + (2 * length + 4 * muon_length(side)) * muon_row(side);
}

// Update the weights, a matrix [rows, columns], and its momentum. The other arguments are those of adamw, for one
// tensor. room: working memory, of the size muon_room.
void LEVEL(muon)(
    int rows, int columns, float *weights, const void *part, const void *other, int kinds, float *momentum,
    uint16_t *copy, int rates, float *const *averages, const float *shares, const struct muon *s, float *room
) {
    int64_t size = (int64_t)rows * columns;
    float *step = room;
    for (int64_t at = 0; at < size; at += WIDTH) {
        int count = LEVEL(count)(at, size);
        vec g = s->factor * LEVEL(gradient_of)(part, other, kinds, at, count);
        vec m = s->momentum * LEVEL(get_some)(momentum + at, count) + g;
        LEVEL(put_some)(momentum + at, m, count);
        LEVEL(put_some)(step + at, g + s->momentum * m, count);
    }
    LEVEL(orthogonalize)(step, rows, columns, s, room + muon_length(size));
    for (int64_t at = 0; at < size; at += WIDTH) {
        int count = LEVEL(count)(at, size);
        vec p = s->keep * LEVEL(get_some)(weights + at, count) - s->rate * LEVEL(get_some)(step + at, count);
        LEVEL(put_weights)(p, at, count, weights, copy, rates, averages, 1, shares);
    }
}
