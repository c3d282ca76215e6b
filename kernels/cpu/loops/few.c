/* Chunks of which few units differ (specification, section 17.5): where they do, and where a decoder finds them again.
 * Reference: deltafmt/exact/few.py. */

/* Writes the places of integers of so many bytes that are not zero in a word, of which `first` is the first one. */
INLINE size_t put_places(uint64_t word, size_t bytes, size_t first, int64_t *restrict places, size_t found) {
    while (word) {
        size_t lane = (size_t)__builtin_ctzll(word) / (8 * bytes);
        places[found++] = (int64_t)(first + lane);
        word &= ~(~0ull >> (64 - 8 * bytes) << 8 * bytes * lane);
    }
    return found;
}

#ifdef WITH_AVX2
/* Writes the places of set bits; a bit stands for so many units or bytes before the next. Two are written without asking
 * whether they are there: most words have no more, and a wrong guess costs more than a write. */
INLINE size_t put_bits_of(uint64_t word, size_t bits, size_t first, int64_t *restrict places, size_t found) {
    for (int i = 0; i < 2; i++) {
        places[found] = (int64_t)(first + _tzcnt_u64(word) / bits);
        found += word != 0;
        word &= word - 1;
    }
    for (; word; word &= word - 1) places[found++] = (int64_t)(first + _tzcnt_u64(word) / bits);
    return found;
}

/* Says which units of 32 bytes are equal: all bits of such a unit are set. */
INLINE uint32_t equal_units(const void *values, const void *others, size_t width) {
    __m256i a = _mm256_loadu_si256(values), b = _mm256_loadu_si256(others);
    __m256i equal = width == 1 ? _mm256_cmpeq_epi8(a, b) : width == 2 ? _mm256_cmpeq_epi16(a, b) :
                    width == 4 ? _mm256_cmpeq_epi32(a, b) : _mm256_cmpeq_epi64(a, b);
    return (uint32_t)_mm256_movemask_epi8(equal);
}

/* The lowest bit of each unit of 8 bytes. */
INLINE uint64_t low_bits(size_t width) { return ~0ull / ((1ull << width) - 1); }

#define DIFFER_RUNS(T)                                                                                                \
    for (; i + 64 / sizeof(T) <= count && found <= most; i += 64 / sizeof(T)) {                                       \
        uint64_t low = equal_units(values + i, prediction + i, sizeof(T));                                            \
        uint64_t high = equal_units(values + i + 32 / sizeof(T), prediction + i + 32 / sizeof(T), sizeof(T));         \
        found = put_bits_of(~(high << 32 | low) & low_bits(sizeof(T)), sizeof(T), i, places, found);                  \
    }
#else
#define DIFFER_RUNS(T)
#endif

enum { FIND_UNITS = 512 };

#define FEW_UNITS(T)                                                                                                  \
    /* Writes the places of units that differ. Stops where there are more than `most`. */                             \
    static size_t differ_##T(const struct exact *e, size_t most, int64_t *restrict places) {                          \
        enum { WORDS = 4, LANES = 8 / sizeof(T), RUN = WORDS * LANES };                                               \
        const T *restrict values = e->values, *restrict prediction = e->prediction;                                   \
        size_t count = e->count, found = 0, i = 0;                                                                    \
        DIFFER_RUNS(T)                                                                                                \
        for (; i + RUN <= count && found <= most; i += RUN) {                                                         \
            uint64_t a[WORDS], b[WORDS];                                                                              \
            memcpy(a, values + i, sizeof a);                                                                          \
            memcpy(b, prediction + i, sizeof b);                                                                      \
            if (!((a[0] ^ b[0]) | (a[1] ^ b[1]) | (a[2] ^ b[2]) | (a[3] ^ b[3]))) continue;                           \
            for (size_t word = 0; word < WORDS; word++)                                                               \
                found = put_places(a[word] ^ b[word], sizeof(T), i + word * LANES, places, found);                    \
        }                                                                                                             \
        for (; i < count && found <= most; i++)                                                                       \
            if (values[i] != prediction[i]) places[found++] = (int64_t)i;                                             \
        return found;                                                                                                 \
    }                                                                                                                 \
    /* Passes over units of each key until none is left before the next rank. Quarters of the chunk go side by side. */\
    static void find_##T(const struct exact *e, const int64_t *restrict ranks, size_t number,                         \
                         int64_t *restrict places) {                                                                  \
        if (keyed_find_##T(e, ranks, number, places)) return;                                                         \
        size_t count = e->count, quarter = count / QUARTERS, keys = all_keys(e), rank = 0;                            \
        uint32_t *left[QUARTERS], *next[QUARTERS], start = 0;                                                         \
        uint16_t key[QUARTERS][FIND_UNITS];                                                                           \
        for (size_t q = 0; q < QUARTERS; q++) left[q] = e->table + q * keys, next[q] = left[q] + QUARTERS * keys;     \
        memset(e->table, 0, QUARTERS * keys * sizeof *e->table);                                                      \
        for (size_t first = 0; first < quarter; first += FIND_UNITS) {                                                \
            size_t run = quarter - first < FIND_UNITS ? quarter - first : FIND_UNITS;                                 \
            for (size_t q = 0; q < QUARTERS; q++) keys_##T(e, q * quarter + first, run, key[q]);                      \
            for (size_t i = 0; i < run; i++)                                                                          \
                for (size_t q = 0; q < QUARTERS; q++) left[q][key[q][i]]++;                                           \
        }                                                                                                             \
        keys_##T(e, QUARTERS * quarter, count % QUARTERS, key[0]);                                                    \
        for (size_t i = 0; i < count % QUARTERS; i++) left[QUARTERS - 1][key[0][i]]++;                                \
        for (size_t k = 0; k < keys; k++)                                                                             \
            for (size_t q = 0; q < QUARTERS; q++) {                                                                   \
                while (rank < number && (uint64_t)ranks[rank] < start) rank++;                                        \
                next[q][k] = (uint32_t)rank;                                                                          \
                uint32_t units = left[q][k];                                                                          \
                left[q][k] = rank < number ? (uint32_t)ranks[rank] - start : UINT32_MAX;                              \
                start += units;                                                                                       \
            }                                                                                                         \
        for (size_t first = 0; first < quarter; first += FIND_UNITS) {                                                \
            size_t run = quarter - first < FIND_UNITS ? quarter - first : FIND_UNITS;                                 \
            for (size_t q = 0; q < QUARTERS; q++) keys_##T(e, q * quarter + first, run, key[q]);                      \
            for (size_t i = 0; i < run; i++)                                                                          \
                for (size_t q = 0; q < QUARTERS; q++) {                                                               \
                    if (left[q][key[q][i]]--) continue;                                                               \
                    size_t at = next[q][key[q][i]]++;                                                                 \
                    places[at] = (int64_t)(q * quarter + first + i);                                                  \
                    left[q][key[q][i]] = at + 1 < number ? (uint32_t)(ranks[at + 1] - ranks[at] - 1) : UINT32_MAX;    \
                }                                                                                                     \
        }                                                                                                             \
        keys_##T(e, QUARTERS * quarter, count % QUARTERS, key[0]);                                                    \
        for (size_t i = 0; i < count % QUARTERS; i++) {                                                               \
            if (left[QUARTERS - 1][key[0][i]]--) continue;                                                            \
            size_t at = next[QUARTERS - 1][key[0][i]]++;                                                              \
            places[at] = (int64_t)(QUARTERS * quarter + i);                                                           \
            left[QUARTERS - 1][key[0][i]] = at + 1 < number ? (uint32_t)(ranks[at + 1] - ranks[at] - 1) : UINT32_MAX; \
        }                                                                                                             \
    }

FEW_UNITS(uint8_t)
FEW_UNITS(uint16_t)
FEW_UNITS(uint32_t)
FEW_UNITS(uint64_t)

/* places: room for most + PLACES_RUN. */
static size_t exact_differ(const struct exact *e, size_t most, int64_t *places) {
    if (e->width == 1) return differ_uint8_t(e, most, places);
    if (e->width == 2) return differ_uint16_t(e, most, places);
    if (e->width == 4) return differ_uint32_t(e, most, places);
    return differ_uint64_t(e, most, places);
}

/* ranks: ascending, below count; places: (number,). */
static void exact_find(const struct exact *e, const int64_t *ranks, size_t number, int64_t *places) {
    if (e->width == 1)
        find_uint8_t(e, ranks, number, places);
    else if (e->width == 2)
        find_uint16_t(e, ranks, number, places);
    else if (e->width == 4)
        find_uint32_t(e, ranks, number, places);
    else
        find_uint64_t(e, ranks, number, places);
}

/* places: room for most + PLACES_RUN. */
static size_t exact_filled(const struct exact *e, size_t most, int64_t *restrict places) {
    enum { RUN = 8 };
    const uint8_t *planes = e->planes;
    size_t count = e->count, width = e->width, stride = e->stride, found = 0, i = 0;
#ifdef WITH_AVX2
    for (; i + 64 <= count && found <= most; i += 64) {
        __m256i low = _mm256_setzero_si256(), high = low, zero = low;
        for (size_t plane = 0; plane < width; plane++) {
            low = _mm256_or_si256(low, _mm256_loadu_si256((const __m256i *)(planes + plane * stride + i)));
            high = _mm256_or_si256(high, _mm256_loadu_si256((const __m256i *)(planes + plane * stride + i + 32)));
        }
        uint32_t first = (uint32_t)_mm256_movemask_epi8(_mm256_cmpeq_epi8(low, zero));
        uint32_t second = (uint32_t)_mm256_movemask_epi8(_mm256_cmpeq_epi8(high, zero));
        found = put_bits_of(~((uint64_t)second << 32 | first), 1, i, places, found);
    }
#endif
    for (; i + RUN <= count && found <= most; i += RUN) {
        uint64_t any = 0, word;
        for (size_t plane = 0; plane < width; plane++) {
            memcpy(&word, planes + plane * stride + i, sizeof word);
            any |= word;
        }
        if (any) found = put_places(any, 1, i, places, found);
    }
    for (; i < count && found <= most; i++) {
        uint8_t byte = 0;
        for (size_t plane = 0; plane < width; plane++) byte |= planes[plane * stride + i];
        if (byte) places[found++] = (int64_t)i;
    }
    return found;
}

#define MOVED_UNITS(T)                                                                                                \
    static void take_##T(const T *restrict units, const int64_t *restrict places, size_t number, T *restrict out) {   \
        for (size_t i = 0; i < number; i++) out[i] = units[places[i]];                                                \
    }                                                                                                                 \
    static void put_##T(T *restrict units, const int64_t *restrict places, size_t number, const T *restrict values) { \
        for (size_t i = 0; i < number; i++) units[places[i]] = values[i];                                             \
    }

MOVED_UNITS(uint8_t)
MOVED_UNITS(uint16_t)
MOVED_UNITS(uint32_t)
MOVED_UNITS(uint64_t)

static void exact_take(const void *units, size_t width, const int64_t *places, size_t number, void *out) {
    if (width == 1)
        take_uint8_t(units, places, number, out);
    else if (width == 2)
        take_uint16_t(units, places, number, out);
    else if (width == 4)
        take_uint32_t(units, places, number, out);
    else
        take_uint64_t(units, places, number, out);
}

static void exact_put(void *units, size_t width, const int64_t *places, size_t number, const void *values) {
    if (width == 1)
        put_uint8_t(units, places, number, values);
    else if (width == 2)
        put_uint16_t(units, places, number, values);
    else if (width == 4)
        put_uint32_t(units, places, number, values);
    else
        put_uint64_t(units, places, number, values);
}

/* counts: (256,), of gaps between numbers in ascending order; those above 255 count as such. set: scratch, with a bit
 * for each number that there can be. */
static void exact_gaps(const int64_t *numbers, size_t count, uint64_t *set, size_t words, uint64_t *counts) {
    uint64_t before = 0;
    int first = 1;
    memset(counts, 0, 256 * sizeof *counts);
    memset(set, 0, words * sizeof *set);
    for (size_t i = 0; i < count; i++) set[numbers[i] / 64] |= 1ull << numbers[i] % 64;
    for (size_t word = 0; word < words; word++)
        for (uint64_t left = set[word]; left; left &= left - 1) {
            uint64_t number = 64 * word + (uint64_t)__builtin_ctzll(left), gap = number - before;
            if (!first) counts[gap < 255 ? gap : 255]++;
            first = 0;
            before = number;
        }
}
