/* A look at a plane of bytes: whether it may repeat. Reference: deltafmt/exact/repeats.py, which says what is looked at. */

enum {
    REPEATS_SHORT = 256,
    REPEATS_PAIRS = 256,
    REPEATS_EQUAL = 32, /* one of so many pairs */
    REPEATS_STEP = 128,
    REPEATS_WINDOW = 1 << 15,
    REPEATS_SAME = 256,
    REPEATS_SET = 4,
    REPEATS_SLOT_BITS = 12,
};

INLINE uint64_t word_at(const uint8_t *data, size_t place) {
    uint64_t word;
    memcpy(&word, data + place, sizeof word);
    return word;
}

static int repeats_near(const uint8_t *data, size_t count) {
    size_t words = count / 8, step = words / REPEATS_PAIRS, pairs = 0, equal = 0;
    step = (step < 2 ? 2 : step) | 1;
    for (size_t i = 0; i + 1 < words; i += step, pairs++) {
        uint64_t word = word_at(data, 8 * i);
        equal += word && word == word_at(data, 8 * i + 8);
    }
    return equal * REPEATS_EQUAL > pairs;
}

/* Tells whether the bytes at two places are the same, and not just zeros. */
static int same_bytes(const uint8_t *one, const uint8_t *other, size_t count) {
    size_t set = 0;
    if (memcmp(one, other, count)) return 0;
    for (size_t i = 0; i < count; i++) set += one[i] != 0;
    return set >= REPEATS_SET;
}

INLINE size_t repeats_slot(uint64_t word) {
    return word * 0x9E3779B97F4A7C15ull >> (64 - REPEATS_SLOT_BITS);
}

static int repeats_far(const uint8_t *data, size_t count) {
    /* Which words may be among the first ones. */
    uint8_t known[1 << REPEATS_SLOT_BITS] = {0};
    for (size_t i = 0; i < REPEATS_STEP; i++) known[repeats_slot(word_at(data, i))] = 1;
    for (size_t place = REPEATS_STEP; place + 8 <= count; place += REPEATS_STEP) {
        uint64_t word = word_at(data, place);
        if (!word || !known[repeats_slot(word)]) continue;
        size_t length = count - place < REPEATS_SAME ? count - place : REPEATS_SAME;
        for (size_t i = 0; i < REPEATS_STEP; i++)
            if (word_at(data, i) == word && same_bytes(data + i, data + place, length)) return 1;
    }
    return 0;
}

static int may_repeat(const uint8_t *data, size_t count) {
    if (count < REPEATS_SHORT) return 0;
    if (repeats_near(data, count)) return 1;
    if (count <= REPEATS_WINDOW) return repeats_far(data, count);
    return repeats_far(data, REPEATS_WINDOW) || repeats_far(data + count - REPEATS_WINDOW, REPEATS_WINDOW);
}
