// Vectors of numbers, and operations on them, for ARM64: NEON, with instructions for bfloat16 (FEAT_BF16) or without.
// x86.h has the same names for x86-64.

#define WIDTH 4
#define ROWS 8  // rows of a matrix product that are computed together; more would not fit in the registers
#define vec float32x4_t
#define get LEVEL(get_four)
#define put LEVEL(put_four)
#define zero() vdupq_n_f32(0)
#define splat vdupq_n_f32
#define minimum vminq_f32
#define maximum vmaxq_f32
#define square_root vsqrtq_f32
// v * f + sum, for each number of the vector v and one float f, which is given by its bits.
#define add_products(sum, v, f) vfmaq_lane_f32(sum, v, vcreate_f32((uint32_t)(f)), 0)

static inline vec LEVEL(get_four)(const float *from) {
    vec v;
    memcpy(&v, from, sizeof v);
    return v;
}
static inline void LEVEL(put_four)(float *to, vec v) { memcpy(to, &v, sizeof v); }
static inline vec LEVEL(load_bf16)(const uint16_t *from) {
    uint16x4_t bits;
    memcpy(&bits, from, sizeof bits);
    return vreinterpretq_f32_u32(vshll_n_u16(bits, 16));
}
static inline uint16x4_t LEVEL(to_bf16)(vec v) {
#ifdef __ARM_FEATURE_BF16_VECTOR_ARITHMETIC
    return vreinterpret_u16_bf16(vcvt_bf16_f32(v));
#else
    uint32x4_t bits = vreinterpretq_u32_f32(v), last = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    uint16x4_t rounded = vaddhn_u32(bits, vaddq_u32(last, vdupq_n_u32(0x7fff)));
    // Rounding could overflow a NaN to zero.
    uint16x4_t nan = vorr_u16(vshrn_n_u32(bits, 16), vdup_n_u16(0x40));
    return vbsl_u16(vmovn_u32(vceqq_f32(v, v)), rounded, nan);
#endif
}
static inline void LEVEL(store_bf16)(uint16_t *to, vec v) {
    uint16x4_t bits = LEVEL(to_bf16)(v);
    memcpy(to, &bits, sizeof bits);
}

// The nearest whole numbers.
static inline vec LEVEL(nearest)(vec x) { return vrndnq_f32(x); }
// x * 2^power, for whole powers and normal numbers x.
static inline vec LEVEL(scale)(vec x, vec power) {
    return vreinterpretq_f32_s32(vaddq_s32(vreinterpretq_s32_f32(x), vshlq_n_s32(vcvtq_s32_f32(power), 23)));
}
// 1 / x, exact to 4 digits, which is more than bfloat16 holds: an estimate and a step of Newton's method.
static inline vec LEVEL(rough_reciprocal)(vec x) {
    vec estimate = vrecpeq_f32(x);
    return estimate * vrecpsq_f32(x, estimate);
}

#ifdef __ARM_FEATURE_BF16_VECTOR_ARITHMETIC
// Convert two vectors to bfloat16 and pack them as pairs, with the numbers of the first in the lower halves.
static inline vec LEVEL(pack_pairs)(vec first, vec second) {
    uint16x4_t low = LEVEL(to_bf16)(first), high = LEVEL(to_bf16)(second);
    return vreinterpretq_f32_u16(vcombine_u16(vzip1_u16(low, high), vzip2_u16(low, high)));
}
// add_products for pairs of bfloat16 numbers, whose two products are added.
#define add_pair_products(sum, v, f)                                                                                   \
    vbfdotq_lane_f32(sum, vreinterpretq_bf16_f32(v), vcreate_bf16((uint32_t)(f)), 0)
#endif
