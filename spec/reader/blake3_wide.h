/* The text of the function that compresses eight inputs side by side. blake3.c includes it once for each kind of
 * processor, with WIDE_NAME and WIDE_TARGET defined: a compiler splits vectors that a processor lacks before it inlines
 * a function. */
/* Compress eight inputs of `blocks` blocks. `step` is added to the counter from one input to the next. */
WIDE_TARGET static void WIDE_NAME(const uint8_t *data, size_t blocks, uint64_t counter, int step, uint32_t flags,
                                  uint32_t first, uint32_t last, uint32_t (*out)[8]) {
    vec m[16], v[16], value[8], low, high, s0, s1, s2, s3;
    const size_t stride = blocks * BLOCK;
    EACH8(START);
    for (int l = 0; l < LANES; l++) {
        low[l] = (uint32_t)(counter + (uint64_t)(step * l));
        high[l] = (uint32_t)((counter + (uint64_t)(step * l)) >> 32);
    }
    for (size_t i = 0; i < blocks; i++) {
        const uint8_t *p = data + BLOCK * i;
        const uint32_t mark = flags | (i == 0 ? first : 0) | (i + 1 == blocks ? last : 0);
        EACH8(LOAD);
        TRANSPOSE(m, 0);
        TRANSPOSE(m, 8);
        EACH8(STATE);
        v[8] = SAME(IV[0]), v[9] = SAME(IV[1]), v[10] = SAME(IV[2]), v[11] = SAME(IV[3]);
        v[12] = low, v[13] = high, v[14] = SAME(BLOCK), v[15] = SAME(mark);
        ROUND(v, m, ORDER[0]);
        ROUND(v, m, ORDER[1]);
        ROUND(v, m, ORDER[2]);
        ROUND(v, m, ORDER[3]);
        ROUND(v, m, ORDER[4]);
        ROUND(v, m, ORDER[5]);
        ROUND(v, m, ORDER[6]);
        EACH8(VALUE);
    }
    TRANSPOSE(value, 0);
    memcpy(out, value, sizeof value);
}
