/* Products with one row of x by multiplying bytes, where the processor does. */

#ifndef EQAT_MULTIPLY_DIGITS
#define EQAT_MULTIPLY_DIGITS

#include "packed.h"

/* y[O] from x[ceil(I / 32), 32]. Returns 0, and does nothing, where this way is not open. */
int multiply_in_digits(int bits, const Packed *p, const float *s, const float *x, float *y, int threads);

#endif
