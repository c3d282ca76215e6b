/* Huffman codes as zstd has them (RFC 8878, section 4.2): the tree of a block, and the streams of its codes.
 * Reference: deltafmt/exact/plane_frames.py. */

enum {
    HUFFMAN_BITS = 11,
    WEIGHT_LOG = 6,
    /* So many weights or fewer are written as they are: 4 bits each. */
    DIRECT_WEIGHTS = 128,
};

struct tree {
    uint16_t code[256];
    uint8_t bits[256];
    uint8_t description[DIRECT_WEIGHTS + 2];
    size_t length; /* bytes of the description; 0 if there is no tree */
};

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
    if (leaves < 2) return 0; /* callers see to it; compilers cannot */
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
