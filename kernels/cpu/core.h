/* What all loops share: types, bits of floats, and the table of loops that a processor level has.
 *
 * Every loop gives the same bits as the numpy reference beside which it stands in Python. Sums of floats are never
 * reordered and products are never fused (-ffp-contract=off); sums that are reordered are sums of integers.
 *
 * The loops trust their arguments: module.c has checked every length, dtype and position before a loop runs.
 */
#ifndef DELTAFMT_CORE_H
#define DELTAFMT_CORE_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if !defined(__BYTE_ORDER__) || __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "files are little-endian, and these loops read them as they lie: other machines use the numpy reference"
#endif

#define INLINE static inline __attribute__((always_inline))

enum { TILE_ROWS = 32, WORD_BITS = 32, MAX_PLANES = 8, MAX_KEY_BITS = 11 };

/* A sample that tells of a chunk has so many units at most. */
enum { EXACT_SAMPLE = 8192 };

/* Places are written for so many units at once: an array of `most` places has room for so many more. */
enum { PLACES_RUN = 64 };

/* A frame of Huffman codes is written into so many bytes: it is no longer than its content and the heads of its blocks,
 * but codes of a block are written before it is known whether they are shorter. */
#define FRAME_ROOM(COUNT, SEGMENTS) ((COUNT) + (COUNT) / 2 + 4 * ((SEGMENTS) + (COUNT) / (1 << 17)) + 512)

/* Bytes of scratch memory that writing a frame takes. */
enum { FRAME_SCRATCH = 5 << 16 };

/* Units are found in so many parts of a chunk side by side. */
enum { QUARTERS = 4 };

/* Keys are counted in runs, with COMMON numbers for each run. Finding units lists those of rare keys, of which there are
 * at most one in RARE. */
enum { KEY_RUN = 512, COMMON = 8, RARE = 8 };
#define KEY_RUNS(COUNT) (((COUNT) + KEY_RUN - 1) / KEY_RUN)

/* Dtypes of weights and scales. */
enum dtype { BF16, F16, F32 };

/* What a loop returns. Other than DONE, the reference has to run again and name the place. */
enum { DONE, NOT_FINITE, SCALE_OVERFLOW, BROKEN };

/* How codes are made from values (specification, section 12.1; deltafmt/methods/quantize.py). */
struct quantizer {
    int bits, midtread, search, refinements;
    enum dtype scale_dtype;
    size_t group; /* consecutive entries that share a scale, at least 1 */
    size_t candidates;
    const float *factors; /* the reciprocals of the steps to try */
};

/* Positions of kept entries of a run of rows: (mask rows, groups, n), each below m; row r uses mask row r / share. */
struct kept {
    const uint8_t *positions;
    size_t groups, n, m, share, columns;
};

struct nm_pack {
    const void *finetuned, *base;
    enum dtype finetuned_dtype, base_dtype;
    size_t rows;
    struct kept kept;
    float factor;
    struct quantizer quantizer;
    uint32_t *codes; /* (tiles, words, 32) */
    void *scales;    /* (tiles, scales per row, 32), BF16 or F32 */
};

struct nm_unpack {
    const uint32_t *codes;
    const float *scales; /* (rows, scales per row) */
    size_t rows, group;
    int bits, top;
    struct kept kept;
    const void *base;
    enum dtype base_dtype, dtype;
    void *out;
};

struct sparse {
    size_t rows, columns, span, blocks, entries;
    uint32_t filler;
    const int64_t *ends, *positions; /* (rows,) and (entries,) */
};

struct sparse_tile {
    size_t lanes, columns, slots; /* rows of the tile that exist; slots of the tile */
    size_t span, blocks;
    uint32_t filler;
    const void *gaps; /* (32, slots), of gap_bytes each */
    size_t gap_bytes;
    const int64_t *starts; /* (blocks + 1,), counted from the tile's first slot */
    const uint8_t *codes;  /* (32, slots), or NULL where values are stored as they are */
    int top;
    const float *scales; /* (32,) */
    const void *values;  /* (slots, 32) */
    enum dtype dtype;
    float *out; /* (lanes, columns), zeros */
};

/* A chunk of an exact tensor: units of `width` bytes, and the bits of the prediction that sort them. */
struct exact {
    const void *values, *prediction; /* (count,); no values in exact_join */
    size_t count, width;
    int is_float, shift, bits;
    const uint8_t *marks; /* (count,): which units are sorted behind all others; NULL for none */
    uint8_t *planes;      /* (width, count), `stride` bytes apart */
    size_t stride;
    uint32_t *table;      /* scratch of counts: find_scratch bytes */
    void *out, *sorted;   /* (count,); out in exact_join; sorted is scratch */
};

INLINE size_t all_keys(const struct exact *e) { return (e->marks ? (size_t)2 : 1) << e->bits; }

/* Units of fewer than LEAST_KEYED, or of more keys than a byte has, are counted one by one. */
enum { LEAST_KEYED = 1 << 14 };
INLINE int may_be_keyed(const struct exact *e) { return !e->marks && e->bits <= 8 && e->count >= LEAST_KEYED; }

/* Bytes of scratch memory that finding units takes: two numbers for each key and quarter, or what is said of runs above. */
INLINE size_t find_scratch(const struct exact *e) {
    size_t plain = 2 * QUARTERS * all_keys(e), keyed = may_be_keyed(e) ? COMMON * KEY_RUNS(e->count) + e->count / RARE : 0;
    return (plain > keyed ? plain : keyed) * sizeof(uint32_t);
}

/* The loops of one processor level. Scratch memory comes from the caller: `row` bytes as module.c computes them. */
struct loops {
    const char *level;

    int (*subtract)(const void *finetuned, enum dtype, const void *base, enum dtype, size_t count, float *out);
    void (*add)(const void *base, enum dtype, const float *delta, size_t count, void *out, enum dtype);

    void (*seeded)(uint32_t seed, uint64_t first, size_t count, size_t groups, size_t n, size_t m,
                   int lane_bits, uint8_t *out);
    void (*uniform)(uint32_t seed, uint64_t first, size_t count, size_t groups, size_t n, size_t m,
                    uint8_t *out);
    void (*draw)(uint32_t seed, uint64_t first, size_t rows, size_t columns, uint64_t least,
                 uint8_t *out);
    int (*positions_ok)(const uint8_t *positions, size_t count, size_t n, size_t m, int ascending);
    void (*rank)(const uint8_t *positions, size_t count, size_t n, size_t m, const uint64_t *table, uint64_t *out);
    void (*unrank)(const uint64_t *ranks, size_t count, size_t n, size_t m, const uint64_t *table, uint8_t *out);

    void (*pack_words)(const void *fields, size_t bytes, size_t rows, size_t count, int width, size_t share,
                       uint32_t *out, void *scratch);
    void (*unpack_words)(const uint32_t *packed, size_t rows, size_t count, size_t first, size_t last, int width,
                         size_t share, void *out, size_t bytes, void *scratch);

    int (*gather)(const void *finetuned, enum dtype, const void *base, enum dtype, size_t rows, const struct kept *,
                  float factor, float *out, void *scratch);
    int (*quantize)(const float *kept, size_t rows, size_t entries, const struct quantizer *, uint8_t *fields,
                    float *scales, void *scratch);
    void (*scatter)(const uint8_t *codes, const float *scales, size_t rows, size_t group, int top, const struct kept *,
                    float *out, void *scratch);
    int (*nm_pack)(const struct nm_pack *, void *scratch);
    void (*nm_unpack)(const struct nm_unpack *, void *scratch);

    void (*dequantize)(const uint8_t *codes, size_t rows, size_t count, int step, const int32_t *offsets,
                       const float *factors, size_t group, float *out);
    void (*add_outer)(const float *u, const float *v, size_t vectors, size_t rows, size_t columns, float *out);

    int (*sparse_needed)(const struct sparse *, int64_t *needed);
    int (*sparse_place)(const struct sparse *, const int64_t *starts, size_t slots, void *gaps, size_t gap_bytes,
                        const void *values, size_t value_bytes, void *placed, int by_slot);
    int (*sparse_tile)(const struct sparse_tile *);
    int (*sparse_within)(const void *gaps, size_t gap_bytes, size_t slots, const int64_t *starts, const int64_t *widths,
                         size_t blocks, uint32_t filler);

    void (*exact_split)(const struct exact *, uint64_t *counts);
    void (*exact_join)(const struct exact *);
    void (*exact_ranks)(const struct exact *, const int64_t *places, size_t number, uint64_t *counts, int64_t *ranks);
    void (*exact_find)(const struct exact *, const int64_t *ranks, size_t number, int64_t *places);
    size_t (*exact_differ)(const struct exact *, size_t most, int64_t *places);
    size_t (*exact_filled)(const struct exact *, size_t most, int64_t *places);
    void (*exact_take)(const void *units, size_t width, const int64_t *places, size_t number, void *out);
    void (*exact_put)(void *units, size_t width, const int64_t *places, size_t number, const void *values);
    void (*exact_gaps)(const int64_t *numbers, size_t count, uint64_t *set, size_t words, uint64_t *counts);

    size_t (*plane_frame)(const uint8_t *data, const uint64_t *ends, size_t segments, uint8_t *out, void *scratch);
    int (*may_repeat)(const uint8_t *data, size_t count);
    void (*count_bytes)(const uint8_t *data, size_t count, uint32_t *counts);
    int (*exact_unrelated)(const struct exact *, const uint64_t *logs);
};

extern const struct loops loops_baseline;
#if defined(__x86_64__)
extern const struct loops loops_x86_64_v3;
#endif

#endif
