/* N:M terms: kept entries gathered and scattered, packing and unpacking in one pass (specification, section 11).
 * Reference: deltafmt/methods/sampling.py, deltafmt/terms/nm/scatter.py, deltafmt/terms/nm/run.py. */

/* "Entry i of group g stands at column g * M + position." */
INLINE void columns_of(const uint8_t *restrict positions, size_t groups, size_t n, size_t m, uint32_t *restrict at) {
    for (size_t g = 0; g < groups; g++)
        for (size_t i = 0; i < n; i++) at[g * n + i] = (uint32_t)(g * m) + positions[g * n + i];
}

/* Writes the columns of the kept entries of a mask row; every column is below groups * m. */
static void kept_columns(const struct kept *kept, size_t mask_row, uint32_t *at) {
    const uint8_t *positions = kept->positions + mask_row * kept->groups * kept->n;
    switch (kept->n) {
    case 1: columns_of(positions, kept->groups, 1, kept->m, at); break;
    case 2: columns_of(positions, kept->groups, 2, kept->m, at); break;
    case 4: columns_of(positions, kept->groups, 4, kept->m, at); break;
    default: columns_of(positions, kept->groups, kept->n, kept->m, at);
    }
}

/* How many of a row's kept entries lie in groups that are complete: only those behind them may be outside. */
INLINE size_t inside_of(const struct kept *kept) { return kept->columns / kept->m * kept->n; }

static void take(const float *restrict row, const uint32_t *restrict at, const struct kept *kept, float factor,
                 float *restrict out) {
    size_t count = kept->groups * kept->n, inside = inside_of(kept);
    for (size_t e = 0; e < inside; e++) out[e] = row[at[e]] * factor;
    for (size_t e = inside; e < count; e++) out[e] = at[e] < kept->columns ? row[at[e]] * factor : float_of(0x7FC00000u);
}

INLINE const void *row_at(const void *raw, enum dtype dtype, size_t element) {
    return (const uint8_t *)raw + element * dtype_bytes(dtype);
}

/* scratch: 4 bytes a column, then 4 bytes a kept entry. */
static int gather(const void *finetuned, enum dtype a, const void *base, enum dtype b, size_t rows,
                  const struct kept *kept, float factor, float *out, void *scratch) {
    float *row = scratch;
    uint32_t *at = (uint32_t *)(row + kept->columns);
    size_t count = kept->groups * kept->n;
    int32_t largest = 0;
    for (size_t r = 0; r < rows; r++) {
        size_t start = r * kept->columns;
        if (r % kept->share == 0) kept_columns(kept, r / kept->share, at);
        int32_t found = differences(row_at(finetuned, a, start), a, row_at(base, b, start), b, kept->columns, row);
        largest = found > largest ? found : largest;
        take(row, at, kept, factor, out + r * count);
    }
    return largest < INFINITE ? DONE : NOT_FINITE;
}

/* "value = float32(2u - top) * float32(scale * 0.5)", one rounding in float32. */
INLINE void values_of(const uint8_t *restrict codes, const float *scales, size_t count, size_t group, int top,
                      float *restrict values) {
    for (size_t start = 0, c = 0; start < count; start += group, c++) {
        size_t stop = count - start < group ? count : start + group;
        float half = scales[c] * 0.5f;
        for (size_t e = start; e < stop; e++) values[e] = (float)(2 * (int32_t)codes[e] - top) * half;
    }
}

/* scratch: 4 bytes a kept entry, twice. */
static void scatter(const uint8_t *codes, const float *scales, size_t rows, size_t group, int top,
                    const struct kept *kept, float *out, void *scratch) {
    size_t count = kept->groups * kept->n, inside = inside_of(kept), per_row = scales_of(count, group);
    uint32_t *at = scratch;
    float *values = (float *)(at + count);
    for (size_t r = 0; r < rows; r++, out += kept->columns) {
        if (r % kept->share == 0) kept_columns(kept, r / kept->share, at);
        values_of(codes + r * count, scales + r * per_row, count, group, top, values);
        memset(out, 0, kept->columns * sizeof *out);
        for (size_t e = 0; e < inside; e++) out[at[e]] = values[e];
        for (size_t e = inside; e < count; e++)
            if (at[e] < kept->columns) out[at[e]] = values[e];
    }
}

/* Subtracts, gathers, quantizes and packs a run of rows; every row stays in the first-level cache.
 *
 * scratch: 4 bytes a column; 4 bytes a kept entry, three times; 4 bytes a scale of a row; 4 bytes a word of a row; a
 * byte a kept entry, padded to 32. */
static int nm_pack(const struct nm_pack *job, void *scratch) {
    const struct kept *kept = &job->kept;
    const struct quantizer *q = &job->quantizer;
    size_t count = kept->groups * kept->n, per_row = scales_of(count, q->group), words = stream_words(count, q->bits);
    float *row = scratch, *entries = row + kept->columns;
    uint32_t *at = (uint32_t *)(entries + count);
    int32_t *units = (int32_t *)(at + count);
    float *scales = (float *)(units + count);
    uint32_t *line = (uint32_t *)(scales + per_row);
    uint8_t *fields = (uint8_t *)(line + words);
    memset(fields, 0, padded_32(count));
    for (size_t r = 0; r < job->rows; r++) {
        size_t start = r * kept->columns, stride;
        if (r % kept->share == 0) kept_columns(kept, r / kept->share, at);
        int32_t largest = differences(row_at(job->finetuned, job->finetuned_dtype, start), job->finetuned_dtype,
                                      row_at(job->base, job->base_dtype, start), job->base_dtype, kept->columns, row);
        if (largest >= INFINITE) return NOT_FINITE;
        take(row, at, kept, job->factor, entries);
        int status = quantize_row(entries, count, q, fields, scales, units);
        if (status) return status;
        pack_row(fields, count, q->bits, line);
        uint32_t *out = job->codes + line_of(r, words, kept->share, &stride);
        put_line(line, words, out, stride);
        size_t first = line_of(r, per_row, kept->share, &stride);
        for (size_t c = 0; c < per_row; c++) {
            if (q->scale_dtype == BF16)
                ((uint16_t *)job->scales)[first + c * stride] = (uint16_t)(bits_of(scales[c]) >> 16);
            else
                ((float *)job->scales)[first + c * stride] = scales[c];
        }
    }
    return DONE;
}

/* Writes base + values into a row, and the base where nothing is kept. */
INLINE void add_kept_of(const void *restrict base, enum dtype b, void *restrict out, enum dtype dtype,
                        const uint32_t *restrict at, const float *restrict values, const struct kept *kept,
                        uint32_t *restrict sums) {
    size_t count = kept->groups * kept->n, inside = inside_of(kept);
    if (b == dtype)
        memcpy(out, base, kept->columns * dtype_bytes(dtype));
    else
        for (size_t i = 0; i < kept->columns; i++) store(out, dtype, i, sum_of(load(base, b, i), b, 0.0f, dtype));
    /* In three steps, of which the middle one takes many entries at a time. */
    for (size_t e = 0; e < inside; e++) sums[e] = load(base, b, at[e]);
    for (size_t e = 0; e < inside; e++) sums[e] = sum_of(sums[e], b, values[e], dtype);
    for (size_t e = 0; e < inside; e++) store(out, dtype, at[e], sums[e]);
    for (size_t e = inside; e < count; e++)
        if (at[e] < kept->columns) store(out, dtype, at[e], sum_of(load(base, b, at[e]), b, values[e], dtype));
}

/* Unpacks the codes of a run of rows and adds them to the base; every row stays in the first-level cache.
 *
 * scratch: 4 bytes a kept entry, three times; 4 bytes a word of a row; a byte a kept entry, padded to 32. */
static void nm_unpack(const struct nm_unpack *job, void *scratch) {
    const struct kept *kept = &job->kept;
    size_t count = kept->groups * kept->n, per_row = scales_of(count, job->group);
    size_t words = stream_words(count, job->bits);
    uint32_t *at = scratch, *sums = at + count, *line = sums + count;
    float *values = (float *)(line + words);
    uint8_t *codes = (uint8_t *)(values + count);
    for (size_t r = 0; r < job->rows; r++) {
        size_t start = r * kept->columns, stride;
        if (r % kept->share == 0) kept_columns(kept, r / kept->share, at);
        const uint32_t *packed = job->codes + line_of(r, words, kept->share, &stride);
        take_line(packed, stride, words, line);
        unpack_row(line, count, job->bits, codes);
        values_of(codes, job->scales + r * per_row, count, job->group, job->top, values);
        const void *base = row_at(job->base, job->base_dtype, start);
        void *out = (uint8_t *)job->out + start * dtype_bytes(job->dtype);
#define CALL(A, B) add_kept_of(base, A, out, B, at, values, kept, sums)
        FOR_DTYPES(job->base_dtype, job->dtype, CALL);
#undef CALL
    }
}
