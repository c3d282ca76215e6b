/* Map a delta file in C: print the first codes, positions and scales of one row.
 *
 *     cc -std=c99 -O2 -Wall -o map_c docs/examples/map_c.c
 *     ./map_c FILE ROW ROWS COLUMNS N M BITS SHARE SEED CODES INDEX SCALES SCALES_PER_ROW SCALE_BYTES
 *
 * CODES, INDEX and SCALES are the `file_offset`s that `deltafmt inspect --json` prints for a tensor of a hot file that
 * is one `nm` term. An INDEX of 0 says that there is none: the positions follow from SEED. ROWS are the rows that the
 * delta covers, SCALE_BYTES = 2 for BF16 and 4 for F32. The host must be little-endian.
 */
#define _POSIX_C_SOURCE 200809L
#include <fcntl.h>
#include <inttypes.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

enum { SHOWN = 16, LANES = 32 };

static const uint8_t *file;
static uint64_t file_size;

static void die(const char *message)
{
    fprintf(stderr, "map_c: %s\n", message);
    exit(1);
}

static uint64_t number(const char *text)
{
    char *end;
    uint64_t value = strtoull(text, &end, 10);
    if (*text == '\0' || *end != '\0' || value >= (UINT64_C(1) << 48))
        die("an argument is not a number");
    return value;
}

/* A buffer of `rows` rows of `per_row` items of `size` bytes, in super-tiles of 32 `share` rows (1 for the index); it
 * must lie inside the file. */
static const void *buffer(uint64_t offset, uint64_t rows, uint64_t share, uint64_t per_row, uint64_t size)
{
    uint64_t bytes;
    if (rows >= (UINT64_C(1) << 28) || per_row >= (UINT64_C(1) << 28))
        die("too many rows or columns");
    bytes = (rows + LANES * share - 1) / (LANES * share) * (LANES * share) * per_row * size;
    if (offset > file_size || bytes > file_size - offset || offset % size)
        die("a buffer leaves the file");
    return file + offset;
}

/* Item w of lane l of tile t is item 32 (t W + w) + l; the rows of a mask row lie in one lane of `share` tiles. */
static uint64_t place(uint64_t row, uint64_t share, uint64_t per_row, uint64_t item)
{
    uint64_t tile = row / (LANES * share) * share + row % share, lane = row % (LANES * share) / share;
    return LANES * (tile * per_row + item) + lane;
}

/* The largest plane that `width` bits allow: a power of two, at most 32. */
static uint64_t plane_of(uint64_t width)
{
    uint64_t plane = 32;
    while (plane > width)
        plane /= 2;
    return plane;
}

/* A field lies in planes, lowest bits first; in each, field i takes the bits i*plane to (i+1)*plane of the row. */
static void print_fields(const char *name, uint64_t offset, uint64_t row, uint64_t rows, uint64_t share, uint64_t count,
                         uint64_t width)
{
    uint64_t i, low, plane, first, per_row = 0;
    const uint32_t *words;
    for (low = 0; low < width; low += plane) {
        plane = plane_of(width - low);
        per_row += (count * plane + 31) / 32;
    }
    words = buffer(offset, rows, share, per_row, 4);
    printf("%s", name);
    for (i = 0; i < count && i < SHOWN; i++) {
        uint64_t value = 0;
        for (low = 0, first = 0; low < width; low += plane) {
            uint64_t word;
            plane = plane_of(width - low);
            word = words[place(row, share, per_row, first + i * plane / 32)];
            value |= (word >> i * plane % 32 & ((UINT64_C(1) << plane) - 1)) << low;
            first += (count * plane + 31) / 32;
        }
        printf(" %" PRIu64, value);
    }
    printf("\n");
}

/* Section 11.4: 32 bits to 32 bits. */
static uint32_t mix(uint32_t x)
{
    x = (x ^ x >> 16) * UINT32_C(0x7FEB352D);
    x = (x ^ x >> 15) * UINT32_C(0x846CA68B);
    return x ^ x >> 16;
}

/* Section 11.4: 32 bits to 64. */
static uint64_t mix64(uint32_t x)
{
    uint64_t product = (uint64_t)(x ^ x >> 16) * UINT32_C(0xCD9E8D57);
    return (product >> 32 ^ (product & UINT32_MAX)) * UINT32_C(0xFFFEB2D5);
}

/* Positions of a mask row that follow from a seed: no byte of the file says them. */
static void print_seeded(uint32_t seed, uint64_t mask_row, uint64_t count, uint32_t n, uint32_t m)
{
    uint32_t key = mix(seed + (uint32_t)mask_row * UINT32_C(0x9E3779B1)), log_m = 0, needed, bits = 4, entry;
    while (UINT32_C(2) << log_m <= m)
        log_m++;
    needed = n == 1 ? log_m : 2 * log_m - 1;
    while (bits < needed)
        bits *= 2;
    printf("positions");
    for (entry = 0; entry < count && entry < SHOWN; entry++) {
        uint32_t group = entry / n, per_hash = 64 / bits;
        uint64_t hash = mix64(key + group / per_hash * UINT32_C(0x85EBCA6B));
        uint32_t lane = (uint32_t)(hash >> bits * (group % per_hash));
        uint32_t factor = (lane >> (log_m - 1) & (m - 1)) | 1, offset = lane & (m - 1);
        printf(" %" PRIu32, (factor * (entry % n) + offset) & (m - 1));
    }
    printf("\n");
}

int main(int argc, char **argv)
{
    uint64_t row, rows, columns, n, m, kept, bits, share, seed, index, per_row, scale_bytes, position_bits, i;
    const void *scales;
    struct stat status;
    void *mapped;
    int descriptor;

    if (argc != 15)
        die("usage: map_c FILE ROW ROWS COLUMNS N M BITS SHARE SEED CODES INDEX SCALES SCALES_PER_ROW SCALE_BYTES");
    descriptor = open(argv[1], O_RDONLY);
    if (descriptor < 0 || fstat(descriptor, &status) != 0 || status.st_size <= 0)
        die("cannot open the file");
    file_size = (uint64_t)status.st_size;
    mapped = mmap(NULL, (size_t)file_size, PROT_READ, MAP_SHARED, descriptor, 0);
    if (mapped == MAP_FAILED)
        die("cannot map the file");
    close(descriptor);
    file = mapped;

    row = number(argv[2]);
    rows = number(argv[3]);
    columns = number(argv[4]);
    n = number(argv[5]);
    m = number(argv[6]);
    bits = number(argv[7]);
    share = number(argv[8]);
    seed = number(argv[9]);
    index = number(argv[11]);
    per_row = number(argv[13]);
    scale_bytes = number(argv[14]);
    if (row >= rows || columns >= (UINT64_C(1) << 28) || m < 2 || m > 255 || n < 1 || n > m || bits < 1 || bits > 8
        || share < 1 || share > 8 || seed > UINT32_MAX || (scale_bytes != 2 && scale_bytes != 4)
        || (!index && (m > 128 || (m & (m - 1)))))
        die("an argument is out of range");
    kept = (columns + m - 1) / m * n;
    for (position_bits = 1; m > UINT64_C(1) << position_bits;)
        position_bits++;
    print_fields("codes", number(argv[10]), row, rows, share, kept, bits);
    if (index)
        print_fields("positions", index, row / share, (rows + share - 1) / share, 1, kept, position_bits);
    else
        print_seeded((uint32_t)seed, row / share, kept, (uint32_t)n, (uint32_t)m);
    scales = buffer(number(argv[12]), rows, share, per_row, scale_bytes);
    printf("scales");
    for (i = 0; i < per_row && i < SHOWN; i++) {
        uint64_t at = place(row, share, per_row, i);
        /* A BF16 is the upper half of a float. */
        uint32_t raw = scale_bytes == 4 ? ((const uint32_t *)scales)[at] : (uint32_t)((const uint16_t *)scales)[at] << 16;
        float scale;
        memcpy(&scale, &raw, sizeof scale);
        printf(" %.9g", scale);
    }
    printf("\n");
    return munmap(mapped, (size_t)file_size) == 0 ? 0 : 1;
}
