/* Products of weights of 16 bits with a few rows of x in float32. */

#include "lanes.h"

/* Exact: bfloat16 is the upper half of a float32; float16 has its exponent 112 lower and its bits 13 places down. */
INLINE floats widen(int bfloat16, const uint16_t *from) {
    typedef uint16_t halves __attribute__((vector_size(2 * LANES)));
    halves raw;
    memcpy(&raw, from, sizeof raw);
    const words16 half = __builtin_convertvector(raw, words16);
    return bfloat16 ? (floats)(half << 16) : (floats)((half & 0x8000) << 16 | (half & 0x7fff) << 13) * 0x1p112f;
}

/* One row of W with all rows of x; the last columns as if zeros followed. */
INLINE void multiply_narrow_row(int bfloat16, const uint16_t *w, const float *x, float *y, int64_t outputs,
                                int64_t columns, int rows) {
    const int chains = rows == 16 ? 1 : 2; /* as in multiply_row */
    const int64_t step = chains * LANES, whole = columns / step * step;
    floats total[16];
#pragma GCC unroll 16
    for (int t = 0; t < chains * rows; t++) total[t] = (floats){0};
    fetch_ahead(w, columns * 2, 0);
    for (int64_t i = 0; i < columns; i += step) {
        uint16_t last[2 * LANES] = {0};
        if (i == whole) memcpy(last, w + i, (size_t)(columns - i) * 2);
        for (int part = 0; part < chains; part++) {
            const floats value = widen(bfloat16, (i == whole ? last : w + i) + part * LANES);
#pragma GCC unroll 16
            for (int t = 0; t < rows; t++) {
                float tail[2 * LANES] = {0};
                const float *from = x + t * columns + i;
                if (i == whole) from = memcpy(tail, from, (size_t)(columns - i) * 4);
                total[part * rows + t] += value * load(from + part * LANES);
            }
        }
    }
#pragma GCC unroll 16
    for (int t = 0; t < rows; t++) y[t * outputs] = sum(chains == 1 ? total[t] : total[t] + total[rows + t]);
}

/* y[T, O] from x[T, I] and W[O, I] of bfloat16 or float16; T is 1, 4, 8 or 16, as in multiply. */
void multiply_narrow(int bfloat16, const uint16_t *w, const float *x, float *y, int64_t outputs, int64_t columns,
                     int rows, int threads) {
#define NARROW(kind, count) multiply_narrow_row(kind, w + o * columns, x, y + o, outputs, columns, count)
#pragma omp parallel for num_threads(threads)
    for (int64_t o = 0; o < outputs; o++) {
        switch (rows + (bfloat16 != 0)) {
            case 1: NARROW(0, 1); break;
            case 2: NARROW(1, 1); break;
            case 4: NARROW(0, 4); break;
            case 5: NARROW(1, 4); break;
            case 8: NARROW(0, 8); break;
            case 9: NARROW(1, 8); break;
            case 16: NARROW(0, 16); break;
            default: NARROW(1, 16);
        }
    }
}
