// Products of matrices of float numbers, a small block at a time.

// m[ROWS][2 * WIDTH] = start + a b. The numbers of a lie `row` and `step` apart, the rows of b, m and start `b_row`,
// `m_row` and `start_row`. start: NULL for zeros; it may be m.
static inline void LEVEL(product)(
    const float *a, size_t row, size_t step, const float *b, size_t b_row, float *m, size_t m_row, int depth,
    const float *start, size_t start_row
) {
    vec sums[ROWS][2];
    _Pragma("GCC unroll 16") for (int r = 0; r < ROWS; r++) {
        sums[r][0] = start ? get(start + r * start_row) : zero();
        sums[r][1] = start ? get(start + r * start_row + WIDTH) : zero();
    }
    for (int d = 0; d < depth; d++) {
        vec left = get(b + d * b_row), right = get(b + d * b_row + WIDTH);
        _Pragma("GCC unroll 16") for (int r = 0; r < ROWS; r++) {
            vec factor = splat(a[r * row + d * step]);
            sums[r][0] += factor * left;
            sums[r][1] += factor * right;
        }
    }
    _Pragma("GCC unroll 16") for (int r = 0; r < ROWS; r++) {
        put(m + r * m_row, sums[r][0]);
        put(m + r * m_row + WIDTH, sums[r][1]);
    }
}
