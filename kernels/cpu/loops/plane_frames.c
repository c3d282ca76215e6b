/* Frames of zstd for planes of bytes (RFC 8878, section 3.1.1): Huffman codes, and no matches but runs of zeros.
 * Reference: deltafmt/exact/plane_frames.py. */

enum {
    FRAME_BLOCK = 1 << 17,
    LITERAL_CODES = 36,
    MATCH_CODES = 53,
    /* Kinds of blocks and of literals, and the bytes of the head of literals with a tree. */
    BLOCK_RAW = 0,
    BLOCK_RLE = 1,
    BLOCK_COMPRESSED = 2,
    LITERALS_STORED = 0,
    LITERALS_TREE = 2,
    LITERALS_SAME_TREE = 3,
    LITERALS_HEAD = 5,
    /* Fewer bytes are not worth a tree. */
    HUFFMAN_LEAST = 64,
    /* Shorter runs of zeros are literals. Runs are looked for where one of so many bytes begins eight zeros. */
    RUN_LEAST = 12,
    RUNS_PAY = 256,
    RUNS_MOST = FRAME_BLOCK / RUN_LEAST + 1,
};

/* Counts words of 8 zeros. */
static size_t count_zeros(const uint8_t *restrict data, size_t count) {
    size_t zeros = 0;
    for (size_t i = 0; i < count / 8; i++) {
        uint64_t word;
        memcpy(&word, data + 8 * i, sizeof word);
        zeros += !word;
    }
    return zeros;
}

INLINE uint8_t *put_head(uint8_t *out, int last, int kind, size_t size) {
    return put_number(out, (uint64_t)last | (uint64_t)kind << 1 | (uint64_t)size << 3, 3);
}

/* Literals, and a match of the byte before them: the codes of their lengths, and the lengths whose lowest bits follow. */
struct sequence {
    uint32_t literals, match;
    uint8_t codes[2];
};

/* The codes of lengths of literals below 64, and of matches, less 3, below 128 (RFC 8878, section 3.1.1.3.2.1.1). */
static const uint8_t literal_codes[64] = {
    0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15, 16, 16, 17, 17, 18, 18, 19, 19, 20, 20, 20, 20, 21, 21, 21, 21,
    22, 22, 22, 22, 22, 22, 22, 22, 23, 23, 23, 23, 23, 23, 23, 23, 24, 24, 24, 24, 24, 24, 24, 24, 24, 24, 24, 24, 24, 24, 24, 24,
};
static const uint8_t match_codes[128] = {
    0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31,
    32, 32, 33, 33, 34, 34, 35, 35, 36, 36, 36, 36, 37, 37, 37, 37, 38, 38, 38, 38, 38, 38, 38, 38, 39, 39, 39, 39, 39, 39, 39, 39,
    40, 40, 40, 40, 40, 40, 40, 40, 40, 40, 40, 40, 40, 40, 40, 40, 41, 41, 41, 41, 41, 41, 41, 41, 41, 41, 41, 41, 41, 41, 41, 41,
    42, 42, 42, 42, 42, 42, 42, 42, 42, 42, 42, 42, 42, 42, 42, 42, 42, 42, 42, 42, 42, 42, 42, 42, 42, 42, 42, 42, 42, 42, 42, 42,
};
/* How many of the lowest bits of a length follow its code. */
static const uint8_t literal_bits[LITERAL_CODES] = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,  1,  1,
                                                    1, 1, 2, 2, 3, 3, 4, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16};
static const uint8_t match_bits[MATCH_CODES] = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
                                                0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1,
                                                2, 2, 3, 3, 4, 4, 5, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16};

INLINE uint8_t literal_code(uint32_t length) {
    return length < 64 ? literal_codes[length] : (uint8_t)(log2_of(length) + 19);
}
INLINE uint8_t match_code(uint32_t length) {
    return length < 128 ? match_codes[length] : (uint8_t)(log2_of(length) + 36);
}

/* Finds runs of zeros. All but the first zero of a run are a match; all other bytes are literals. Returns how many runs.
 * Writes up to 16 bytes behind the literals. */
static size_t find_runs(const uint8_t *restrict data, size_t count, struct sequence *restrict sequences,
                        uint8_t *restrict literals, size_t *literal_count) {
    const uint64_t low = 0x7F7F7F7F7F7F7F7Full;
    size_t found = 0, kept = 0, from = 0, end = 0, first = 0;
#define ENDS_AT(PLACE)                                                                                              \
    do {                                                                                                            \
        size_t place_ = (PLACE);                                                                                    \
        if (place_ - end >= RUN_LEAST) {                                                                            \
            size_t length_ = end + 1 - from;                                                                        \
            uint32_t match_ = (uint32_t)(place_ - end) - 4;                                                         \
            if (length_ <= 16 && from + 16 <= count)                                                                \
                memcpy(literals + kept, data + from, 16);                                                           \
            else                                                                                                    \
                memcpy(literals + kept, data + from, length_);                                                      \
            kept += length_;                                                                                        \
            sequences[found++] = (struct sequence){                                                                 \
                (uint32_t)length_, match_, {literal_code((uint32_t)length_), match_code(match_)}};                  \
            from = place_;                                                                                          \
        }                                                                                                           \
        end = place_ + 1;                                                                                           \
    } while (0)
    for (; first + 64 <= count; first += 64) {
        /* A bit for each byte that is not zero. */
        uint64_t words[8], set = 0;
        memcpy(words, data + first, sizeof words);
        for (int w = 0; w < 8; w++) {
            uint64_t top = (((words[w] & low) + low) | words[w]) & ~low;
            set |= (top >> 7) * 0x0102040810204080ull >> 56 << 8 * w;
        }
        for (; set; set &= set - 1) ENDS_AT(first + (size_t)__builtin_ctzll(set));
    }
    for (; first < count; first++)
        if (data[first]) ENDS_AT(first);
    ENDS_AT(count);
#undef ENDS_AT
    memcpy(literals + kept, data + from, count - from);
    *literal_count = kept + count - from;
    return found;
}

/* Writes sequences; returns their end. Writes up to 8 bytes behind it. */
static uint8_t *put_sequences(const struct sequence *restrict sequences, size_t count, uint8_t *restrict out) {
    uint32_t counts[2][STATE_KINDS] = {{0}}, state[2] = {0, 0};
    struct states codes[2];
    int is_one[2];
    if (count < 128) {
        *out++ = (uint8_t)count;
    } else {
        *out++ = (uint8_t)(128 + (count >> 8));
        *out++ = (uint8_t)count;
    }
    if (!count) return out;
    for (size_t i = 0; i < count; i++) {
        counts[0][sequences[i].codes[0]]++;
        counts[1][sequences[i].codes[1]]++;
    }
    uint8_t *modes = out++;
    *modes = 1 << 4; /* one offset: the one before, which is a byte */
    for (int table = 0; table < 2; table++) {
        uint8_t first = sequences[0].codes[table];
        is_one[table] = counts[table][first] == count;
        *modes = (uint8_t)(*modes | (is_one[table] ? 1 : 2) << (table ? 2 : 6));
        if (is_one[table]) {
            *out++ = first;
        } else {
            make_states(counts[table], table ? MATCH_CODES : LITERAL_CODES, count, count < 256 ? 6 : 8, &codes[table]);
            out = put_shares(&codes[table], out);
        }
        if (!table) *out++ = 0;
    }
    uint64_t held = 0;
    uint32_t fill = 0;
#define PUT(VALUE, BITS)                                                         \
    do {                                                                         \
        uint32_t bits_ = (BITS);                                                 \
        held |= ((uint64_t)(VALUE) & (((uint64_t)1 << bits_) - 1)) << fill;      \
        fill += bits_;                                                           \
    } while (0)
    /* 9 bits of each state, 16 of each length, and 7 of what is left of a byte. */
    for (size_t i = count; i-- > 0;) {
        const struct sequence *one = &sequences[i];
        for (int table = 1; table >= 0; table--) {
            if (is_one[table]) continue;
            uint32_t before = state[table], bits = next_state(&codes[table], &state[table], one->codes[table]);
            PUT(before, bits);
        }
        PUT(one->literals, literal_bits[one->codes[0]]);
        PUT(one->match, match_bits[one->codes[1]]);
        memcpy(out, &held, sizeof held);
        out += fill >> 3;
        held >>= fill & ~7u;
        fill &= 7;
    }
    for (int table = 1; table >= 0; table--)
        if (!is_one[table]) PUT(state[table], (uint32_t)codes[table].log);
    PUT(1, 1);
#undef PUT
    memcpy(out, &held, sizeof held);
    return out + (fill + 7) / 8;
}

/* What a frame is written with: the tree that its blocks had last, and room. */
struct frame {
    struct tree trees[2];
    uint64_t codes[256]; /* of the last tree, as put_stream takes them */
    int last; /* which tree was last; -1 for none */
    struct sequence sequences[RUNS_MOST];
    uint8_t literals[FRAME_BLOCK + 16];
    uint8_t stream[FRAME_BLOCK / 4 * 3 / 2];
};

_Static_assert(sizeof(struct frame) <= FRAME_SCRATCH, "scratch memory holds a frame");

/* Returns the bits that some bytes take with the last tree; UINT64_MAX if it has not all of them. */
static uint64_t bits_with(const struct frame *frame, const uint32_t *restrict counts) {
    uint64_t total = 0;
    if (frame->last < 0) return UINT64_MAX;
    const uint8_t *bits = frame->trees[frame->last].bits;
    for (int s = 0; s < 256; s++) {
        if (counts[s] && !bits[s]) return UINT64_MAX;
        total += (uint64_t)counts[s] * bits[s];
    }
    return total;
}

/* Writes bytes of two kinds or more as literals, with a new tree or the last one; returns their end, NULL if no tree pays. */
static uint8_t *put_literals(struct frame *frame, const uint8_t *data, size_t count, const uint32_t *counts, uint8_t *out) {
    if (count < HUFFMAN_LEAST) return NULL;
    int other = frame->last == 0;
    struct tree *tree = &frame->trees[other];
    uint64_t with_new = make_tree(counts, tree), with_last = bits_with(frame, counts);
    uint64_t least = with_new ? with_new + 8 * tree->length : UINT64_MAX;
    int is_new = least < with_last;
    if ((is_new ? least : with_last) / 8 >= count - count / 64) return NULL;
    uint8_t *start = out + LITERALS_HEAD, *at = start, *jumps;
    size_t quarter = (count + 3) / 4;
    if (is_new) {
        memcpy(at, tree->description, tree->length);
        at += tree->length;
        frame->last = other;
        for (int s = 0; s < 256; s++) frame->codes[s] = tree->bits[s] ? (uint64_t)tree->code[s] << (64 - tree->bits[s]) | tree->bits[s] : 0;
    }
    jumps = at;
    at += 6;
    for (int stream = 0; stream < 4; stream += 2) {
        const uint8_t *from = data + (size_t)stream * quarter;
        uint8_t *ends[2] = {at, frame->stream};
        put_streams(from, from + quarter, quarter, stream ? 4 * quarter - count : 0, frame->codes, ends);
        size_t first = (size_t)(ends[0] - at), second = (size_t)(ends[1] - frame->stream);
        memcpy(ends[0], frame->stream, second);
        at = ends[0] + second;
        put_number(jumps + 2 * stream, first, 2);
        if (!stream) put_number(jumps + 2, second, 2);
    }
    uint64_t kind = is_new ? LITERALS_TREE : LITERALS_SAME_TREE;
    put_number(out, kind | 3 << 2 | (uint64_t)count << 4 | (uint64_t)(at - start) << 22, LITERALS_HEAD);
    return at;
}

/* Writes a block in which runs of zeros are matches; returns its end. Not all of its bytes are zeros, so that its literals
 * are bytes of two kinds or more. */
static uint8_t *put_runs(struct frame *frame, const uint8_t *data, size_t count, uint8_t *out) {
    uint32_t counts[256];
    size_t kept, found = find_runs(data, count, frame->sequences, frame->literals, &kept);
    count_bytes(frame->literals, kept, counts);
    uint8_t *at = put_literals(frame, frame->literals, kept, counts, out);
    if (!at) {
        at = put_number(out, LITERALS_STORED | 3 << 2 | (uint64_t)kept << 4, 3);
        memcpy(at, frame->literals, kept);
        at += kept;
    }
    return put_sequences(frame->sequences, found, at);
}

/* Writes one block; returns its end. */
static uint8_t *put_block(struct frame *frame, const uint8_t *data, size_t count, int is_last, uint8_t *out) {
    uint32_t counts[256];
    uint8_t *end = NULL;
    int last_before = frame->last;
    if (data[0] == data[count - 1] && !memcmp(data, data + 1, count - 1)) {
        out = put_head(out, is_last, BLOCK_RLE, count);
        *out++ = data[0];
        return out;
    }
    if (count_zeros(data, count) > count / RUNS_PAY) {
        end = put_runs(frame, data, count, out + 3);
    } else {
        count_bytes(data, count, counts);
        end = put_literals(frame, data, count, counts, out + 3);
        if (end) *end++ = 0; /* no sequences */
    }
    if (end && (size_t)(end - out) - 3 < count) {
        put_head(out, is_last, BLOCK_COMPRESSED, (size_t)(end - out) - 3);
        return end;
    }
    frame->last = end ? -1 : last_before;
    out = put_head(out, is_last, BLOCK_RAW, count);
    memcpy(out, data, count);
    return out + count;
}

/* ends: where blocks end, ascending; the last one is the end of the content. Returns the bytes of the frame. */
static size_t plane_frame(const uint8_t *data, const uint64_t *ends, size_t segments, uint8_t *out, void *scratch) {
    struct frame *frame = scratch;
    size_t from = 0, count = ends[segments - 1];
    frame->last = -1;
    uint8_t *at = put_number(out, 0xFD2FB528u, 4);
    *at++ = 2 << 6 | 1 << 5; /* 4 bytes of content size, a single segment */
    at = put_number(at, count, 4);
    for (size_t segment = 0; segment < segments; segment++)
        while (from < ends[segment]) {
            size_t run = ends[segment] - from < FRAME_BLOCK ? ends[segment] - from : FRAME_BLOCK;
            at = put_block(frame, data + from, run, from + run == count, at);
            from += run;
        }
    return (size_t)(at - out);
}
