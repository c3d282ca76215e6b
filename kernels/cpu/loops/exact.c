/* Exact tensors: zigzag differences of ordered integers, sorted by the exponent of what is predicted, in planes of
 * bytes (specification, sections 17.3, 17.5 and 17.8). Reference: deltafmt/exact/differences.py.
 *
 * Only sorting goes unit by unit. The other steps are loops that the compiler turns into vector instructions: codes and
 * keys are computed for a run of units at a time. Signs are as good as random, so that nothing here branches on one.
 *
 * Sorted codes are a whole array, which is taken apart into planes, or put together from them, a run at a time. A unit
 * waits for the one before it of its key, so several segments of a chunk are sorted side by side. They lie apart by other
 * steps than powers of two. Where units go is found in a loop of its own: where a write waits for the place that it goes
 * to, so do the reads behind it. */

enum { KEYS = 2 << MAX_KEY_BITS };

/* "o(u) = u + 2^(n-1) if u < 2^(n-1); o(u) = 2^n - 1 - u otherwise." */
#define ORDERED(T, TOP, u) ((T)((u) ^ (T)((T)(0 - (T)((u) >> (TOP))) | (T)((T)1 << (TOP)))))
#define UNORDERED(T, TOP, o) ((T)((o) ^ (T)((T)((T)((o) >> (TOP)) - 1) | (T)((T)1 << (TOP)))))
/* "z = 2 d if d < 2^(n-1); z = 2^(n+1) - 2 d - 1 otherwise." */
#define ZIGZAG(T, TOP, d) ((T)((T)((d) << 1) ^ (T)(0 - (T)((d) >> (TOP)))))
#define UNZIGZAG(T, z) ((T)((T)((z) >> 1) ^ (T)(0 - (T)((z)&1))))

enum { SEGMENTS = 2, SEGMENT_RUN = 1024, APART = 32 };

/* Keys are counted two at a time where they lie in a window of so many bits, as exponents of weights do. */
enum { WINDOW_BITS = 5, WINDOW = 1 << WINDOW_BITS, PAIRS = WINDOW * WINDOW, ABOVE = 4 };

/* Counts keys of a run, the pairs that lie in the window from `low` on in `pairs`: [second - low][first - low]. */
INLINE void count_keys(const uint16_t *restrict key, size_t run, uint32_t low, uint32_t *restrict numbers,
                       uint32_t *restrict pairs) {
    uint16_t pair[SEGMENT_RUN / 2];
    uint32_t outside = 0;
    for (size_t i = 0; i < run / 2; i++) {
        uint32_t both;
        memcpy(&both, key + 2 * i, sizeof both);
        both -= low * 0x10001u; /* what is below leaves higher bits, too */
        outside |= both;
        pair[i] = (uint16_t)((both & (WINDOW - 1)) | (both >> (16 - WINDOW_BITS) & (PAIRS - WINDOW)));
    }
    if (outside & ~((WINDOW - 1) * 0x10001u))
        for (size_t i = 0; i < run / 2 * 2; i++) numbers[key[i]]++;
    else
        for (size_t i = 0; i < run / 2; i++) pairs[pair[i]]++;
    if (run % 2) numbers[key[run - 1]]++;
}

/* Long segments begin apart by STEP_REST more than a multiple of STEP. */
enum { LONG_SEGMENT = 1 << 16, STEP = 2048, STEP_REST = 288 };

INLINE size_t segment_of(size_t count) {
    size_t segment = count / SEGMENTS;
    return segment < LONG_SEGMENT ? segment : segment - (segment - STEP_REST) % STEP;
}

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
    /* The keys of a run: those of units that are marked lie behind all others. */                                    \
    INLINE void keys_##T(const struct exact *e, size_t first, size_t count, uint16_t *restrict keys) {                \
        const T *restrict prediction = (const T *)e->prediction + first;                                              \
        T mask = (T)(((size_t)1 << e->bits) - 1);                                                                     \
        int shift = e->shift, bits = e->bits;                                                                         \
        if (sizeof(T) == 2 && shift == 7 && bits == 8) /* BF16: in lanes of 16 bits */                                \
            for (size_t i = 0; i < count; i++) keys[i] = (uint16_t)((uint16_t)(prediction[i] << 1) >> 8);             \
        else                                                                                                          \
            for (size_t i = 0; i < count; i++) keys[i] = (uint16_t)(prediction[i] >> shift & mask);                   \
        if (!e->marks) return;                                                                                        \
        const uint8_t *restrict marks = e->marks + first;                                                             \
        for (size_t i = 0; i < count; i++) keys[i] = (uint16_t)(keys[i] | (marks[i] != 0) << bits);                   \
    }                                                                                                                 \
    /* Integers from the bytes of planes, and back. */                                                                \
    INLINE void whole_##T(const uint8_t *planes, size_t stride, size_t count, T *restrict units) {                    \
        for (size_t plane = 0; plane < sizeof(T); plane++) {                                                          \
            const uint8_t *restrict bytes = planes + plane * stride;                                                  \
            if (plane)                                                                                                \
                for (size_t i = 0; i < count; i++) units[i] = (T)(units[i] | (T)((T)bytes[i] << 8 * plane));          \
            else                                                                                                      \
                for (size_t i = 0; i < count; i++) units[i] = bytes[i];                                               \
        }                                                                                                             \
    }                                                                                                                 \
    INLINE void parts_##T(const T *restrict units, size_t count, uint8_t *planes, size_t stride) {                    \
        for (size_t plane = 0; plane < sizeof(T); plane++) {                                                          \
            uint8_t *restrict bytes = planes + plane * stride;                                                        \
            for (size_t i = 0; i < count; i++) bytes[i] = (uint8_t)(units[i] >> 8 * plane);                           \
        }                                                                                                             \
    }                                                                                                                 \
    /* Says where the codes of each key and segment begin. */                                                         \
    static void begin_segments_##T(const struct exact *e, size_t segment, size_t step, uint32_t *restrict numbers) {  \
        uint16_t key[SEGMENT_RUN], most = 0;                                                                          \
        uint32_t pairs[PAIRS], low = 0;                                                                               \
        size_t count = e->count, keys = all_keys(e);                                                                  \
        memset(numbers, 0, SEGMENTS * step * sizeof *numbers);                                                        \
        for (size_t s = 0; s < SEGMENTS; s++) {                                                                       \
            size_t from = s * segment, end = s + 1 < SEGMENTS ? from + segment : count;                               \
            uint32_t *restrict own = numbers + s * step;                                                              \
            memset(pairs, 0, sizeof pairs);                                                                           \
            for (size_t first = from; first < end; first += SEGMENT_RUN) {                                            \
                size_t run = end - first < SEGMENT_RUN ? end - first : SEGMENT_RUN;                                   \
                keys_##T(e, first, run, key);                                                                         \
                if (first == from) {                                                                                  \
                    for (size_t i = 0; i < run; i++) most = key[i] > most ? key[i] : most;                            \
                    low = most + ABOVE < WINDOW ? 0 : (uint32_t)most + ABOVE - WINDOW;                                \
                }                                                                                                     \
                count_keys(key, run, low, own, pairs);                                                                \
            }                                                                                                         \
            for (size_t second = 0; second < WINDOW; second++)                                                        \
                for (size_t one = 0; one < WINDOW; one++) {                                                           \
                    uint32_t number = pairs[second * WINDOW + one];                                                   \
                    if (!number) continue;                                                                            \
                    own[low + one] += number;                                                                         \
                    own[low + second] += number;                                                                      \
                }                                                                                                     \
        }                                                                                                             \
        uint32_t next = 0;                                                                                            \
        for (size_t k = 0; k < keys; k++)                                                                             \
            for (size_t s = 0; s < SEGMENTS; s++) {                                                                   \
                uint32_t number = numbers[s * step + k];                                                              \
                numbers[s * step + k] = next;                                                                         \
                next += number;                                                                                       \
            }                                                                                                         \
    }                                                                                                                 \
    static void split_##T(const struct exact *e, uint64_t *counts) {                                                  \
        const T *values = e->values, *prediction = e->prediction;                                                     \
        size_t count = e->count, keys = all_keys(e), stride = e->stride;                                              \
        uint32_t places[SEGMENTS * (KEYS + APART)], to[SEGMENTS][SEGMENT_RUN];                                        \
        uint16_t key[SEGMENTS][SEGMENT_RUN];                                                                          \
        T codes[SEGMENTS][SEGMENT_RUN + APART], *restrict sorted = e->sorted;                                         \
        size_t segment = keys > 1 ? segment_of(count) : 0, step = keys + APART, rest = SEGMENTS * segment;            \
        if (keys == 1) {                                                                                              \
            counts[0] = count;                                                                                        \
            for (size_t first = 0; first < count; first += SEGMENT_RUN) {                                             \
                size_t run = count - first < SEGMENT_RUN ? count - first : SEGMENT_RUN;                               \
                encode_##T(values + first, prediction + first, run, e->is_float, codes[0]);                           \
                parts_##T(codes[0], run, e->planes + first, stride);                                                  \
            }                                                                                                         \
            return;                                                                                                   \
        }                                                                                                             \
        begin_segments_##T(e, segment, step, places);                                                                 \
        for (size_t k = 0; k < keys; k++) counts[k] = (k + 1 < keys ? places[k + 1] : count) - places[k];             \
        for (size_t first = 0; first < segment; first += SEGMENT_RUN) {                                               \
            size_t run = segment - first < SEGMENT_RUN ? segment - first : SEGMENT_RUN;                               \
            for (size_t s = 0; s < SEGMENTS; s++) {                                                                   \
                size_t at = s * segment + first;                                                                      \
                encode_##T(values + at, prediction + at, run, e->is_float, codes[s]);                                 \
                keys_##T(e, at, run, key[s]);                                                                         \
            }                                                                                                         \
            for (size_t i = 0; i < run; i++)                                                                          \
                for (size_t s = 0; s < SEGMENTS; s++) to[s][i] = places[s * step + key[s][i]]++;                      \
            for (size_t i = 0; i < run; i++)                                                                          \
                for (size_t s = 0; s < SEGMENTS; s++) sorted[to[s][i]] = codes[s][i];                                 \
        }                                                                                                             \
        for (size_t i = rest; i < count; i++) {                                                                       \
            encode_##T(values + i, prediction + i, 1, e->is_float, codes[0]);                                         \
            keys_##T(e, i, 1, key[0]);                                                                                \
            sorted[places[(SEGMENTS - 1) * step + key[0][0]]++] = codes[0][0];                                        \
        }                                                                                                             \
        for (size_t first = 0; first < count; first += SEGMENT_RUN) {                                                 \
            size_t run = count - first < SEGMENT_RUN ? count - first : SEGMENT_RUN;                                   \
            parts_##T(sorted + first, run, e->planes + first, stride);                                                \
        }                                                                                                             \
    }                                                                                                                 \
    static void join_##T(const struct exact *e) {                                                                     \
        const T *prediction = e->prediction;                                                                          \
        size_t count = e->count, keys = all_keys(e), stride = e->stride;                                              \
        uint32_t places[SEGMENTS * (KEYS + APART)];                                                                   \
        uint16_t key[SEGMENTS][SEGMENT_RUN];                                                                          \
        T codes[SEGMENTS][SEGMENT_RUN + APART], *restrict sorted = e->sorted, *out = e->out;                          \
        size_t segment = keys > 1 ? segment_of(count) : 0, step = keys + APART, rest = SEGMENTS * segment;            \
        for (size_t first = 0; first < count; first += SEGMENT_RUN) {                                                 \
            size_t run = count - first < SEGMENT_RUN ? count - first : SEGMENT_RUN;                                   \
            T *to = keys > 1 ? sorted + first : codes[0];                                                             \
            whole_##T(e->planes + first, stride, run, to);                                                            \
            if (keys == 1) decode_##T(to, prediction + first, run, e->is_float, out + first);                         \
        }                                                                                                             \
        if (keys == 1) return;                                                                                        \
        begin_segments_##T(e, segment, step, places);                                                                 \
        for (size_t first = 0; first < segment; first += SEGMENT_RUN) {                                               \
            size_t run = segment - first < SEGMENT_RUN ? segment - first : SEGMENT_RUN, i = 0;                        \
            for (size_t s = 0; s < SEGMENTS; s++) keys_##T(e, s * segment + first, run, key[s]);                      \
            for (; i + 2 <= run; i += 2)                                                                              \
                for (size_t s = 0; s < SEGMENTS; s++) {                                                               \
                    uint32_t *restrict place = places + s * step;                                                     \
                    codes[s][i] = sorted[place[key[s][i]]++];                                                         \
                    codes[s][i + 1] = sorted[place[key[s][i + 1]]++];                                                 \
                }                                                                                                     \
            if (i < run)                                                                                              \
                for (size_t s = 0; s < SEGMENTS; s++) codes[s][i] = sorted[places[s * step + key[s][i]]++];           \
            for (size_t s = 0; s < SEGMENTS; s++) {                                                                   \
                size_t at = s * segment + first;                                                                      \
                decode_##T(codes[s], prediction + at, run, e->is_float, out + at);                                    \
            }                                                                                                         \
        }                                                                                                             \
        for (size_t i = rest; i < count; i++) {                                                                       \
            keys_##T(e, i, 1, key[0]);                                                                                \
            codes[0][0] = sorted[places[(SEGMENTS - 1) * step + key[0][0]]++];                                        \
            decode_##T(codes[0], prediction + i, 1, e->is_float, out + i);                                            \
        }                                                                                                             \
    }

EXACT_UNITS(uint8_t, 7)
EXACT_UNITS(uint16_t, 15)
EXACT_UNITS(uint32_t, 31)
EXACT_UNITS(uint64_t, 63)

/* planes: (width, count); counts: (1 << bits,), or twice as many with marks. */
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
