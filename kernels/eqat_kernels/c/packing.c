/* Codes of one byte to packed words, and back. Layout: packing/reference.py. */

#include "packed.h"

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
