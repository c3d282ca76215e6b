/* Where few units stand among all, sorted by the exponent of what is predicted (specification, section 17.5): what
 * exact.c does for every unit. Reference: deltafmt/exact/differences.py.
 *
 * Counting is the whole work. Units are counted in four tables by turns, because a counter waits for its last
 * increment. */

enum { TURNS = 4, UNMARKED_KEYS = 1 << MAX_KEY_BITS };

#define RANKS_UNITS(T)                                                                                                \
    INLINE void tally_##T(const T *restrict prediction, size_t first, size_t end, int shift, T mask,                  \
                          uint32_t seen[TURNS][UNMARKED_KEYS]) {                                                      \
        size_t i = first;                                                                                             \
        for (; i + TURNS <= end; i += TURNS)                                                                          \
            for (size_t turn = 0; turn < TURNS; turn++) seen[turn][prediction[i + turn] >> shift & mask]++;           \
        for (; i < end; i++) seen[0][prediction[i] >> shift & mask]++;                                                \
    }                                                                                                                 \
    /* Turns the counts of all units into where each key starts. */                                                   \
    INLINE void start_##T(uint32_t seen[TURNS][UNMARKED_KEYS], size_t keys, uint64_t *restrict starts) {              \
        uint64_t next = 0;                                                                                            \
        for (size_t key = 0; key < keys; key++) {                                                                     \
            starts[key] = next;                                                                                       \
            for (size_t turn = 0; turn < TURNS; turn++) next += seen[turn][key];                                      \
        }                                                                                                             \
    }                                                                                                                 \
    static void ranks_##T(const struct exact *e, const int64_t *restrict places, size_t number,                       \
                          uint64_t *restrict counts, int64_t *restrict ranks) {                                       \
        const T *restrict prediction = e->prediction;                                                                 \
        if (keyed_ranks_##T(e, places, number, counts, ranks)) return;                                                \
        size_t keys = (size_t)1 << e->bits, from = 0;                                                                 \
        T mask = (T)(keys - 1);                                                                                       \
        uint32_t seen[TURNS][UNMARKED_KEYS];                                                                          \
        uint64_t starts[UNMARKED_KEYS];                                                                               \
        memset(seen, 0, sizeof seen);                                                                                 \
        for (size_t i = 0; i < number; i++) {                                                                         \
            size_t place = (size_t)places[i], key = prediction[place] >> e->shift & mask;                             \
            tally_##T(prediction, from, place, e->shift, mask, seen);                                                 \
            ranks[i] = 0;                                                                                             \
            for (size_t turn = 0; turn < TURNS; turn++) ranks[i] += seen[turn][key];                                  \
            from = place;                                                                                             \
        }                                                                                                             \
        tally_##T(prediction, from, e->count, e->shift, mask, seen);                                                  \
        start_##T(seen, keys, starts);                                                                                \
        for (size_t i = 0; i < number; i++) ranks[i] += (int64_t)starts[prediction[places[i]] >> e->shift & mask];    \
        for (size_t key = 0; key < keys; key++) counts[key] = (key + 1 < keys ? starts[key + 1] : e->count) - starts[key];\
    }

RANKS_UNITS(uint8_t)
RANKS_UNITS(uint16_t)
RANKS_UNITS(uint32_t)
RANKS_UNITS(uint64_t)

/* places: ascending, below count; ranks: (number,); counts: (1 << bits,). */
static void exact_ranks(const struct exact *e, const int64_t *places, size_t number, uint64_t *counts, int64_t *ranks) {
    if (e->width == 1)
        ranks_uint8_t(e, places, number, counts, ranks);
    else if (e->width == 2)
        ranks_uint16_t(e, places, number, counts, ranks);
    else if (e->width == 4)
        ranks_uint32_t(e, places, number, counts, ranks);
    else
        ranks_uint64_t(e, places, number, counts, ranks);
}
