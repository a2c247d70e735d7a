/* Attention over a cache of integers. Formulas: cached_attention/reference.py. */

#include "lanes.h"

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
