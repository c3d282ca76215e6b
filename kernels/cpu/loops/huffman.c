/* Frames of zstd for planes of bytes (RFC 8878, section 3.1.1): Huffman codes, and no matches but runs of zeros.
 * Reference: deltafmt/exact/plane_frames.py.
 *
 * Bytes are coded from the last one to the first one, as the format has it. */

enum {
    HUFFMAN_BITS = 11, HUFFMAN_BLOCK = 1 << 17, WEIGHT_LOG = 6, STATE_LOG = 9, STATE_KINDS = 64, LITERAL_CODES = 36, MATCH_CODES = 53, LITERALS_HEAD = 5,
    /* Shorter runs of zeros are literals. */
    RUN_LEAST = 12, RUNS_PAY = 256, RUNS_MOST = HUFFMAN_BLOCK / RUN_LEAST + 1,
    /* A tree of so many weights or fewer is written as it is; 4 bits a weight. */
    DIRECT_WEIGHTS = 128,
    BLOCK_RAW = 0, BLOCK_RLE = 1, BLOCK_COMPRESSED = 2, LITERALS_TREE = 2, LITERALS_SAME_TREE = 3,
    /* Fewer bytes are not worth a tree. */
    HUFFMAN_LEAST = 64,
};

struct tree {
    uint16_t code[256];
    uint8_t bits[256];
    uint8_t description[DIRECT_WEIGHTS + 2];
    size_t length; /* bytes of the description; 0 if there is no tree */
};

/* Bits in the order of their writing, the lowest ones first. */
struct bits {
    uint8_t *at;
    uint64_t held;
    int count;
};

INLINE void put_bits(struct bits *b, uint64_t value, int count) {
    b->held |= value << b->count;
    b->count += count;
    while (b->count >= 8) {
        *b->at++ = (uint8_t)b->held;
        b->held >>= 8;
        b->count -= 8;
    }
}

INLINE uint8_t *end_bits(struct bits *b) {
    if (b->count) *b->at++ = (uint8_t)b->held;
    return b->at;
}

INLINE int log2_of(uint32_t value) { return 31 - __builtin_clz(value); }

/* Counts bytes. Equal neighbours would wait for each other in one table. */
static void count_bytes(const uint8_t *restrict data, size_t count, uint32_t *restrict counts) {
    uint32_t tables[4][256];
    size_t i = 0;
    memset(tables, 0, sizeof tables);
    for (; i + 8 <= count; i += 8) {
        uint64_t word;
        memcpy(&word, data + i, sizeof word);
        for (int byte = 0; byte < 8; byte++) tables[byte % 4][(uint8_t)(word >> 8 * byte)]++;
    }
    for (; i < count; i++) tables[0][data[i]]++;
    for (int s = 0; s < 256; s++) counts[s] = tables[0][s] + tables[1][s] + tables[2][s] + tables[3][s];
}

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

/* Sorts numbers, at most 256: runs of one, two, four are merged by turns into another array. */
static void sort_numbers(uint64_t *restrict numbers, int count) {
    uint64_t other[256];
    for (int run = 1; run < count; run *= 2) {
        for (int first = 0; first < count; first += 2 * run) {
            int middle = first + run < count ? first + run : count, end = middle + run < count ? middle + run : count;
            int left = first, right = middle;
            for (int at = first; at < end; at++) {
                int is_left = right == end || (left < middle && numbers[left] < numbers[right]);
                other[at] = numbers[is_left ? left : right];
                left += is_left, right += !is_left;
            }
        }
        memcpy(numbers, other, (size_t)count * sizeof *numbers);
    }
}

/* Gives the length of each byte's code, at most HUFFMAN_BITS; returns the longest one. At least two bytes occur. */
static int code_lengths(const uint32_t *restrict counts, uint8_t *restrict bits) {
    uint64_t order[256], weight[512];
    uint16_t parent[512];
    uint8_t depth[512];
    int leaves = 0;
    for (int s = 0; s < 256; s++) {
        bits[s] = 0;
        if (counts[s]) order[leaves++] = (uint64_t)counts[s] << 8 | (uint64_t)s;
    }
    sort_numbers(order, leaves);
    /* Nodes come into being in ascending order, so that two queues are a heap. */
    int leaf = 0, node = leaves, next = leaves;
    for (int i = 0; i < leaves; i++) weight[i] = order[i] >> 8;
    for (; next < 2 * leaves - 1; next++) {
        weight[next] = 0;
        for (int child = 0; child < 2; child++) {
            int least = node >= next || (leaf < leaves && weight[leaf] <= weight[node]) ? leaf++ : node++;
            weight[next] += weight[least];
            parent[least] = (uint16_t)next;
        }
    }
    depth[next - 1] = 0;
    for (int i = next - 2; i >= 0; i--) depth[i] = (uint8_t)(depth[parent[i]] + 1);
    /* Lengths are cut, and others grow until all codes fit; what room is left goes to the most frequent. */
    int room = 1 << HUFFMAN_BITS, longest = 0;
    for (int i = 0; i < leaves; i++) {
        if (depth[i] > HUFFMAN_BITS) depth[i] = HUFFMAN_BITS;
        room -= 1 << (HUFFMAN_BITS - depth[i]);
    }
    while (room < 0) {
        int chosen = -1;
        for (int i = 0; i < leaves; i++)
            if (depth[i] < HUFFMAN_BITS && (chosen < 0 || depth[i] > depth[chosen])) chosen = i;
        depth[chosen]++;
        room += 1 << (HUFFMAN_BITS - depth[chosen]);
    }
    for (int i = leaves - 1; room && i >= 0; i--)
        while (room >= 1 << (HUFFMAN_BITS - depth[i])) {
            room -= 1 << (HUFFMAN_BITS - depth[i]);
            depth[i]--;
        }
    for (int i = 0; i < leaves; i++) {
        bits[order[i] & 255] = depth[i];
        if (depth[i] > longest) longest = depth[i];
    }
    return longest;
}

/* A finite-state-entropy code of small numbers (RFC 8878, section 4.1). */
struct states {
    int log, kinds;
    uint32_t shares[STATE_KINDS];
    /* The lowest bits of a state that are written before a number are (state + more) >> 16, and the state behind it is
     * next[(state >> bits) + firsts]. */
    uint32_t more[STATE_KINDS];
    int32_t firsts[STATE_KINDS];
    uint16_t next[1 << STATE_LOG];
};

/* Makes a code for numbers that occur so often, of which there are at least two, with 2^log states. */
static void make_states(const uint32_t *restrict counts, int kinds, uint64_t total, int log, struct states *restrict code) {
    uint8_t spread[1 << STATE_LOG];
    uint32_t starts[STATE_KINDS], size = 1u << log, place = 0, first = 0;
    int left = (int)size;
    code->log = log;
    code->kinds = 0;
    for (int k = 0; k < kinds; k++) {
        uint32_t share = (uint32_t)((uint64_t)counts[k] << log) / (uint32_t)total;
        code->shares[k] = counts[k] && !share ? 1 : share;
        left -= (int)code->shares[k];
        if (counts[k]) code->kinds = k + 1;
    }
    for (; left; left += left < 0 ? 1 : -left) {
        int most = 0;
        for (int k = 0; k < code->kinds; k++)
            if (code->shares[k] > code->shares[most]) most = k;
        code->shares[most] += (uint32_t)(left < 0 ? -1 : left);
    }
    for (int k = 0; k < code->kinds; k++) {
        uint32_t share = code->shares[k];
        /* A state has `most` bits written if it is 2^most shares or more, otherwise one less. */
        uint32_t most = (uint32_t)log - (share > 1 ? (uint32_t)log2_of(share - 1) : 0);
        code->more[k] = share ? (most << 16) - (share << most) : 0;
        code->firsts[k] = (int32_t)first - (int32_t)share;
        starts[k] = first;
        first += share;
        for (uint32_t i = 0; i < share; i++) {
            spread[place] = (uint8_t)k;
            place = (place + (size >> 1) + (size >> 3) + 3) % size;
        }
    }
    for (uint32_t i = 0; i < size; i++) code->next[starts[spread[i]]++] = (uint16_t)(size + i);
}

/* Writes the shares of a code; returns their end. */
static uint8_t *put_shares(const struct states *code, uint8_t *out) {
    struct bits b = {out, 0, 0};
    int remaining = (1 << code->log) + 1, threshold = 1 << code->log, width = code->log + 1;
    put_bits(&b, (uint64_t)(code->log - 5), 4);
    for (int k = 0; k < code->kinds; k++) {
        int value = (int)code->shares[k] + 1, top = 2 * threshold - 1 - remaining, zeros = 0;
        remaining -= (int)code->shares[k];
        if (value >= threshold) value += top;
        put_bits(&b, (uint64_t)value, width - (value < top));
        while (remaining < threshold) threshold >>= 1, width--;
        if (code->shares[k]) continue;
        /* How many more zeros follow: 3 means that a number follows again. */
        while (!code->shares[k + 1 + zeros]) zeros++;
        k += zeros;
        for (; zeros >= 3; zeros -= 3) put_bits(&b, 3, 2);
        put_bits(&b, (uint64_t)zeros, 2);
    }
    return end_bits(&b);
}

/* Gives the state behind a number, and returns how many of the lowest bits of the state before are written. The first
 * state of a number, 2^log, needs none. */
INLINE uint32_t next_state(const struct states *code, uint32_t *state, uint32_t number) {
    uint32_t bits = *state ? (*state + code->more[number]) >> 16 : 0;
    *state = code->next[*state ? (int32_t)(*state >> bits) + code->firsts[number]
                               : (int32_t)code->shares[number] + code->firsts[number]];
    return bits;
}

/* Writes the weights of a tree as a code of two states (RFC 8878, section 4.2.1.2); returns the bytes, 0 if all are equal. */
static size_t code_weights(const uint8_t *restrict weights, size_t count, uint8_t *restrict out) {
    uint32_t counts[HUFFMAN_BITS + 1] = {0}, states[2] = {0, 0};
    struct states code;
    for (size_t i = 0; i < count; i++) counts[weights[i]]++;
    if (counts[weights[0]] == count) return 0;
    make_states(counts, HUFFMAN_BITS + 1, count, WEIGHT_LOG, &code);
    struct bits b = {put_shares(&code, out), 0, 0};
    for (size_t i = count; i-- > 0;) {
        uint32_t before = states[i % 2], bits = next_state(&code, &states[i % 2], weights[i]);
        put_bits(&b, before & ((1u << bits) - 1), (int)bits);
    }
    put_bits(&b, states[1] - (1 << WEIGHT_LOG), WEIGHT_LOG);
    put_bits(&b, states[0] - (1 << WEIGHT_LOG), WEIGHT_LOG);
    put_bits(&b, 1, 1);
    return (size_t)(end_bits(&b) - out);
}

/* Makes the tree of some counts; returns the bits that all bytes take, or 0 if there is no tree. */
static uint64_t make_tree(const uint32_t *restrict counts, struct tree *restrict tree) {
    uint8_t weights[256];
    uint32_t next[HUFFMAN_BITS + 2] = {0};
    uint64_t total = 0;
    int longest = code_lengths(counts, tree->bits), last = 0;
    tree->length = 0;
    for (int s = 0; s < 256; s++) {
        weights[s] = tree->bits[s] ? (uint8_t)(longest + 1 - tree->bits[s]) : 0;
        if (tree->bits[s]) last = s, next[tree->bits[s]]++;
        total += (uint64_t)counts[s] * tree->bits[s];
    }
    /* The longest codes are the lowest; those of one length ascend with their bytes. */
    for (uint32_t bits = (uint32_t)longest, low = 0; bits; bits--) {
        uint32_t number = next[bits];
        next[bits] = low;
        low = (low + number) >> 1;
    }
    for (int s = 0; s < 256; s++)
        if (tree->bits[s]) tree->code[s] = (uint16_t)next[tree->bits[s]]++;
    if (last <= DIRECT_WEIGHTS) {
        tree->description[0] = (uint8_t)(127 + last);
        for (int s = 0; s < last; s += 2)
            tree->description[1 + s / 2] = (uint8_t)(weights[s] << 4 | (s + 1 < last ? weights[s + 1] : 0));
        tree->length = 1 + ((size_t)last + 1) / 2;
        return total;
    }
    uint8_t coded[512];
    size_t length = code_weights(weights, (size_t)last, coded);
    if (!length || length >= 128) return 0;
    tree->description[0] = (uint8_t)length;
    memcpy(tree->description + 1, coded, length);
    tree->length = 1 + length;
    return total;
}

/* A stream of codes that is being written. Bits are held at the upper end of a word, the last ones uppermost. A code
 * stands there in its entry, too, and its length in the entry's lowest byte: that byte falls out of the word before the
 * bits reach it. */
struct stream {
    uint64_t held, fill;
    uint8_t *out;
};

INLINE void put_code(struct stream *s, uint64_t code) {
    s->held = s->held >> (code & 63) | code;
    s->fill += code;
}

/* Writes up to 8 bytes behind those that are full. */
INLINE void put_full(struct stream *s) {
    uint64_t count = s->fill & 63, low = count ? s->held >> (64 - count) : 0;
    memcpy(s->out, &low, sizeof low);
    s->out += count >> 3;
    s->fill = count & 7;
}

INLINE uint8_t *end_stream(struct stream *s) {
    put_full(s);
    *s->out = (uint8_t)((s->fill ? s->held >> (64 - s->fill) : 0) | (uint64_t)1 << s->fill);
    return s->out + 1;
}

/* Writes two streams of codes side by side, because a code waits for the one before it; each begins with its last byte.
 * The second one has as many bytes, or up to 3 fewer. */
static void put_streams(const uint8_t *restrict first, const uint8_t *restrict second, size_t count, size_t fewer,
                        const uint64_t *restrict codes, uint8_t *ends[2]) {
    struct stream a = {0, 0, ends[0]}, b = {0, 0, ends[1]};
    size_t i = count - fewer;
    for (size_t k = count; k > i; k--) put_code(&a, codes[first[k - 1]]);
    put_full(&a);
    for (; i % 4; i--) {
        put_code(&a, codes[first[i - 1]]);
        put_code(&b, codes[second[i - 1]]);
    }
    put_full(&a);
    put_full(&b);
    /* Four codes and what is left of the last byte: 51 bits at most. */
    for (; i; i -= 4) {
        put_code(&a, codes[first[i - 1]]);
        put_code(&b, codes[second[i - 1]]);
        put_code(&a, codes[first[i - 2]]);
        put_code(&b, codes[second[i - 2]]);
        put_code(&a, codes[first[i - 3]]);
        put_code(&b, codes[second[i - 3]]);
        put_code(&a, codes[first[i - 4]]);
        put_code(&b, codes[second[i - 4]]);
        put_full(&a);
        put_full(&b);
    }
    ends[0] = end_stream(&a);
    ends[1] = end_stream(&b);
}

INLINE uint8_t *put_number(uint8_t *out, uint64_t value, int bytes) {
    for (int i = 0; i < bytes; i++) *out++ = (uint8_t)(value >> 8 * i);
    return out;
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
    uint8_t literals[HUFFMAN_BLOCK + 16];
    uint8_t stream[HUFFMAN_BLOCK / 4 * 3 / 2];
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

/* Writes a block in which runs of zeros are matches; returns its end. */
static uint8_t *put_runs(struct frame *frame, const uint8_t *data, size_t count, uint8_t *out) {
    uint32_t counts[256];
    size_t kept, found = find_runs(data, count, frame->sequences, frame->literals, &kept);
    count_bytes(frame->literals, kept, counts);
    int is_one = counts[frame->literals[0]] == kept;
    uint8_t *at = is_one ? NULL : put_literals(frame, frame->literals, kept, counts, out);
    if (!at) {
        size_t stored = is_one ? 1 : kept;
        at = put_number(out, (uint64_t)is_one | 3 << 2 | (uint64_t)kept << 4, 3);
        memcpy(at, frame->literals, stored);
        at += stored;
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
        end = counts[data[0]] == count ? NULL : put_literals(frame, data, count, counts, out + 3);
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
static size_t huffman_frame(const uint8_t *data, const uint64_t *ends, size_t segments, uint8_t *out, void *scratch) {
    struct frame *frame = scratch;
    size_t from = 0, count = ends[segments - 1];
    frame->last = -1;
    uint8_t *at = put_number(out, 0xFD2FB528u, 4);
    *at++ = 2 << 6 | 1 << 5; /* 4 bytes of content size, a single segment */
    at = put_number(at, count, 4);
    for (size_t segment = 0; segment < segments; segment++)
        while (from < ends[segment]) {
            size_t run = ends[segment] - from < HUFFMAN_BLOCK ? ends[segment] - from : HUFFMAN_BLOCK;
            at = put_block(frame, data + from, run, from + run == count, at);
            from += run;
        }
    return (size_t)(at - out);
}
