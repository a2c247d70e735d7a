/* Packed weights: codes, zero points and step sizes of a row. Layout: packing/reference.py.

   Letters: O rows of W, I columns, G groups of a row, N bits, W words of a row. */

#ifndef EQAT_PACKED
#define EQAT_PACKED

#include "lanes.h"

#define RUN 32 /* codes; N whole words at every bit width, and inside one group */

/* One copy of a function for each bit width, so that N is a constant inside. The function works on one row: around it
   is the parallel loop, whose body would otherwise be compiled before the constant is known. */
#define FOR_BITS(bits, function, ...)            \
    switch (bits) {                              \
        case 2: function(2, __VA_ARGS__); break; \
        case 3: function(3, __VA_ARGS__); break; \
        case 4: function(4, __VA_ARGS__); break; \
        default: function(8, __VA_ARGS__);       \
    }


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

#endif
