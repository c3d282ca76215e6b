/* Floats as raw bits: widening, rounding, difference and sum (specification, section 10).
 * Reference: deltafmt/terms/floats.py. */

INLINE float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

enum { MAGNITUDE = 0x7FFFFFFF, INFINITE = 0x7F800000, QUIET = 0x7FC00000 };

/* A half's exponent counts from 15 and a float's from 127, so its bits, read as a float, are 2**112 times too small. */
INLINE float widen_f16(uint16_t half) {
    uint32_t rest = (uint32_t)(half & 0x7FFF) << 13;
    uint32_t finite = bits_of(float_of(rest) * 0x1p112f);
    uint32_t magnitude = rest < 0x0F800000u ? finite : rest | INFINITE;
    return float_of((uint32_t)(half & 0x8000) << 16 | magnitude);
}

INLINE uint16_t narrow_f16(float value) {
    uint32_t bits = bits_of(value), magnitude = bits & MAGNITUDE;
    uint32_t normal = (magnitude + 0xFFF + (magnitude >> 13 & 1) - 0x38000000u) >> 13;
    /* Adding 0.5 makes the unit in the last place that of the smallest half, so that the sum rounds as it must. */
    uint32_t small = bits_of(float_of(magnitude) + 0.5f) - 0x3F000000u;
    uint32_t half = magnitude < 0x38800000u ? small : normal;
    half = magnitude >= 0x47800000u ? 0x7C00u : half;
    half = magnitude > INFINITE ? 0x7E00u | (magnitude >> 13 & 0x3FF) : half;
    return (uint16_t)((bits >> 16 & 0x8000u) | half);
}

INLINE uint16_t narrow_bf16(float value) {
    uint32_t bits = bits_of(value);
    uint32_t rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    return (uint16_t)((bits & MAGNITUDE) > INFINITE ? bits >> 16 | 0x40 : rounded);
}

INLINE size_t dtype_bytes(enum dtype dtype) { return dtype == F32 ? 4 : 2; }

INLINE uint32_t load(const void *raw, enum dtype dtype, size_t i) {
    return dtype == F32 ? ((const uint32_t *)raw)[i] : ((const uint16_t *)raw)[i];
}

INLINE void store(void *raw, enum dtype dtype, size_t i, uint32_t bits) {
    if (dtype == F32)
        ((uint32_t *)raw)[i] = bits;
    else
        ((uint16_t *)raw)[i] = (uint16_t)bits;
}

INLINE float widen(uint32_t raw, enum dtype dtype) {
    return dtype == BF16 ? float_of(raw << 16) : dtype == F16 ? widen_f16((uint16_t)raw) : float_of(raw);
}

INLINE uint32_t narrow(float value, enum dtype dtype) {
    return dtype == BF16 ? narrow_bf16(value) : dtype == F16 ? narrow_f16(value) : bits_of(value);
}

/* Calls a function for a pair of dtypes that the compiler knows. */
#define FOR_DTYPES(a, b, CALL)                                                             \
    ((a) == BF16  ? ((b) == BF16 ? CALL(BF16, BF16) : (b) == F16 ? CALL(BF16, F16) : CALL(BF16, F32)) \
     : (a) == F16 ? ((b) == BF16 ? CALL(F16, BF16) : (b) == F16 ? CALL(F16, F16) : CALL(F16, F32))    \
                  : ((b) == BF16 ? CALL(F32, BF16) : (b) == F16 ? CALL(F32, F16) : CALL(F32, F32)))

/* Writes the differences of a run of elements; returns the largest magnitude's bits, above INFINITE for a NaN. */
INLINE int32_t differences_of(const void *finetuned, enum dtype a, const void *base, enum dtype b, size_t count,
                              float *restrict out) {
    int32_t largest = 0;
    for (size_t i = 0; i < count; i++) {
        float difference = widen(load(finetuned, a, i), a) - widen(load(base, b, i), b);
        out[i] = difference;
        int32_t magnitude = (int32_t)(bits_of(difference) & MAGNITUDE);
        largest = magnitude > largest ? magnitude : largest;
    }
    return largest;
}

static int32_t differences(const void *finetuned, enum dtype a, const void *base, enum dtype b, size_t count,
                           float *restrict out) {
#define CALL(A, B) differences_of(finetuned, A, base, B, count, out)
    return FOR_DTYPES(a, b, CALL);
#undef CALL
}

static int subtract(const void *finetuned, enum dtype a, const void *base, enum dtype b, size_t count, float *out) {
    return differences(finetuned, a, base, b, count, out) < INFINITE ? DONE : NOT_FINITE;
}

/* The bits of a NaN in another dtype: the sign, and the highest bits of the fraction, of which the first is 1. */
INLINE uint32_t nan_of(uint32_t base, enum dtype b, enum dtype dtype) {
    uint32_t bits = b == F16 ? (base & 0x8000) << 16 | INFINITE | (base & 0x3FF) << 13 : b == BF16 ? base << 16 : base;
    bits |= QUIET;
    return dtype == F16 ? (bits >> 16 & 0x8000) | 0x7C00 | (bits >> 13 & 0x3FF) : dtype == BF16 ? bits >> 16 : bits;
}

/* "A sum is rounded to the nearest; where the delta is zero, the base itself." */
INLINE uint32_t sum_of(uint32_t base, enum dtype b, float delta, enum dtype dtype) {
    float wide = widen(base, b);
    float sum = delta == 0.0f ? wide : wide + delta;
    uint32_t nan = nan_of(wide != wide ? base : b == F16 ? 0x7E00u : (uint32_t)QUIET >> (b == BF16 ? 16 : 0), b, dtype);
    uint32_t rounded = sum != sum ? nan : narrow(sum, dtype);
    return delta == 0.0f && b == dtype ? base : rounded;
}

/* A NaN is rare, and its bits take as long as all the rest: a run that has one is computed again. */
INLINE void add_of(const void *restrict base, enum dtype b, const float *restrict delta, size_t count,
                   void *restrict out, enum dtype dtype) {
    enum { RUN = 1024 };
    for (size_t start = 0; start < count; start += RUN) {
        size_t stop = count - start < RUN ? count : start + RUN;
        int32_t nans = 0;
        for (size_t i = start; i < stop; i++) {
            uint32_t element = load(base, b, i);
            float wide = widen(element, b), sum = wide + delta[i];
            nans |= sum != sum;
            if (b == dtype)
                store(out, dtype, i, delta[i] == 0.0f ? element : narrow(sum, dtype));
            else
                store(out, dtype, i, narrow(delta[i] == 0.0f ? wide : sum, dtype));
        }
        if (nans)
            for (size_t i = start; i < stop; i++) store(out, dtype, i, sum_of(load(base, b, i), b, delta[i], dtype));
    }
}

static void add(const void *base, enum dtype b, const float *delta, size_t count, void *out, enum dtype dtype) {
#define CALL(A, B) add_of(base, A, delta, count, out, B)
    FOR_DTYPES(b, dtype, CALL);
#undef CALL
}
