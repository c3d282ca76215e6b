/* Scales and codes of kept entries, on both symmetric grids (specification, section 12.1).
 * Reference: deltafmt/methods/quantize.py. */

/* Magnitudes are brought to integers up to 2**20 for the search, whose sums are then exact in any order. */
static const float UNIT = 0x1p20f;
/* Below TINY, a scale is the min-max one: the search's reciprocal would overflow. */
static const float TINY = 0x1p-100f, SMALLEST = 0x1p-126f;

/* Rounds to the nearest integer, ties to even, for magnitudes below 2**22: the sum has no room for a fraction. */
INLINE int32_t nearest(float x) { return (int32_t)bits_of(x + 0x1.8p23f) - 0x4B400000; }

INLINE int32_t floor_of(float x) {
    int32_t whole = (int32_t)x;
    return whole - ((float)whole > x);
}

/* NaN marks an entry beyond the last column and counts as zero. */
static float largest_of(const float *restrict kept, size_t count) {
    int32_t largest = 0;
    for (size_t i = 0; i < count; i++) {
        int32_t magnitude = (int32_t)(bits_of(kept[i]) & MAGNITUDE);
        magnitude = magnitude > INFINITE ? 0 : magnitude;
        largest = magnitude > largest ? magnitude : largest;
    }
    return float_of((uint32_t)largest);
}

/* Rounds to BF16, or leaves as it is. */
INLINE float stored_scale(float scale, enum dtype dtype) {
    return dtype == BF16 ? float_of((uint32_t)narrow_bf16(scale) << 16) : scale;
}

/* The smallest scale of its dtype that reaches the largest magnitude. */
INLINE float minmax_scale(float largest, const struct quantizer *q) {
    if (!(largest > 0)) return 0;
    float halves = q->midtread ? (float)((1 << (q->bits - 1)) - 1) : (float)((1 << q->bits) - 1) / 2;
    float exact = largest / halves;
    exact = exact > SMALLEST ? exact : SMALLEST;
    return q->scale_dtype == BF16 ? float_of((bits_of(exact) + 0xFFFF) & 0xFFFF0000u) : exact;
}

/* The gain of a step, by its reciprocal, and the best step for the levels that it assigns. */
INLINE void fit_of(const int32_t *restrict units, size_t count, float factor, int32_t top, int midtread, size_t block,
                   double *gain, double *step) {
    int64_t products = 0, squares = 0;
    float limit = (float)top + 1;
    for (size_t start = 0; start < count; start += block) {
        size_t stop = count - start < block ? count : start + block;
        int32_t p = 0, s = 0; /* a unit has 20 bits and a level k, so that 2**(11 - k) products fit */
        for (size_t i = start; i < stop; i++) {
            float scaled = (float)units[i] * factor;
            scaled = scaled < limit ? scaled : limit;
            scaled = scaled > 0 ? scaled : 0;
            int32_t level = midtread ? nearest(scaled) : (int32_t)scaled;
            level = 2 * (level < top ? level : top) + !midtread;
            level &= ~(units[i] >> 31); /* -1 marks an entry beyond the last column */
            p += units[i] * level;
            s += level * level;
        }
        products += p;
        squares += s;
    }
    double p = (double)products, s = (double)(squares > 0 ? squares : 1);
    *gain = p * p / s;
    *step = 2.0 * p / s;
}

static void fit(const int32_t *units, size_t count, float factor, const struct quantizer *q, double *gain,
                double *step) {
    int32_t top = (1 << (q->bits - 1)) - 1;
    size_t block = (size_t)1 << (11 - q->bits);
    if (q->midtread)
        fit_of(units, count, factor, top, 1, block, gain, step);
    else
        fit_of(units, count, factor, top, 0, block, gain, step);
}

/* The scale of least squared error: the best of the candidate steps, refined by turns of levels and best scale. */
static float searched_scale(const float *restrict kept, size_t count, float largest, const struct quantizer *q,
                            int32_t *restrict units) {
    float inverse = UNIT / largest;
    for (size_t i = 0; i < count; i++) {
        float x = float_of(bits_of(kept[i]) & MAGNITUDE);
        int32_t unit = nearest(x <= largest ? x * inverse : 0.0f);
        units[i] = x <= largest ? unit : -1;
    }
    double best = -1.0, step = 1.0, gain, fitted;
    for (size_t j = 0; j < q->candidates; j++) {
        fit(units, count, q->factors[j], q, &gain, &fitted);
        if (gain > best) best = gain, step = fitted;
    }
    for (int j = 0; j < q->refinements; j++) {
        fit(units, count, (float)(1.0 / (step > 0.0 ? step : 1.0)), q, &gain, &fitted);
        if (gain > best) best = gain, step = fitted;
    }
    float scale = stored_scale((float)(step * ((double)largest / (double)UNIT)), q->scale_dtype);
    return scale > SMALLEST ? scale : SMALLEST;
}

INLINE void assign_of(const float *restrict kept, size_t count, float inverse, int32_t low, int32_t high, int midtread,
                      uint8_t *restrict fields) {
    for (size_t i = 0; i < count; i++) {
        int inside = kept[i] == kept[i];
        float steps = (inside ? kept[i] : 0.0f) * inverse;
        steps = steps < (float)low ? (float)low : steps;
        steps = steps > (float)high ? (float)high : steps;
        int32_t level = midtread ? nearest(steps) : floor_of(steps);
        fields[i] = (uint8_t)(inside ? level - low : 0);
    }
}

/* Quantizes one row; scratch: 4 bytes an entry of a group, for the search alone. */
static int quantize_row(const float *kept, size_t entries, const struct quantizer *q, uint8_t *fields, float *scales,
                        int32_t *units) {
    int32_t half = 1 << (q->bits - 1), low = q->midtread ? 1 - half : -half;
    for (size_t start = 0, c = 0; start < entries || c == 0; start += q->group, c++) {
        size_t count = entries - start < q->group ? entries - start : q->group;
        float largest = largest_of(kept + start, count);
        if (bits_of(largest) >= INFINITE) return SCALE_OVERFLOW;
        int search = q->search && largest >= TINY;
        float scale = search ? searched_scale(kept + start, count, largest, q, units) : minmax_scale(largest, q);
        if (bits_of(scale) >= INFINITE) return SCALE_OVERFLOW;
        scales[c] = scale;
        float inverse = scale > 0 ? 1.0f / scale : 0.0f;
        if (q->midtread)
            assign_of(kept + start, count, inverse, low, half - 1, 1, fields + start);
        else
            assign_of(kept + start, count, inverse, low, half - 1, 0, fields + start);
    }
    return DONE;
}

static size_t scales_of(size_t entries, size_t group) { return entries ? (entries + group - 1) / group : 1; }

static int quantize(const float *kept, size_t rows, size_t entries, const struct quantizer *q, uint8_t *fields,
                    float *scales, void *scratch) {
    size_t per_row = scales_of(entries, q->group);
    for (size_t r = 0; r < rows; r++) {
        int status = quantize_row(kept + r * entries, entries, q, fields + r * entries, scales + r * per_row, scratch);
        if (status) return status;
    }
    return DONE;
}
