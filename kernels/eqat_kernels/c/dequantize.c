/* Packed weights as dense ones. Formula: dequant/reference.py. */

#include "packed.h"

INLINE void store_bfloat16(uint16_t *to, floats value) {
    for (int k = 0; k < LANES; k++) to[k] = to_bfloat16(value[k]);
}

INLINE void dequantize_row(int bits, const Packed *p, const float *s, void *out, int bfloat16, int64_t o) {
    const int64_t width = bfloat16 ? 2 : 4;
    const Row row = row_of(bits, p, s, o);
    const uint32_t *words = row.words;
    char *to = (char *)out + (o - p->first) * p->columns * width, *end = to + p->columns * width;
    for (int64_t group = 0; group < row.groups; group++) {
        const Grid grid = grid_of(bits, zero_point(bits, &row, group), row.s[group]);
        for (int64_t r = 0; r < row.runs; r++, words += bits, to += RUN * width) {
            const words16 run = run_at(words, row.end);
            const int whole = to + RUN * width <= end;
            float tail[RUN];
            for (int half = 0; half < 2; half++) {
                const floats value = values(bits, grid, run, half);
                char *at = (whole ? to : (char *)tail) + half * LANES * width;
                if (bfloat16)
                    store_bfloat16((uint16_t *)at, value);
                else
                    memcpy(at, &value, sizeof value);
            }
            if (!whole) memcpy(to, tail, (size_t)(end - to));
        }
    }
}

void dequantize(int bits, const Packed *p, const float *s, void *out, int bfloat16, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t o = p->first; o < p->last; o++) {
        FOR_BITS(bits, dequantize_row, p, s, out, bfloat16, o)
    }
}
