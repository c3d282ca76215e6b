/* Fields of bits, and finite-state-entropy codes of small numbers (RFC 8878, section 4.1).
 * Reference: deltafmt/exact/states.py. */

enum { STATE_LOG = 9, STATE_KINDS = 64 };

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

INLINE uint8_t *put_number(uint8_t *out, uint64_t value, int bytes) {
    for (int i = 0; i < bytes; i++) *out++ = (uint8_t)(value >> 8 * i);
    return out;
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
