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

/* The codes of one half of a run. */
INLINE words16 codes(int bits, words16 run, int half) {
    words16 code;
    switch (2 * bits + half) {
        case 4: code = LOW(run, 2, 0); break;
        case 5: code = LOW(run, 2, 1); break;
        case 6: code = LOW(run, 3, 0) | HIGH(run, 3, 0); break;
        case 7: code = LOW(run, 3, 1) | HIGH(run, 3, 1); break;
        case 8: code = LOW(run, 4, 0); break;
        case 9: code = LOW(run, 4, 1); break;
        case 16: code = LOW(run, 8, 0); break;
        default: code = LOW(run, 8, 1);
    }
    return code & ((1u << bits) - 1);
}

INLINE floats to_floats(words16 code) { return __builtin_convertvector((ints)code, floats); }

/* The words of the run that begins at column i, and what follows them: codes behind the end of a row are not used.
   Read as a whole register, except at the very end of the tensor: a narrow copy would have to go through memory. */
INLINE words16 run_at(int bits, const uint32_t *row, int64_t i, const uint32_t *end) {
    words16 run = {0};
    const uint32_t *from = row + i / RUN * bits;
    if (__builtin_expect(from + LANES <= end, 1))
        memcpy(&run, from, sizeof run);
    else
        memcpy(&run, from, (size_t)((const char *)end - (const char *)from));
    return run;
}

INLINE floats load(const float *from) {
    floats value;
    memcpy(&value, from, sizeof value);
    return value;
}

INLINE float sum(floats value) {
    float total = 0;
    for (int k = 0; k < LANES; k++) total += value[k];
    return total;
}

/* z of one group of row `o`; zero points are packed along the rows, [ceil(O N / 32), G]. */
INLINE int32_t zero_point(int bits, const uint32_t *zeros, int64_t o, int64_t group, int64_t groups) {
    if (!zeros) return 1 << (bits - 1);
    int64_t word = o * bits / 32;
    int shift = (int)(o * bits % 32);
    uint64_t value = zeros[word * groups + group];
    if (shift + bits > 32) value |= (uint64_t)zeros[(word + 1) * groups + group] << 32;
    return (int32_t)(value >> shift) & ((1 << bits) - 1);
}

typedef struct {
    const uint32_t *words; /* [O, W] */
    const uint32_t *end;   /* of the words */
    const uint32_t *zeros; /* [ceil(O N / 32), G], or null on the symmetric grid */
    int64_t columns, groups, row_words, first, last; /* rows first .. last - 1 are worked on */
} Packed;

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

void fake_quantize_forward(const float *w, const float *s, const float *z, float *out, int64_t groups, int64_t size,
                           int bits, int threads) {
    const float top = (float)((1 << bits) - 1);
#pragma omp parallel for num_threads(threads)
    for (int64_t group = 0; group < groups; group++) {
        const float step = s[group], inverse = 1 / step, zero = rintf(z[group]);
        const float *from = w + group * size;
        float *to = out + group * size;
#pragma omp simd
        for (int64_t i = 0; i < size; i++) {
            float v = rintf(divide(from[i], step, inverse)) + zero;
            float q = v < 0 ? 0 : v > top ? top : v;
            to[i] = (q - zero) * step;
        }
    }
}

void fake_quantize_backward(const float *grad, const float *w, const float *s, const float *z, float *grad_w,
                            float *grad_s, float *grad_z, int64_t groups, int64_t size, int bits, int threads) {
    const float top = (float)((1 << bits) - 1);
#pragma omp parallel for num_threads(threads)
    for (int64_t group = 0; group < groups; group++) {
        const float step = s[group], inverse = 1 / step, zero = rintf(z[group]);
        const float *from = w + group * size, *d = grad + group * size;
        float *to = grad_w + group * size;
        float slopes = 0, clipped = 0;
#pragma omp simd reduction(+ : slopes, clipped)
        for (int64_t i = 0; i < size; i++) {
            float u = divide(from[i], step, inverse), v = rintf(u) + zero;
            float q = v < 0 ? 0 : v > top ? top : v;
            float inside = v == q ? d[i] : 0;
            to[i] = inside;
            slopes += d[i] * (q - zero - (v == q ? u : 0));
            clipped += d[i] - inside;
        }
        grad_s[group] = slopes;
        grad_z[group] = -step * clipped;
    }
}

/* ---- packed weights ---------------------------------------------------------------------------------------- */

/* To nearest, ties to even. */
INLINE void store_bfloat16(uint16_t *to, floats value) {
    words16 raw = (words16)value;
    typedef uint16_t halves __attribute__((vector_size(2 * LANES)));
    halves rounded = __builtin_convertvector((raw + 0x7fff + (raw >> 16 & 1)) >> 16, halves);
    memcpy(to, &rounded, sizeof rounded);
}

INLINE void dequantize_row(int bits, const Packed *p, const float *s, void *out, int bfloat16, int64_t o) {
    const int64_t size = p->columns / p->groups, width = bfloat16 ? 2 : 4;
    char *line = (char *)out + (o - p->first) * p->columns * width;
    for (int64_t group = 0; group < p->groups; group++) {
        const float zero = zero_point(bits, p->zeros, o, group, p->groups), step = s[o * p->groups + group];
        for (int64_t i = group * size; i < (group + 1) * size; i += RUN) {
            const words16 run = run_at(bits, p->words + o * p->row_words, i, p->end);
            const int whole = i + RUN <= p->columns;
            float tail[RUN];
            char *to = whole ? line + i * width : (char *)tail;
            for (int half = 0; half < 2; half++) {
                floats value = (to_floats(codes(bits, run, half)) - zero) * step;
                if (bfloat16)
                    store_bfloat16((uint16_t *)to + half * LANES, value);
                else
                    memcpy((float *)to + half * LANES, &value, sizeof value);
            }
            if (!whole) memcpy(line + i * width, tail, (size_t)((p->columns - i) * width));
        }
    }
}

void dequantize(int bits, const Packed *p, const float *s, void *out, int bfloat16, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t o = p->first; o < p->last; o++) {
        FOR_BITS(bits, dequantize_row, p, s, out, bfloat16, o)
    }
}

/* y[T, O] from x[T, ceil(I / 32) * 32], zero behind I: a run is unpacked once for all rows of x. */
INLINE void multiply_row(int bits, const Packed *p, const float *s, const float *x, float *y, int rows, int64_t o) {
    const int64_t size = p->columns / p->groups, width = (p->columns + RUN - 1) / RUN * RUN;
    const int chains = rows == 16 ? 1 : 2; /* one for each half of a run: additions wait for each other */
    floats total[16];
#pragma GCC unroll 16
    for (int t = 0; t < chains * rows; t++) total[t] = (floats){0}; /* one by one: they become registers */
    for (int64_t group = 0; group < p->groups; group++) {
        const float step = s[o * p->groups + group];
        const float shift = -step * zero_point(bits, p->zeros, o, group, p->groups);
        for (int64_t i = group * size; i < (group + 1) * size; i += RUN) {
            const words16 run = run_at(bits, p->words + o * p->row_words, i, p->end);
            for (int half = 0; half < 2; half++) {
                const floats value = to_floats(codes(bits, run, half)) * step + shift;
#pragma GCC unroll 16
                for (int t = 0; t < rows; t++)
                    total[half * (chains - 1) * rows + t] += value * load(x + t * width + i + half * LANES);
            }
        }
    }
#pragma GCC unroll 16
    for (int t = 0; t < rows; t++)
        y[t * (p->last - p->first) + o - p->first] = sum(chains == 1 ? total[t] : total[t] + total[rows + t]);
}

/* `rows` is 1, 4 or 16: constants, so that the sums stay in registers. */
void multiply(int bits, const Packed *p, const float *s, const float *x, float *y, int rows, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t o = p->first; o < p->last; o++) {
        if (rows == 1) {
            FOR_BITS(bits, multiply_row, p, s, x, y, 1, o)
        } else if (rows == 4) {
            FOR_BITS(bits, multiply_row, p, s, x, y, 4, o)
        } else {
            FOR_BITS(bits, multiply_row, p, s, x, y, 16, o)
        }
    }
}

/* ds[O, G] from the weight gradient of rows first .. last - 1. */
INLINE void scale_gradient_row(int bits, const Packed *p, const float *grad_w, float *grad_s, int64_t o) {
    const int64_t size = p->columns / p->groups;
    const float *from = grad_w + (o - p->first) * p->columns;
    for (int64_t group = 0; group < p->groups; group++) {
        const float zero = zero_point(bits, p->zeros, o, group, p->groups);
        floats total = {0};
        for (int64_t i = group * size; i < (group + 1) * size; i += RUN) {
            const words16 run = run_at(bits, p->words + o * p->row_words, i, p->end);
            float tail[RUN] = {0};
            const int whole = i + RUN <= p->columns;
            if (!whole) memcpy(tail, from + i, (size_t)(p->columns - i) * 4);
            for (int half = 0; half < 2; half++)
                total += (to_floats(codes(bits, run, half)) - zero) * load((whole ? from + i : tail) + half * LANES);
        }
        grad_s[o * p->groups + group] = sum(total);
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
        const words16 run = run_at(bits, words, i, end);
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
