/* Exact tensors: zigzag differences of ordered integers, sorted by the exponent of what is predicted, in planes of
 * bytes (specification, sections 17.3 and 17.5). Reference: deltafmt/exact/differences.py.
 *
 * Only sorting goes unit by unit. The other steps are loops that the compiler turns into vector instructions: codes and
 * keys are computed for a run of units at a time, and planes are made of whole units that are sorted already. Signs are
 * as good as random, so that nothing here branches on one. */

/* Units are sorted block by block, because a block stays in the cache, and the runs of each bucket are then copied to
 * where they belong. A unit waits for the one before it in its bucket, so the quarters of a block are sorted side by
 * side. A quarter has 4224 units (core.h), and not 4096: their arrays would evict one another from the cache. */
enum { QUARTERS = 4, BLOCK_UNITS = EXACT_BLOCK, KEYS = (1 << MAX_KEY_BITS) + 72 };

/* "o(u) = u + 2^(n-1) if u < 2^(n-1); o(u) = 2^n - 1 - u otherwise." */
#define ORDERED(T, TOP, u) ((T)((u) ^ (T)((T)(0 - (T)((u) >> (TOP))) | (T)((T)1 << (TOP)))))
#define UNORDERED(T, TOP, o) ((T)((o) ^ (T)((T)((T)((o) >> (TOP)) - 1) | (T)((T)1 << (TOP)))))
/* "z = 2 d if d < 2^(n-1); z = 2^(n+1) - 2 d - 1 otherwise." */
#define ZIGZAG(T, TOP, d) ((T)((T)((d) << 1) ^ (T)(0 - (T)((d) >> (TOP)))))
#define UNZIGZAG(T, z) ((T)((T)((z) >> 1) ^ (T)(0 - (T)((z)&1))))

/* The loops for units of type T, of which TOP is the highest bit. */
#define EXACT_UNITS(T, TOP)                                                                                           \
    INLINE void encode_##T(const T *restrict values, const T *restrict prediction, size_t count, int is_float,        \
                           T *restrict codes) {                                                                       \
        if (is_float)                                                                                                 \
            for (size_t i = 0; i < count; i++) {                                                                      \
                T d = (T)(ORDERED(T, TOP, values[i]) - ORDERED(T, TOP, prediction[i]));                               \
                codes[i] = ZIGZAG(T, TOP, d);                                                                         \
            }                                                                                                         \
        else                                                                                                          \
            for (size_t i = 0; i < count; i++) {                                                                      \
                T d = (T)(values[i] - prediction[i]);                                                                 \
                codes[i] = ZIGZAG(T, TOP, d);                                                                         \
            }                                                                                                         \
    }                                                                                                                 \
    INLINE void decode_##T(const T *restrict codes, const T *restrict prediction, size_t count, int is_float,         \
                           T *restrict out) {                                                                         \
        if (is_float)                                                                                                 \
            for (size_t i = 0; i < count; i++) {                                                                      \
                T o = (T)(ORDERED(T, TOP, prediction[i]) + UNZIGZAG(T, codes[i]));                                    \
                out[i] = UNORDERED(T, TOP, o);                                                                        \
            }                                                                                                         \
        else                                                                                                          \
            for (size_t i = 0; i < count; i++) out[i] = (T)(prediction[i] + UNZIGZAG(T, codes[i]));                   \
    }                                                                                                                 \
    INLINE void keys_##T(const T *restrict prediction, size_t count, int shift, T mask, uint16_t *restrict keys) {    \
        for (size_t i = 0; i < count; i++) keys[i] = (uint16_t)(prediction[i] >> shift & mask);                       \
    }                                                                                                                 \
    /* Counts the units of each bucket in each quarter of each block, and where each bucket starts in the planes. */  \
    static void count_##T(const struct exact *e, size_t *restrict starts, uint64_t *restrict counts) {                \
        const T *restrict prediction = e->prediction;                                                                 \
        size_t buckets = (size_t)1 << e->bits, count = e->count;                                                      \
        uint32_t *restrict table = e->table;                                                                          \
        T mask = (T)(buckets - 1);                                                                                    \
        memset(starts, 0, buckets * sizeof *starts);                                                                  \
        for (size_t first = 0; first < count; first += BLOCK_UNITS, table += QUARTERS * buckets) {                    \
            size_t run = count - first < BLOCK_UNITS ? count - first : BLOCK_UNITS, quarter = run / QUARTERS;         \
            memset(table, 0, QUARTERS * buckets * sizeof *table);                                                     \
            for (size_t i = 0; i < quarter; i++)                                                                      \
                for (size_t q = 0; q < QUARTERS; q++)                                                                 \
                    table[q * buckets + (prediction[first + q * quarter + i] >> e->shift & mask)]++;                  \
            for (size_t i = QUARTERS * quarter; i < run; i++)                                                         \
                table[(QUARTERS - 1) * buckets + (prediction[first + i] >> e->shift & mask)]++;                       \
            for (size_t q = 0; q < QUARTERS; q++)                                                                     \
                for (size_t bucket = 0; bucket < buckets; bucket++) starts[bucket] += table[q * buckets + bucket];    \
        }                                                                                                             \
        size_t next = 0;                                                                                              \
        for (size_t bucket = 0; bucket < buckets; bucket++) {                                                         \
            size_t number = starts[bucket];                                                                           \
            if (counts) counts[bucket] = number;                                                                      \
            starts[bucket] = next;                                                                                    \
            next += number;                                                                                           \
        }                                                                                                             \
    }                                                                                                                 \
    /* Where the first unit of each bucket and quarter goes in a sorted block; ends: where each bucket ends. */       \
    INLINE void place_##T(const uint32_t *restrict table, size_t buckets, uint32_t places[QUARTERS][KEYS],            \
                          uint32_t *restrict ends) {                                                                  \
        uint32_t next = 0;                                                                                            \
        for (size_t bucket = 0; bucket < buckets; bucket++) {                                                         \
            for (size_t q = 0; q < QUARTERS; q++) {                                                                   \
                places[q][bucket] = next;                                                                             \
                next += table[q * buckets + bucket];                                                                  \
            }                                                                                                         \
            ends[bucket] = next;                                                                                      \
        }                                                                                                             \
    }                                                                                                                 \
    /* Units in the order in which they are. */                                                                       \
    static void split_run_##T(const T *values, const T *prediction, size_t count, int is_float, T *restrict codes,    \
                              uint8_t *planes, size_t stride) {                                                       \
        for (size_t first = 0; first < count; first += BLOCK_UNITS) {                                                 \
            size_t run = count - first < BLOCK_UNITS ? count - first : BLOCK_UNITS;                                   \
            encode_##T(values + first, prediction + first, run, is_float, codes);                                     \
            for (size_t plane = 0; plane < sizeof(T); plane++) {                                                      \
                uint8_t *restrict bytes = planes + plane * stride + first;                                            \
                for (size_t i = 0; i < run; i++) bytes[i] = (uint8_t)(codes[i] >> 8 * plane);                         \
            }                                                                                                         \
        }                                                                                                             \
    }                                                                                                                 \
    INLINE void whole_##T(const uint8_t *planes, size_t stride, size_t count, T *restrict units) {                    \
        for (size_t plane = 0; plane < sizeof(T); plane++) {                                                          \
            const uint8_t *restrict bytes = planes + plane * stride;                                                  \
            if (!plane)                                                                                               \
                for (size_t i = 0; i < count; i++) units[i] = bytes[i];                                               \
            else                                                                                                      \
                for (size_t i = 0; i < count; i++) units[i] = (T)(units[i] | (T)((T)bytes[i] << 8 * plane));          \
        }                                                                                                             \
    }                                                                                                                 \
    static void join_run_##T(const uint8_t *planes, size_t stride, const T *prediction, size_t count, int is_float,   \
                             T *restrict codes, T *out) {                                                             \
        for (size_t first = 0; first < count; first += BLOCK_UNITS) {                                                 \
            size_t run = count - first < BLOCK_UNITS ? count - first : BLOCK_UNITS;                                   \
            whole_##T(planes + first, stride, run, codes);                                                            \
            decode_##T(codes, prediction + first, run, is_float, out + first);                                        \
        }                                                                                                             \
    }                                                                                                                 \
    static void split_##T(const struct exact *e, uint64_t *counts) {                                                  \
        const T *values = e->values, *prediction = e->prediction;                                                     \
        T *restrict sorted = e->sorted, *restrict codes = sorted + BLOCK_UNITS;                                       \
        size_t count = e->count, buckets = (size_t)1 << e->bits, starts[KEYS];                                        \
        T mask = (T)(buckets - 1);                                                                                    \
        uint32_t places[QUARTERS][KEYS], ends[KEYS], *table = e->table;                                               \
        uint16_t keys[BLOCK_UNITS];                                                                                   \
        if (buckets == 1) {                                                                                           \
            split_run_##T(values, prediction, count, e->is_float, codes, e->planes, count);                           \
            counts[0] = count;                                                                                        \
            return;                                                                                                   \
        }                                                                                                             \
        count_##T(e, starts, counts);                                                                                 \
        for (size_t first = 0; first < count; first += BLOCK_UNITS, table += QUARTERS * buckets) {                    \
            size_t run = count - first < BLOCK_UNITS ? count - first : BLOCK_UNITS, quarter = run / QUARTERS;         \
            encode_##T(values + first, prediction + first, run, e->is_float, codes);                                  \
            keys_##T(prediction + first, run, e->shift, mask, keys);                                                  \
            place_##T(table, buckets, places, ends);                                                                  \
            for (size_t i = 0; i < quarter; i++)                                                                      \
                for (size_t q = 0; q < QUARTERS; q++)                                                                 \
                    sorted[places[q][keys[q * quarter + i]]++] = codes[q * quarter + i];                              \
            for (size_t i = QUARTERS * quarter; i < run; i++) sorted[places[QUARTERS - 1][keys[i]]++] = codes[i];     \
            for (size_t bucket = 0, from = 0; bucket < buckets; from = ends[bucket++]) {                              \
                size_t number = ends[bucket] - from;                                                                  \
                if (!number) continue;                                                                                \
                for (size_t plane = 0; plane < sizeof(T); plane++) {                                                  \
                    uint8_t *restrict bytes = e->planes + plane * count + starts[bucket];                             \
                    for (size_t i = 0; i < number; i++) bytes[i] = (uint8_t)(sorted[from + i] >> 8 * plane);          \
                }                                                                                                     \
                starts[bucket] += number;                                                                             \
            }                                                                                                         \
        }                                                                                                             \
    }                                                                                                                 \
    static void join_##T(const struct exact *e) {                                                                     \
        const T *prediction = e->prediction;                                                                          \
        T *restrict sorted = e->sorted, *restrict codes = sorted + BLOCK_UNITS, *out = e->out;                        \
        size_t count = e->count, buckets = (size_t)1 << e->bits, starts[KEYS];                                        \
        T mask = (T)(buckets - 1);                                                                                    \
        uint32_t places[QUARTERS][KEYS], ends[KEYS], *table = e->table;                                               \
        uint16_t keys[BLOCK_UNITS];                                                                                   \
        if (buckets == 1) {                                                                                           \
            join_run_##T(e->planes, count, prediction, count, e->is_float, codes, out);                               \
            return;                                                                                                   \
        }                                                                                                             \
        count_##T(e, starts, NULL);                                                                                   \
        for (size_t first = 0; first < count; first += BLOCK_UNITS, table += QUARTERS * buckets) {                    \
            size_t run = count - first < BLOCK_UNITS ? count - first : BLOCK_UNITS, quarter = run / QUARTERS;         \
            place_##T(table, buckets, places, ends);                                                                  \
            for (size_t bucket = 0, from = 0; bucket < buckets; from = ends[bucket++]) {                              \
                size_t number = ends[bucket] - from;                                                                  \
                if (!number) continue;                                                                                \
                whole_##T(e->planes + starts[bucket], count, number, sorted + from);                                  \
                starts[bucket] += number;                                                                             \
            }                                                                                                         \
            keys_##T(prediction + first, run, e->shift, mask, keys);                                                  \
            for (size_t i = 0; i < quarter; i++)                                                                      \
                for (size_t q = 0; q < QUARTERS; q++)                                                                 \
                    codes[q * quarter + i] = sorted[places[q][keys[q * quarter + i]]++];                              \
            for (size_t i = QUARTERS * quarter; i < run; i++) codes[i] = sorted[places[QUARTERS - 1][keys[i]]++];     \
            decode_##T(codes, prediction + first, run, e->is_float, out + first);                                     \
        }                                                                                                             \
    }

EXACT_UNITS(uint8_t, 7)
EXACT_UNITS(uint16_t, 15)
EXACT_UNITS(uint32_t, 31)
EXACT_UNITS(uint64_t, 63)

/* planes: (width, count); counts: (1 << bits,). */
static void exact_split(const struct exact *e, uint64_t *counts) {
    if (e->width == 1)
        split_uint8_t(e, counts);
    else if (e->width == 2)
        split_uint16_t(e, counts);
    else if (e->width == 4)
        split_uint32_t(e, counts);
    else
        split_uint64_t(e, counts);
}

static void exact_join(const struct exact *e) {
    if (e->width == 1)
        join_uint8_t(e);
    else if (e->width == 2)
        join_uint16_t(e);
    else if (e->width == 4)
        join_uint32_t(e);
    else
        join_uint64_t(e);
}
