/* A look at a sample of a chunk: whether its units are smaller alone or as differences. Reference: is_unrelated in
 * deltafmt/exact/samples.py. */

/* The sum, over the planes of some units, of n log2 n for each number n of equal bytes. */
#define SAMPLE_UNITS(T)                                                                                              \
    INLINE uint64_t order_##T(const T *restrict units, size_t count, const uint64_t *restrict logs) {                \
        uint8_t plane[EXACT_SAMPLE];                                                                                 \
        uint32_t counts[256];                                                                                        \
        uint64_t total = 0;                                                                                          \
        for (size_t byte = 0; byte < sizeof(T); byte++) {                                                            \
            for (size_t i = 0; i < count; i++) plane[i] = (uint8_t)(units[i] >> 8 * byte);                           \
            count_bytes(plane, count, counts);                                                                       \
            for (int s = 0; s < 256; s++) total += logs[counts[s]];                                                  \
        }                                                                                                            \
        return total;                                                                                                \
    }                                                                                                                \
    static int unrelated_##T(const struct exact *e, const uint64_t *logs) {                                          \
        T *restrict codes = e->sorted;                                                                               \
        encode_##T(e->values, e->prediction, e->count, e->is_float, codes);                                          \
        return order_##T(e->values, e->count, logs) > order_##T(codes, e->count, logs);                              \
    }

SAMPLE_UNITS(uint8_t)
SAMPLE_UNITS(uint16_t)
SAMPLE_UNITS(uint32_t)
SAMPLE_UNITS(uint64_t)

static int exact_unrelated(const struct exact *e, const uint64_t *logs) {
    if (e->width == 1) return unrelated_uint8_t(e, logs);
    if (e->width == 2) return unrelated_uint16_t(e, logs);
    if (e->width == 4) return unrelated_uint32_t(e, logs);
    return unrelated_uint64_t(e, logs);
}
