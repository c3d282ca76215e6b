/* Mutates delta files for the second reader, and mends what would otherwise end every mutation at a checksum.
 *
 * With clang's libFuzzer, LLVMFuzzerCustomMutator mends what libFuzzer has changed. Without, main chooses the changes:
 *
 *     fuzz SECONDS SEED FILE...
 *
 * The same seed gives the same inputs. The harness itself is in driver.c. A finding ends the process: a report of a
 * sanitizer, or a crash; the input is then in `crash.deltafmt` (libFuzzer names its own).
 */
#define _POSIX_C_SOURCE 200809L
#include "blake3.h"
#include "xxh3.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t length);

enum { MOST = 32768, HEADER = 64, TRAILER = 128, PAGE = 4096 };

static uint64_t state = 1;

static uint64_t draw(uint64_t below) { /* xorshift64*, whose upper bits are good enough to choose a byte by */
    state ^= state >> 12, state ^= state << 25, state ^= state >> 27;
    return below ? (state * UINT64_C(2685821657736338717) >> 16) % below : 0;
}

static uint64_t get64(const uint8_t *p) {
    uint64_t x = 0;
    for (int i = 8; i-- > 0;) x = x << 8 | p[i];
    return x;
}

static void put64(uint8_t *p, uint64_t x) {
    for (int i = 0; i < 8; i++) p[i] = (uint8_t)(x >> 8 * i);
}

/* Where the index lies; 0 if the file has none. */
static size_t index_of(const uint8_t *data, size_t size, size_t *length) {
    if (size < PAGE + TRAILER) return 0;
    uint64_t offset = get64(data + size - TRAILER);
    if (offset < PAGE || offset > size - TRAILER) return 0;
    *length = size - TRAILER - (size_t)offset;
    return (size_t)offset;
}

/* A section as the index describes it: `{checksum, codec, kind, length, offset, ...}`. */
typedef struct {
    size_t checksum, start, length;
} place;

/* Read a number of the index; what is none is 0. */
static uint64_t number_at(const uint8_t *data, size_t *at, size_t end) {
    uint64_t value = 0;
    int more = data[*at] == 0xCC ? 1 : data[*at] == 0xCD ? 2 : data[*at] == 0xCE ? 4 : 0;
    if (*at + 9 > end) return 0;
    if (more == 0) return data[(*at)++];
    for (int i = 1; i <= more; i++) value = value << 8 | data[*at + (size_t)i];
    *at += (size_t)more + 1;
    return value;
}

static size_t find_sections(const uint8_t *data, size_t index, size_t length, place *out, size_t most) {
    static const char head[] = "\xA8"
                               "checksum\xC4\x10";
    size_t found = 0, end = index + length;
    for (size_t i = index; i + 64 <= end && found < most; i++) {
        if (memcmp(data + i, head, 11) != 0) continue;
        size_t at = i + 11 + 16;
        if (memcmp(data + at,
                   "\xA5"
                   "codec",
                   6) != 0 ||
            memcmp(data + at + 7,
                   "\xA4"
                   "kind",
                   5) != 0)
            continue;
        if (memcmp(data + at + 13,
                   "\xA6"
                   "length",
                   7) != 0)
            continue;
        at += 20;
        uint64_t bytes = number_at(data, &at, end);
        at += 7;
        uint64_t start = at + 9 <= end ? number_at(data, &at, end) : 0;
        if (start < PAGE || start > index || bytes == 0 || bytes > index - start) continue;
        out[found++] = (place){i + 11, (size_t)start, (size_t)bytes};
    }
    return found;
}

/* Make the lengths of the trailer, the header's checksum and the seal fit. */
static void mend_ends(uint8_t *data, size_t size) {
    size_t length, index = index_of(data, size, &length);
    if (index == 0) return;
    uint8_t *trailer = data + size - TRAILER;
    put64(trailer + 8, length);
    put64(trailer + 16, size);
    put64(data + 56, dlt_xxh3_64(data, 56));
    blake3 hash;
    dlt_blake3_start(&hash);
    dlt_blake3_add(&hash, data, HEADER);
    dlt_blake3_add(&hash, data + index, length);
    dlt_blake3_add(&hash, trailer, 88);
    dlt_blake3_end(&hash, trailer + 88);
}

#ifdef __clang__
size_t LLVMFuzzerMutate(uint8_t *data, size_t size, size_t most);
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t most, unsigned seed);

size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t most, unsigned seed) {
    static uint8_t before[MOST];
    size_t length, index = index_of(data, size, &length);
    if (seed % 8 == 0 || index == 0 || size > MOST || size > most) return LLVMFuzzerMutate(data, size, most);
    memcpy(before, data, size);
    if (seed % 8 < 4) { /* the index alone, which may change its length */
        memcpy(data, before + index, length);
        size_t changed = LLVMFuzzerMutate(data, length, most - index - TRAILER);
        memmove(data + index, data, changed);
        memcpy(data, before, index);
        memcpy(data + index + changed, before + size - TRAILER, TRAILER);
        size = index + changed + TRAILER;
    } else { /* bytes of a section */
        place places[8];
        size_t count = find_sections(data, index, length, places, 8);
        if (count == 0) return size;
        place *p = &places[seed / 8 % count];
        LLVMFuzzerMutate(data + p->start, p->length, p->length);
        dlt_xxh3_128(data + p->start, p->length, data + p->checksum);
    }
    mend_ends(data, size);
    return size;
}
#else
typedef struct {
    uint8_t *data;
    size_t size;
} seed_file;

/* Numbers at limits, in the forms that the index gives them. */
static const uint8_t numbers[][9] = {
    {1, 0},
    {1, 1},
    {1, 2},
    {1, 7},
    {1, 8},
    {1, 16},
    {1, 32},
    {1, 127},
    {1, 0xFF},
    {1, 0xC0},
    {1, 0xC2},
    {1, 0x80},
    {1, 0x90},
    {2, 0xCC, 0x80},
    {2, 0xCC, 0xFF},
    {3, 0xCD, 1, 0},
    {3, 0xCD, 0xFF, 0xFF},
    {5, 0xCE, 0, 1, 0, 0},
    {5, 0xCE, 0x7F, 0xFF, 0xFF, 0xFF},
    {5, 0xCE, 0xFF, 0xFF, 0xFF, 0xFF},
    {3, 0xCD, 2, 0},
    {3, 0xCD, 0x10, 0},
    {2, 0xD0, 0x80},
    {5, 0xCA, 0, 0, 0, 0},
};

/* One change of some bytes; `from` and `to` bound it. Returns the new size. */
static size_t change(uint8_t *data, size_t size, size_t from, size_t to, int in_place) {
    if (to <= from) return size;
    size_t at = from + (size_t)draw(to - from), count = 1 + (size_t)draw(1u << draw(6));
    if (count > to - at) count = to - at;
    switch (draw(in_place ? 4 : 7)) {
    case 0: data[at] ^= (uint8_t)(1u << draw(8)); break;
    case 1: data[at] = (uint8_t)draw(256); break;
    case 2: data[at] = (uint8_t)(data[at] + (draw(2) ? 1 : 255)); break;
    case 3: memmove(data + at, data + from + (size_t)draw(to - from - count + 1), count); break;
    case 4: { /* a number in the place of one byte */
        const uint8_t *number = numbers[draw(sizeof numbers / sizeof *numbers)];
        if (size + 8 > MOST) break;
        memmove(data + at + number[0], data + at + 1, size - at - 1);
        memcpy(data + at, number + 1, number[0]);
        return size + number[0] - 1;
    }
    case 5: /* bytes that vanish */ memmove(data + at, data + at + count, size - at - count); return size - count;
    default: /* bytes that stand there twice */
        if (size + count > MOST) break;
        memmove(data + at + count, data + at, size - at);
        return size + count;
    }
    return size;
}

/* Change a file in one of four ways; most are mended. */
static size_t mutate(uint8_t *data, size_t size) {
    size_t length = 0, index = index_of(data, size, &length);
    uint64_t kind = draw(16), times = 1 + draw(3);
    if (index == 0 || kind == 0) return change(data, size, 0, size, 0);
    if (kind < 9) {
        for (; times > 0 && length > 0; times--) {
            size_t before = size;
            size = change(data, size, index, index + length, draw(2) == 0);
            length = length + size - before;
        }
    } else if (kind < 15) {
        place places[8];
        size_t count = find_sections(data, index, length, places, 8);
        if (count > 0) {
            const place *p = &places[draw(count)];
            for (; times > 0; times--) change(data, size, p->start, p->start + p->length, 1);
            dlt_xxh3_128(data + p->start, p->length, data + p->checksum);
        }
    } else {
        change(data, size, draw(2) ? size - TRAILER : 0, draw(2) ? size : HEADER, 1);
    }
    if (draw(32)) mend_ends(data, size);
    return size;
}

static uint8_t input[MOST];
static size_t input_size;

#ifdef __SANITIZE_ADDRESS__
void __sanitizer_set_death_callback(void (*callback)(void));

static void keep_input(void) {
    FILE *stream = fopen("crash.deltafmt", "wb");
    if (stream == NULL) return;
    fwrite(input, 1, input_size, stream);
    fclose(stream);
}
#endif

int main(int count, char **arguments) {
    if (count < 4) return fprintf(stderr, "usage: fuzz SECONDS SEED FILE...\n"), 2;
    double seconds = atof(arguments[1]);
    size_t files = 0, most = (size_t)count - 3;
    seed_file *seeds = calloc(most, sizeof *seeds);
    state = strtoull(arguments[2], NULL, 10) * UINT64_C(0x9E3779B97F4A7C15) | 1;
    for (int i = 3; i < count && seeds; i++) {
        FILE *stream = fopen(arguments[i], "rb");
        uint8_t *data = malloc(MOST);
        if (stream == NULL || data == NULL) return fprintf(stderr, "%s: it cannot be read\n", arguments[i]), 5;
        size_t size = fread(data, 1, MOST, stream);
        if (size < MOST && size > 0) seeds[files++] = (seed_file){data, size};
        else free(data);
        fclose(stream);
    }
    if (files == 0) return fprintf(stderr, "no file is of a size to mutate\n"), 2;
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_set_death_callback(keep_input);
#endif
    struct timespec start, now;
    clock_gettime(CLOCK_MONOTONIC, &start);
    uint64_t inputs = 0;
    do {
        for (int i = 0; i < 100; i++, inputs++) {
            const seed_file *from = &seeds[draw(files)];
            memcpy(input, from->data, input_size = from->size);
            input_size = mutate(input, input_size);
            LLVMFuzzerTestOneInput(input, input_size);
        }
        clock_gettime(CLOCK_MONOTONIC, &now);
    } while ((double)(now.tv_sec - start.tv_sec) + 1e-9 * (double)(now.tv_nsec - start.tv_nsec) < seconds);
    printf("%llu inputs, no finding\n", (unsigned long long)inputs);
    for (size_t i = 0; i < files; i++) free(seeds[i].data);
    free(seeds);
    return 0;
}
#endif
