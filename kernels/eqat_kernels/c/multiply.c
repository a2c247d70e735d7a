/* Products of packed weights with a few rows of x, and the gradient of their step sizes.
   Formulas: quant_linear/reference.py; T rows of x. */

#include "multiply_digits.h"

/* y[T, O] from x[ceil(I / 32), T, 32], zero behind I: a run is unpacked once for all rows of x. */
INLINE void multiply_row(int bits, const Packed *p, const float *s, const float *x, float *y, int rows, int64_t o) {
    const Row row = row_of(bits, p, s, o);
    const uint32_t *words = row.words;
    const int chains = rows == 16 ? 1 : 2; /* one for each half of a run: additions wait for each other */
    floats total[16];
#pragma GCC unroll 16
    for (int t = 0; t < chains * rows; t++) total[t] = (floats){0}; /* one by one: they become registers */
    fetch_ahead(words, p->row_words * 4, 0);
    fetch_ahead(row.s, row.groups * 4, 0);
    for (int64_t group = 0; group < row.groups; group++) {
        const Grid grid = grid_of(bits, zero_point(bits, &row, group), row.s[group]);
        for (int64_t r = 0; r < row.runs; r++, words += bits, x += rows * RUN) {
            const words16 run = run_at(words, row.end);
            for (int half = 0; half < 2; half++) {
                const floats value = values(bits, grid, run, half);
#pragma GCC unroll 16
                for (int t = 0; t < rows; t++)
                    total[half * (chains - 1) * rows + t] += value * load(x + t * RUN + half * LANES);
            }
        }
    }
#pragma GCC unroll 16
    for (int t = 0; t < rows; t++)
        y[t * (p->last - p->first) + o - p->first] = sum(chains == 1 ? total[t] : total[t] + total[rows + t]);
}

/* `rows` is 1, 4, 8 or 16: constants, so that the sums stay in registers. */
void multiply(int bits, const Packed *p, const float *s, const float *x, float *y, int rows, int threads) {
    if (rows == 1 && multiply_in_digits(bits, p, s, x, y, threads)) return;
#pragma omp parallel for num_threads(threads)
    for (int64_t o = p->first; o < p->last; o++) {
        if (rows == 1) {
            FOR_BITS(bits, multiply_row, p, s, x, y, 1, o)
        } else if (rows == 4) {
            FOR_BITS(bits, multiply_row, p, s, x, y, 4, o)
        } else if (rows == 8) {
            FOR_BITS(bits, multiply_row, p, s, x, y, 8, o)
        } else {
            FOR_BITS(bits, multiply_row, p, s, x, y, 16, o)
        }
    }
}

/* ds[O, G] from the weight gradient of rows first .. last - 1. */
INLINE void scale_gradient_row(int bits, const Packed *p, const float *grad_w, float *grad_s, int64_t o) {
    const Row row = row_of(bits, p, 0, o);
    const uint32_t *words = row.words;
    const float *from = grad_w + (o - p->first) * p->columns, *end = from + p->columns;
    for (int64_t group = 0; group < row.groups; group++) {
        const Grid grid = grid_of(bits, zero_point(bits, &row, group), 1);
        floats total = {0};
        for (int64_t r = 0; r < row.runs; r++, words += bits, from += RUN) {
            const words16 run = run_at(words, row.end);
            float tail[RUN] = {0};
            const int whole = from + RUN <= end;
            if (!whole) memcpy(tail, from, (size_t)(end - from) * 4);
            for (int half = 0; half < 2; half++)
                total += values(bits, grid, run, half) * load((whole ? from : tail) + half * LANES);
        }
        grad_s[o * row.groups + group] = sum(total);
    }
}

void scale_gradient(int bits, const Packed *p, const float *grad_w, float *grad_s, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t o = p->first; o < p->last; o++) {
        FOR_BITS(bits, scale_gradient_row, p, grad_w, grad_s, o)
    }
}
