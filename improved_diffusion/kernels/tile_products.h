// Products of matrices by the matrix unit of AMX: four tiles hold 32 x 32 sums, and four more the factors. a has 32 rows
// of numbers, b rows of units of two numbers, as in attention.h. tiles.h includes this file twice.

static inline void TYPED(zero_sums)(void) {
    TILE_ZERO(0);
    TILE_ZERO(1);
    TILE_ZERO(2);
    TILE_ZERO(3);
}
static inline void TYPED(load_sums)(const float *from, size_t step) {
    step *= sizeof *from;
    TILE_LOAD(0, from, step);
    TILE_LOAD(1, from + 16, step);
    TILE_LOAD(2, (const char *)from + 16 * step, step);
    TILE_LOAD(3, (const char *)(from + 16) + 16 * step, step);
}
static inline void TYPED(store_sums)(float *to, size_t step) {
    step *= sizeof *to;
    TILE_STORE(0, to, step);
    TILE_STORE(1, to + 16, step);
    TILE_STORE(2, (char *)to + 16 * step, step);
    TILE_STORE(3, (char *)(to + 16) + 16 * step, step);
}
// sums += a[32, 32] b[16 units, 32].
static inline void TYPED(add_to_sums)(const STORED *a, size_t a_step, const uint32_t *b, size_t b_step) {
    a_step *= sizeof *a, b_step *= sizeof *b;
    TILE_LOAD(4, a, a_step);
    TILE_LOAD(5, (const char *)a + 16 * a_step, a_step);
    TILE_LOAD(6, b, b_step);
    TILE_LOAD(7, b + 16, b_step);
    TILE_MULTIPLY(0, 4, 6);
    TILE_MULTIPLY(1, 4, 7);
    TILE_MULTIPLY(2, 5, 6);
    TILE_MULTIPLY(3, 5, 7);
}
// GCC does not know that tiles are loaded from memory: what is written before must not be written after it.
static inline void TYPED(finish_writing)(void) { __asm__ volatile("" ::: "memory"); }

// c[32, columns] = a[32, depth] b, b packed. columns and depth are multiples of 32. The steps are the distances between
// rows.
static inline void TYPED(multiply)(
    const STORED *a, size_t a_step, const uint32_t *b, size_t b_step, float *c, size_t c_step, int columns, int depth
) {
    TYPED(finish_writing)();
    for (int column = 0; column < columns; column += 32) {
        TYPED(zero_sums)();
        for (int k = 0; k < depth; k += 32) TYPED(add_to_sums)(a + k, a_step, b + k / 2 * b_step + column, b_step);
        TYPED(store_sums)(c + column, c_step);
    }
}
