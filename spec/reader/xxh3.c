/* XXH3-64 and XXH3-128, seed 0, default secret; see xxh3.h. Names and steps are those of xxHash's description of XXH3.
 */
#include "xxh3.h"

#include <string.h>

/* DELTAFMT_PORTABLE leaves AVX2 out, and with the value 2 all vectors, so that the other code can be tested. */
#if defined(__x86_64__) && defined(__GNUC__) && !defined(DELTAFMT_PORTABLE)
#include <immintrin.h>
#define XXH3_X86 1
#else
#define XXH3_X86 0
#endif

#define PRIME32_1 UINT64_C(0x9E3779B1)
#define PRIME32_2 UINT64_C(0x85EBCA77)
#define PRIME32_3 UINT64_C(0xC2B2AE3D)
#define PRIME64_1 UINT64_C(0x9E3779B185EBCA87)
#define PRIME64_2 UINT64_C(0xC2B2AE3D27D4EB4F)
#define PRIME64_3 UINT64_C(0x165667B19E3779F9)
#define PRIME64_4 UINT64_C(0x85EBCA77C2B2AE63)
#define PRIME64_5 UINT64_C(0x27D4EB2F165667C5)
#define PRIME_MX1 UINT64_C(0x165667919E3779F9)
#define PRIME_MX2 UINT64_C(0x9FB21C651E98DF25)

enum { SECRET_SIZE = 192, STRIPE = 64, STRIPES = (SECRET_SIZE - 64) / 8, BLOCK = STRIPE * STRIPES };

static const uint8_t secret[SECRET_SIZE] = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c, 0xde, 0xd4,
    0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f, 0xcb, 0x79, 0xe6, 0x4e,
    0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21, 0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43,
    0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c, 0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb,
    0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3, 0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19,
    0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8, 0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7,
    0xc7, 0x0b, 0x4f, 0x1d, 0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78,
    0x73, 0x64, 0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb,
    0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e, 0x2b, 0x16,
    0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce, 0x45, 0xcb, 0x3a, 0x8f,
    0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e,
};

typedef struct {
    uint64_t low, high;
} wide;

static uint64_t read32(const uint8_t *p) {
    return (uint64_t)p[0] | (uint64_t)p[1] << 8 | (uint64_t)p[2] << 16 | (uint64_t)p[3] << 24;
}

static uint64_t read64(const uint8_t *p) { return read32(p) | read32(p + 4) << 32; }

static uint64_t swap64(uint64_t x) {
    uint64_t out = 0;
    for (int i = 0; i < 8; i++) out = out << 8 | (x >> (8 * i) & 0xFF);
    return out;
}

static uint64_t swap32(uint64_t x) { return swap64(x) >> 32; }

/* The whole product of two numbers of 64 bits. */
static wide multiply(uint64_t a, uint64_t b) {
    uint64_t low = (a & 0xFFFFFFFF) * (b & 0xFFFFFFFF);
    uint64_t middle = (a >> 32) * (b & 0xFFFFFFFF) + (low >> 32);
    uint64_t other = (a & 0xFFFFFFFF) * (b >> 32) + (middle & 0xFFFFFFFF);
    wide out = {other << 32 | (low & 0xFFFFFFFF), (a >> 32) * (b >> 32) + (middle >> 32) + (other >> 32)};
    return out;
}

static uint64_t fold(uint64_t a, uint64_t b) {
    wide product = multiply(a, b);
    return product.low ^ product.high;
}

static uint64_t avalanche(uint64_t x) {
    x = (x ^ x >> 37) * PRIME_MX1;
    return x ^ x >> 32;
}

static uint64_t avalanche_xxh64(uint64_t x) {
    x = (x ^ x >> 33) * PRIME64_2;
    x = (x ^ x >> 29) * PRIME64_3;
    return x ^ x >> 32;
}

static uint64_t mix(const uint8_t *data, size_t offset) {
    return fold(read64(data) ^ read64(secret + offset), read64(data + 8) ^ read64(secret + offset + 8));
}

/* Inputs of 0 to 16 bytes. */
static wide of_few_bytes(const uint8_t *data, size_t length) {
    wide out;
    if (length == 0) {
        out.low = avalanche_xxh64(read64(secret + 64) ^ read64(secret + 72));
        out.high = avalanche_xxh64(read64(secret + 80) ^ read64(secret + 88));
    } else if (length < 4) {
        uint64_t combined = (uint64_t)data[length - 1] | (uint64_t)length << 8 | (uint64_t)data[0] << 16;
        combined |= (uint64_t)data[length >> 1] << 24;
        uint64_t swapped = swap32(combined);
        out.low = avalanche_xxh64((read32(secret) ^ read32(secret + 4)) ^ combined);
        out.high = avalanche_xxh64((read32(secret + 8) ^ read32(secret + 12)) ^
                                   ((swapped << 13 | swapped >> 19) & 0xFFFFFFFF));
    } else if (length <= 8) {
        uint64_t value = read64(secret + 16) ^ read64(secret + 24) ^ (read32(data) | read32(data + length - 4) << 32);
        out = multiply(value, PRIME64_1 + ((uint64_t)length << 2));
        out.high += out.low << 1;
        out.low ^= out.high >> 3;
        out.low = (out.low ^ out.low >> 35) * PRIME_MX2;
        out.low ^= out.low >> 28;
        out.high = avalanche(out.high);
    } else {
        uint64_t last = read64(data + length - 8);
        uint64_t second = read64(secret + 48) ^ read64(secret + 56) ^ last;
        wide product = multiply(read64(secret + 32) ^ read64(secret + 40) ^ read64(data) ^ last, PRIME64_1);
        product.low += (uint64_t)(length - 1) << 54;
        product.high += second + (second & 0xFFFFFFFF) * (PRIME32_2 - 1);
        product.low ^= swap64(product.high);
        out = multiply(product.low, PRIME64_2);
        out.high = avalanche(out.high + product.high * PRIME64_2);
        out.low = avalanche(out.low);
    }
    return out;
}

static void mix_two(uint64_t sum[2], const uint8_t *one, const uint8_t *two, size_t offset) {
    sum[0] = (sum[0] + mix(one, offset)) ^ (read64(two) + read64(two + 8));
    sum[1] = (sum[1] + mix(two, offset + 16)) ^ (read64(one) + read64(one + 8));
}

/* Inputs of 17 to 240 bytes. */
static wide of_some_bytes(const uint8_t *data, size_t length) {
    uint64_t sum[2] = {(uint64_t)length * PRIME64_1, 0};
    if (length <= 128) {
        for (size_t i = (length - 1) / 32 + 1; i-- > 0;)
            mix_two(sum, data + 16 * i, data + length - 16 * i - 16, 32 * i);
    } else {
        for (size_t i = 0; i < 4; i++) mix_two(sum, data + 32 * i, data + 32 * i + 16, 32 * i);
        sum[0] = avalanche(sum[0]);
        sum[1] = avalanche(sum[1]);
        for (size_t i = 4; i < length / 32; i++) mix_two(sum, data + 32 * i, data + 32 * i + 16, 32 * (i - 4) + 3);
        mix_two(sum, data + length - 16, data + length - 32, 103);
    }
    wide out = {avalanche(sum[0] + sum[1]), 0};
    out.high = 0 - avalanche(sum[0] * PRIME64_1 + sum[1] * PRIME64_4 + (uint64_t)length * PRIME64_2);
    return out;
}

/* One stripe of 64 bytes enters the accumulators. */
static void accumulate(uint64_t sum[8], const uint8_t *stripe, const uint8_t *key) {
    for (int i = 0; i < 8; i++) {
        uint64_t word = read64(stripe + 8 * i), value = word ^ read64(key + 8 * i);
        sum[i ^ 1] += word;
        sum[i] += (value & 0xFFFFFFFF) * (value >> 32);
    }
}

static void scramble(uint64_t sum[8]) {
    for (int i = 0; i < 8; i++) {
        sum[i] = (sum[i] ^ sum[i] >> 47 ^ read64(secret + SECRET_SIZE - 64 + 8 * i)) * PRIME32_1;
    }
}

/* Whole blocks of 1024 bytes: each is 16 stripes and a scrambling. */
static void accumulate_blocks(uint64_t sum[8], const uint8_t *data, size_t blocks) {
    for (size_t block = 0; block < blocks; block++) {
        for (size_t n = 0; n < STRIPES; n++) accumulate(sum, data + BLOCK * block + STRIPE * n, secret + 8 * n);
        scramble(sum);
    }
}

#if XXH3_X86
/* The same with instructions of AVX2. */
__attribute__((target("avx2"))) static void accumulate_blocks_avx2(uint64_t sum[8], const uint8_t *data,
                                                                   size_t blocks) {
    __m256i acc[2], prime = _mm256_set1_epi32((int)PRIME32_1);
    memcpy(acc, sum, sizeof acc);
    for (size_t block = 0; block < blocks; block++, data += BLOCK) {
        for (size_t n = 0; n < STRIPES; n++) {
            for (int half = 0; half < 2; half++) {
                __m256i word = _mm256_loadu_si256((const __m256i *)(const void *)(data + STRIPE * n + 32 * half));
                __m256i key = _mm256_loadu_si256((const __m256i *)(const void *)(secret + 8 * n + 32 * half));
                __m256i value = _mm256_xor_si256(word, key);
                __m256i product = _mm256_mul_epu32(value, _mm256_shuffle_epi32(value, 0x31));
                acc[half] = _mm256_add_epi64(acc[half], _mm256_add_epi64(product, _mm256_shuffle_epi32(word, 0x4E)));
            }
        }
        for (int half = 0; half < 2; half++) {
            __m256i key = _mm256_loadu_si256((const __m256i *)(const void *)(secret + SECRET_SIZE - 64 + 32 * half));
            __m256i value = _mm256_xor_si256(acc[half], _mm256_xor_si256(_mm256_srli_epi64(acc[half], 47), key));
            __m256i high = _mm256_mul_epu32(_mm256_srli_epi64(value, 32), prime);
            acc[half] = _mm256_add_epi64(_mm256_mul_epu32(value, prime), _mm256_slli_epi64(high, 32));
        }
    }
    memcpy(sum, acc, sizeof acc);
}
#endif

static uint64_t merge(const uint64_t sum[8], uint64_t start, size_t offset) {
    for (size_t i = 0; i < 8; i += 2) {
        start += fold(sum[i] ^ read64(secret + offset + 8 * i), sum[i + 1] ^ read64(secret + offset + 8 * i + 8));
    }
    return avalanche(start);
}

void dlt_xxh3_start(xxh3_run *run) {
    static const uint64_t start[8] = {PRIME32_3, PRIME64_1, PRIME64_2, PRIME64_3,
                                      PRIME64_4, PRIME32_2, PRIME64_5, PRIME32_1};
    memcpy(run->sum, start, sizeof start);
    run->blocks = 0;
}

void dlt_xxh3_advance(xxh3_run *run, const uint8_t *data, size_t length, size_t position) {
    /* The last block, even a full one, is not scrambled: it waits for the end. */
    size_t most = length ? (length - 1) / BLOCK : 0, blocks = position / BLOCK < most ? position / BLOCK : most;
    if (blocks <= run->blocks) return;
    const uint8_t *from = data + BLOCK * run->blocks;
#if XXH3_X86
    if (__builtin_cpu_supports("avx2")) accumulate_blocks_avx2(run->sum, from, blocks - run->blocks);
    else
#endif
        accumulate_blocks(run->sum, from, blocks - run->blocks);
    run->blocks = blocks;
}

/* Inputs of 241 bytes and more. */
static wide of_many_bytes(xxh3_run *run, const uint8_t *data, size_t length) {
    dlt_xxh3_advance(run, data, length, length);
    uint64_t *sum = run->sum;
    const uint8_t *last = data + BLOCK * run->blocks;
    size_t left = length - BLOCK * run->blocks;
    for (size_t n = 0; n < (left - 1) / STRIPE; n++) accumulate(sum, last + STRIPE * n, secret + 8 * n);
    accumulate(sum, data + length - STRIPE, secret + SECRET_SIZE - 71);
    wide out = {merge(sum, (uint64_t)length * PRIME64_1, 11), 0};
    out.high = merge(sum, ~((uint64_t)length * PRIME64_2), SECRET_SIZE - 75);
    return out;
}

void dlt_xxh3_end(xxh3_run *run, const uint8_t *data, size_t length, uint8_t out[16]) {
    wide hash = length <= 16    ? of_few_bytes(data, length)
                : length <= 240 ? of_some_bytes(data, length)
                                : of_many_bytes(run, data, length);
    for (int i = 0; i < 8; i++) {
        out[i] = (uint8_t)(hash.high >> (56 - 8 * i));
        out[8 + i] = (uint8_t)(hash.low >> (56 - 8 * i));
    }
}

void dlt_xxh3_128(const uint8_t *data, size_t length, uint8_t out[16]) {
    xxh3_run run;
    dlt_xxh3_start(&run);
    dlt_xxh3_end(&run, data, length, out);
}

/* Inputs of up to 240 bytes; longer ones have the lower half of XXH3-128. */
static uint64_t few_bytes_64(const uint8_t *data, size_t length) {
    if (length == 0) return avalanche_xxh64(read64(secret + 56) ^ read64(secret + 64));
    if (length < 4) return of_few_bytes(data, length).low;
    if (length <= 8) {
        uint64_t x = (read64(secret + 8) ^ read64(secret + 16)) ^ (read32(data + length - 4) | read32(data) << 32);
        x ^= (x << 49 | x >> 15) ^ (x << 24 | x >> 40);
        x *= PRIME_MX2;
        x ^= (x >> 35) + length;
        x *= PRIME_MX2;
        return x ^ x >> 28;
    }
    if (length <= 16) {
        uint64_t low = read64(secret + 24) ^ read64(secret + 32) ^ read64(data);
        uint64_t high = read64(secret + 40) ^ read64(secret + 48) ^ read64(data + length - 8);
        return avalanche((uint64_t)length + swap64(low) + high + fold(low, high));
    }
    uint64_t sum = (uint64_t)length * PRIME64_1;
    if (length <= 128) {
        for (size_t i = 0; i <= (length - 1) / 32; i++) {
            sum += mix(data + 16 * i, 32 * i);
            sum += mix(data + length - 16 * i - 16, 32 * i + 16);
        }
        return avalanche(sum);
    }
    for (size_t i = 0; i < 8; i++) sum += mix(data + 16 * i, 16 * i);
    sum = avalanche(sum);
    for (size_t i = 8; i < length / 16; i++) sum += mix(data + 16 * i, 16 * (i - 8) + 3);
    return avalanche(sum + mix(data + length - 16, 136 - 17));
}

uint64_t dlt_xxh3_64(const uint8_t *data, size_t length) {
    xxh3_run run;
    if (length <= 240) return few_bytes_64(data, length);
    dlt_xxh3_start(&run);
    return of_many_bytes(&run, data, length).low;
}
