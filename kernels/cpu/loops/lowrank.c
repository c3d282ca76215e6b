/* Sums of outer products (specification, section 13.3). Reference: deltafmt/terms/levels.py. */

/* "The product of the r-th vectors is rounded, then added to the sum of those before it." Four products are added while
 * a sum is at hand, one after the other, so that the order is that of the vectors. */
static void add_outer(const float *restrict u, const float *restrict v, size_t vectors, size_t rows, size_t columns,
                      float *restrict out) {
    for (size_t r = 0; r < rows; r++, out += columns) {
        size_t n = 0;
        for (; n + 4 <= vectors; n += 4) {
            const float *a = v + n * columns, *b = a + columns, *c = b + columns, *d = c + columns;
            float ua = u[n * rows + r], ub = u[(n + 1) * rows + r], uc = u[(n + 2) * rows + r], ud = u[(n + 3) * rows + r];
            for (size_t i = 0; i < columns; i++) out[i] = out[i] + ua * a[i] + ub * b[i] + uc * c[i] + ud * d[i];
        }
        for (; n < vectors; n++) {
            const float *a = v + n * columns;
            float ua = u[n * rows + r];
            for (size_t i = 0; i < columns; i++) out[i] = out[i] + ua * a[i];
        }
    }
}
