/* One row of x, where the processor multiplies bytes four at a time: 64 columns of x become whole numbers of 24 bits, of
   their largest, in three signed bytes each. Sums of codes times bytes are exact, so the result is as good as float32's.

       sum (q - z) x = size (65536 sum q d2 + 256 sum q d1 + sum q d0 - z sum x) */

#include "multiply_digits.h"

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#include <immintrin.h>

#define CHUNK 64
#define WHOLE 8355000.0f /* below 127 in each of three bytes, and so is what is rounded up */

typedef uint8_t bytes64 __attribute__((vector_size(CHUNK)));
typedef uint64_t longs8 __attribute__((vector_size(CHUNK)));

/* Digits in the order in which `codes64` has the codes, and the sum of the four numbers of each lane. */
typedef struct {
    _Alignas(CHUNK) int8_t digits[3][CHUNK];
    floats sum;
} Chunk;

/* 64 codes as bytes. Cut out where they lie, those of one shift are together: at 4 bits the even ones, then the odd. */
INLINE bytes64 codes64(int bits, const uint32_t *from, const uint32_t *end) {
    const words16 run = run_at(from, end);
    if (bits == 8) return (bytes64)run;
    if (bits == 4) {
        const words16 twice = __builtin_shufflevector(run, run, 0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7);
        return (bytes64)(twice >> (words16){0, 0, 0, 0, 0, 0, 0, 0, 4, 4, 4, 4, 4, 4, 4, 4}) & 15;
    }
    if (bits == 2) {
        const words16 times4 = __builtin_shufflevector(run, run, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3);
        return (bytes64)(times4 >> (words16){0, 0, 0, 0, 2, 2, 2, 2, 4, 4, 4, 4, 6, 6, 6, 6}) & 3;
    }
    const bytes64 raw = (bytes64)run; /* three bytes of eight codes in a lane of eight bytes, then twice as far apart */
#define LANE(i) 3 * i, 3 * i + 1, 3 * i + 2, 3 * i, 3 * i, 3 * i, 3 * i, 3 * i
    longs8 lane = (longs8)__builtin_shufflevector(raw, raw, LANE(0), LANE(1), LANE(2), LANE(3), LANE(4), LANE(5),
                                                  LANE(6), LANE(7));
    lane = (lane & 0xfff) | (lane & 0xfff000) << 20;
    lane = (lane & 0x3f0000003f) | (lane & 0xfc000000fc0) << 10;
    return (bytes64)((lane & 0x7000700070007) | (lane & 0x38003800380038) << 5);
}

/* Fills chunks and what one unit of each is worth; says whether all numbers are of a size that this can hold. */
static int in_digits(int bits, const float *x, int64_t columns, Chunk *chunk, float *unit) {
    const int apart = bits == 4 ? 2 : bits == 2 ? 4 : 1, together = CHUNK / apart;
    for (int64_t i = 0; i < columns; i += CHUNK, x += CHUNK, chunk++, unit++) {
        float top = 0, sums[LANES] = {0};
        for (int k = 0; k < CHUNK; k++) top = fabsf(x[k]) <= top ? top : fabsf(x[k]);
        if (!(top < 1e30f) || (top > 0 && top < 1e-30f)) return 0;
        const float times = top > 0 ? WHOLE / top : 0;
        *unit = top / WHOLE;
        for (int k = 0; k < CHUNK; k++) {
            const int32_t whole = (int32_t)rintf(x[k % together * apart + k / together] * times);
            const int32_t upper = (whole - (int8_t)whole) >> 8;
            chunk->digits[0][k] = (int8_t)whole;
            chunk->digits[1][k] = (int8_t)upper;
            chunk->digits[2][k] = (int8_t)((upper - (int8_t)upper) >> 8);
            sums[k / 4] += (float)whole;
        }
        chunk->sum = load(sums);
    }
    return 1;
}

INLINE ints dot64(bytes64 code, const int8_t *digits) {
    return (ints)_mm512_dpbusd_epi32(_mm512_setzero_si512(), (__m512i)code, _mm512_load_si512(digits));
}

INLINE void multiply_digits_row(int bits, const Packed *p, const float *s, const Chunk *chunk, const float *unit,
                                float *y, int64_t o) {
    const Row row = row_of(bits, p, s, o);
    const uint32_t *words = row.words;
    floats total = {0};
    fetch_ahead(words, p->row_words * 4, 0);
    fetch_ahead(row.s, row.groups * 4, 0);
    for (int64_t group = 0; group < row.groups; group++) {
        const float zero = zero_point(bits, &row, group), step = row.s[group];
        for (int64_t r = 0; r < row.runs; r += 2, words += 2 * bits, chunk++, unit++) {
            const bytes64 code = codes64(bits, words, row.end);
            const ints upper = (dot64(code, chunk->digits[2]) << 8) + dot64(code, chunk->digits[1]);
            const floats lower = __builtin_convertvector(dot64(code, chunk->digits[0]), floats) - zero * chunk->sum;
            total += (__builtin_convertvector(upper, floats) * 256 + lower) * (step * *unit);
        }
    }
    y[o - p->first] = sum(total);
}

int multiply_in_digits(int bits, const Packed *p, const float *s, const float *x, float *y, int threads) {
    if (p->columns / p->groups % CHUNK) return 0;
    Chunk chunks[p->columns / CHUNK];
    float units[p->columns / CHUNK];
    if (!in_digits(bits, x, p->columns, chunks, units)) return 0;
#pragma omp parallel for num_threads(threads)
    for (int64_t o = p->first; o < p->last; o++) {
        FOR_BITS(bits, multiply_digits_row, p, s, chunks, units, y, o)
    }
    return 1;
}
#else
int multiply_in_digits(int bits, const Packed *p, const float *s, const float *x, float *y, int threads) {
    (void)bits, (void)p, (void)s, (void)x, (void)y, (void)threads;
    return 0;
}
#endif
