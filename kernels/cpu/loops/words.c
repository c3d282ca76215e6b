/* Packed words: fields in planes of 32-bit words, word-major in tiles of 32 rows (specification, section 11.2).
 * Reference: deltafmt/terms/words.py.
 *
 * A row's words are made next to each other and then written into its lane, 32 words apart. With share v, row r stands in
 * tile r / (32 v) * v + r % v, lane r % (32 v) / v; with share 0, rows are not tiled: row r has the words of line r. */

/* Writes the widths of a stream's planes, lowest bits first; returns how many there are. */
INLINE int planes_of(int width, int planes[MAX_PLANES]) {
    int count = 0;
    while (width) {
        int plane = 1;
        while (plane * 2 <= width && plane < WORD_BITS) plane *= 2;
        planes[count++] = plane;
        width -= plane;
    }
    return count;
}

INLINE size_t plane_words(size_t count, int plane) { return (count * (size_t)plane + WORD_BITS - 1) / WORD_BITS; }

INLINE size_t stream_words(size_t count, int width) {
    int planes[MAX_PLANES], number = planes_of(width, planes);
    size_t words = 0;
    for (int i = 0; i < number; i++) words += plane_words(count, planes[i]);
    return words;
}

/* Brings eight fields, one in each byte, together into 8 * width bits. */
INLINE uint64_t squeeze(uint64_t x, int width) {
    int gap = 8 - width;
    uint64_t low = ((1ull << width) - 1) * 0x0001000100010001ull;
    x = (x & low) | (x >> gap & low << width);
    low = ((1ull << 2 * width) - 1) * 0x0000000100000001ull;
    x = (x & low) | (x >> 2 * gap & low << 2 * width);
    low = (1ull << 4 * width) - 1;
    return (x & low) | (x >> 4 * gap & low << 4 * width);
}

/* Undoes squeeze. */
INLINE uint64_t spread(uint64_t x, int width) {
    int gap = 8 - width;
    uint64_t low = (1ull << 4 * width) - 1;
    x = (x & low) | (x & low << 4 * width) << 4 * gap;
    low = ((1ull << 2 * width) - 1) * 0x0000000100000001ull;
    x = (x & low) | (x & low << 2 * width) << 2 * gap;
    low = ((1ull << width) - 1) * 0x0001000100010001ull;
    return (x & low) | (x & low << width) << gap;
}

INLINE uint64_t eight(const uint8_t *fields) {
    uint64_t x;
    memcpy(&x, fields, sizeof x);
    return x;
}

/* Packs one plane of fields of a byte; behind the last field stand zeros up to a multiple of 32 fields. */
INLINE void pack_plane(const uint8_t *restrict fields, int low, int width, size_t words, uint32_t *restrict out) {
    uint64_t mask = ((1ull << width) - 1) * 0x0101010101010101ull;
    if (width == 8) {
        memcpy(out, fields, words * 4);
        return;
    }
    for (size_t w = 0; w < words; w++) {
        uint64_t word = 0;
        for (int part = 0; part < 4 / width; part++)
            word |= squeeze(eight(fields + (w * (size_t)(4 / width) + (size_t)part) * 8) >> low & mask, width)
                    << part * 8 * width;
        out[w] = (uint32_t)word;
    }
}

/* Undoes pack_plane: sets the fields, or adds the bits of a further plane. Writes whole words' fields. */
INLINE void unpack_plane(const uint32_t *restrict packed, int low, int width, size_t words, uint8_t *restrict fields) {
    if (width == 8) {
        memcpy(fields, packed, words * 4);
        return;
    }
    for (size_t w = 0; w < words; w++)
        for (int part = 0; part < 4 / width; part++) {
            uint8_t *at = fields + (w * (size_t)(4 / width) + (size_t)part) * 8;
            uint64_t bits = (uint64_t)(packed[w] >> part * 8 * width) & ((1ull << 8 * width) - 1);
            uint64_t x = spread(bits, width) << low;
            if (low) x |= eight(at);
            memcpy(at, &x, sizeof x);
        }
}

#define FOR_PLANE(width, CALL)    \
    switch (width) {              \
    case 1: CALL(1); break;       \
    case 2: CALL(2); break;       \
    case 4: CALL(4); break;       \
    default: CALL(8);             \
    }

/* Packs a row of fields of one byte, of at most 8 bits, behind which stand zeros up to a multiple of 32 fields. */
static void pack_row(const uint8_t *fields, size_t count, int width, uint32_t *out) {
    int planes[MAX_PLANES], number = planes_of(width, planes), low = 0;
    for (int i = 0; i < number; low += planes[i++]) {
        size_t words = plane_words(count, planes[i]);
#define CALL(WIDTH) pack_plane(fields, low, WIDTH, words, out)
        FOR_PLANE(planes[i], CALL)
#undef CALL
        out += words;
    }
}

/* Undoes pack_row; writes up to 31 fields too many. */
static void unpack_row(const uint32_t *packed, size_t count, int width, uint8_t *fields) {
    int planes[MAX_PLANES], number = planes_of(width, planes), low = 0;
    for (int i = 0; i < number; low += planes[i++]) {
        size_t words = plane_words(count, planes[i]);
#define CALL(WIDTH) unpack_plane(packed, low, WIDTH, words, fields)
        FOR_PLANE(planes[i], CALL)
#undef CALL
        packed += words;
    }
}

INLINE uint64_t field_at(const void *fields, size_t bytes, size_t i) {
    if (bytes == 1) return ((const uint8_t *)fields)[i];
    if (bytes == 2) return ((const uint16_t *)fields)[i];
    return ((const uint64_t *)fields)[i];
}

/* The same for fields of 1, 2 or 8 bytes and up to 64 bits. */
INLINE void pack_wide_of(const void *fields, size_t bytes, size_t count, int width, uint32_t *out) {
    int planes[MAX_PLANES], number = planes_of(width, planes), low = 0;
    for (int i = 0; i < number; low += planes[i++]) {
        size_t words = plane_words(count, planes[i]), field = 0;
        uint64_t mask = (1ull << planes[i]) - 1;
        for (size_t w = 0; w < words; w++) {
            uint64_t word = 0;
            for (int at = 0; at < WORD_BITS && field < count; at += planes[i])
                word |= (field_at(fields, bytes, field++) >> low & mask) << at;
            *out++ = (uint32_t)word;
        }
    }
}

static void pack_wide(const void *fields, size_t bytes, size_t count, int width, uint32_t *out) {
    if (bytes == 1)
        pack_wide_of(fields, 1, count, width, out);
    else if (bytes == 2)
        pack_wide_of(fields, 2, count, width, out);
    else
        pack_wide_of(fields, 8, count, width, out);
}

INLINE void unpack_wide_of(const uint32_t *packed, size_t count, int width, void *fields, size_t bytes) {
    int planes[MAX_PLANES], number = planes_of(width, planes), low = 0;
    memset(fields, 0, count * bytes);
    for (int i = 0; i < number; low += planes[i++]) {
        size_t words = plane_words(count, planes[i]), field = 0;
        uint64_t mask = (1ull << planes[i]) - 1;
        for (size_t w = 0; w < words; w++)
            for (int at = 0; at < WORD_BITS && field < count; at += planes[i], field++) {
                uint64_t bits = (packed[w] >> at & mask) << low;
                if (bytes == 1)
                    ((uint8_t *)fields)[field] |= (uint8_t)bits;
                else if (bytes == 2)
                    ((uint16_t *)fields)[field] |= (uint16_t)bits;
                else
                    ((uint64_t *)fields)[field] |= bits;
            }
        packed += words;
    }
}

static void unpack_wide(const uint32_t *packed, size_t count, int width, void *fields, size_t bytes) {
    if (bytes == 1)
        unpack_wide_of(packed, count, width, fields, 1);
    else if (bytes == 2)
        unpack_wide_of(packed, count, width, fields, 2);
    else
        unpack_wide_of(packed, count, width, fields, 8);
}

/* Returns where the words of a row begin, and in `stride` how far they are apart. */
INLINE size_t line_of(size_t row, size_t words, size_t share, size_t *stride) {
    *stride = share ? TILE_ROWS : 1;
    if (!share) return row * words;
    size_t super = TILE_ROWS * share;
    return (row / super * share + row % share) * words * TILE_ROWS + row % super / share;
}

static void put_line(const uint32_t *restrict line, size_t words, uint32_t *restrict out, size_t stride) {
    for (size_t w = 0; w < words; w++) out[w * stride] = line[w];
}

static void take_line(const uint32_t *restrict packed, size_t stride, size_t words, uint32_t *restrict line) {
    for (size_t w = 0; w < words; w++) line[w] = packed[w * stride];
}

INLINE size_t padded_32(size_t count) { return (count + 31) / 32 * 32; }

/* scratch: stream_words * 4 bytes, then padded_32(count) bytes. */
static void pack_words(const void *fields, size_t bytes, size_t rows, size_t count, int width, size_t share,
                       uint32_t *out, void *scratch) {
    size_t words = stream_words(count, width), stride;
    uint32_t *line = scratch;
    uint8_t *padded = (uint8_t *)(line + words);
    memset(padded, 0, padded_32(count));
    for (size_t r = 0; r < rows; r++) {
        const uint8_t *row = (const uint8_t *)fields + r * count * bytes;
        if (bytes == 1 && width <= 8) {
            memcpy(padded, row, count);
            pack_row(padded, count, width, line);
        } else {
            pack_wide(row, bytes, count, width, line);
        }
        uint32_t *at = out + line_of(r, words, share, &stride);
        put_line(line, words, at, stride);
    }
    if (!share) return;
    /* "Super-tiles are complete. Words of rows that do not exist are zero." */
    size_t super = TILE_ROWS * share;
    for (size_t r = rows; r < (rows + super - 1) / super * super; r++) {
        uint32_t *at = out + line_of(r, words, share, &stride);
        for (size_t w = 0; w < words; w++) at[w * stride] = 0;
    }
}

/* Unpacks fields `first` (a multiple of 32) to `last` of rows of `count`; scratch as of pack_words for last - first. */
static void unpack_words(const uint32_t *packed, size_t rows, size_t count, size_t first, size_t last, int width,
                         size_t share, void *out, size_t bytes, void *scratch) {
    int planes[MAX_PLANES], number = planes_of(width, planes);
    size_t all = stream_words(count, width), part = last - first, stride;
    uint32_t *line = scratch;
    uint8_t *padded = (uint8_t *)(line + stream_words(part, width));
    for (size_t r = 0; r < rows; r++) {
        const uint32_t *at = packed + line_of(r, all, share, &stride);
        uint32_t *next = line;
        for (int i = 0; i < number; i++) {
            /* 32 fields are whole words in every plane. */
            size_t words = plane_words(part, planes[i]), skipped = first / 32 * (size_t)planes[i];
            take_line(at + skipped * stride, stride, words, next);
            next += words;
            at += plane_words(count, planes[i]) * stride;
        }
        uint8_t *row = (uint8_t *)out + r * part * bytes;
        if (bytes == 1 && width <= 8) {
            unpack_row(line, part, width, padded);
            memcpy(row, padded, part);
        } else {
            unpack_wide(line, part, width, row, bytes);
        }
    }
}
