/* Entries that stand anywhere, as gaps in slots (specification, section 14). Reference: deltafmt/terms/sparse/codec.py. */

/* Calls `entry(part, slot, gap)` for every entry of a row; gives back the slots that each block of the row takes. */
INLINE int walk_row(const struct sparse *s, size_t row, int64_t *needed, const int64_t *starts, size_t slots,
                    void *gaps, size_t gap_bytes, const uint8_t *values, size_t value_bytes, uint8_t *placed,
                    int by_slot) {
    size_t tile = row / TILE_ROWS, lane = row % TILE_ROWS;
    int64_t first = row ? s->ends[row - 1] : 0, last = s->ends[row];
    if (first < 0 || last < first || (uint64_t)last > s->entries) return BROKEN;
    size_t block = SIZE_MAX, after = 0, taken = 0;
    int64_t before = -1;
    for (int64_t e = first; e < last; e++) {
        int64_t column = s->positions[e];
        if (column <= before || (uint64_t)column >= s->columns) return BROKEN;
        before = column;
        if ((size_t)column / s->span != block) {
            block = (size_t)column / s->span;
            after = block * s->span;
            taken = 0;
        }
        /* "A distance of q F + d, d below F, takes q fillers and then the gap d." */
        size_t distance = (size_t)column - after;
        taken += distance / s->filler + 1;
        after = (size_t)column + 1;
        if (needed) {
            int64_t *most = needed + tile * s->blocks + block;
            if ((int64_t)taken > *most) *most = (int64_t)taken;
            continue;
        }
        size_t slot = (size_t)starts[tile * s->blocks + block] + taken - 1, at = lane * slots + slot;
        if (slot >= slots) return BROKEN;
        uint32_t gap = (uint32_t)(distance % s->filler);
        if (gap_bytes == 1)
            ((uint8_t *)gaps)[at] = (uint8_t)gap;
        else
            ((uint16_t *)gaps)[at] = (uint16_t)gap;
        if (by_slot) at = slot * TILE_ROWS + lane;
        memcpy(placed + at * value_bytes, values + (size_t)e * value_bytes, value_bytes);
    }
    return DONE;
}

/* "A block has the slots of the row that needs the most." needed: (tiles * blocks,), zeros. */
static int sparse_needed(const struct sparse *s, int64_t *needed) {
    for (size_t row = 0; row < s->rows; row++)
        if (walk_row(s, row, needed, NULL, 0, NULL, 1, NULL, 1, NULL, 0)) return BROKEN;
    return DONE;
}

/* gaps: (32, slots), fillers. placed: (32, slots), or (slots, 32) with by_slot, zeros. */
static int sparse_place(const struct sparse *s, const int64_t *starts, size_t slots, void *gaps, size_t gap_bytes,
                        const void *values, size_t value_bytes, void *placed, int by_slot) {
    for (size_t row = 0; row < s->rows; row++) {
        int status = value_bytes == 1
                         ? walk_row(s, row, NULL, starts, slots, gaps, gap_bytes, values, 1, placed, by_slot)
                     : value_bytes == 2
                         ? walk_row(s, row, NULL, starts, slots, gaps, gap_bytes, values, 2, placed, by_slot)
                         : walk_row(s, row, NULL, starts, slots, gaps, gap_bytes, values, 4, placed, by_slot);
        if (status) return status;
    }
    return DONE;
}

INLINE int sparse_lane(const struct sparse_tile *t, size_t lane, size_t gap_bytes) {
    const uint8_t *gaps = (const uint8_t *)t->gaps + lane * t->slots * gap_bytes;
    int exists = lane < t->lanes, wrong = 0;
    float half = exists && t->codes ? t->scales[lane] * 0.5f : 0.0f;
    for (size_t block = 0; block < t->blocks; block++) {
        size_t column = block * t->span, end = column + t->span;
        if (end > t->columns) end = t->columns;
        for (int64_t slot = t->starts[block]; slot < t->starts[block + 1]; slot++) {
            uint32_t gap = gap_bytes == 1 ? gaps[slot] : ((const uint16_t *)gaps)[slot];
            /* "A filler skips F columns, an entry its gap and its own." */
            column += gap;
            if (!t->codes) {
                uint32_t raw = load(t->values, t->dtype, (size_t)slot * TILE_ROWS + lane);
                wrong |= (bits_of(widen(raw, t->dtype)) & MAGNITUDE) >= INFINITE;
            }
            if (gap == t->filler) continue;
            if (column >= end || !exists) return BROKEN;
            float value = t->codes
                              ? (float)(2 * (int32_t)t->codes[lane * t->slots + (size_t)slot] - t->top) * half
                              : widen(load(t->values, t->dtype, (size_t)slot * TILE_ROWS + lane), t->dtype);
            t->out[lane * t->columns + column++] = value;
        }
    }
    return wrong ? BROKEN : DONE;
}

/* Writes the entries of one tile into its rows; whatever is wrong, the reference names it. */
static int sparse_tile(const struct sparse_tile *t) {
    for (size_t lane = 0; lane < TILE_ROWS; lane++)
        if (t->gap_bytes == 1 ? sparse_lane(t, lane, 1) : sparse_lane(t, lane, 2)) return BROKEN;
    return DONE;
}

INLINE int lane_within(const void *gaps, size_t gap_bytes, const int64_t *starts, const int64_t *widths, size_t blocks,
                       uint32_t filler) {
    int wrong = 0;
    for (size_t block = 0; block < blocks; block++) {
        uint64_t column = 0, width = (uint64_t)widths[block];
        for (int64_t slot = starts[block]; slot < starts[block + 1]; slot++) {
            uint32_t gap = gap_bytes == 1 ? ((const uint8_t *)gaps)[slot] : ((const uint16_t *)gaps)[slot];
            int is_entry = gap != filler;
            column += gap;
            wrong |= is_entry & (column >= width);
            column += (uint64_t)is_entry;
        }
    }
    return !wrong;
}

/* Tells whether every entry of some blocks lies in its block. gaps: (32, slots); starts: (blocks + 1,). */
static int sparse_within(const void *gaps, size_t gap_bytes, size_t slots, const int64_t *starts, const int64_t *widths,
                         size_t blocks, uint32_t filler) {
    for (size_t lane = 0; lane < TILE_ROWS; lane++) {
        const uint8_t *of_lane = (const uint8_t *)gaps + lane * slots * gap_bytes;
        if (!(gap_bytes == 1 ? lane_within(of_lane, 1, starts, widths, blocks, filler)
                             : lane_within(of_lane, 2, starts, widths, blocks, filler)))
            return 0;
    }
    return 1;
}
