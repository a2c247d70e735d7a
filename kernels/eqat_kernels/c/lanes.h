/* What all of these files share: 16 lanes of numbers, and how they are read, added and rounded.

   C with the vector types of GCC and Clang, no intrinsics: 16 lanes, one register with AVX-512, several elsewhere.
   Rows are shared among threads and a row's sums have one order, so results do not depend on the number of threads.
   All tensors are contiguous. */

#ifndef EQAT_LANES
#define EQAT_LANES

#include <math.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define LANES 16
#define AHEAD 8192 /* bytes, two pages; measured: less and more are slower */

typedef float floats __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t words16 __attribute__((vector_size(4 * LANES)));

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

#endif
