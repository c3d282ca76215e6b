/* BLAKE3; see blake3.h. Eight chunks, or eight parents, are compressed side by side, a lane of a vector each. */
#include "blake3.h"

#include <string.h>

enum { LANES = 8, CHUNK = 1024, BLOCK = 64, WIDEST = 256 };
enum { CHUNK_START = 1, CHUNK_END = 2, PARENT = 4, ROOT = 8 };

static const uint32_t IV[8] = {0x6A09E667, 0xBB67AE85, 0x3C6EF372, 0xA54FF53A,
                               0x510E527F, 0x9B05688C, 0x1F83D9AB, 0x5BE0CD19};

/* The message words of each round: the permutation of the paper, applied once more in each row. */
static const uint8_t ORDER[7][16] = {
    {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}, {2, 6, 3, 10, 7, 0, 4, 13, 1, 11, 12, 5, 9, 14, 15, 8},
    {3, 4, 10, 12, 13, 2, 7, 14, 6, 5, 9, 0, 11, 15, 8, 1}, {10, 7, 12, 9, 14, 3, 13, 15, 4, 0, 11, 2, 5, 8, 1, 6},
    {12, 13, 9, 11, 15, 10, 14, 8, 7, 2, 5, 3, 0, 1, 6, 4}, {9, 14, 11, 5, 8, 12, 15, 1, 13, 3, 0, 10, 2, 6, 4, 7},
    {11, 15, 5, 0, 1, 9, 8, 6, 14, 10, 2, 12, 3, 4, 7, 13},
};

static uint32_t read32(const uint8_t *p) {
    return (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}

static void write_words(uint8_t *out, const uint32_t words[8]) {
    for (int i = 0; i < 32; i++) out[i] = (uint8_t)(words[i / 4] >> (8 * (i % 4)));
}

static void write_all_words(uint8_t *out, uint32_t (*values)[8], size_t count) {
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    memcpy(out, values, 32 * count);
#else
    for (size_t i = 0; i < count; i++) write_words(out + 32 * i, values[i]);
#endif
}

/* The quarter-round G; the same text serves numbers and vectors of numbers. */
#define G(a, b, c, d, x, y)                                                                                    \
    (a += b + (x), d = TURN(d ^ a, 16), c += d, b = TURN(b ^ c, 12), a += b + (y), d = TURN(d ^ a, 8), c += d, \
     b = TURN(b ^ c, 7))
#define ROUND(v, m, o)                                   \
    do {                                                 \
        G(v[0], v[4], v[8], v[12], m[o[0]], m[o[1]]);    \
        G(v[1], v[5], v[9], v[13], m[o[2]], m[o[3]]);    \
        G(v[2], v[6], v[10], v[14], m[o[4]], m[o[5]]);   \
        G(v[3], v[7], v[11], v[15], m[o[6]], m[o[7]]);   \
        G(v[0], v[5], v[10], v[15], m[o[8]], m[o[9]]);   \
        G(v[1], v[6], v[11], v[12], m[o[10]], m[o[11]]); \
        G(v[2], v[7], v[8], v[13], m[o[12]], m[o[13]]);  \
        G(v[3], v[4], v[9], v[14], m[o[14]], m[o[15]]);  \
    } while (0)
#define TURN(x, n) ((x) >> (n) | (x) << (32 - (n)))

/* Compress one block into a chaining value. */
static void compress(uint32_t value[8], const uint8_t block[BLOCK], uint64_t counter, uint32_t length, uint32_t flags) {
    uint32_t m[16], v[16];
    for (int i = 0; i < 16; i++) m[i] = read32(block + 4 * i);
    for (int i = 0; i < 8; i++) v[i] = value[i], v[8 + i] = IV[i];
    v[12] = (uint32_t)counter, v[13] = (uint32_t)(counter >> 32), v[14] = length, v[15] = flags;
    for (int round = 0; round < 7; round++) ROUND(v, m, ORDER[round]);
    for (int i = 0; i < 8; i++) value[i] = v[i] ^ v[8 + i];
}

/* Compress `count` inputs of `blocks` blocks each, one at a time. `step` is added to the counter from one input to the
 * next. */
static void compress_each(const uint8_t *data, size_t count, size_t blocks, uint64_t counter, int step, uint32_t flags,
                          uint32_t first, uint32_t last, uint32_t (*out)[8]) {
    for (size_t n = 0; n < count; n++, counter += (uint64_t)step) {
        uint32_t value[8];
        memcpy(value, IV, sizeof value);
        for (size_t i = 0; i < blocks; i++, data += BLOCK) {
            compress(value, data, counter, BLOCK, flags | (i == 0 ? first : 0) | (i + 1 == blocks ? last : 0));
        }
        memcpy(out[n], value, sizeof value);
    }
}

#ifndef DELTAFMT_PORTABLE
#define DELTAFMT_PORTABLE 0 /* 1 leaves AVX2 out, 2 all vectors: for tests */
#endif
#if DELTAFMT_PORTABLE < 2 && defined(__GNUC__) && defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
#define WIDE 1
typedef uint32_t vec __attribute__((vector_size(4 * LANES)));
#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (vec){__VA_ARGS__})
#endif

/* Pairs of words, pairs of pairs, and halves change places, so that eight vectors, one an input, become one a word. */
#define TURN_WORDS(a, b, c, d)                                                                       \
    (s0 = SHUFFLE(a, b, 0, 8, 1, 9, 4, 12, 5, 13), s1 = SHUFFLE(a, b, 2, 10, 3, 11, 6, 14, 7, 15),   \
     s2 = SHUFFLE(c, d, 0, 8, 1, 9, 4, 12, 5, 13), s3 = SHUFFLE(c, d, 2, 10, 3, 11, 6, 14, 7, 15),   \
     a = SHUFFLE(s0, s2, 0, 1, 8, 9, 4, 5, 12, 13), b = SHUFFLE(s0, s2, 2, 3, 10, 11, 6, 7, 14, 15), \
     c = SHUFFLE(s1, s3, 0, 1, 8, 9, 4, 5, 12, 13), d = SHUFFLE(s1, s3, 2, 3, 10, 11, 6, 7, 14, 15))
#define TURN_HALVES(a, b) \
    (s0 = SHUFFLE(a, b, 0, 1, 2, 3, 8, 9, 10, 11), s1 = SHUFFLE(a, b, 4, 5, 6, 7, 12, 13, 14, 15), a = s0, b = s1)
#define TRANSPOSE(r, i)                                                                                  \
    (TURN_WORDS(r[i], r[i + 1], r[i + 2], r[i + 3]), TURN_WORDS(r[i + 4], r[i + 5], r[i + 6], r[i + 7]), \
     TURN_HALVES(r[i], r[i + 4]), TURN_HALVES(r[i + 1], r[i + 5]), TURN_HALVES(r[i + 2], r[i + 6]),      \
     TURN_HALVES(r[i + 3], r[i + 7]))

#define EACH8(statement) \
    (statement(0), statement(1), statement(2), statement(3), statement(4), statement(5), statement(6), statement(7))
#define LOAD(l) (memcpy(&m[l], p + stride * (l), 32), memcpy(&m[8 + (l)], p + stride * (l) + 32, 32))
#define SAME(x) ((vec){x, x, x, x, x, x, x, x})
#define START(w) (value[w] = SAME(IV[w]))
#define STATE(w) (v[w] = value[w])
#define VALUE(w) (value[w] = v[w] ^ v[8 + (w)])

#define WIDE_NAME wide_plain
#define WIDE_TARGET
#include "blake3_wide.h"
#undef WIDE_NAME
#undef WIDE_TARGET

typedef void wide_function(const uint8_t *, size_t, uint64_t, int, uint32_t, uint32_t, uint32_t, uint32_t (*)[8]);

#if defined(__x86_64__) && DELTAFMT_PORTABLE == 0
#define WIDE_NAME wide_avx2
#define WIDE_TARGET __attribute__((target("avx2")))
#include "blake3_wide.h"

static wide_function *choose(void) { return __builtin_cpu_supports("avx2") ? wide_avx2 : wide_plain; }
#else
static wide_function *choose(void) { return wide_plain; }
#endif
#else
#define WIDE 0
#endif

/* Compress inputs: eight at a time, and what is left one at a time. */
static void compress_many(const uint8_t *data, size_t count, size_t blocks, uint64_t counter, int step, uint32_t flags,
                          uint32_t first, uint32_t last, uint32_t (*out)[8]) {
#if WIDE
    wide_function *wide = choose();
    for (; count >= LANES;
         count -= LANES, counter += (uint64_t)(step * LANES), out += LANES, data += LANES * blocks * BLOCK) {
        wide(data, blocks, counter, step, flags, first, last, out);
    }
#endif
    compress_each(data, count, blocks, counter, step, flags, first, last, out);
}

/* The chaining value of a whole subtree of `count` chunks, a power of two up to WIDEST. */
static void subtree(const uint8_t *data, size_t count, uint64_t counter, uint32_t value[8]) {
    uint32_t values[WIDEST][8];
    uint8_t blocks[WIDEST / 2 * BLOCK];
    compress_many(data, count, CHUNK / BLOCK, counter, 1, 0, CHUNK_START, CHUNK_END, values);
    for (; count > 1; count /= 2) {
        write_all_words(blocks, values, count);
        compress_many(blocks, count / 2, 1, 0, 0, PARENT, 0, 0, values);
    }
    memcpy(value, values[0], 32);
}

/* The chaining value of two subtrees. */
static void join(const uint32_t left[8], const uint32_t right[8], uint32_t flags, uint32_t value[8]) {
    uint8_t block[BLOCK];
    write_words(block, left);
    write_words(block + 32, right);
    memcpy(value, IV, 32);
    compress(value, block, 0, BLOCK, PARENT | flags);
}

/* Put a subtree of `count` chunks on the stack; a subtree that is now whole takes the place of its halves. */
static void push(blake3 *hash, uint32_t value[8], uint64_t count) {
    for (uint64_t subtrees = hash->chunks / count; subtrees & 1; subtrees >>= 1)
        join(hash->stack[--hash->depth], value, 0, value);
    memcpy(hash->stack[hash->depth++], value, 32);
    hash->chunks += count;
}

void dlt_blake3_start(blake3 *hash) { hash->filled = 0, hash->chunks = 0, hash->depth = 0; }

/* `kept` bytes at least are kept back: 1, as the input may end here, or 0. */
static void add(blake3 *hash, const uint8_t *p, size_t length, size_t kept) {
    uint32_t value[8];
    while (length > 0) {
        if (hash->filled == CHUNK) {
            subtree(hash->chunk, 1, hash->chunks, value);
            push(hash, value, 1);
            hash->filled = 0;
        }
        if (hash->filled == 0 && length >= CHUNK + kept) {
            /* The widest subtree that may start here. */
            size_t count = WIDEST;
            while (hash->chunks % count != 0 || count * CHUNK + kept > length) count /= 2;
            subtree(p, count, hash->chunks, value);
            push(hash, value, count);
            p += count * CHUNK, length -= count * CHUNK;
        } else {
            size_t taken = CHUNK - hash->filled < length ? CHUNK - hash->filled : length;
            memcpy(hash->chunk + hash->filled, p, taken);
            hash->filled += taken, p += taken, length -= taken;
        }
    }
}

void dlt_blake3_add(blake3 *hash, const void *data, size_t length) { add(hash, data, length, 1); }
void dlt_blake3_add_part(blake3 *hash, const void *data, size_t length) { add(hash, data, length, 0); }

void dlt_blake3_end(const blake3 *hash, uint8_t out[32]) {
    uint32_t value[8];
    uint32_t root = hash->depth == 0 ? ROOT : 0, start = CHUNK_START;
    size_t done = 0;
    memcpy(value, IV, 32);
    for (; hash->filled - done > BLOCK; done += BLOCK, start = 0)
        compress(value, hash->chunk + done, hash->chunks, BLOCK, start);
    uint8_t block[BLOCK] = {0};
    memcpy(block, hash->chunk + done, hash->filled - done);
    compress(value, block, hash->chunks, (uint32_t)(hash->filled - done), start | CHUNK_END | root);
    for (int i = hash->depth; i-- > 0;) join(hash->stack[i], value, i == 0 ? ROOT : 0, value);
    write_words(out, value);
}

void dlt_blake3_of(const void *data, size_t length, uint8_t out[32]) {
    blake3 hash;
    dlt_blake3_start(&hash);
    dlt_blake3_add(&hash, data, length);
    dlt_blake3_end(&hash, out);
}
