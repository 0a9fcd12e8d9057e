// Attention, convolutions and the blocks made of them in bfloat16, by the matrix unit of AMX. This file compiles them
// twice: for the unit itself (amx), and for an emulation of it in plain C (amx_emulated), by which the same code is
// tested on processors without the unit.

#pragma push_macro("TYPED")
#pragma push_macro("ROWS")
#undef TYPED
#undef ROWS
#define ROWS 32
// Other sizes are left to the kernels without tiles.
#define OTHER_SIZES(positions, width) ((positions) % 32 || (width) % 32)
#define OTHER(name) LEVEL(name##_bf16)

// Eight tiles of 16 rows of 64 bytes (Intel's manual, volume 1, section 18.3.1).
struct tile_configuration {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes_per_row[16];
    uint8_t rows[16];
};
static const struct tile_configuration whole_tiles __attribute__((aligned(64))) = {
    1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}
};

// The emulation. A float holds two bfloat16 numbers of a factor, or one number of a result.
static _Thread_local struct {
    struct tile_configuration configuration;
    float tiles[8][16][16];
    int64_t products;
} emulated;

static void emulated_configure(const struct tile_configuration *configuration) {
    emulated.configuration = *configuration;
    memset(emulated.tiles, 0, sizeof emulated.tiles);
}
static void emulated_release(void) { memset(&emulated.configuration, 0, sizeof emulated.configuration); }
// Where the unit would raise an invalid-opcode exception.
static void emulated_check(int allowed) {
    if (!allowed) abort();
}
static void emulated_zero(int tile) {
    emulated_check(emulated.configuration.palette == 1);
    memset(emulated.tiles[tile], 0, sizeof emulated.tiles[tile]);
}
static void emulated_load(int tile, const void *from, size_t step) {
    const struct tile_configuration *c = &emulated.configuration;
    emulated_zero(tile);
    for (int row = 0; row < c->rows[tile]; row++)
        memcpy(emulated.tiles[tile][row], (const char *)from + row * step, c->bytes_per_row[tile]);
}
static void emulated_store(int tile, void *to, size_t step) {
    const struct tile_configuration *c = &emulated.configuration;
    emulated_check(c->palette == 1);
    for (int row = 0; row < c->rows[tile]; row++)
        memcpy((char *)to + row * step, emulated.tiles[tile][row], c->bytes_per_row[tile]);
}
// sum += a * b (Intel's manual, volume 2, TDPBF16PS).
static void emulated_multiply(int sum, int a, int b) {
    const struct tile_configuration *c = &emulated.configuration;
    int depth = c->bytes_per_row[a] / 4, columns = c->bytes_per_row[sum] / 4;
    emulated_check(
        c->palette == 1 && sum != a && sum != b && a != b && c->rows[a] == c->rows[sum] && c->rows[b] == depth &&
        c->bytes_per_row[b] == c->bytes_per_row[sum]
    );
    for (int row = 0; row < c->rows[sum]; row++) {
        float even[16] = {0}, odd[16] = {0};
        for (int k = 0; k < depth; k++) {
            uint16_t left[2], right[2];
            memcpy(left, &emulated.tiles[a][row][k], sizeof left);
            for (int column = 0; column < columns; column++) {
                memcpy(right, &emulated.tiles[b][k][column], sizeof right);
                even[column] = fmaf(bf16_to_float(left[0]), bf16_to_float(right[0]), even[column]);
                odd[column] = fmaf(bf16_to_float(left[1]), bf16_to_float(right[1]), odd[column]);
            }
        }
        for (int column = 0; column < columns; column++)
            emulated.tiles[sum][row][column] += even[column] + odd[column];
    }
    emulated.products++;
}
// How many products of tiles this thread has emulated.
int64_t tile_products_amx_emulated(void) { return emulated.products; }

#define TYPED(name) name##_bf16_amx_emulated
#define TILE_CONFIGURE emulated_configure
#define TILE_RELEASE emulated_release
#define TILE_ZERO emulated_zero
#define TILE_LOAD emulated_load
#define TILE_STORE emulated_store
#define TILE_MULTIPLY emulated_multiply
#include "tile_products.h"
#include "attention.h"
#include "tile_convolutions.h"
#include "blocks.h"
#undef TYPED
#undef TILE_CONFIGURE
#undef TILE_RELEASE
#undef TILE_ZERO
#undef TILE_LOAD
#undef TILE_STORE
#undef TILE_MULTIPLY

#pragma GCC push_options
#pragma GCC target("amx-tile,amx-bf16")
#define TYPED(name) name##_bf16_amx
#define TILE_CONFIGURE _tile_loadconfig
#define TILE_RELEASE _tile_release
#define TILE_ZERO _tile_zero
#define TILE_LOAD _tile_loadd
#define TILE_STORE _tile_stored
#define TILE_MULTIPLY _tile_dpbf16ps
#include "tile_products.h"
#include "attention.h"
#include "tile_convolutions.h"
#include "blocks.h"

// Whether the system lets this process use the tiles, and whether they compute what the emulation computes: a convolution
// and its gradients, of small whole numbers, whose sums are exact.
int tiles_work(void) {
    enum { ASK_FOR_PERMISSION = 0x1023, TILE_DATA = 18 };  // arch_prctl(2), since Linux 5.16
    if (syscall(SYS_arch_prctl, ASK_FOR_PERMISSION, TILE_DATA)) return 0;
    enum { HEIGHT = 5, WIDE = 7, CHANNELS = 32, NUMBERS = HEIGHT * WIDE * CHANNELS, WEIGHTS = 9 * CHANNELS * CHANNELS };
    uint16_t x[NUMBERS], dy[NUMBERS], weight[WEIGHTS], y[2][NUMBERS], dweight[2][WEIGHTS + CHANNELS];
    for (int i = 0; i < NUMBERS; i++) x[i] = float_to_bf16(i * 7 % 11 - 5);
    for (int i = 0; i < NUMBERS; i++) dy[i] = float_to_bf16(i * 3 % 7 - 3);
    for (int i = 0; i < WEIGHTS; i++) weight[i] = float_to_bf16(i * 5 % 13 - 6);
    float *room = malloc(TYPED(conv3x3_room)(HEIGHT, WIDE, CHANNELS, CHANNELS, 1) * sizeof *room);
    if (!room) return 0;
    conv3x3_forward_bf16_amx_emulated(x, weight, NULL, y[0], room, 1, HEIGHT, WIDE, CHANNELS, CHANNELS, 0, 1);
    conv3x3_backward_bf16_amx_emulated(
        x, dy, dweight[0], dweight[0] + WEIGHTS, room, 1, HEIGHT, WIDE, CHANNELS, CHANNELS, 1
    );
    TYPED(conv3x3_forward)(x, weight, NULL, y[1], room, 1, HEIGHT, WIDE, CHANNELS, CHANNELS, 0, 1);
    TYPED(conv3x3_backward)(
        x, dy, dweight[1], dweight[1] + WEIGHTS, room, 1, HEIGHT, WIDE, CHANNELS, CHANNELS, 1
    );
    free(room);
    return !memcmp(y[0], y[1], sizeof y[0]) && !memcmp(dweight[0], dweight[1], sizeof dweight[0]);
}

#undef TYPED
#undef TILE_CONFIGURE
#undef TILE_RELEASE
#undef TILE_ZERO
#undef TILE_LOAD
#undef TILE_STORE
#undef TILE_MULTIPLY
#pragma GCC pop_options

#undef ROWS
#undef OTHER_SIZES
#undef OTHER
#pragma pop_macro("ROWS")
#pragma pop_macro("TYPED")
