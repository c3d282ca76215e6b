/* Keys of a run of units at a time, by AVX2.
 *
 * A counter waits for its last increment, and the exponents of weights are few. So the units of the most common keys
 * are counted by comparing 32 keys at once, and only the units of rare keys one by one. What is found is what few.c and
 * ranks.c find without it. Reference: deltafmt/exact/few.py. */

#ifdef WITH_AVX2
enum { KEY_WORDS = KEY_RUN / 64, MOST_KEYS = 256, SAMPLE_RUNS = 64, SAMPLE = 64 * SAMPLE_RUNS };

/* The most common keys, and a slot for each key: theirs come first. */
struct common {
    __m256i wanted[COMMON];
    uint8_t keys[COMMON], slots[MOST_KEYS];
};

/* Chooses the keys that are most common in a sample. Returns 0 if too many units have other keys. */
static int choose_keys(uint32_t *restrict sample, struct common *restrict common) {
    uint32_t rest = SAMPLE;
    int chosen[MOST_KEYS] = {0};
    for (size_t slot = 0; slot < COMMON; slot++) {
        size_t most = 0;
        for (size_t key = 1; key < MOST_KEYS; key++)
            if (chosen[most] || (!chosen[key] && sample[key] > sample[most])) most = key;
        rest -= sample[most];
        chosen[most] = 1;
        common->keys[slot] = (uint8_t)most;
        common->slots[most] = (uint8_t)slot;
        common->wanted[slot] = _mm256_set1_epi8((char)most);
    }
    for (size_t key = 0, next = COMMON; key < MOST_KEYS; key++)
        if (!chosen[key]) common->slots[key] = (uint8_t)next++;
    return rest <= SAMPLE / 16;
}

/* Says which of 64 units have a key. */
INLINE uint64_t have_key(const uint8_t *keys, __m256i wanted) {
    __m256i low = _mm256_loadu_si256((const __m256i *)keys), high = _mm256_loadu_si256((const __m256i *)(keys + 32));
    uint32_t first = (uint32_t)_mm256_movemask_epi8(_mm256_cmpeq_epi8(low, wanted));
    uint32_t second = (uint32_t)_mm256_movemask_epi8(_mm256_cmpeq_epi8(high, wanted));
    return (uint64_t)second << 32 | first;
}

/* Counts the units of the common keys in a run, and says which units are rare. */
INLINE void count_run(const uint8_t *restrict keys, const struct common *restrict common, uint32_t *restrict numbers,
                      uint64_t *restrict rare) {
    __m256i sums[COMMON], zero = _mm256_setzero_si256();
    for (size_t slot = 0; slot < COMMON; slot++) sums[slot] = zero;
    for (size_t word = 0; word < KEY_WORDS; word++) {
        __m256i low = _mm256_loadu_si256((const __m256i *)(keys + 64 * word)), known_low = zero;
        __m256i high = _mm256_loadu_si256((const __m256i *)(keys + 64 * word + 32)), known_high = zero;
        for (size_t slot = 0; slot < COMMON; slot++) {
            __m256i is_low = _mm256_cmpeq_epi8(low, common->wanted[slot]);
            __m256i is_high = _mm256_cmpeq_epi8(high, common->wanted[slot]);
            known_low = _mm256_or_si256(known_low, is_low);
            known_high = _mm256_or_si256(known_high, is_high);
            sums[slot] = _mm256_sub_epi8(sums[slot], _mm256_add_epi8(is_low, is_high));
        }
        uint32_t first = (uint32_t)_mm256_movemask_epi8(known_low), second = (uint32_t)_mm256_movemask_epi8(known_high);
        rare[word] = ~((uint64_t)second << 32 | first);
    }
    for (size_t slot = 0; slot < COMMON; slot++) {
        __m256i sum = _mm256_sad_epu8(sums[slot], zero);
        __m128i half = _mm_add_epi64(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
        numbers[slot] = (uint32_t)(_mm_cvtsi128_si64(half) + _mm_extract_epi64(half, 1));
    }
}

/* How many units of a key are passed over between a rank and the next one. Where the next one is of another key, all
 * units of this key are. */
INLINE uint32_t until_next(const int64_t *ranks, size_t number, size_t next) {
    return next < number ? (uint32_t)(ranks[next] - ranks[next - 1] - 1) : UINT32_MAX;
}

#define KEYED_UNITS(T)                                                                                                \
    INLINE void key_bytes_##T(const struct exact *e, size_t first, size_t count, uint8_t *restrict keys) {            \
        const T *restrict prediction = (const T *)e->prediction + first;                                              \
        T mask = (T)(((size_t)1 << e->bits) - 1);                                                                     \
        int shift = e->shift;                                                                                         \
        if (sizeof(T) == 2 && shift == 7 && e->bits == 8) /* BF16: in lanes of 16 bits */                             \
            for (size_t i = 0; i < count; i++) keys[i] = (uint8_t)((uint16_t)(prediction[i] << 1) >> 8);              \
        else                                                                                                          \
            for (size_t i = 0; i < count; i++) keys[i] = (uint8_t)(prediction[i] >> shift & mask);                    \
    }                                                                                                                 \
    /* Gives the keys of a run, and of a common key behind the last unit; returns how many of the latter there are. */\
    INLINE uint32_t key_run_##T(const struct exact *e, const struct common *common, size_t first, uint8_t *keys) {    \
        size_t left = e->count - first, over = left < KEY_RUN ? KEY_RUN - left : 0;                                   \
        if (over)                                                                                                     \
            key_bytes_##T(e, first, left, keys);                                                                      \
        else                                                                                                          \
            key_bytes_##T(e, first, KEY_RUN, keys);                                                                   \
        if (over) memset(keys + left, common->keys[0], over);                                                         \
        return (uint32_t)over;                                                                                        \
    }                                                                                                                 \
    /* Chooses the common keys of a chunk. Returns 0 if its units are better counted one by one. */                   \
    static int common_##T(const struct exact *e, struct common *common) {                                             \
        uint32_t sample[MOST_KEYS] = {0};                                                                             \
        uint8_t keys[SAMPLE / SAMPLE_RUNS];                                                                           \
        if (!may_be_keyed(e)) return 0;                                                                               \
        for (size_t run = 0; run < SAMPLE_RUNS; run++) {                                                              \
            key_bytes_##T(e, run * (e->count / SAMPLE_RUNS), sizeof keys, keys);                                      \
            for (size_t i = 0; i < sizeof keys; i++) sample[keys[i]]++;                                               \
        }                                                                                                             \
        return choose_keys(sample, common);                                                                           \
    }                                                                                                                 \
    /* Gives what ranks_##T does. Returns 0, and gives nothing, if the units are better counted one by one. */        \
    static int keyed_ranks_##T(const struct exact *e, const int64_t *restrict places, size_t number,                  \
                               uint64_t *restrict counts, int64_t *restrict ranks) {                                  \
        struct common chosen, *common = &chosen;                                                                      \
        if (!common_##T(e, common)) return 0;                                                                         \
        uint8_t keys[KEY_RUN];                                                                                        \
        uint32_t seen[MOST_KEYS] = {0}, numbers[COMMON];                                                              \
        uint64_t starts[MOST_KEYS], rare[KEY_WORDS], next = 0;                                                        \
        const T *restrict prediction = e->prediction;                                                                 \
        T mask = (T)(((size_t)1 << e->bits) - 1);                                                                     \
        size_t i = 0;                                                                                                 \
        for (size_t first = 0; first < e->count; first += KEY_RUN) {                                                  \
            uint32_t over = key_run_##T(e, common, first, keys);                                                      \
            for (; i < number && (size_t)places[i] < first + KEY_RUN; i++) {                                          \
                size_t lane = (size_t)places[i] - first, word = 0;                                                    \
                __m256i wanted = _mm256_set1_epi8((char)keys[lane]);                                                  \
                uint64_t before = have_key(keys + lane / 64 * 64, wanted) & ~(~0ull << lane % 64);                    \
                ranks[i] = (int64_t)seen[common->slots[keys[lane]]] + __builtin_popcountll(before);                   \
                for (; word < lane / 64; word++) ranks[i] += __builtin_popcountll(have_key(keys + 64 * word, wanted));\
            }                                                                                                         \
            count_run(keys, common, numbers, rare);                                                                   \
            for (size_t slot = 0; slot < COMMON; slot++) seen[slot] += numbers[slot];                                 \
            seen[0] -= over;                                                                                          \
            for (size_t word = 0; word < KEY_WORDS; word++)                                                           \
                for (; rare[word]; rare[word] &= rare[word] - 1)                                                      \
                    seen[common->slots[keys[64 * word + (size_t)__builtin_ctzll(rare[word])]]]++;                     \
        }                                                                                                             \
        for (size_t key = 0; key < (size_t)1 << e->bits; key++) {                                                     \
            starts[key] = next;                                                                                       \
            counts[key] = seen[common->slots[key]];                                                                   \
            next += counts[key];                                                                                      \
        }                                                                                                             \
        for (i = 0; i < number; i++) ranks[i] += (int64_t)starts[prediction[places[i]] >> e->shift & mask];           \
        return 1;                                                                                                     \
    }                                                                                                                 \
    /* Finds what find_##T does. Returns 0, and finds nothing, if the units are better counted one by one. */         \
    static int keyed_find_##T(const struct exact *e, const int64_t *restrict ranks, size_t number,                    \
                              int64_t *restrict places) {                                                             \
        struct common chosen, *common = &chosen;                                                                      \
        if (!common_##T(e, common)) return 0;                                                                         \
        uint8_t keys[KEY_RUN];                                                                                        \
        uint64_t rare[KEY_WORDS];                                                                                     \
        uint32_t left[MOST_KEYS] = {0}, next[MOST_KEYS], start = 0, over;                                             \
        uint32_t *restrict table = e->table, *restrict lone = e->table + COMMON * KEY_RUNS(e->count);                 \
        size_t rank = 0, lonely = 0;                                                                                  \
        /* The numbers of each run, and the rare units. */                                                            \
        for (size_t first = 0; first < e->count; first += KEY_RUN, table += COMMON) {                                 \
            over = key_run_##T(e, common, first, keys);                                                               \
            count_run(keys, common, table, rare);                                                                     \
            table[0] -= over;                                                                                         \
            for (size_t slot = 0; slot < COMMON; slot++) left[slot] += table[slot];                                   \
            if (lonely + KEY_RUN > e->count / RARE) return 0;                                                         \
            for (size_t word = 0; word < KEY_WORDS; word++)                                                           \
                for (; rare[word]; rare[word] &= rare[word] - 1) {                                                    \
                    size_t lane = 64 * word + (size_t)__builtin_ctzll(rare[word]);                                    \
                    left[common->slots[keys[lane]]]++;                                                                \
                    lone[lonely++] = (uint32_t)(first + lane);                                                        \
                }                                                                                                     \
        }                                                                                                             \
        for (size_t key = 0; key < (size_t)1 << e->bits; key++) {                                                     \
            size_t slot = common->slots[key];                                                                         \
            uint32_t units = left[slot];                                                                              \
            while (rank < number && (uint64_t)ranks[rank] < start) rank++;                                            \
            next[slot] = (uint32_t)rank;                                                                              \
            left[slot] = rank < number ? (uint32_t)ranks[rank] - start : UINT32_MAX;                                  \
            start += units;                                                                                           \
        }                                                                                                             \
        table = e->table;                                                                                             \
        for (size_t first = 0; first < e->count; first += KEY_RUN, table += COMMON) {                                 \
            int known = 0;                                                                                            \
            for (size_t slot = 0; slot < COMMON; slot++) {                                                            \
                if (left[slot] >= table[slot]) {                                                                      \
                    left[slot] -= table[slot];                                                                        \
                    continue;                                                                                         \
                }                                                                                                     \
                if (!known) over = key_run_##T(e, common, first, keys);                                               \
                known = 1;                                                                                            \
                /* Units of this key: passed ones, and the wanted one. Behind the last unit of a chunk lie keys of none. */\
                uint32_t passed = 0, at = left[slot];                                                                 \
                for (size_t word = 0; at < table[slot]; word++) {                                                     \
                    uint64_t lanes = have_key(keys + 64 * word, common->wanted[slot]);                                \
                    uint32_t units = (uint32_t)__builtin_popcountll(lanes);                                           \
                    while (at < table[slot] && at - passed < units) { /* behind its units is padding */               \
                        for (; passed < at; passed++, units--) lanes &= lanes - 1;                                    \
                        places[next[slot]++] = (int64_t)(first + 64 * word + (size_t)__builtin_ctzll(lanes));         \
                        uint32_t more = until_next(ranks, number, next[slot]);                                        \
                        at = more < UINT32_MAX - 1 - at ? at + 1 + more : UINT32_MAX;                                 \
                    }                                                                                                 \
                    passed += units;                                                                                  \
                }                                                                                                     \
                left[slot] = at == UINT32_MAX ? UINT32_MAX : at - table[slot];                                        \
            }                                                                                                         \
        }                                                                                                             \
        for (size_t i = 0; i < lonely; i++) {                                                                         \
            size_t slot = common->slots[((const T *)e->prediction)[lone[i]] >> e->shift & (T)(((size_t)1 << e->bits) - 1)];\
            if (left[slot]--) continue;                                                                               \
            places[next[slot]++] = (int64_t)lone[i];                                                                  \
            left[slot] = until_next(ranks, number, next[slot]);                                                       \
        }                                                                                                             \
        return 1;                                                                                                     \
    }
#else
#define KEYED_UNITS(T)                                                                                                \
    INLINE int keyed_ranks_##T(const struct exact *e, const int64_t *places, size_t number, uint64_t *counts,         \
                               int64_t *ranks) {                                                                      \
        (void)e, (void)places, (void)number, (void)counts, (void)ranks;                                               \
        return 0;                                                                                                     \
    }                                                                                                                 \
    INLINE int keyed_find_##T(const struct exact *e, const int64_t *ranks, size_t number, int64_t *places) {          \
        (void)e, (void)ranks, (void)number, (void)places;                                                             \
        return 0;                                                                                                     \
    }
#endif

KEYED_UNITS(uint8_t)
KEYED_UNITS(uint16_t)
KEYED_UNITS(uint32_t)
KEYED_UNITS(uint64_t)
