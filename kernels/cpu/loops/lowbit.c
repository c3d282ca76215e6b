/* Codes of every element to values (specification, section 12.3). Reference: deltafmt/terms/levels.py. */

/* value = float32(step * u - offset) * factor, with one rounding. */
static void dequantize(const uint8_t *restrict codes, size_t rows, size_t count, int step,
                       const int32_t *restrict offsets, const float *restrict factors, size_t group,
                       float *restrict out) {
    size_t per_row = count ? (count + group - 1) / group : 0;
    for (size_t r = 0; r < rows; r++, codes += count, out += count, offsets += per_row, factors += per_row) {
        if (group == 1) {
            for (size_t i = 0; i < count; i++) out[i] = (float)(step * (int32_t)codes[i] - offsets[i]) * factors[i];
            continue;
        }
        for (size_t start = 0, c = 0; start < count; start += group, c++) {
            size_t stop = count - start < group ? count : start + group;
            int32_t offset = offsets[c];
            float factor = factors[c];
            for (size_t i = start; i < stop; i++) out[i] = (float)(step * (int32_t)codes[i] - offset) * factor;
        }
    }
}
