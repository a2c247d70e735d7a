/* The ops of eqat_kernels on a CPU. Formulas: the `reference.py` of each op; layout: packing/reference.py.

   C with the vector types of GCC and Clang, no intrinsics: 16 lanes, one register with AVX-512, several elsewhere.
   Rows are shared among threads and a row's sums have one order, so results do not depend on the number of threads.
   All tensors are contiguous.

   Letters: O rows of W, I columns, G groups of a row, N bits, W words of a row, T rows of x. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define LANES 16
#define RUN 32 /* codes; N whole words at every bit width, and inside one group */
#define AHEAD 8192 /* bytes, two pages; measured: less and more are slower */

typedef float floats __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t words16 __attribute__((vector_size(4 * LANES)));

/* One copy of a function for each bit width, so that N is a constant inside. The function works on one row: around it
   is the parallel loop, whose body would otherwise be compiled before the constant is known. */
#define FOR_BITS(bits, function, ...)            \
    switch (bits) {                              \
        case 2: function(2, __VA_ARGS__); break; \
        case 3: function(3, __VA_ARGS__); break; \
        case 4: function(4, __VA_ARGS__); break; \
        default: function(8, __VA_ARGS__);       \
    }

/* ---- reading packed codes ---------------------------------------------------------------------------------- */

/* Lane i of half h gets code 16 h + i of a run: the word it begins in, shifted; only 3 bits can need the next word. */
#define BIT(N, h, i) ((LANES * (h) + (i)) * (N))
#define WORD(N, h, i) (BIT(N, h, i) / 32)
#define NEXT(N, h, i) (BIT(N, h, i) / 32 + 1)
#define SHIFT(N, h, i) (BIT(N, h, i) % 32)
#define UNSHIFT(N, h, i) (31 - BIT(N, h, i) % 32)
#define EACH(f, N, h)                                                                                              \
    f(N, h, 0), f(N, h, 1), f(N, h, 2), f(N, h, 3), f(N, h, 4), f(N, h, 5), f(N, h, 6), f(N, h, 7), f(N, h, 8),    \
        f(N, h, 9), f(N, h, 10), f(N, h, 11), f(N, h, 12), f(N, h, 13), f(N, h, 14), f(N, h, 15)
#define PICK(run, f, N, h) __builtin_shufflevector(run, run, EACH(f, N, h))
#define LOW(run, N, h) (PICK(run, WORD, N, h) >> (words16){EACH(SHIFT, N, h)})
#define HIGH(run, N, h) (PICK(run, NEXT, N, h) << 1 << (words16){EACH(UNSHIFT, N, h)})

/* The codes of one half of a run, with what follows them in their words still above them. */
INLINE words16 crowded_codes(int bits, words16 run, int half) {
    switch (2 * bits + half) {
        case 4: return LOW(run, 2, 0);
        case 5: return LOW(run, 2, 1);
        case 6: return LOW(run, 3, 0) | HIGH(run, 3, 0);
        case 7: return LOW(run, 3, 1) | HIGH(run, 3, 1);
        case 8: return LOW(run, 4, 0);
        case 9: return LOW(run, 4, 1);
        case 16: return LOW(run, 8, 0);
        default: return LOW(run, 8, 1);
    }
}

INLINE words16 codes(int bits, words16 run, int half) { return crowded_codes(bits, run, half) & ((1u << bits) - 1); }

INLINE floats to_floats(words16 code) { return __builtin_convertvector((ints)code, floats); }

/* What the codes of a group stand for, (q - z) s. With AVX-512 that is looked up: one instruction takes 16 entries by
   the low four bits of 16 numbers, so what is above a code need not be cleared; entries repeat below 4 bits. */
#ifdef __AVX512F__
#define TABLES 1
#else
#define TABLES 0
#endif

typedef struct {
    floats table;
    float zero, step;
} Grid;

INLINE Grid grid_of(int bits, float zero, float step) {
    const words16 entries = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return (Grid){(to_floats(entries & ((1u << bits) - 1)) - zero) * step, zero, step};
}

INLINE floats values(int bits, Grid grid, words16 run, int half) {
    if (!TABLES || bits > 4) return (to_floats(codes(bits, run, half)) - grid.zero) * grid.step;
    const words16 entry = crowded_codes(bits, run, half);
#ifdef __clang__
    return __builtin_shufflevector(grid.table, entry);
#else
    return __builtin_shuffle(grid.table, entry);
#endif
}

/* The words of a run and what follows them; codes behind the end of a row are not used. Read as a whole register,
   except at the very end of the tensor: a narrow copy has to go through memory. */
static __attribute__((noinline, cold)) words16 last_words(const uint32_t *from, const uint32_t *end) {
    words16 run = {0};
    memcpy(&run, from, (size_t)((const char *)end - (const char *)from));
    return run;
}

INLINE words16 run_at(const uint32_t *from, const uint32_t *end) {
    words16 run;
    if (__builtin_expect(from + LANES > end, 0)) return last_words(from, end);
    memcpy(&run, from, sizeof run);
    return run;
}

INLINE floats load(const float *from) {
    floats value;
    memcpy(&value, from, sizeof value);
    return value;
}

/* In halves: lane by lane, each addition would wait for the one before. */
INLINE float sum(floats value) {
    value += __builtin_shufflevector(value, value, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
    value += __builtin_shufflevector(value, value, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3);
    value += __builtin_shufflevector(value, value, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1);
    return value[0] + value[1];
}

typedef struct {
    const uint32_t *words; /* [O, W] */
    const uint32_t *end;   /* of the words */
    const uint32_t *zeros; /* [ceil(O N / 32), G], or null on the symmetric grid */
    int64_t columns, groups, row_words, first, last; /* rows first .. last - 1 are worked on */
} Packed;

/* One row of W. Zero points are packed along the rows, so all of a row are at one place in their words. */
typedef struct {
    const uint32_t *words, *end, *low, *high; /* words of its codes; of the zero points, and the next line of them */
    const float *s;
    int64_t groups, runs; /* runs of a group */
    int shift;            /* of the zero points */
} Row;

INLINE Row row_of(int bits, const Packed *p, const float *s, int64_t o) {
    const int64_t size = p->columns / p->groups;
    const uint32_t *low = p->zeros ? p->zeros + o * bits / 32 * p->groups : 0;
    return (Row){p->words + o * p->row_words, p->end,    low, low ? low + p->groups : 0,
                 s + o * p->groups,           p->groups, (size + RUN - 1) / RUN, (int)(o * bits % 32)};
}

INLINE float zero_point(int bits, const Row *row, int64_t group) {
    if (!row->low) return 1 << (bits - 1);
    uint32_t value = row->low[group] >> row->shift;
    if (bits == 3 && row->shift > 29) value |= row->high[group] << (32 - row->shift);
    return (float)(int32_t)(value & ((1u << bits) - 1));
}

/* ---- fake quantization ------------------------------------------------------------------------------------- */

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

/* bfloat16 is the upper half of a float32. */
INLINE float from_bfloat16(uint16_t half) {
    const uint32_t raw = (uint32_t)half << 16;
    float value;
    memcpy(&value, &raw, sizeof value);
    return value;
}

/* To nearest, ties to even. */
INLINE uint16_t to_bfloat16(float value) {
    uint32_t raw;
    memcpy(&raw, &value, sizeof raw);
    return (uint16_t)((raw + 0x7fff + (raw >> 16 & 1)) >> 16);
}

/* Asks for the lines AHEAD of these, since the processor's own prefetching ends with each page of memory. */
INLINE void fetch_ahead(const void *from, int64_t bytes, int to_write) {
    for (const char *line = (const char *)from + AHEAD, *end = line + bytes; line < end; line += 64)
        if (to_write)
            __builtin_prefetch(line, 1);
        else
            __builtin_prefetch(line, 0);
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

/* ---- packed weights ---------------------------------------------------------------------------------------- */

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

/* One row of x, where the processor multiplies bytes four at a time: 64 columns of x become whole numbers of 24 bits, of
   their largest, in three signed bytes each. Sums of codes times bytes are exact, so the result is as good as float32's.

       sum (q - z) x = size (65536 sum q d2 + 256 sum q d1 + sum q d0 - z sum x) */
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

static int multiply_in_digits(int bits, const Packed *p, const float *s, const float *x, float *y, int threads) {
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
#define multiply_in_digits(...) 0
#endif

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

/* ---- weights of 16 bits ------------------------------------------------------------------------------------ */

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

/* ---- packing ----------------------------------------------------------------------------------------------- */

INLINE void unpack_row(int bits, const uint32_t *words, const uint32_t *end, uint8_t *result, int64_t length) {
    typedef uint8_t bytes __attribute__((vector_size(LANES)));
    for (int64_t i = 0; i < length; i += RUN) {
        const words16 run = run_at(words + i / RUN * bits, end);
        const bytes code[2] = {__builtin_convertvector(codes(bits, run, 0), bytes),
                               __builtin_convertvector(codes(bits, run, 1), bytes)};
        memcpy(result + i, code, (size_t)(length - i < RUN ? length - i : RUN));
    }
}

void unpack(int bits, const uint32_t *words, uint8_t *result, int64_t rows, int64_t length, int64_t row_words,
            int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t o = 0; o < rows; o++) {
        FOR_BITS(bits, unpack_row, words + o * row_words, words + rows * row_words, result + o * length, length)
    }
}

void pack(int bits, const uint8_t *given, uint32_t *words, int64_t rows, int64_t length, int64_t row_words,
          int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t o = 0; o < rows; o++) {
        const uint8_t *from = given + o * length;
        uint32_t *to = words + o * row_words, *end = to + row_words;
        uint64_t held = 0;
        int count = 0; /* bits held, fewer than 32 between codes */
        for (int64_t i = 0; i < length; i++) {
            held |= (uint64_t)from[i] << count;
            count += bits;
            if (count >= 32) {
                *to++ = (uint32_t)held;
                held >>= 32;
                count -= 32;
            }
        }
        if (to < end) *to = (uint32_t)held;
    }
}

/* ---- attention over a cache of integers ---------------------------------------------------------------------- */

/* Keys or values: their first row of bytes, how far apart sequences, heads and tokens are, and what a row holds. */
typedef struct {
    const uint8_t *first;
    int64_t of_batch, of_head, of_token;
    int64_t bytes; /* of codes; behind them is the step size */
    int64_t half;  /* floats from the even channels to the odd ones, a multiple of LANES; with 8 bits of all channels */
} Cache;

INLINE void expand(int bits, const uint8_t *row, const Cache *c, float *to) {
    if (bits == 4)
        for (int64_t i = 0; i < c->bytes; i++) {
            to[i] = (float)((row[i] & 15) - 8);
            to[c->half + i] = (float)((row[i] >> 4) - 8);
        }
    else
        for (int64_t i = 0; i < c->bytes; i++) to[i] = (float)(row[i] - 128);
}

INLINE float step_of(const uint8_t *row, const Cache *c) {
    const uint32_t bits = (uint32_t)row[c->bytes] << 16 | (uint32_t)row[c->bytes + 1] << 24;
    float step;
    memcpy(&step, &bits, 4);
    return step;
}

INLINE void softmax(float *logits, int64_t count) {
    float top = -INFINITY, total = 0;
    for (int64_t t = 0; t < count; t++) top = logits[t] > top ? logits[t] : top;
    for (int64_t t = 0; t < count; t++) total += logits[t] = top == -INFINITY ? 0 : expf(logits[t] - top);
    for (int64_t t = 0; t < count; t++) logits[t] /= total > 0 ? total : 1;
}

/* All queries of one head: q and out [queries][wide], logits [queries][tokens] with the mask in them. */
INLINE void attend_head(int bits, const uint8_t *k, const uint8_t *v, const Cache *keys, const Cache *values,
                        const float *q, float *logits, float *out, int64_t queries, int64_t tokens) {
    const int64_t wide = keys->half * (bits == 4 ? 2 : 1);
    float row[wide];
    memset(row, 0, sizeof row);
    for (int64_t t = 0; t < tokens; t++, k += keys->of_token) {
        expand(bits, k, keys, row);
        const float step = step_of(k, keys);
        for (int64_t m = 0; m < queries; m++) {
            floats found = {0};
            for (int64_t i = 0; i < wide; i += LANES) found += load(q + m * wide + i) * load(row + i);
            logits[m * tokens + t] += sum(found) * step;
        }
    }
    for (int64_t m = 0; m < queries; m++) softmax(logits + m * tokens, tokens);
    for (int64_t t = 0; t < tokens; t++, v += values->of_token) {
        expand(bits, v, values, row);
        const float step = step_of(v, values);
        for (int64_t m = 0; m < queries; m++) {
            const float weight = logits[m * tokens + t] * step;
            float *to = out + m * wide;
            for (int64_t i = 0; i < wide; i++) to[i] += weight * row[i];
        }
    }
}

void attend(int bits, const Cache *keys, const Cache *values, const float *q, float *logits, float *out, int64_t all,
            int64_t heads, int64_t queries, int64_t tokens, int threads) {
    const int64_t wide = keys->half * (bits == 4 ? 2 : 1);
#pragma omp parallel for num_threads(threads)
    for (int64_t h = 0; h < all; h++) {
        const uint8_t *k = keys->first + h / heads * keys->of_batch + h % heads * keys->of_head;
        const uint8_t *v = values->first + h / heads * values->of_batch + h % heads * values->of_head;
        const float *query = q + h * queries * wide;
        float *seen = logits + h * queries * tokens, *result = out + h * queries * wide;
        if (bits == 4) attend_head(4, k, v, keys, values, query, seen, result, queries, tokens);
        else attend_head(8, k, v, keys, values, query, seen, result, queries, tokens);
    }
}
