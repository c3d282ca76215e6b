/* Positions of kept entries: drawn from a seed, checked, and as ranks (specification, section 11.4).
 * Reference: deltafmt/terms/nm/hashing.py, deltafmt/terms/nm/index/rank.py, deltafmt/methods/sampling.py. */

#define ROW_STEP 0x9E3779B1u
#define BLOCK_STEP 0x85EBCA6Bu
#define MIX_FIRST 0x7FEB352Du
#define MIX_SECOND 0x846CA68Bu
#define FOLD 0xCD9E8D57u
#define SPREAD 0xFFFEB2D5u

INLINE uint32_t mix(uint32_t x) {
    x ^= x >> 16;
    x *= MIX_FIRST;
    x ^= x >> 15;
    x *= MIX_SECOND;
    return x ^ x >> 16;
}

INLINE uint64_t mix64(uint32_t x) {
    uint64_t wide = (uint64_t)(x ^ x >> 16) * FOLD;
    return (wide >> 32 ^ (wide & 0xFFFFFFFFu)) * SPREAD;
}

INLINE uint32_t row_key(uint32_t seed, uint64_t row) {
    return mix(seed + (uint32_t)row * ROW_STEP);
}

INLINE void seeded_of(uint32_t seed, uint64_t first, size_t count, size_t groups, size_t n,
                      size_t m, int lane_bits, uint8_t *restrict out) {
    size_t per_hash = 64 / (size_t)lane_bits;
    uint32_t mask = (uint32_t)m - 1, lane_mask = (1u << lane_bits) - 1;
    int log_m = __builtin_ctz((unsigned)m);
    for (size_t r = 0; r < count; r++) {
        uint32_t key = row_key(seed, first + r), block = 0;
        for (size_t g = 0; g < groups; block++) {
            uint64_t h = mix64(key + block * BLOCK_STEP);
            size_t stop = groups - g < per_hash ? groups : g + per_hash;
            for (; g < stop; g++, h >>= lane_bits, out += n) {
                uint32_t lane = (uint32_t)h & lane_mask;
                uint32_t b = lane & mask, a = (lane >> (log_m - 1) & mask) | 1;
                for (size_t i = 0; i < n; i++) out[i] = (uint8_t)((a * (uint32_t)i + b) & mask);
            }
        }
    }
}

static void seeded(uint32_t seed, uint64_t first, size_t count, size_t groups, size_t n,
                   size_t m, int lane_bits, uint8_t *out) {
#define CALL(N) seeded_of(seed, first, count, groups, N, m, lane_bits, out)
    switch (n) {
    case 1: CALL(1); break;
    case 2: CALL(2); break;
    case 4: CALL(4); break;
    default: CALL(n);
    }
#undef CALL
}

/* Selection sampling: position p is taken with probability (still needed) / (still left). */
static void uniform(uint32_t seed, uint64_t first, size_t count, size_t groups, size_t n,
                    size_t m, uint8_t *out) {
    for (size_t r = 0; r < count; r++) {
        uint32_t key = row_key(seed, first + r);
        for (size_t g = 0; g < groups; g++) {
            size_t needed = n;
            for (size_t p = 0; needed; p++) {
                uint64_t number = mix(key + (uint32_t)(g * m + p) * BLOCK_STEP);
                if (number * (m - p) >> 32 < needed) {
                    *out++ = (uint8_t)p;
                    needed--;
                }
            }
        }
    }
}

static void draw(uint32_t seed, uint64_t first, size_t rows, size_t columns, uint64_t least,
                 uint8_t *restrict out) {
    uint32_t below = least > UINT32_MAX ? UINT32_MAX : (uint32_t)least;
    uint8_t any = least <= UINT32_MAX;
    for (size_t r = 0; r < rows; r++, out += columns) {
        uint32_t key = row_key(seed, first + r);
        for (size_t c = 0; c < columns; c++)
            out[c] = (uint8_t)(any & (mix(key + (uint32_t)c * BLOCK_STEP) >= below));
    }
}

/* Tells whether every position is below m and, where asked for, ascends in its group of n. */
static int positions_ok(const uint8_t *positions, size_t count, size_t n, size_t m, int ascending) {
    uint8_t largest = 0, wrong = 0;
    for (size_t i = 0; i < count * n; i++) largest = positions[i] > largest ? positions[i] : largest;
    if (count && largest >= m) return 0;
    if (ascending)
        for (size_t g = 0; g < count; g++)
            for (size_t i = 1; i < n; i++) wrong |= positions[g * n + i] <= positions[g * n + i - 1];
    return !wrong;
}

/* "rank = C(p_0, 1) + C(p_1, 2) + ... + C(p_{N-1}, N)"; table[i][p] is C(p, i + 1). */
static void rank(const uint8_t *positions, size_t count, size_t n, size_t m, const uint64_t *table, uint64_t *out) {
    for (size_t g = 0; g < count; g++, positions += n) {
        uint64_t sum = 0;
        for (size_t i = 0; i < n; i++) sum += table[i * m + positions[i]];
        out[g] = sum;
    }
}

/* "p_i, from i = N-1 down to 0, is the largest p with C(p, i+1) at most what is left of the rank." */
static void unrank(const uint64_t *ranks, size_t count, size_t n, size_t m, const uint64_t *table, uint8_t *out) {
    for (size_t g = 0; g < count; g++, out += n) {
        uint64_t rest = ranks[g];
        size_t p = m;
        for (size_t i = n; i-- > 0;) {
            /* Each p is below the one before it. C(0, i+1) is 0, so that the search ends at the latest there. */
            if (p) p--;
            while (p && table[i * m + p] > rest) p--;
            out[i] = (uint8_t)p;
            rest -= table[i * m + p];
        }
    }
}
