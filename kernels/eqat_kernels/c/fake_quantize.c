/* Fake quantization, forward and backward. Formulas: fake_quant/reference.py. */

#include "lanes.h"

/* a / b, correctly rounded, from the correctly rounded inverse of b (Markstein's theorem): b is that of a whole group,
   and a division takes as long as the memory does. */
INLINE float divide(float a, float b, float inverse) {
#ifdef FP_FAST_FMAF
    float quotient = a * inverse;
    return fmaf(fmaf(-quotient, b, a), inverse, quotient);
#else
    (void)inverse;
    return a / b;
#endif
}

/* The grid of a group, in levels q - round(z): W_hat = level * step. */
typedef struct {
    float step, inverse, low, high;
} Levels;

INLINE Levels levels_of(float step, float z, int bits) {
    const float low = -rintf(z);
    return (Levels){step, 1 / step, low, (float)((1 << bits) - 1) + low};
}

/* Two instructions, the largest and the smallest of two; a NaN stays one. */
INLINE float clip(Levels grid, float level) {
    level = grid.low > level ? grid.low : level;
    return grid.high < level ? grid.high : level;
}

INLINE void fake_quantize_lanes(int bfloat16, Levels grid, const float *w, void *out, int count) {
#pragma omp simd
    for (int k = 0; k < count; k++) {
        const float value = clip(grid, rintf(divide(w[k], grid.step, grid.inverse))) * grid.step;
        if (bfloat16)
            ((uint16_t *)out)[k] = to_bfloat16(value);
        else
            ((float *)out)[k] = value;
    }
}

INLINE void fake_quantize_group(int bfloat16, Levels grid, const float *w, void *out, int64_t size) {
    const int64_t width = bfloat16 ? 2 : 4;
    fetch_ahead(w, size * 4, 0);
    fetch_ahead(out, size * width, 1);
    for (int64_t i = 0; i < size; i += LANES) {
        char *to = (char *)out + i * width;
        if (i + LANES <= size)
            fake_quantize_lanes(bfloat16, grid, w + i, to, LANES);
        else
            fake_quantize_lanes(bfloat16, grid, w + i, to, (int)(size - i));
    }
}

/* W_hat in float32 or bfloat16, which is how the product that follows wants it. */
void fake_quantize_forward(int bfloat16, const float *w, const float *s, const float *z, void *out, int64_t groups,
                           int64_t size, int bits, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t group = 0; group < groups; group++) {
        const Levels grid = levels_of(s[group], z[group], bits);
        const float *from = w + group * size;
        if (bfloat16)
            fake_quantize_group(1, grid, from, (uint16_t *)out + group * size, size);
        else
            fake_quantize_group(0, grid, from, (float *)out + group * size, size);
    }
}

/* Adds to the sums over a group: of d (level - u), u only where W is inside the grid, and of d where it is not. Writes
   W_hat again where `hat` is given. `grad_w` may be `grad`. */
INLINE void fake_quantize_lanes_backward(int bfloat16, Levels grid, const void *grad, const float *w, float *grad_w,
                                         void *hat, floats *slopes, floats *clipped, int count) {
    float slope[LANES] = {0}, outside[LANES] = {0};
#pragma omp simd
    for (int k = 0; k < count; k++) {
        const float d = bfloat16 ? from_bfloat16(((const uint16_t *)grad)[k]) : ((const float *)grad)[k];
        const float u = divide(w[k], grid.step, grid.inverse), nearest = rintf(u), level = clip(grid, nearest);
        const float inside = level == nearest ? d : 0, value = level * grid.step;
        grad_w[k] = inside;
        slope[k] = d * (level - (level == nearest ? u : 0));
        outside[k] = d - inside;
        if (hat && bfloat16)
            ((uint16_t *)hat)[k] = to_bfloat16(value);
        else if (hat)
            ((float *)hat)[k] = value;
    }
    *slopes += load(slope);
    *clipped += load(outside);
}

INLINE void fake_quantize_group_backward(int bfloat16, Levels grid, const char *grad, const float *w, float *grad_w,
                                         char *hat, float *grad_s, float *grad_z, int64_t size) {
    const int64_t width = bfloat16 ? 2 : 4;
    floats slopes = {0}, clipped = {0};
    fetch_ahead(w, size * 4, 0);
    fetch_ahead(grad, size * width, 0);
    fetch_ahead(grad_w, size * 4, 1);
    if (hat) fetch_ahead(hat, size * width, 1);
    for (int64_t i = 0; i < size; i += LANES) {
        const char *d = grad + i * width;
        char *out = hat ? hat + i * width : 0;
        if (i + LANES <= size)
            fake_quantize_lanes_backward(bfloat16, grid, d, w + i, grad_w + i, out, &slopes, &clipped, LANES);
        else
            fake_quantize_lanes_backward(bfloat16, grid, d, w + i, grad_w + i, out, &slopes, &clipped, (int)(size - i));
    }
    *grad_s = sum(slopes);
    *grad_z = -grid.step * sum(clipped);
}

/* `hat`, of the type of `grad`, or null. */
void fake_quantize_backward(int bfloat16, const void *grad, const float *w, const float *s, const float *z,
                            float *grad_w, void *hat, float *grad_s, float *grad_z, int64_t groups, int64_t size,
                            int bits, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t group = 0; group < groups; group++) {
        const Levels grid = levels_of(s[group], z[group], bits);
        const int64_t at = group * size, bytes = at * (bfloat16 ? 2 : 4);
        const char *d = (const char *)grad + bytes;
        float *dw = grad_w + at, *ds = grad_s + group, *dz = grad_z + group;
        if (bfloat16 && hat)
            fake_quantize_group_backward(1, grid, d, w + at, dw, (char *)hat + bytes, ds, dz, size);
        else if (bfloat16)
            fake_quantize_group_backward(1, grid, d, w + at, dw, 0, ds, dz, size);
        else if (hat)
            fake_quantize_group_backward(0, grid, d, w + at, dw, (char *)hat + bytes, ds, dz, size);
        else
            fake_quantize_group_backward(0, grid, d, w + at, dw, 0, ds, dz, size);
    }
}
