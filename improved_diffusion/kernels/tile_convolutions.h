// Convolutions in bfloat16 by tiles, as they are defined. tiles.h includes this file twice, after attention.h.
//
// The positions of images lie one after the other in a sequence, with a position of zeros after each row, and a row of
// zeros after each image. Then a neighbour of a position lies at the same distance everywhere, also at the edges, and a
// convolution of 3x3 pixels is the sum of nine products of matrices: those of the sequence, at nine distances, with the
// weights of one of the nine taps, [in, out]. Results at the positions of zeros are dropped. A
// convolution with a kernel of size 1 has one tap and no zeros: each position is an image.

// Images of height x width positions as a sequence: the number of taps in the kernel, and the distances in positions
// from one row to the next and from one image to the next.
struct TYPED(lattice) {
    int taps, height, width, row, image;
};
#define LATTICE struct TYPED(lattice)
enum { TYPED(TOGETHER) = 512 };  // positions that are computed together, if an image has no more

static inline LATTICE TYPED(lattice_of_images)(int height, int width) {
    return (LATTICE){9, height, width, width + 1, (height + 1) * (width + 1)};
}
static inline LATTICE TYPED(lattice_of_positions)(void) { return (LATTICE){1, 1, 1, 1, 1}; }
static inline int TYPED(images_together)(LATTICE l) {
    return l.image < TYPED(TOGETHER) ? TYPED(TOGETHER) / l.image : 1;
}
// How far a tap of the kernel is from its middle.
static inline int TYPED(distance)(LATTICE l, int tap) {
    return l.taps == 1 ? 0 : (tap / 3 - 1) * l.row + tap % 3 - 1;
}
// Positions of zeros that a sequence has at its ends, so that all distances stay within it.
static inline int TYPED(margin)(LATTICE l) { return l.taps == 1 ? 0 : l.row / 2 * 2 + 2; }
// Positions that `images` images take, in whole tiles of 32.
static inline size_t TYPED(positions_of)(LATTICE l, int images) { return ((size_t)images * l.image + 31) / 32 * 32; }
static inline size_t TYPED(length_of)(LATTICE l, int images) {
    return TYPED(positions_of)(l, images) + 2 * TYPED(margin)(l);
}

// Whether images are a sequence as they are.
static inline int TYPED(is_sequence)(LATTICE l, int images) { return l.taps == 1 && images % 32 == 0; }

// The first position of a row of some images, within the sequence and its margins.
static inline size_t TYPED(position)(LATTICE l, int row) {
    return TYPED(margin)(l) + (size_t)(row / l.height) * l.image + (size_t)(row % l.height) * l.row;
}
// Row `number` of the sequence of some images [height, width, channels] and all that is zero between it and the next.
// The first row and the last also have the margins. to: [length_of, channels].
static void TYPED(to_sequence)(const STORED *x, STORED *to, LATTICE l, int images, int channels, int number) {
    size_t position = TYPED(position)(l, number), end = position + l.width, size = channels * sizeof *x;
    size_t next = number + 1 < images * l.height ? TYPED(position)(l, number + 1) : TYPED(length_of)(l, images);
    if (number == 0) memset(to, 0, position * size);
    memcpy(to + position * channels, x + (size_t)number * l.width * channels, l.width * size);
    memset(to + end * channels, 0, (next - end) * size);
}

// The weights [out, taps, in] as right factors, [columns / 32, taps, rows / 2, 32] units. Those of the gradient of
// the input are turned by 180 degrees, and have `out` rows.
static void TYPED(pack_weights)(const STORED *weight, uint32_t *to, int taps, int in, int out, int backward) {
    int rows = backward ? out : in, columns = backward ? in : out;
    size_t step = (size_t)taps * in;
#pragma omp for schedule(static) collapse(2)
    for (int column = 0; column < columns; column += 32)
        for (int tap = 0; tap < taps; tap++) {
            uint32_t *at = to + ((size_t)column * taps / 2 + tap * 16) * rows;
            if (backward) TYPED(pack_rows)(weight + (taps - 1 - tap) * (size_t)in + column, step, at, rows, 32);
            else TYPED(pack_columns)(weight + column * step + tap * (size_t)in, step, at, 32, in);
        }
}

// m[32][32] = the results at 32 positions of the sequence in 32 columns.
static inline void TYPED(sum_taps)(
    const STORED *sequence, const uint32_t *weights, LATTICE l, int rows, float *m
) {
    TYPED(finish_writing)();
    TYPED(zero_sums)();
    for (int tap = 0; tap < l.taps; tap++) {
        const STORED *at = sequence + (ptrdiff_t)TYPED(distance)(l, tap) * rows;
        for (int k = 0; k < rows; k += 32, weights += 16 * 32) TYPED(add_to_sums)(at + k, rows, weights, 32);
    }
    TYPED(store_sums)(m, 32);
}

// The convolution of some images, given as a sequence from its first position on. y: [images, height, width, columns].
static void TYPED(convolve)(
    const STORED *sequence, const uint32_t *weights, const STORED *bias, STORED *y, LATTICE l, int images, int rows,
    int columns
) {
    float m[32 * 32];
    int positions = images * l.image - (l.taps > 1 ? l.row : 0);
    for (int column = 0; column < columns; column += 32) {
        const uint32_t *panel = weights + (size_t)column * l.taps * rows / 2;
        vec left = bias ? LOAD(bias + column) : zero(), right = bias ? LOAD(bias + column + 16) : zero();
        STORED *to = y + column;
        for (int first = 0, of_row = 0, of_image = 0; first < positions; first += 32) {
            TYPED(sum_taps)(sequence + (size_t)first * rows, panel, l, rows, m);
            for (int r = 0; r < 32 && first + r < positions; r++) {
                if (of_row < l.width && of_image < l.height * l.row) {
                    STORE(to, get(m + 32 * r) + left);
                    STORE(to + 16, get(m + 32 * r + 16) + right);
                    to += columns;
                }
                if (++of_row == l.row) of_row = 0;
                if (++of_image == l.image) of_image = 0;
            }
        }
    }
}

// As conv3x3_forward and pointwise_forward, for the images of a lattice.
static void TYPED(convolve_all)(
    const STORED *x, const STORED *weight, const STORED *bias, STORED *y, float *room, LATTICE l, int images, int in,
    int out, int backward, int threads
) {
    int rows = backward ? out : in, columns = backward ? in : out, together = TYPED(images_together)(l);
    size_t pixels = (size_t)l.height * l.width, margin = TYPED(margin)(l);
    uint32_t *weights = (uint32_t *)room;
    STORED *sequences = (STORED *)(weights + (size_t)l.taps * in * out / 2);
#pragma omp parallel num_threads(threads)
    {
        TYPED(pack_weights)(weight, weights, l.taps, in, out, backward);
        STORED *own = sequences + omp_get_thread_num() * TYPED(length_of)(l, together) * rows;
        TILE_CONFIGURE(&whole_tiles);
#pragma omp for schedule(static)
        for (int first = 0; first < images; first += together) {
            int count = images - first < together ? images - first : together;
            const STORED *from = x + first * pixels * rows, *sequence = from;
            if (!TYPED(is_sequence)(l, count)) {
                for (int row = 0; row < count * l.height; row++) TYPED(to_sequence)(from, own, l, count, rows, row);
                sequence = own + margin * rows;
            }
            TYPED(convolve)(sequence, weights, bias, y + first * pixels * columns, l, count, rows, columns);
        }
        TILE_RELEASE();
    }
}

// `count` positions of a sequence from number `first` on, in pairs: a unit holds two neighbours. Both are even.
// nothing: zeros. to: [count / 2, channels].
static void TYPED(pair_positions)(
    const STORED *x, const STORED *nothing, uint32_t *to, LATTICE l, int images, int channels, int first, int count
) {
    int image = first / l.image, row = first % l.image / l.row, column = first % l.image % l.row;
    for (int i = 0; i < count; i += 2) {
        const STORED *pair[2];
        for (int k = 0; k < 2; k++) {
            size_t pixel = ((size_t)image * l.height + row) * l.width + column;
            pair[k] = image < images && row < l.height && column < l.width ? x + pixel * channels : nothing;
            if (++column < l.row) continue;
            column = 0;
            if (++row < l.image / l.row) continue;
            row = 0;
            image++;
        }
        for (int c = 0; c < channels; c += WIDTH)
            put((float *)to + (size_t)i / 2 * channels + c, LEVEL(pairs)(pair[0] + c, pair[1] + c));
    }
}

// m[32][32] += the sum over all positions of the product of two sequences at a distance. dy is transposed, [32,
// dy_step], x in pairs of positions, [positions / 2, x_step].
static inline void TYPED(add_positions)(
    const STORED *dy, size_t dy_step, const uint32_t *x, size_t x_step, size_t positions, float *m, size_t m_step
) {
    TYPED(finish_writing)();
    TYPED(load_sums)(m, m_step);
    for (size_t k = 0; k < positions; k += 32) TYPED(add_to_sums)(dy + k, dy_step, x + k / 2 * x_step, x_step);
    TYPED(store_sums)(m, m_step);
}

// Numbers from one row of a transposed sequence to the next: no multiple of 128 bytes, so that rows do not compete for
// places in the caches.
static inline size_t TYPED(transposed_step)(size_t length) { return length + (length % 64 ? 0 : 32); }

// The working memory of the functions below and above, in numbers of 4 bytes.
static size_t TYPED(room_of)(LATTICE l, size_t in, size_t out, size_t threads) {
    size_t length = TYPED(length_of)(l, TYPED(images_together)(l)), most = in > out ? in : out;
    size_t forward = l.taps * in * out / 2 + threads * length * most / 2;
    size_t sequences = length * in / 2 + TYPED(transposed_step)(length) * out / 2;
    size_t backward = l.taps * in * out + out + most / 2 + sequences + threads * 16 * out;
    return forward > backward ? forward : backward;
}

// As conv3x3_backward and pointwise_backward, for the images of a lattice. The products are added in the order of the
// images and of their positions, on any number of threads.
static void TYPED(differentiate)(
    const STORED *x, const STORED *dy, STORED *dweight, STORED *dbias, float *room, LATTICE l, int images, int in,
    int out, int threads
) {
    int together = TYPED(images_together)(l);
    size_t pixels = (size_t)l.height * l.width, margin = TYPED(margin)(l), length = TYPED(length_of)(l, together);
    size_t weights = (size_t)l.taps * in * out, step = TYPED(transposed_step)(length), most = in > out ? in : out;
    float *total = room, *bias = total + weights;
    STORED *nothing = (STORED *)(bias + out), *turned = nothing + most + length * in;
    uint32_t *pairs = (uint32_t *)(nothing + most), *rooms = (uint32_t *)(turned + step * out);
    memset(room, 0, (weights + out + most / 2) * sizeof *room);
#pragma omp parallel num_threads(threads)
    {
        uint32_t *own = rooms + (size_t)omp_get_thread_num() * 16 * out;
        TILE_CONFIGURE(&whole_tiles);
        for (int first = 0; first < images; first += together) {
            int count = images - first < together ? images - first : together;
            int positions = (int)TYPED(positions_of)(l, count);
            const STORED *x_at = x + first * pixels * in, *dy_at = dy + first * pixels * out;
#pragma omp for schedule(static) nowait
            for (int at = 0; at < positions; at += 32) {
                TYPED(pair_positions)(x_at, nothing, pairs + (size_t)at / 2 * in, l, count, in, at, 32);
                TYPED(pair_positions)(dy_at, nothing, own, l, count, out, at, 32);
                LEVEL(turn)(own, out, (uint32_t *)turned + (margin + at) / 2, step / 2, 16, out);
            }
#pragma omp for schedule(static) nowait
            for (int c = 0; c < out; c++) {
                memset(turned + c * step, 0, margin * sizeof *turned);
                memset(turned + c * step + margin + positions, 0, margin * sizeof *turned);
            }
#pragma omp for schedule(static)
            for (int c = 0; c < out; c += WIDTH) {
                vec sums[4] = {get(bias + c), zero(), zero(), zero()};  // four, so that they do not wait for each other
                for (size_t pixel = 0; pixel < count * pixels; pixel += 4)
                    for (size_t k = 0; k < 4 && pixel + k < count * pixels; k++)
                        sums[k] += LOAD(dy_at + (pixel + k) * out + c);
                put(bias + c, (sums[0] + sums[1]) + (sums[2] + sums[3]));
            }
#pragma omp for schedule(static) collapse(3)
            for (int row = 0; row < out; row += 32)
                for (int column = 0; column < in; column += 32)
                    for (int tap = 0; tap < l.taps; tap++) {
                        const STORED *from = turned + row * step + margin - TYPED(distance)(l, tap);
                        float *to = total + ((size_t)row * l.taps + tap) * in + column;
                        TYPED(add_positions)(from, step, pairs + column, in, positions, to, (size_t)l.taps * in);
                    }
        }
        TILE_RELEASE();
#pragma omp for schedule(static) nowait
        for (size_t i = 0; i < weights; i += WIDTH) STORE(dweight + i, get(total + i));
#pragma omp for schedule(static)
        for (int c = 0; c < out; c += WIDTH) STORE(dbias + c, get(bias + c));
    }
}

size_t TYPED(conv3x3_room)(size_t height, size_t width, size_t in, size_t out, size_t threads) {
    return TYPED(room_of)(TYPED(lattice_of_images)((int)height, (int)width), in, out, threads);
}
void TYPED(conv3x3_forward)(
    const STORED *x, const STORED *weight, const STORED *bias, STORED *y, float *room, int images, int height,
    int width, int in, int out, int backward, int threads
) {
    LATTICE l = TYPED(lattice_of_images)(height, width);
    TYPED(convolve_all)(x, weight, bias, y, room, l, images, in, out, backward, threads);
}
void TYPED(conv3x3_backward)(
    const STORED *x, const STORED *dy, STORED *dweight, STORED *dbias, float *room, int images, int height, int width,
    int in, int out, int threads
) {
    LATTICE l = TYPED(lattice_of_images)(height, width);
    TYPED(differentiate)(x, dy, dweight, dbias, room, l, images, in, out, threads);
}

size_t TYPED(pointwise_room)(size_t in, size_t out, size_t threads) {
    return TYPED(room_of)(TYPED(lattice_of_positions)(), in, out, threads);
}
void TYPED(pointwise_forward)(
    const STORED *x, const STORED *weight, const STORED *bias, STORED *y, float *room, int positions, int in, int out,
    int backward, int threads
) {
    LATTICE l = TYPED(lattice_of_positions)();
    TYPED(convolve_all)(x, weight, bias, y, room, l, positions, in, out, backward, threads);
}
void TYPED(pointwise_backward)(
    const STORED *x, const STORED *dy, STORED *dweight, STORED *dbias, float *room, int positions, int in, int out,
    int threads
) {
    LATTICE l = TYPED(lattice_of_positions)();
    TYPED(differentiate)(x, dy, dweight, dbias, room, l, positions, in, out, threads);
}

#undef LATTICE
