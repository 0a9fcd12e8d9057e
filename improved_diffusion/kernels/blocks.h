// Whole blocks of the UNet, made of the other kernels, so that Python makes one call for each. This file is included once
// for each type of numbers, STORED. The gradients of what is in struct residual or struct attending have its names, in a
// struct of their own.

// The statistics and the working memory of a normalisation within its part of `floats`.
#define STATISTICS(of_norm, images, groups)                                                                            \
    of_norm, of_norm + (images) * (groups), of_norm + 2 * (images) * (groups)
#ifdef TILE_MULTIPLY  // normalisation takes no tiles
#define NORM(name) LEVEL(name##_bf16)
#elif defined(__AVX512FP16__)  // normalisation is in the generation before
#define NORM(name) name##_bf16_avx512bf16
void NORM(norm_forward)(
    const STORED *x, const STORED *weight, const STORED *bias, const STORED *modulation, STORED *y, float *mean,
    float *rstd, float *sums, int images, int positions, int channels, int groups, float epsilon, int activate,
    int threads
);
void NORM(norm_backward)(
    const STORED *dy, const STORED *more, const STORED *x, const STORED *weight, const STORED *bias,
    const STORED *modulation, const float *mean, const float *rstd, STORED *dx, STORED *dweight, STORED *dbias,
    STORED *dmodulation, float *sums, int images, int positions, int channels, int groups, int activate, int threads
);
#else
#define NORM(name) TYPED(name)
#endif

static void TYPED(add)(STORED *to, const STORED *more, size_t numbers, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (size_t i = 0; i < numbers; i += WIDTH) STORE(to + i, LOAD(to + i) + LOAD(more + i));
}

// y = conv2(act(norm2(conv1(act(norm1(x)))))) + skip(x), where the modulation scales and shifts norm2.
void TYPED(residual_forward)(const struct residual *s) {
    int positions = s->height * s->width, all = s->images * positions;
    float *of_norm1 = s->floats, *of_norm2 = of_norm1 + 2 * s->images * (s->groups1 + s->in);
    NORM(norm_forward)(
        s->x, s->norm1_weight, s->norm1_bias, NULL, s->h1, STATISTICS(of_norm1, s->images, s->groups1), s->images,
        positions, s->in, s->groups1, s->epsilon1, 1, s->threads
    );
    TYPED(conv3x3_forward)(
        s->h1, s->weight1, s->bias1, s->c1, s->room, s->images, s->height, s->width, s->in, s->out, 0, s->threads
    );
    NORM(norm_forward)(
        s->c1, s->norm2_weight, s->norm2_bias, s->modulation, s->h2, STATISTICS(of_norm2, s->images, s->groups2),
        s->images, positions, s->out, s->groups2, s->epsilon2, 1, s->threads
    );
    TYPED(conv3x3_forward)(
        s->h2, s->weight2, s->bias2, s->y, s->room, s->images, s->height, s->width, s->out, s->out, 0, s->threads
    );
    if (s->skip_weight)
        TYPED(pointwise_forward)(
            s->x, s->skip_weight, s->skip_bias, s->skip, s->room, all, s->in, s->out, 0, s->threads
        );
    TYPED(add)(s->y, s->skip_weight ? s->skip : s->x, (size_t)all * s->out, s->threads);
}

void TYPED(residual_backward)(const struct residual *s, const struct residual_gradients *d) {
    int positions = s->height * s->width, all = s->images * positions;
    float *of_norm1 = s->floats, *of_norm2 = of_norm1 + 2 * s->images * (s->groups1 + s->in);
    TYPED(conv3x3_backward)(
        s->h2, d->y, d->weight2, d->bias2, s->room, s->images, s->height, s->width, s->out, s->out, s->threads
    );
    TYPED(conv3x3_forward)(
        d->y, s->weight2, NULL, d->h, s->room, s->images, s->height, s->width, s->out, s->out, 1, s->threads
    );
    NORM(norm_backward)(
        d->h, NULL, s->c1, s->norm2_weight, s->norm2_bias, s->modulation,
        of_norm2, of_norm2 + s->images * s->groups2, d->c1, d->norm2_weight, d->norm2_bias, d->modulation,
        of_norm2 + 2 * s->images * s->groups2, s->images, positions, s->out, s->groups2, 1, s->threads
    );
    TYPED(conv3x3_backward)(
        s->h1, d->c1, d->weight1, d->bias1, s->room, s->images, s->height, s->width, s->in, s->out, s->threads
    );
    TYPED(conv3x3_forward)(
        d->c1, s->weight1, NULL, d->h, s->room, s->images, s->height, s->width, s->in, s->out, 1, s->threads
    );
    if (s->skip_weight) {
        TYPED(pointwise_backward)(
            s->x, d->y, d->skip_weight, d->skip_bias, s->room, all, s->in, s->out, s->threads
        );
        TYPED(pointwise_forward)(
            d->y, s->skip_weight, NULL, d->skip, s->room, all, s->in, s->out, 1, s->threads
        );
    }
    NORM(norm_backward)(
        d->h, s->skip_weight ? d->skip : d->y, s->x, s->norm1_weight, s->norm1_bias, NULL,
        of_norm1, of_norm1 + s->images * s->groups1, d->x, d->norm1_weight, d->norm1_bias, NULL,
        of_norm1 + 2 * s->images * s->groups1, s->images, positions, s->in, s->groups1, 1, s->threads
    );
}

#ifdef UNIT
// y = proj(attention(qkv(norm(x)))) + x.
void TYPED(attending_forward)(const struct attending *s) {
    int all = s->images * s->positions, channels = s->heads * s->width;
    NORM(norm_forward)(
        s->x, s->norm_weight, s->norm_bias, NULL, s->h, STATISTICS(s->floats, s->images, s->groups), s->images,
        s->positions, channels, s->groups, s->epsilon, 0, s->threads
    );
    TYPED(pointwise_forward)(
        s->h, s->qkv_weight, s->qkv_bias, s->qkv, s->room, all, channels, 3 * channels, 0, s->threads
    );
    TYPED(attention_forward)(
        s->qkv, s->a, s->logsums, (uint32_t *)s->room, s->images, s->positions, s->heads, s->width, s->threads
    );
    TYPED(pointwise_forward)(
        s->a, s->proj_weight, s->proj_bias, s->y, s->room, all, channels, channels, 0, s->threads
    );
    TYPED(add)(s->y, s->x, (size_t)all * channels, s->threads);
}

void TYPED(attending_backward)(const struct attending *s, const struct attending_gradients *d) {
    int all = s->images * s->positions, channels = s->heads * s->width;
    TYPED(pointwise_backward)(
        s->a, d->y, d->proj_weight, d->proj_bias, s->room, all, channels, channels, s->threads
    );
    TYPED(pointwise_forward)(d->y, s->proj_weight, NULL, d->h, s->room, all, channels, channels, 1, s->threads);
    TYPED(attention_backward)(
        d->h, s->qkv, s->a, s->logsums, d->qkv, (uint32_t *)s->room, s->images, s->positions, s->heads, s->width,
        s->threads
    );
    TYPED(pointwise_backward)(
        s->h, d->qkv, d->qkv_weight, d->qkv_bias, s->room, all, channels, 3 * channels, s->threads
    );
    TYPED(pointwise_forward)(
        d->qkv, s->qkv_weight, NULL, d->h, s->room, all, channels, 3 * channels, 1, s->threads
    );
    NORM(norm_backward)(
        d->h, d->y, s->x, s->norm_weight, s->norm_bias, NULL, s->floats, s->floats + s->images * s->groups, d->x,
        d->norm_weight, d->norm_bias, NULL, s->floats + 2 * s->images * s->groups, s->images, s->positions, channels,
        s->groups, 0, s->threads
    );
}
#endif

#undef STATISTICS
#undef NORM
