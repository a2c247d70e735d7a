/* What lies between the products of a decode step: a few rows of float32, with any strides, and the loop over a
   recorded list of calls. Their specification is torch's op that recording/steps.py names for each.

   Functions take up to 12 whole numbers, pointers among them; the last one given is the number of threads. */

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

typedef int64_t Number;
typedef void (*Function)(Number, Number, Number, Number, Number, Number, Number, Number, Number, Number, Number, Number);

typedef struct {
    Function function;
    Number numbers[12];
} Call;

void replay(const Call *calls, int64_t count) {
    for (const Call *c = calls; c < calls + count; c++) {
        const Number *n = c->numbers;
        c->function(n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7], n[8], n[9], n[10], n[11]);
    }
}

/* Sizes, and how far apart the elements of the result and of two operands are. */
typedef struct {
    int64_t sizes[4], out[4], a[4], b[4];
} Strides;

/* `result` of u and v, element by element; the last dimension is vectorized where it has no gaps or v is one number. */
#define ELEMENTWISE(name, result)                                                                                \
    static void name##_row(const Strides *s, const float *a, const float *b, float *out) {                       \
        const int64_t size = s->sizes[3], near = s->out[3] == 1 && s->a[3] == 1;                                 \
        if (near && s->b[3] == 1)                                                                                \
            for (int64_t k = 0; k < size; k++) {                                                                 \
                const float u = a[k], v = b[k];                                                                  \
                out[k] = result;                                                                                 \
            }                                                                                                    \
        else if (near && s->b[3] == 0) {                                                                         \
            const float v = *b;                                                                                  \
            for (int64_t k = 0; k < size; k++) {                                                                 \
                const float u = a[k];                                                                            \
                out[k] = result;                                                                                 \
            }                                                                                                    \
        } else                                                                                                   \
            for (int64_t k = 0; k < size; k++) {                                                                 \
                const float u = a[k * s->a[3]], v = b[k * s->b[3]];                                              \
                out[k * s->out[3]] = result;                                                                     \
            }                                                                                                    \
    }                                                                                                            \
    void name(const Strides *s, const float *a, const float *b, float *out) {                                    \
        for (int64_t i = 0; i < s->sizes[0]; i++)                                                                \
            for (int64_t j = 0; j < s->sizes[1]; j++)                                                            \
                for (int64_t k = 0; k < s->sizes[2]; k++)                                                        \
                    name##_row(s, a + i * s->a[0] + j * s->a[1] + k * s->a[2],                                   \
                               b + i * s->b[0] + j * s->b[1] + k * s->b[2],                                      \
                               out + i * s->out[0] + j * s->out[1] + k * s->out[2]);                             \
    }

ELEMENTWISE(sum_of, u + v)
ELEMENTWISE(product_of, u *v)
ELEMENTWISE(inverse_root_of, v / sqrtf(u))
ELEMENTWISE(silu_of, v *u / (1 + expf(-u)))

void mean_of(const float *a, float *out, int64_t rows, int64_t size) {
    for (int64_t i = 0; i < rows; i++) {
        float total = 0;
#pragma omp simd reduction(+ : total)
        for (int64_t k = 0; k < size; k++) total += a[i * size + k];
        out[i] = total / (float)size;
    }
}

void number_sum_of(const int64_t *a, const int64_t *b, int64_t *out) { *out = *a + *b; }

/* Copies `from` to the place `*index` of a dimension of `to` whose elements are `step` apart; `one` is 1. */
void put_at(const Strides *s, const float *from, const float *one, float *to, const int64_t *index, int64_t step) {
    product_of(s, from, one, to + *index * step);
}

/* Sizes of an attention, and how far apart the rows of its tensors are; the channels of a row lie together. */
typedef struct {
    int64_t batch, heads, queries, tokens, channels;
    int64_t q[3], k[3], v[3], out[3]; /* of a sequence, a head, a token */
    int64_t mask[4];                  /* of a sequence, a head, a query, a token */
    double scale;
} Attention;

static float dot(const float *a, const float *b, int64_t size) {
    float total = 0;
#pragma omp simd reduction(+ : total)
    for (int64_t k = 0; k < size; k++) total += a[k] * b[k];
    return total;
}

/* One query. A token whose mask is the lowest number is not looked at: a long cache costs what is in it. */
static void attend_query(const Attention *s, const float *q, const float *k, const float *v, const float *mask,
                         float *logits, float *out) {
    float top = -INFINITY, total = 0;
    for (int64_t t = 0; t < s->tokens; t++) {
        const float added = mask[t * s->mask[3]];
        logits[t] = added == -FLT_MAX ? -INFINITY : dot(q, k + t * s->k[2], s->channels) * (float)s->scale + added;
        top = logits[t] > top ? logits[t] : top;
    }
    memset(out, 0, (size_t)s->channels * sizeof *out);
    for (int64_t t = 0; t < s->tokens; t++) {
        if (logits[t] == -INFINITY) continue;
        const float weight = expf(logits[t] - top), *row = v + t * s->v[2];
        total += weight;
        for (int64_t i = 0; i < s->channels; i++) out[i] += weight * row[i];
    }
    for (int64_t i = 0; i < s->channels; i++) out[i] /= total;
}

/* `logits` has room for the tokens of every head. */
void attend_floats(const Attention *s, const float *q, const float *k, const float *v, const float *mask, float *logits,
                   float *out, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t each = 0; each < s->batch * s->heads; each++) {
        const int64_t b = each / s->heads, h = each % s->heads;
        for (int64_t m = 0; m < s->queries; m++)
            attend_query(s, q + b * s->q[0] + h * s->q[1] + m * s->q[2], k + b * s->k[0] + h * s->k[1],
                         v + b * s->v[0] + h * s->v[1], mask + b * s->mask[0] + h * s->mask[1] + m * s->mask[2],
                         logits + each * s->tokens, out + b * s->out[0] + h * s->out[1] + m * s->out[2]);
    }
}
