/* The second reader of delta files, written from spec/deltafmt-v1.md alone; see deltafmt.h for its use.
 *
 * The sentence of the specification that a line implements stands above it, with the number of its section. The order
 * is that of a reading: errors, msgpack (7.1), the index (7.2 to 7.4, 7.8), opening (3 to 5, 8), raw bytes (5, 6), word
 * streams (11.2), the kinds (11 to 14): checks, then values; sums (10), digests (7.5, 7.6) and verifying (15).
 */
#define _POSIX_C_SOURCE 200809L
#define _DEFAULT_SOURCE
#define _DARWIN_C_SOURCE
#include "deltafmt.h"

#include "blake3.h"
#include "xxh3.h"

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

/* 10.4: no product is fused with a sum. The compiler is told so by -ffp-contract=off, too. */
#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#endif
#if !defined(__BYTE_ORDER__) || __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "this reader uses mapped numbers in place and needs a little-endian machine"
#endif

enum {
    PAGE = 4096,
    ALIGNMENT = 256,
    HEADER = 64,
    TRAILER = 128,
    CHUNK = 262144,
    MAX_NAME = 1024,
    MAX_MEMBERS = 1000000,
    MAX_INDEX = 67108864,
    LANES = 32
};
#define MAX_ELEMENTS (UINT64_C(1) << 48)
#define MAX_RAW (UINT64_C(1) << 40)
enum {
    FEATURE_PARTS = 1,
    FEATURE_LEADING = 2,
    FEATURE_SCALED = 4,
    FEATURE_EXACT = 8,
    FEATURE_PROGRESSIVE = 16,
    FEATURE_PARENT = 32,
    FEATURES = 63
};
enum { OF_TENSORS = 1, OF_ATTACHMENTS = 2, OF_EXACT = 3, SERVED_END = 4 };

#define TRY(call)                              \
    do {                                       \
        dlt_status status_ = (call);           \
        if (status_ != DLT_OK) return status_; \
    } while (0)

typedef struct {
    const uint8_t *p;
    size_t length;
} slice;
typedef struct {
    dlt_dtype dtype;
    dlt_shape shape;
} outline;
typedef struct {
    dlt_text name;
    slice raw;
    outline *known;
} member; /* known: of a tensor that an alias has named */
typedef struct {
    dlt_text name;
    dlt_bytes bytes;
    const uint8_t *digest;
} attachment;
typedef struct {
    dlt_layout layout;
    slice raw;
    size_t index_value;
} layout_entry;
typedef struct {
    dlt_text key, value;
} pair;

typedef struct {
    const uint8_t *checksum;
    uint32_t codec, kind;
    uint64_t length, offset, raw_length;
    enum { UNCHECKED, CHECKING, CHECKED } state; /* CHECKING: dlt_verify takes its checksum on the way */
    xxh3_run run;
    uint64_t *frames; /* codec 1: where each chunk's frame starts in the section, and the end of the last; made at first
                         use */
} section;

struct dlt_file {
    const uint8_t *data;
    uint64_t size;
    int mapped;
    dlt_limits limits;
    uint64_t decoded;
    dlt_info about;
    slice index, raw_metadata, raw_removed;
    const section *served; /* that of kind 4; NULL: the file is not progressive */
    /* What the index of the served part repeats: attachments; layouts to scaled; the sections before `served`. */
    slice raw_attachments, raw_middle, raw_sections;
    member *tensors, *scaled;
    attachment *attachments, *files; /* files: their bytes are their heads */
    layout_entry *layouts;
    section *sections;
    pair *metadata;
    dlt_text *removed;
    uint8_t *chunk; /* the last chunk that was decompressed */
    const section *chunk_of;
    uint64_t chunk_number;
};

/* ---- Errors ---- */

__attribute__((format(printf, 3, 4))) static dlt_status fail(dlt_error *error, dlt_status status, const char *format,
                                                             ...) {
    va_list arguments;
    va_start(arguments, format);
    error->status = status;
    vsnprintf(error->message, sizeof error->message, format, arguments);
    va_end(arguments);
    return status;
}

#define INVALID(error, ...) fail(error, DLT_INVALID, __VA_ARGS__)

/* A text from a file as a message may show it: cut, and without control characters. */
typedef struct {
    char text[72];
} shown;

static shown show(dlt_text text) {
    shown out;
    size_t n = 0;
    for (; n < text.length && n < sizeof out.text - 4; n++) {
        unsigned char c = (unsigned char)text.text[n];
        out.text[n] = (char)(c < 0x20 || c >= 0x7F ? '?' : c);
    }
    if (n < text.length) memcpy(out.text + n, "...", 3), n += 3;
    out.text[n] = 0;
    return out;
}

static dlt_status no_memory(dlt_error *error) { return fail(error, DLT_SYSTEM, "no memory"); }

static int same_text(dlt_text a, dlt_text b) { return a.length == b.length && memcmp(a.text, b.text, a.length) == 0; }

static int is(dlt_text text, const char *word) {
    for (size_t i = 0; i < text.length; i++) {
        if (text.text[i] != word[i] || word[i] == 0) return 0;
    }
    return word[text.length] == 0;
}

/* By code point, which is the order of the bytes of UTF-8. */
static int compare_texts(dlt_text a, dlt_text b) {
    int order = memcmp(a.text, b.text, a.length < b.length ? a.length : b.length);
    return order ? order : (a.length > b.length) - (a.length < b.length);
}

static uint64_t ceil_div(uint64_t a, uint64_t b) { return a / b + (a % b != 0); }
static uint64_t align(uint64_t x, uint64_t to) { return ceil_div(x, to) * to; }
static uint64_t least(uint64_t a, uint64_t b) { return a < b ? a : b; }

static int all_zero(const uint8_t *p, uint64_t length) {
    uint64_t i = 0, word;
    for (; i + 8 <= length; i += 8) {
        memcpy(&word, p + i, 8);
        if (word) return 0;
    }
    for (; i < length; i++) {
        if (p[i]) return 0;
    }
    return 1;
}

static uint32_t read32(const uint8_t *p) {
    uint32_t x;
    memcpy(&x, p, 4);
    return x;
}
static uint64_t read64(const uint8_t *p) {
    uint64_t x;
    memcpy(&x, p, 8);
    return x;
}

/* ---- Msgpack in canonical form (7.1) ---- */

typedef struct {
    const uint8_t *p, *end;
    dlt_error *error;
    dlt_text where; /* what is read: "the index", or a tensor's name */
} cursor;

static dlt_status bad(const cursor *c, const char *what) {
    return INVALID(c->error, "%s: %s", show(c->where).text, what);
}

static dlt_status take(cursor *c, size_t n, const uint8_t **out) {
    *out = c->p;
    if ((size_t)(c->end - c->p) < n) return bad(c, "ends in the middle of a value");
    c->p += n;
    return DLT_OK;
}

/* Read a number of 1, 2, 4 or 8 bytes, big-endian. 7.1: every integer, length and string takes its shortest form. */
static dlt_status read_number(cursor *c, unsigned size, uint64_t shortest, uint64_t *out) {
    const uint8_t *p;
    *out = 0;
    TRY(take(c, size, &p));
    for (unsigned i = 0; i < size; i++) *out = *out << 8 | p[i];
    return *out < shortest ? bad(c, "a number is not canonical: it has a shorter form") : DLT_OK;
}

static dlt_status read_integer(cursor *c, const char *what, uint64_t smallest, uint64_t largest, uint64_t *out) {
    const uint8_t *p;
    TRY(take(c, 1, &p));
    if (*p < 0x80) *out = *p;
    else if (*p == 0xCC) TRY(read_number(c, 1, 0x80, out));
    else if (*p == 0xCD) TRY(read_number(c, 2, 0x100, out));
    else if (*p == 0xCE) TRY(read_number(c, 4, 0x10000, out));
    else if (*p == 0xCF) TRY(read_number(c, 8, UINT64_C(0x100000000), out));
    else return INVALID(c->error, "%s: %s is not an integer from 0 up", show(c->where).text, what);
    if (*out < smallest || *out > largest) {
        return INVALID(c->error, "%s: %s is %llu, which is not %llu to %llu", show(c->where).text, what,
                       (unsigned long long)*out, (unsigned long long)smallest, (unsigned long long)largest);
    }
    return DLT_OK;
}

static dlt_status check_utf8(const cursor *c, const uint8_t *p, size_t n) {
    const uint8_t *end = p + n;
    while (p < end) {
        uint64_t eight;
        if (end - p >= 8 && (memcpy(&eight, p, 8), (eight & UINT64_C(0x8080808080808080)) == 0)) {
            p += 8;
            continue;
        }
        uint32_t code = *p++;
        if (code < 0x80) continue;
        int more = code >= 0xF0 ? 3 : code >= 0xE0 ? 2 : 1;
        static const uint32_t smallest[4] = {0, 0x80, 0x800, 0x10000};
        if (code < 0xC2 || code > 0xF4 || end - p < more) return bad(c, "a string is not UTF-8");
        code &= 0x3Fu >> more;
        for (int i = 0; i < more; i++, p++) {
            if ((*p & 0xC0) != 0x80) return bad(c, "a string is not UTF-8");
            code = code << 6 | (*p & 0x3F);
        }
        if (code < smallest[more] || code > 0x10FFFF || (code >= 0xD800 && code < 0xE000))
            return bad(c, "a string is not UTF-8");
    }
    return DLT_OK;
}

static dlt_status read_string(cursor *c, dlt_text *out) {
    const uint8_t *p;
    uint64_t length;
    TRY(take(c, 1, &p));
    if (*p >= 0xA0 && *p < 0xC0) length = *p & 0x1F;
    else if (*p == 0xD9) TRY(read_number(c, 1, 32, &length));
    else if (*p == 0xDA) TRY(read_number(c, 2, 0x100, &length));
    else if (*p == 0xDB) TRY(read_number(c, 4, 0x10000, &length));
    else return bad(c, "a value is not a string where one belongs");
    TRY(take(c, (size_t)length, &p));
    out->text = (const char *)p;
    out->length = (size_t)length;
    return check_utf8(c, p, (size_t)length);
}

static dlt_status read_bytes(cursor *c, slice *out) {
    const uint8_t *p;
    uint64_t length;
    TRY(take(c, 1, &p));
    if (*p == 0xC4) TRY(read_number(c, 1, 0, &length));
    else if (*p == 0xC5) TRY(read_number(c, 2, 0x100, &length));
    else if (*p == 0xC6) TRY(read_number(c, 4, 0x10000, &length));
    else return bad(c, "a value is not a byte string where one belongs");
    TRY(take(c, (size_t)length, &out->p));
    out->length = (size_t)length;
    return DLT_OK;
}

static dlt_status read_digest(cursor *c, size_t length, const uint8_t **out) {
    slice bytes;
    TRY(read_bytes(c, &bytes));
    if (bytes.length != length) return bad(c, "a digest or checksum has another length");
    *out = bytes.p;
    return DLT_OK;
}

/* 9: tensors, and members of any map or array of the index: 1,000,000. Each has a byte at least, so the file pays for
 * them. */
static dlt_status read_count(cursor *c, uint8_t few, uint8_t few_end, uint8_t two, uint8_t four, const char *what,
                             size_t *out) {
    const uint8_t *p;
    uint64_t count;
    TRY(take(c, 1, &p));
    if (*p >= few && *p < few_end) count = *p & 0xF;
    else if (*p == two) TRY(read_number(c, 2, 16, &count));
    else if (*p == four) TRY(read_number(c, 4, 0x10000, &count));
    else return INVALID(c->error, "%s: a value is not %s where one belongs", show(c->where).text, what);
    if (count > MAX_MEMBERS)
        return INVALID(c->error, "%s: %s has more than 1,000,000 members", show(c->where).text, what);
    if (count > (uint64_t)(c->end - c->p)) return bad(c, "ends in the middle of a value");
    *out = (size_t)count;
    return DLT_OK;
}

static dlt_status read_map(cursor *c, size_t *count) { return read_count(c, 0x80, 0x90, 0xDE, 0xDF, "a map", count); }
static dlt_status read_array(cursor *c, size_t *count) {
    return read_count(c, 0x90, 0xA0, 0xDC, 0xDD, "an array", count);
}

/* The keys of most maps are known. As they are sorted, each can be expected in its place. */
static dlt_status other_key(cursor *c, const char *key) {
    dlt_text found;
    TRY(read_string(c, &found));
    return INVALID(c->error, "%s: expected the key %s, found %s", show(c->where).text, key, show(found).text);
}

/* A key of fewer than 32 bytes: its form is one byte and the text. */
#define expect_key(c, key)                                                                  \
    ((size_t)((c)->end - (c)->p) >= sizeof(key) && *(c)->p == (0xA0 | (sizeof(key) - 1)) && \
             memcmp((c)->p + 1, key, sizeof(key) - 1) == 0                                  \
         ? ((c)->p += sizeof(key), DLT_OK)                                                  \
         : other_key(c, key))

/* Whether a key that a map need not have comes next; it is read then. */
#define is_key(c, key)                                                                     \
    ((size_t)((c)->end - (c)->p) >= sizeof(key) && *(c)->p == (0xA0 | (sizeof(key) - 1)) && \
     memcmp((c)->p + 1, key, sizeof(key) - 1) == 0 && ((c)->p += sizeof(key), 1))

static dlt_status expect_map(cursor *c, size_t count) {
    size_t found;
    TRY(read_map(c, &found));
    return found == count ? DLT_OK : bad(c, "a map lacks a key, or has one too many");
}

/* 7.1: map keys are strings, unique, sorted by code point. */
static dlt_status in_order(const cursor *c, dlt_text before, dlt_text name, const char *what) {
    if (before.text == NULL || compare_texts(before, name) < 0) return DLT_OK;
    return INVALID(c->error, "%s: %s are not sorted and unique at %s", show(c->where).text, what, show(name).text);
}

/* 9: the name of a tensor, of a part, of a removed tensor or of an attachment: 1 to 1,024 bytes. */
static dlt_status read_name(cursor *c, dlt_text *name) {
    TRY(read_string(c, name));
    return name->length >= 1 && name->length <= MAX_NAME ? DLT_OK : bad(c, "a name has not 1 to 1,024 bytes");
}

/* Find a word in a list; the position is the value of its enumeration. */
static dlt_status read_word(cursor *c, const char *what, const char *const *words, size_t count, unsigned *out) {
    dlt_text found;
    TRY(read_string(c, &found));
    for (size_t i = 0; i < count; i++) {
        if (words[i] && is(found, words[i])) return *out = (unsigned)i, DLT_OK;
    }
    return INVALID(c->error, "%s: unknown %s %s", show(c->where).text, what, show(found).text);
}

/* ---- Names and dtypes ---- */

static const char *const DTYPES[DLT_DTYPES] = {
    "BOOL",    "U8",      "I8",      "U16",     "I16",         "U32",         "I32", "U64",  "I64", "F4",  "F6_E2M3",
    "F6_E3M2", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F16", "BF16", "F32", "F64", "C64",
};
static const uint8_t DTYPE_BITS[DLT_DTYPES] = {8, 8, 8, 16, 16, 32, 32, 64, 64, 4,  6,
                                               6, 8, 8, 8,  8,  8,  16, 16, 32, 64, 64};
static const char *const ACTIONS[5] = {"same", "replace", "add", "alias", "exact"};
static const char *const KINDS[4] = {"nm", "lowbit", "lowrank", "sparse"};
static const char *const GRIDS[3] = {"midtread", "midrise", "asymmetric"};
static const char *const INDEXES[3] = {"seeded", "fixed", "rank"};

const char *dlt_dtype_name(dlt_dtype dtype) { return DTYPES[dtype]; }
uint32_t dlt_dtype_bits(dlt_dtype dtype) { return DTYPE_BITS[dtype]; }
const char *dlt_action_name(dlt_action action) { return ACTIONS[action]; }
const char *dlt_kind_name(dlt_kind kind) { return KINDS[kind]; }

/* A dtype out of `allowed`, a bit each. */
static dlt_status read_dtype(cursor *c, const char *what, uint32_t allowed, dlt_dtype *out) {
    unsigned found;
    TRY(read_word(c, what, DTYPES, DLT_DTYPES, &found));
    if (!(allowed >> found & 1)) return INVALID(c->error, "%s: %s is %s", show(c->where).text, what, DTYPES[found]);
    *out = (dlt_dtype)found;
    return DLT_OK;
}

#define BIT(dtype) (1u << (dtype))
enum { ANY_DTYPE = (1 << DLT_DTYPES) - 1 };

/* 9: dimensions of a tensor: 8; elements of a tensor, sizes of 0 counted as 1: 2^48. */
static dlt_status read_shape(cursor *c, dlt_shape *shape, uint64_t *elements) {
    size_t count;
    uint64_t bound = 1;
    TRY(read_array(c, &count));
    if (count > DLT_MAX_DIMENSIONS) return bad(c, "a tensor has more than 8 dimensions");
    shape->count = (uint32_t)count;
    *elements = 1;
    for (size_t i = 0; i < count; i++) {
        TRY(read_integer(c, "a size", 0, UINT64_MAX, &shape->sizes[i]));
        uint64_t size = shape->sizes[i] ? shape->sizes[i] : 1;
        if (size > MAX_ELEMENTS / bound) return bad(c, "a tensor has more than 2^48 elements");
        bound *= size;
        *elements *= shape->sizes[i];
    }
    return DLT_OK;
}

static int same_shape(const dlt_shape *a, const dlt_shape *b) {
    return a->count == b->count && memcmp(a->sizes, b->sizes, a->count * sizeof a->sizes[0]) == 0;
}

/* Bytes of a tensor. 7.4: elements of fewer than 8 bits are packed without gaps. */
static dlt_status bytes_of(const cursor *c, dlt_dtype dtype, uint64_t elements, uint64_t *out) {
    if (elements * DTYPE_BITS[dtype] % 8 != 0) return bad(c, "the bits of a tensor are not whole bytes");
    *out = elements * DTYPE_BITS[dtype] / 8;
    return DLT_OK;
}

/* ---- Layouts (7.3) ---- */

static dlt_status read_bits(cursor *c, dlt_layout *l) {
    uint64_t bits;
    TRY(expect_key(c, "bits"));
    TRY(read_integer(c, "bits", 1, 8, &bits));
    l->bits = (uint32_t)bits;
    return DLT_OK;
}

static dlt_status read_grid(cursor *c, dlt_layout *l) {
    unsigned grid;
    TRY(expect_key(c, "grid"));
    TRY(read_word(c, "grid", GRIDS, 3, &grid));
    l->grid = (dlt_grid)grid;
    /* 11.1, 12.1: midtread needs k >= 2. */
    return l->grid == DLT_MIDTREAD && l->bits < 2 ? bad(c, "a midtread grid of 1 bit") : DLT_OK;
}

static dlt_status read_scales(cursor *c, dlt_layout *l) {
    uint64_t group;
    TRY(expect_key(c, "scale_dtype"));
    TRY(read_dtype(c, "scale_dtype", BIT(DLT_BF16) | BIT(DLT_F32), &l->scale_dtype));
    TRY(expect_key(c, "scale_group"));
    TRY(read_integer(c, "scale_group", 0, INT32_MAX, &group));
    l->scale_group = (uint32_t)group;
    return DLT_OK;
}

/* C(n, k), or UINT64_MAX if it is 2^64 - 1 or more. */
static uint64_t binomial(unsigned n, unsigned k) {
    if (k > n) return 0;
    if (k > n - k) k = n - k;
    uint64_t row[129] = {1};
    for (unsigned i = 1; i <= n; i++) {
        for (unsigned j = k < i ? k : i; j > 0; j--)
            row[j] = row[j] > UINT64_MAX - row[j - 1] ? UINT64_MAX : row[j] + row[j - 1];
    }
    return row[k];
}

static dlt_status expect_kind(cursor *c, dlt_kind kind) {
    unsigned found;
    TRY(expect_key(c, "kind"));
    TRY(read_word(c, "layout", KINDS, 4, &found));
    return found == (unsigned)kind ? DLT_OK : bad(c, "the keys of a layout are those of another kind");
}

/* 11.1. Keys in order: bits, grid, group, index, keep, kind, scale_dtype, scale_group, share. */
static dlt_status read_nm(cursor *c, dlt_layout *l, const uint8_t **index_value) {
    uint64_t group, keep, share;
    unsigned index;
    TRY(read_bits(c, l));
    if (l->bits == 7) return bad(c, "bits k = 7 of nm");
    TRY(read_grid(c, l));
    if (l->grid == DLT_ASYMMETRIC) return bad(c, "an asymmetric grid of nm");
    TRY(expect_key(c, "group"));
    TRY(read_integer(c, "group M", 2, 255, &group));
    TRY(expect_key(c, "index"));
    *index_value = c->p;
    TRY(read_word(c, "index", INDEXES, 3, &index));
    TRY(expect_key(c, "keep"));
    TRY(read_integer(c, "keep N", 1, group, &keep));
    TRY(expect_kind(c, DLT_NM));
    TRY(read_scales(c, l));
    TRY(expect_key(c, "share"));
    TRY(read_integer(c, "share", 1, 8, &share));
    l->group = (uint32_t)group, l->keep = (uint32_t)keep, l->share = (uint32_t)share, l->index = (dlt_index)index;
    if (share & (share - 1)) return bad(c, "share is not 1, 2, 4 or 8");
    /* seeded: M a power of two, at most 128. */
    if (index == DLT_SEEDED && (group > 128 || group & (group - 1)))
        return bad(c, "a seeded index whose M is no power of two up to 128");
    /* rank: C(M, N) < 2^64. UINT64_MAX itself is no binomial coefficient of M up to 255. */
    if (index == DLT_RANK && binomial(l->group, l->keep) == UINT64_MAX)
        return bad(c, "a rank index whose C(M, N) is not below 2^64");
    return DLT_OK;
}

/* 13.1, 14.1: BF16, F16 or F32: as values of that dtype; or a map {bits, grid, scale_dtype, scale_group}: as codes. */
static dlt_status read_values(cursor *c, dlt_layout *l) {
    if (c->p < c->end && *c->p >= 0xA0)
        return read_dtype(c, "dtype of values", BIT(DLT_BF16) | BIT(DLT_F16) | BIT(DLT_F32), &l->values);
    l->coded = 1;
    TRY(expect_map(c, 4));
    TRY(read_bits(c, l));
    TRY(read_grid(c, l));
    return read_scales(c, l);
}

static dlt_status read_layout(cursor *c, layout_entry *entry) {
    dlt_layout *l = &entry->layout;
    const uint8_t *start = c->p, *index_value = start;
    static const size_t keys[4] = {9, 6, 3, 4};
    size_t count;
    memset(l, 0, sizeof *l);
    TRY(read_map(c, &count));
    /* The kind decides the keys, and is not the first of them: find it by what the first key is, which differs but for
     * nm and lowbit (axis, bits, factors, gap_bits). A kind that is unknown is found when its key or value is not what
     * it must be. */
    cursor ahead = *c;
    dlt_text first;
    TRY(read_string(&ahead, &first));
    l->kind = is(first, "axis")       ? DLT_LOWBIT
              : is(first, "factors")  ? DLT_LOWRANK
              : is(first, "gap_bits") ? DLT_SPARSE
                                      : DLT_NM;
    if (count != keys[l->kind])
        return bad(c, "a layout of an unknown kind, or whose map lacks a key or has one too many");
    uint64_t number;
    switch (l->kind) {
    case DLT_NM: TRY(read_nm(c, l, &index_value)); break;
    case DLT_LOWBIT: { /* 12.1: axis, bits, grid, kind, scale_dtype, scale_group */
        static const char *const axes[2] = {"row", "column"};
        unsigned axis;
        TRY(expect_key(c, "axis"));
        TRY(read_word(c, "axis", axes, 2, &axis));
        TRY(read_bits(c, l));
        TRY(read_grid(c, l));
        TRY(expect_kind(c, DLT_LOWBIT));
        TRY(read_scales(c, l));
        l->by_column = axis == 1;
        /* column with scale_group 0 and a grid other than asymmetric */
        if (l->by_column && (l->scale_group != 0 || l->grid == DLT_ASYMMETRIC))
            return bad(c, "scales of columns with groups or zero points");
        break;
    }
    case DLT_LOWRANK: /* 13.1: factors, kind, rank */
        TRY(expect_key(c, "factors"));
        TRY(read_values(c, l));
        TRY(expect_kind(c, DLT_LOWRANK));
        TRY(expect_key(c, "rank"));
        TRY(read_integer(c, "rank R", 1, 65535, &number));
        l->rank = (uint32_t)number;
        break;
    case DLT_SPARSE: /* 14.1: gap_bits, kind, span, values */
        TRY(expect_key(c, "gap_bits"));
        TRY(read_integer(c, "gap_bits", 1, 16, &number));
        /* 1 to 8, 16 */
        if (number > 8 && number < 16) return bad(c, "gap_bits is not 1 to 8 or 16");
        l->gap_bits = (uint32_t)number;
        TRY(expect_kind(c, DLT_SPARSE));
        TRY(expect_key(c, "span"));
        TRY(read_integer(c, "span", 256, 65536, &number));
        if (number & (number - 1)) return bad(c, "span is no power of two");
        l->span = (uint32_t)number;
        TRY(expect_key(c, "values"));
        TRY(read_values(c, l));
        /* with scale_group 0 and a grid other than asymmetric: one scale a row */
        if (l->coded && (l->scale_group != 0 || l->grid == DLT_ASYMMETRIC))
            return bad(c, "sparse codes with groups or zero points");
        break;
    }
    entry->raw.p = start;
    entry->raw.length = (size_t)(c->p - start);
    entry->index_value = (size_t)(index_value - start);
    return DLT_OK;
}

/* ---- Word streams and buffers: their sizes (11.2, 11.3, 12.2, 13.2, 14.2) ---- */

/* The planes of a word stream. A width of 64 has two, one of 63 six. */
typedef struct {
    unsigned planes, width;
    unsigned plane_width[7], shift[7];
    uint64_t first_word[7]; /* of each plane, in the words of a row */
    uint64_t count, words;  /* fields and words of a row */
} stream;

static stream stream_of(unsigned width, uint64_t count) {
    stream s = {0};
    s.width = width;
    s.count = count;
    /* Plane 0 has the largest power of two that is at most width and at most 32; the next the largest that the bits
     * left allow. */
    for (unsigned done = 0, w = 32; done < width; done += w) {
        while (w > width - done) w /= 2;
        s.plane_width[s.planes] = w;
        s.shift[s.planes] = done;
        s.first_word[s.planes++] = s.words;
        /* W_j = ceil(count * w_j / 32), without an overflow: w_j divides 32. */
        s.words += ceil_div(count, 32 / w);
    }
    return s;
}

static unsigned bits_for(uint64_t values) { /* ceil(log2 values) */
    unsigned bits = 0;
    while (bits < 64 && (UINT64_C(1) << bits) < values) bits++;
    return bits;
}

static uint64_t groups_of(const dlt_layout *l, uint64_t columns) { return ceil_div(columns, l->group); }

/* Scales of a row, or of a vector, of n codes: 1 if scale_group is 0, otherwise ceil(n / scale_group). */
static uint64_t scales_of(const dlt_layout *l, uint64_t n) { return l->scale_group ? ceil_div(n, l->scale_group) : 1; }

static stream codes_stream(const dlt_layout *l, uint64_t columns) {
    return stream_of(l->bits, l->kind == DLT_NM ? groups_of(l, columns) * l->keep : columns);
}

/* 11.4. fixed: fields of ceil(log2 M) bits, one for each entry; rank: one of ceil(log2 C(M, N)) bits for each group. */
static stream index_stream(const dlt_layout *l, dlt_index index, uint64_t columns) {
    uint64_t groups = groups_of(l, columns);
    if (index == DLT_RANK) return stream_of(bits_for(binomial(l->group, l->keep)), groups);
    return stream_of(bits_for(l->group), groups * l->keep);
}

/* Super-tiles are complete: n rows take ceil(n / (32 v)) * v tiles. */
static uint64_t tiles_of(uint64_t rows, uint32_t v) { return ceil_div(rows, (uint64_t)LANES * v) * v; }

static uint64_t blocks_of(const dlt_layout *l, uint64_t columns) { return ceil_div(columns, l->span); }

static uint64_t size_of(dlt_dtype dtype) { return DTYPE_BITS[dtype] / 8; }

typedef struct {
    const char *name;
    uint64_t length;
} expected;

/* The names and lengths of a term's buffers, in the order of the names. Rows times columns are at most 2^48 and ranks
 * at most either, so nothing here overflows. */
static unsigned expected_buffers(const dlt_layout *l, uint64_t rows, uint64_t columns, uint64_t slots,
                                 expected out[DLT_MAX_BUFFERS]) {
    unsigned n = 0;
    uint64_t tiles = ceil_div(rows, LANES), scale = size_of(l->scale_dtype);
    switch (l->kind) {
    case DLT_NM: {
        uint64_t entries = groups_of(l, columns) * l->keep;
        tiles = tiles_of(rows, l->share);
        out[n++] = (expected){"codes", 128 * tiles * codes_stream(l, columns).words};
        if (l->index != DLT_SEEDED) {
            uint64_t mask_tiles = tiles_of(ceil_div(rows, l->share), 1);
            out[n++] = (expected){"index", 128 * mask_tiles * index_stream(l, l->index, columns).words};
        }
        out[n++] = (expected){"scales", LANES * tiles * scales_of(l, entries) * scale};
        break;
    }
    case DLT_LOWBIT: {
        uint64_t scales = l->by_column ? columns : LANES * tiles * scales_of(l, columns);
        out[n++] = (expected){"codes", 128 * tiles * codes_stream(l, columns).words};
        out[n++] = (expected){"scales", scales * scale};
        if (l->grid == DLT_ASYMMETRIC) out[n++] = (expected){"zero_points", scales};
        break;
    }
    case DLT_LOWRANK:
        for (int side = 0; side < 2; side++) {
            static const char *const names[2][4] = {{"u", "u_codes", "u_scales", "u_zero_points"},
                                                    {"v", "v_codes", "v_scales", "v_zero_points"}};
            uint64_t elements = side ? columns : rows;
            if (!l->coded) {
                out[n++] = (expected){names[side][0], l->rank * elements * size_of(l->values)};
                continue;
            }
            uint64_t scales = l->rank * scales_of(l, elements);
            out[n++] = (expected){names[side][1], 4 * l->rank * stream_of(l->bits, elements).words};
            out[n++] = (expected){names[side][2], scales * scale};
            if (l->grid == DLT_ASYMMETRIC) out[n++] = (expected){names[side][3], scales};
        }
        break;
    case DLT_SPARSE:
        if (l->coded) out[n++] = (expected){"codes", 128 * stream_of(l->bits, slots).words};
        out[n++] = (expected){"gaps", 128 * stream_of(l->gap_bits, slots).words};
        if (l->coded) out[n++] = (expected){"scales", LANES * tiles * scale};
        out[n++] = (expected){"starts", 4 * (tiles * blocks_of(l, columns) + 1)};
        if (!l->coded) out[n++] = (expected){"values", LANES * slots * size_of(l->values)};
        break;
    }
    return n;
}

/* ---- Entries (7.4) and descriptions (7.8) ---- */

/* A buffer is [section, offset, length]: a section of the right kind, an offset that is a multiple of 256; it MUST lie
 * inside. */
static dlt_status read_buffer(const dlt_file *file, cursor *c, uint32_t kind, const char *name, dlt_bytes *out) {
    size_t count;
    uint64_t number;
    TRY(read_array(c, &count));
    if (count != 3) return bad(c, "a buffer is not [section, offset, length]");
    TRY(read_integer(c, "a section's number", 0, UINT64_MAX, &number));
    TRY(read_integer(c, "a buffer's offset", 0, UINT64_MAX, &out->offset));
    TRY(read_integer(c, "a buffer's length", 0, UINT64_MAX, &out->length));
    if (number >= file->about.sections) return bad(c, "a buffer lies in a section that does not exist");
    const section *s = &file->sections[number];
    if (s->kind != kind) return bad(c, "a buffer lies in a section of another kind");
    /* 5.7: in sections of kind 3 a buffer starts where the one before it ends. */
    if (kind != OF_EXACT && out->offset % ALIGNMENT) return bad(c, "a buffer's offset is no multiple of 256");
    if (out->offset > s->raw_length || out->length > s->raw_length - out->offset)
        return bad(c, "a buffer leaves its section");
    out->name = name;
    out->section = (uint32_t)number;
    out->data = NULL;
    return DLT_OK;
}

static dlt_status check_parts(const dlt_file *file, cursor *c, const dlt_tensor *t, uint64_t elements) {
    size_t count;
    uint64_t sum = 0, ignored;
    TRY(read_array(c, &count));
    if (count == 0) return bad(c, "a base has an empty list of parts");
    /* 4.4: bit 0 MUST be set if an entry's base has parts. */
    if (!(file->about.incompatible & FEATURE_PARTS)) return bad(c, "a base has parts, and feature bit 0 is not set");
    for (size_t i = 0; i < count; i++) {
        size_t three;
        dlt_text name;
        uint64_t start, taken;
        TRY(read_array(c, &three));
        if (three != 3) return bad(c, "a part is not [name, start, count]");
        TRY(read_name(c, &name));
        TRY(read_integer(c, "a part's start", 0, MAX_ELEMENTS, &start));
        TRY(read_integer(c, "a part's count", 0, MAX_ELEMENTS - start, &taken));
        if (taken > elements - sum) return bad(c, "the parts of a base have more elements than its shape");
        sum += taken;
    }
    /* The counts MUST sum to the elements of shape; elements MUST have whole bytes. */
    if (sum != elements) return bad(c, "the parts of a base have fewer elements than its shape");
    if (DTYPE_BITS[t->base_dtype] % 8) return bad(c, "a base of elements that are no whole bytes has parts");
    return bytes_of(c, t->base_dtype, elements, &ignored);
}

/* `base` is {digest, dtype, shape}, and may have parts. Keys in order: digest, dtype, parts, shape. */
static dlt_status read_base(const dlt_file *file, cursor *c, dlt_tensor *t) {
    size_t count, parts;
    uint64_t elements, ignored;
    TRY(read_map(c, &count));
    if (count != 3 && count != 4) return bad(c, "a base lacks a key, or has one too many");
    TRY(expect_key(c, "digest"));
    TRY(read_digest(c, 32, &t->base_digest));
    TRY(expect_key(c, "dtype"));
    TRY(read_dtype(c, "the base's dtype", ANY_DTYPE, &t->base_dtype));
    cursor before = *c; /* the parts, which need the shape behind them */
    if (count == 4) {
        TRY(expect_key(c, "parts"));
        before = *c;
        TRY(read_array(c, &parts));
        for (size_t i = 0; i < parts; i++) {
            size_t three;
            dlt_text name;
            TRY(read_array(c, &three));
            if (three != 3) return bad(c, "a part is not [name, start, count]");
            TRY(read_string(c, &name));
            TRY(read_integer(c, "a part's start", 0, UINT64_MAX, &ignored));
            TRY(read_integer(c, "a part's count", 0, UINT64_MAX, &ignored));
        }
        t->part_count = (uint32_t)parts;
        t->raw_parts = before.p;
    }
    TRY(expect_key(c, "shape"));
    TRY(read_shape(c, &t->base_shape, &elements));
    t->has_base = 1;
    if (count == 4) TRY(check_parts(file, &before, t, elements));
    return bytes_of(c, t->base_dtype, elements, &ignored);
}

/* A term is {buffers, layout, seed}, and of a sparse layout slots; buffers have exactly the names and lengths of the
 * layout. */
static dlt_status read_term(const dlt_file *file, cursor *c, const dlt_tensor *t, dlt_term *term) {
    size_t count;
    uint64_t number;
    TRY(read_map(c, &count));
    if (count != 3 && count != 4) return bad(c, "a term lacks a key, or has one too many");
    TRY(expect_key(c, "buffers"));
    size_t buffers;
    TRY(read_map(c, &buffers));
    if (buffers > DLT_MAX_BUFFERS) return bad(c, "a term has other buffers than its layout");
    dlt_text names[DLT_MAX_BUFFERS];
    for (size_t i = 0; i < buffers; i++) {
        TRY(read_string(c, &names[i]));
        TRY(in_order(c, i ? names[i - 1] : (dlt_text){0}, names[i], "names of buffers"));
        TRY(read_buffer(file, c, OF_TENSORS, NULL, &term->buffers[i]));
    }
    term->buffer_count = (uint32_t)buffers;
    TRY(expect_key(c, "layout"));
    TRY(read_integer(c, "a layout's number", 0, UINT64_MAX, &number));
    if (number >= file->about.layouts) return bad(c, "a term has a layout that does not exist");
    term->layout_number = (uint32_t)number;
    term->layout = file->layouts[number].layout;
    const dlt_layout *l = &term->layout;
    /* u32; 0 unless the layout is nm with a seeded index */
    TRY(expect_key(c, "seed"));
    TRY(read_integer(c, "a seed", 0, l->kind == DLT_NM && l->index == DLT_SEEDED ? UINT32_MAX : 0, &number));
    term->seed = (uint32_t)number;
    term->slots = 0;
    if ((count == 4) != (l->kind == DLT_SPARSE)) return bad(c, "a sparse term has slots, and no other has");
    if (l->kind == DLT_SPARSE) {
        /* 14.1: at most T * C and below 2^32 */
        uint64_t most = least(ceil_div(t->shared_rows, LANES) * t->columns, UINT32_MAX);
        TRY(expect_key(c, "slots"));
        TRY(read_integer(c, "slots", 0, most, &term->slots));
    }
    /* 13.1: at most the rows and at most the columns of the matrix */
    if (l->kind == DLT_LOWRANK && (l->rank > t->shared_rows || l->rank > t->columns)) {
        return bad(c, "more vectors than the matrix has rows or columns");
    }
    expected want[DLT_MAX_BUFFERS];
    unsigned wanted = expected_buffers(l, t->shared_rows, t->columns, term->slots, want);
    if (wanted != buffers) return bad(c, "a term has other buffers than its layout");
    for (unsigned i = 0; i < wanted; i++) {
        if (!is(names[i], want[i].name)) return bad(c, "a term has other buffers than its layout");
        term->buffers[i].name = want[i].name;
        if (term->buffers[i].length == want[i].length) continue;
        return INVALID(c->error, "%s: the buffer %s has %llu bytes where the shape needs %llu", show(c->where).text,
                       want[i].name, (unsigned long long)term->buffers[i].length, (unsigned long long)want[i].length);
    }
    return DLT_OK;
}

/* Rows and columns (2, 7.4), and what binds the shapes of an `add`. */
static dlt_status check_add(const dlt_file *file, cursor *c, dlt_tensor *t, uint64_t leading) {
    const uint32_t floats = BIT(DLT_BF16) | BIT(DLT_F16) | BIT(DLT_F32);
    const dlt_shape *a = &t->shape, *b = &t->base_shape;
    /* dtype and the base's dtype MUST be BF16, F16 or F32 */
    if (!(floats >> t->dtype & 1) || !(floats >> t->base_dtype & 1)) return bad(c, "an add is not of BF16, F16 or F32");
    /* the shapes MUST have the same length, at least 1, and MUST agree except that the first dimension MAY differ when
     * there are two dimensions or more; no size may be 0 */
    if (a->count != b->count || a->count < 1) return bad(c, "an add has another number of dimensions than its base");
    for (uint32_t i = 0; i < a->count; i++) {
        if (a->sizes[i] == 0 || b->sizes[i] == 0) return bad(c, "an add has a size of 0");
        if (a->sizes[i] != b->sizes[i] && (i > 0 || a->count < 2))
            return bad(c, "an add has another shape than its base");
    }
    /* leading: an integer from 1 to the number of dimensions less 2 */
    uint32_t first = leading ? (uint32_t)leading : a->count - 1;
    t->rows = t->columns = 1;
    for (uint32_t i = 0; i < a->count; i++) *(i < first ? &t->rows : &t->columns) *= a->sizes[i];
    t->shared_rows = a->count < 2 ? 1 : t->rows / a->sizes[0] * least(a->sizes[0], b->sizes[0]);
    if (leading && !(file->about.incompatible & FEATURE_LEADING))
        return bad(c, "an entry has leading, and feature bit 1 is not set");
    return DLT_OK;
}

/* 5.5: all buffers of a tensor MUST lie in one section; that of an exact part lies in one of kind 3. */
static dlt_status check_one_section(const cursor *c, const dlt_tensor *t) {
    const dlt_bytes *first = t->has_data ? &t->data : NULL;
    for (uint32_t i = 0; i < t->term_count; i++) {
        for (uint32_t j = 0; j < t->terms[i].buffer_count; j++) {
            if (first == NULL) first = &t->terms[i].buffers[j];
            if (t->terms[i].buffers[j].section != first->section)
                return bad(c, "the buffers of a tensor lie in several sections");
        }
    }
    return DLT_OK;
}

static member *find_tensor(const dlt_file *file, dlt_text name) {
    size_t low = 0, high = file->about.tensors;
    while (low < high) {
        size_t middle = low + (high - low) / 2;
        int order = compare_texts(file->tensors[middle].name, name);
        if (order == 0) return &file->tensors[middle];
        if (order < 0) low = middle + 1;
        else high = middle;
    }
    return NULL;
}

static dlt_status read_entry(const dlt_file *file, const member *m, dlt_tensor *t, dlt_error *error);

/* alias: the tensor target, which is not an alias and has the same dtype and shape. What a target is, is read once. */
static dlt_status check_alias(const dlt_file *file, const cursor *c, const dlt_tensor *t) {
    member *target = find_tensor(file, t->target);
    if (target == NULL) return bad(c, "an alias of a tensor that is not in the file");
    if (target->known == NULL) {
        dlt_tensor whole;
        cursor at = {target->raw.p, target->raw.p + target->raw.length, c->error, target->name};
        size_t count;
        unsigned action;
        TRY(read_map(&at, &count));
        TRY(expect_key(&at, "action"));
        TRY(read_word(&at, "action", ACTIONS, 5, &action));
        if (action == DLT_ALIAS) return bad(c, "an alias of an alias");
        TRY(read_entry(file, target, &whole, c->error));
        target->known = malloc(sizeof *target->known);
        if (target->known == NULL) return no_memory(c->error);
        target->known->dtype = whole.dtype, target->known->shape = whole.shape;
    }
    if (target->known->dtype == t->dtype && same_shape(&target->known->shape, &t->shape)) return DLT_OK;
    return bad(c, "an alias has another dtype or shape than its target");
}

/* exact is {chunk, data: buffer, digest: bytes 32}: a power of two from 2^8 to 2^24; a buffer in a section of kind 3
 * (17.1). That of an add has factors, too (17.8). */
static dlt_status read_exact(const dlt_file *file, cursor *c, dlt_tensor *t) {
    uint64_t chunk, factor;
    size_t factors;
    /* 4.4: bit 3 MUST be set if an entry has exact. */
    if (!(file->about.incompatible & FEATURE_EXACT)) return bad(c, "an exact tensor, and feature bit 3 is not set");
    /* 17.7: no entry may have the action exact. An add MUST NOT have exact in a file that is not progressive. */
    if (file->served && t->action == DLT_EXACT) return bad(c, "an exact tensor in a progressive file");
    if (!file->served && t->action == DLT_ADD) return bad(c, "an exact part in a file that is not progressive");
    TRY(expect_map(c, t->action == DLT_ADD ? 4 : 3));
    TRY(expect_key(c, "chunk"));
    TRY(read_integer(c, "the units of a chunk", 1 << 8, 1 << 24, &chunk));
    if (chunk & (chunk - 1)) return bad(c, "the units of a chunk are no power of two");
    t->chunk = (uint32_t)chunk;
    TRY(expect_key(c, "data"));
    TRY(read_buffer(file, c, OF_EXACT, "exact", &t->exact));
    TRY(expect_key(c, "digest"));
    TRY(read_digest(c, 32, &t->exact_digest));
    t->has_exact = 1;
    if (t->action == DLT_EXACT) return DLT_OK;
    /* an array with a u32 for each term: the bits of a float32, which MUST be finite; the terms follow in the entry */
    TRY(expect_key(c, "factors"));
    TRY(read_array(c, &factors));
    if (factors > DLT_MAX_TERMS) return bad(c, "an exact part has more factors than a tensor has terms");
    for (size_t i = 0; i < factors; i++) {
        TRY(read_integer(c, "a factor", 0, UINT32_MAX, &factor));
        if ((factor & UINT32_C(0x7F800000)) == UINT32_C(0x7F800000)) return bad(c, "a factor is not finite");
        t->factors[i] = (uint32_t)factor;
    }
    t->factor_count = (uint32_t)factors;
    return DLT_OK;
}

/* 17.1: with base, the two shapes MUST have the same length, MUST agree except for the first dimension, and no size may
 * be 0. The dtypes MUST be equal, or both of BF16, F16 and F32. */
static dlt_status check_prediction(const cursor *c, const dlt_tensor *t) {
    const uint32_t deltas = BIT(DLT_BF16) | BIT(DLT_F16) | BIT(DLT_F32);
    const dlt_shape *a = &t->shape, *b = &t->base_shape;
    int good = t->dtype == t->base_dtype || (BIT(t->dtype) & deltas && BIT(t->base_dtype) & deltas);
    good &= a->count == b->count;
    for (uint32_t i = 0; i < a->count && good; i++)
        good = a->sizes[i] && b->sizes[i] && (i == 0 || a->sizes[i] == b->sizes[i]);
    return good ? DLT_OK : bad(c, "the base of an exact tensor does not predict it");
}

/* An entry is a map with action, dtype and shape, and further keys by its action. Keys in order: action, base, data,
 * digest, dtype, exact, leading, shape, target, terms. */
static dlt_status read_entry(const dlt_file *file, const member *m, dlt_tensor *t, dlt_error *error) {
    cursor at = {m->raw.p, m->raw.p + m->raw.length, error, m->name}, *c = &at;
    size_t count, terms;
    unsigned action;
    uint64_t leading = 0, bytes = 0, number;
    t->name = m->name;
    t->raw = m->raw.p, t->raw_length = m->raw.length;
    t->has_base = t->has_data = t->has_exact = t->loaded = 0;
    t->part_count = t->term_count = t->factor_count = t->memory_count = 0;
    t->raw_parts = t->digest = t->base_digest = t->exact_digest = NULL;
    t->data_start = t->data_end = t->terms_start = t->exact_key = t->exact_start = t->exact_end = 0;
    t->target = (dlt_text){0};
    TRY(read_map(c, &count));
    TRY(expect_key(c, "action"));
    TRY(read_word(c, "action", ACTIONS, 5, &action));
    t->action = (dlt_action)action;
    size_t needed = action == DLT_REPLACE ? 5 : action == DLT_ADD ? 6 : 4, left = count - needed;
    if (count < needed || left > (action == DLT_ADD ? 3u : action == DLT_EXACT ? 1u : 0u))
        return bad(c, "an entry lacks a key, or has one too many");
    if (action == DLT_SAME || action == DLT_ADD || (action == DLT_EXACT && left)) {
        TRY(expect_key(c, "base"));
        TRY(read_base(file, c, t));
        if (action == DLT_EXACT) left--;
    }
    cursor ahead = *c;
    dlt_text key;
    TRY(read_string(&ahead, &key));
    if (action == DLT_REPLACE || (action == DLT_ADD && left && is(key, "data"))) {
        t->data_start = (size_t)(c->p - m->raw.p);
        TRY(expect_key(c, "data"));
        TRY(read_buffer(file, c, OF_TENSORS, "data", &t->data));
        t->data_end = (size_t)(c->p - m->raw.p);
        t->has_data = 1;
        if (action == DLT_ADD) left--;
    }
    if (action == DLT_REPLACE || action == DLT_ADD) {
        TRY(expect_key(c, "digest"));
        TRY(read_digest(c, 32, &t->digest));
    }
    TRY(expect_key(c, "dtype"));
    TRY(read_dtype(c, "dtype", ANY_DTYPE, &t->dtype));
    size_t before = (size_t)(c->p - m->raw.p);
    if ((left && is_key(c, "exact")) || action == DLT_EXACT) {
        if (action == DLT_EXACT) TRY(expect_key(c, "exact"));
        else left--;
        t->exact_key = before;
        t->exact_start = (size_t)(c->p - m->raw.p);
        TRY(read_exact(file, c, t));
        t->exact_end = (size_t)(c->p - m->raw.p);
    }
    if (left > 1) return bad(c, "an entry has a key too many");
    if (left) {
        TRY(expect_key(c, "leading"));
        TRY(read_integer(c, "leading", 1, DLT_MAX_DIMENSIONS, &leading));
    }
    TRY(expect_key(c, "shape"));
    TRY(read_shape(c, &t->shape, &t->elements));
    /* 2: d0 * ... * dn-2 rows and dn-1 columns; a 1-d tensor has one row, a 0-d tensor one row and one column. */
    t->columns = t->shape.count ? t->shape.sizes[t->shape.count - 1] : 1;
    t->rows = 1;
    for (uint32_t i = 0; i + 1 < t->shape.count; i++) t->rows *= t->shape.sizes[i];
    t->shared_rows = 0;
    TRY(bytes_of(c, t->dtype, t->elements, &bytes));
    switch (t->action) {
    case DLT_SAME:
        /* dtype and shape equal */
        if (t->dtype != t->base_dtype || !same_shape(&t->shape, &t->base_shape))
            return bad(c, "same has another dtype or shape than its base");
        break;
    case DLT_REPLACE:
        if (t->data.length != bytes) return bad(c, "the buffer data has another length than the shape needs");
        break;
    case DLT_EXACT:
        if (t->has_base) TRY(check_prediction(c, t));
        break;
    case DLT_ALIAS:
        TRY(expect_key(c, "target"));
        TRY(read_string(c, &t->target));
        break;
    case DLT_ADD:
        if (leading && leading + 2 > t->shape.count) return bad(c, "leading is beyond the number of dimensions less 2");
        TRY(check_add(file, c, t, leading));
        /* If the fine-tune has more rows, data holds the others, in the fine-tune's dtype; otherwise data is absent. */
        number = (t->rows - t->shared_rows) * t->columns * size_of(t->dtype);
        if (t->has_data != (number > 0)) return bad(c, "data holds the rows that the base has not, and only those");
        if (t->has_data && t->data.length != number)
            return bad(c, "the buffer data has another length than the new rows need");
        t->terms_start = (size_t)(c->p - m->raw.p);
        TRY(expect_key(c, "terms"));
        TRY(read_array(c, &terms));
        /* terms is an array of 1 to 16 terms */
        if (terms < 1 || terms > DLT_MAX_TERMS) return bad(c, "an add has not 1 to 16 terms");
        for (size_t i = 0; i < terms; i++) {
            TRY(read_term(file, c, t, &t->terms[i]));
            t->term_count++;
        }
        if (t->has_exact && t->factor_count != t->term_count)
            return bad(c, "an exact part has not a factor for each term");
        TRY(check_one_section(c, t));
        break;
    }
    if (c->p != c->end) return bad(c, "an entry is followed by something");
    return t->action == DLT_ALIAS ? check_alias(file, c, t) : DLT_OK;
}

/* A description (7.8). Keys in order: block, codes {digest, dtype, shape}, scales {digest, dtype, name, shape} or nil.
 */
static dlt_status read_scaled(const member *m, dlt_scaled *s, dlt_error *error) {
    cursor at = {m->raw.p, m->raw.p + m->raw.length, error, m->name}, *c = &at;
    const uint32_t codes = BIT(DLT_F8_E4M3) | BIT(DLT_F8_E5M2);
    const uint32_t scales = BIT(DLT_F32) | BIT(DLT_BF16) | BIT(DLT_F16) | BIT(DLT_F8_E8M0) | BIT(DLT_U8);
    size_t dimensions;
    uint64_t elements, needed = 1;
    memset(s, 0, sizeof *s);
    s->name = m->name;
    TRY(expect_map(c, 3));
    TRY(expect_key(c, "block"));
    TRY(read_array(c, &dimensions));
    if (dimensions > DLT_MAX_DIMENSIONS) return bad(c, "a block has more than 8 dimensions");
    for (size_t i = 0, bound = 1; i < dimensions; i++, bound *= s->block[i - 1]) {
        TRY(read_integer(c, "a size of a block", 1, MAX_ELEMENTS / bound, &s->block[i]));
    }
    TRY(expect_key(c, "codes"));
    TRY(expect_map(c, 3));
    TRY(expect_key(c, "digest"));
    TRY(read_digest(c, 32, &s->codes_digest));
    TRY(expect_key(c, "dtype"));
    TRY(read_dtype(c, "the codes' dtype", codes, &s->codes_dtype));
    TRY(expect_key(c, "shape"));
    TRY(read_shape(c, &s->shape, &elements));
    /* one for each dimension */
    if (dimensions != s->shape.count) return bad(c, "a block has other dimensions than its tensor");
    TRY(expect_key(c, "scales"));
    if (c->p < c->end && *c->p == 0xC0) {
        c->p++;
    } else {
        s->has_scales = 1;
        TRY(expect_map(c, 4));
        TRY(expect_key(c, "digest"));
        TRY(read_digest(c, 32, &s->scales_digest));
        TRY(expect_key(c, "dtype"));
        TRY(read_dtype(c, "the scales' dtype", scales, &s->scales_dtype));
        TRY(expect_key(c, "name"));
        TRY(read_name(c, &s->scales_name));
        TRY(expect_key(c, "shape"));
        TRY(read_shape(c, &s->scales_shape, &elements));
        /* ceil(d_i / b_i) blocks in dimension i, and as many scales as blocks, whatever their shape */
        for (size_t i = 0; i < dimensions; i++) needed *= ceil_div(s->shape.sizes[i], s->block[i]);
        if (elements != needed) return bad(c, "the number of scales is not that of the blocks");
    }
    return c->p == c->end ? DLT_OK : bad(c, "a description is followed by something");
}

/* ---- Names of attachments (7.9) ---- */

static char lower(char c) { return (char)(c >= 'A' && c <= 'Z' ? c + 'a' - 'A' : c); }

static int ends_as(dlt_text name, const char *ending) {
    size_t n = strlen(ending);
    if (name.length < n) return 0;
    for (size_t i = 0; i < n; i++) {
        if (lower(name.text[name.length - n + i]) != ending[i]) return 0;
    }
    return 1;
}

/* A part is not the name of a Windows device: what stands before its first full stop, without spaces at its end and in
 * lower case, is not con, prn, aux, nul, conin$, conout$, nor com or lpt with one of the digits 1 to 9, U+00B9, U+00B2
 * or U+00B3. */
static int is_device(dlt_text part) {
    static const char *const devices[] = {"con", "prn", "aux", "nul", "conin$", "conout$"};
    static const char *const digits[] = {"1", "2", "3", "4",        "5",        "6",
                                         "7", "8", "9", "\xC2\xB9", "\xC2\xB2", "\xC2\xB3"};
    size_t n = 0;
    while (n < part.length && part.text[n] != '.') n++;
    while (n > 0 && part.text[n - 1] == ' ') n--;
    dlt_text stem = {part.text, n}, port = {part.text, 3}, digit = {part.text + 3, n - 3};
    for (size_t i = 0; i < sizeof devices / sizeof *devices; i++) {
        if (n == strlen(devices[i]) && ends_as(stem, devices[i])) return 1;
    }
    if (n < 4 || (!ends_as(port, "com") && !ends_as(port, "lpt"))) return 0;
    for (size_t i = 0; i < sizeof digits / sizeof *digits; i++) {
        if (is(digit, digits[i])) return 1;
    }
    return 0;
}

/* The next part of a path; `at` is where it starts, and then where the one behind it does. */
static dlt_text next_part(dlt_text name, size_t *at) {
    dlt_text part = {name.text + *at, 0};
    while (*at + part.length < name.length && part.text[part.length] != '/') part.length++;
    *at += part.length + 1;
    return part;
}

/* The first three rules of 7.9. It has no control characters (U+0000 to U+001F, U+007F to U+009F) and none of \ : * ? "
 * < > | A part has 1 to 255 bytes, does not start with a full stop, and does not end in a space or full stop. */
static int is_path(dlt_text name) {
    for (size_t i = 0; i < name.length; i++) {
        unsigned char c = (unsigned char)name.text[i],
                      next = (unsigned char)(i + 1 < name.length ? name.text[i + 1] : 0);
        if (c < 0x20 || c == 0x7F || (c == 0xC2 && next >= 0x80 && next < 0xA0) || strchr("\\:*?\"<>|", c)) return 0;
    }
    for (size_t at = 0; at <= name.length;) {
        dlt_text part = next_part(name, &at);
        if (part.length == 0 || part.length > 255 || part.text[0] == '.' || is_device(part)) return 0;
        if (part.text[part.length - 1] == ' ' || part.text[part.length - 1] == '.') return 0;
    }
    return 1;
}

/* Whether a word stands anywhere in a text, in lower case. */
static int has_within(dlt_text text, const char *word) {
    for (size_t n = strlen(word); n <= text.length; n++) {
        if (ends_as((dlt_text){text.text, n}, word)) return 1;
    }
    return 0;
}

/* No part ends, in lower case, as files of weights do. */
static int ends_as_weights(dlt_text part) {
    static const char *const weights[] = {
        ".safetensors",
        ".bin",
        ".pt",
        ".pth",
        ".ckpt",
        ".h5",
        ".msgpack",
        ".gguf",
        ".ggml",
        ".onnx",
        ".npz",
        ".npy",
        ".pkl",
        ".pickle",
        ".tflite",
        ".ot",
        ".deltafmt",
        ".partial",
        ".safetensors.index.json",
        ".bin.index.json",
    };
    for (size_t i = 0; i < sizeof weights / sizeof *weights; i++) {
        if (ends_as(part, weights[i])) return 1;
    }
    return 0;
}

/* The last part does not end in .json with .safetensors.index. or .bin.index. in it; it does not end as compiled code
 * does, and is not adapter_config.json. */
static int is_refused_name(dlt_text name) {
    static const char *const compiled[] = {".so", ".pyd", ".dll", ".dylib", ".exe", ".pyc", ".pyo"};
    static const char adapter[] = "adapter_config.json";
    dlt_text part = name;
    for (size_t at = 0; at <= name.length;) {
        part = next_part(name, &at);
        if (ends_as_weights(part)) return 1;
    }
    for (size_t i = 0; i < sizeof compiled / sizeof *compiled; i++) {
        if (ends_as(part, compiled[i])) return 1;
    }
    if (ends_as(part, ".json") && (has_within(part, ".safetensors.index.") || has_within(part, ".bin.index.")))
        return 1;
    return part.length == sizeof adapter - 1 && ends_as(part, adapter);
}

/* ---- Names of files that are restored (7.10) ---- */

/* Take an ending off a text, if there is something before it. */
static int without(dlt_text *text, const char *ending) {
    size_t n = strlen(ending);
    if (text->length <= n || memcmp(text->text + text->length - n, ending, n) != 0) return 0;
    text->length -= n;
    return 1;
}

/* Take a full stop and a VARIANT off, which is not empty and has no full stop. */
static int without_variant(dlt_text *text) {
    size_t n = text->length;
    while (n > 0 && text->text[n - 1] != '.') n--;
    if (n <= 1 || n == text->length) return 0;
    text->length = n - 1;
    return 1;
}

static dlt_text last_part(dlt_text name) {
    dlt_text part = name;
    for (size_t at = 0; at <= name.length;) part = next_part(name, &at);
    return part;
}

/* X.safetensors.index.json, also with .VARIANT behind .safetensors or behind .index. */
static int is_weight_index(dlt_text name) {
    dlt_text part = last_part(name);
    if (!without(&part, ".json")) return 0;
    for (int behind = 0; behind < 2; behind++) {
        dlt_text rest = part;
        if ((behind && !without_variant(&rest)) || !without(&rest, ".index")) continue;
        dlt_text plain = rest;
        if (without(&plain, ".safetensors") || (without_variant(&rest) && without(&rest, ".safetensors"))) return 1;
    }
    return 0;
}

/* It keeps the rules of 7.9, except that it ends as a weight file does: its folders do not. */
static int is_weight_name(dlt_text name) {
    dlt_text part = last_part(name);
    for (size_t at = 0; at + part.length < name.length;) {
        if (ends_as_weights(next_part(name, &at))) return 0;
    }
    return without(&part, ".safetensors") || is_weight_index(name);
}

static int compare_names(const void *a, const void *b) {
    return compare_texts(*(const dlt_text *)a, *(const dlt_text *)b);
}

/* No two names are equal in lower case, and none is, in lower case, the folder of another: of attachments, and of files
 * that are restored (7.10). */
static dlt_status check_folders(const dlt_file *file, cursor *c) {
    size_t attached = file->about.attachments, count = attached + file->about.files, bytes = 0;
    for (size_t i = 0; i < count; i++)
        bytes += (i < attached ? &file->attachments[i] : &file->files[i - attached])->name.length;
    dlt_text *names = malloc((count + 1) * sizeof *names);
    char *text = malloc(bytes + 1);
    dlt_status status = names && text ? DLT_OK : no_memory(c->error);
    for (size_t i = 0, at = 0; i < count && status == DLT_OK; i++) {
        dlt_text name = (i < attached ? &file->attachments[i] : &file->files[i - attached])->name;
        names[i] = (dlt_text){text + at, name.length};
        for (size_t j = 0; j < names[i].length; j++) text[at++] = lower(name.text[j]);
    }
    if (status == DLT_OK) qsort(names, count, sizeof *names, compare_names);
    for (size_t i = 0; i < count && status == DLT_OK; i++) {
        if (i > 0 && same_text(names[i - 1], names[i])) status = bad(c, "two files differ in case alone, or have one name");
        for (size_t j = 0; j < names[i].length && status == DLT_OK; j++) {
            dlt_text folder = {names[i].text, j};
            if (names[i].text[j] == '/' && bsearch(&folder, names, count, sizeof *names, compare_names)) {
                status = bad(c, "a file is the folder of another");
            }
        }
    }
    free(names);
    free(text);
    return status;
}

/* ---- The index's top level (7.2) ---- */

#define MAKE(pointer, count, error)                                   \
    do {                                                              \
        (pointer) = calloc((count) ? (count) : 1, sizeof *(pointer)); \
        if ((pointer) == NULL) return no_memory(error);               \
    } while (0)

static dlt_status read_attachments(dlt_file *file, cursor *c, cursor *buffers) {
    size_t count;
    TRY(read_map(c, &count));
    MAKE(file->attachments, count, c->error);
    *buffers = *c;
    for (size_t i = 0; i < count; i++) {
        attachment *a = &file->attachments[i];
        uint64_t ignored;
        size_t three;
        TRY(read_name(c, &a->name));
        TRY(in_order(c, i ? a[-1].name : (dlt_text){0}, a->name, "attachments"));
        if (!is_path(a->name))
            return INVALID(c->error, "the attachment %s is not a plain relative path", show(a->name).text);
        if (is_refused_name(a->name))
            return INVALID(c->error, "the attachment %s has a name for weights or code", show(a->name).text);
        TRY(expect_map(c, 2));
        TRY(expect_key(c, "data"));
        TRY(read_array(c, &three)); /* the sections follow in the index: buffers are checked then */
        for (size_t j = 0; j < three; j++) TRY(read_integer(c, "a number of a buffer", 0, UINT64_MAX, &ignored));
        TRY(expect_key(c, "digest"));
        TRY(read_digest(c, 32, &a->digest));
        file->about.attachments++;
    }
    return DLT_OK;
}

/* files: map from name to {digest: bytes 32, head: buffer}, at least one; only with the feature of 4.4. */
static dlt_status read_files(dlt_file *file, cursor *c, cursor *buffers) {
    size_t count, three;
    uint64_t ignored;
    if (!(file->about.incompatible & FEATURE_EXACT)) return bad(c, "the index has files, and feature bit 3 is not set");
    TRY(read_map(c, &count));
    if (count == 0) return bad(c, "the index has files, and names none");
    MAKE(file->files, count, c->error);
    *buffers = *c;
    for (size_t i = 0; i < count; i++) {
        attachment *a = &file->files[i];
        TRY(read_name(c, &a->name));
        TRY(in_order(c, i ? a[-1].name : (dlt_text){0}, a->name, "files"));
        if (!is_path(a->name) || !is_weight_name(a->name))
            return INVALID(c->error, "%s is no path of a weight file, or of an index", show(a->name).text);
        TRY(expect_map(c, 2));
        TRY(expect_key(c, "digest"));
        TRY(read_digest(c, 32, &a->digest));
        TRY(expect_key(c, "head"));
        TRY(read_array(c, &three));
        for (size_t j = 0; j < three; j++) TRY(read_integer(c, "a number of a buffer", 0, UINT64_MAX, &ignored));
        file->about.files++;
    }
    return DLT_OK;
}

static dlt_status read_heads(dlt_file *file, cursor *c) {
    for (size_t i = 0; i < file->about.files; i++) {
        attachment *a = &file->files[i];
        TRY(read_name(c, &a->name));
        TRY(expect_map(c, 2));
        TRY(expect_key(c, "digest"));
        TRY(read_digest(c, 32, &a->digest));
        TRY(expect_key(c, "head"));
        TRY(read_buffer(file, c, OF_ATTACHMENTS, "head", &a->bytes));
        /* 17.7: the served part is a delta file by itself, without `files`: none of its sections holds a head. */
        if (file->served && &file->sections[a->bytes.section] < file->served)
            return INVALID(c->error, "the head of %s lies in the served part", show(a->name).text);
    }
    return DLT_OK;
}

static dlt_status read_attachment_buffers(dlt_file *file, cursor *c) {
    for (size_t i = 0; i < file->about.attachments; i++) {
        attachment *a = &file->attachments[i];
        dlt_text name;
        TRY(read_name(c, &name));
        TRY(expect_map(c, 2));
        TRY(expect_key(c, "data"));
        TRY(read_buffer(file, c, OF_ATTACHMENTS, "attachment", &a->bytes));
        /* 17.7: every attachment MUST lie in a section before this one. */
        if (file->served && &file->sections[a->bytes.section] > file->served)
            return INVALID(c->error, "the attachment %s lies behind the served part", show(a->name).text);
        TRY(expect_key(c, "digest"));
        TRY(read_digest(c, 32, &a->digest));
    }
    return DLT_OK;
}

static int compare_layouts(const void *a, const void *b) {
    const slice *x = a, *y = b;
    return compare_texts((dlt_text){(const char *)x->p, x->length}, (dlt_text){(const char *)y->p, y->length});
}

/* layouts: array of layouts (7.3), each at most once */
static dlt_status read_layouts(dlt_file *file, cursor *c) {
    size_t count;
    TRY(read_array(c, &count));
    MAKE(file->layouts, count, c->error);
    for (size_t i = 0; i < count; i++) {
        TRY(read_layout(c, &file->layouts[i]));
        file->about.layouts++;
    }
    slice *sorted = NULL;
    MAKE(sorted, count, c->error);
    for (size_t i = 0; i < count; i++) sorted[i] = file->layouts[i].raw;
    qsort(sorted, count, sizeof *sorted, compare_layouts);
    int twice = 0;
    for (size_t i = 1; i < count; i++) twice |= compare_layouts(&sorted[i - 1], &sorted[i]) == 0;
    free(sorted);
    return twice ? bad(c, "a layout stands there twice") : DLT_OK;
}

static dlt_status read_metadata(dlt_file *file, cursor *c) {
    size_t count;
    const uint8_t *start = c->p;
    TRY(read_map(c, &count));
    MAKE(file->metadata, count, c->error);
    for (size_t i = 0; i < count; i++) {
        pair *p = &file->metadata[i];
        TRY(read_string(c, &p->key));
        TRY(in_order(c, i ? p[-1].key : (dlt_text){0}, p->key, "keys of the metadata"));
        TRY(read_string(c, &p->value));
        file->about.metadata++;
    }
    file->raw_metadata = (slice){start, (size_t)(c->p - start)};
    return DLT_OK;
}

/* removed: array of strings, sorted, unique */
static dlt_status read_removed(dlt_file *file, cursor *c) {
    size_t count;
    const uint8_t *start = c->p;
    TRY(read_array(c, &count));
    MAKE(file->removed, count, c->error);
    for (size_t i = 0; i < count; i++) {
        TRY(read_name(c, &file->removed[i]));
        TRY(in_order(c, i ? file->removed[i - 1] : (dlt_text){0}, file->removed[i], "removed tensors"));
        file->about.removed++;
    }
    file->raw_removed = (slice){start, (size_t)(c->p - start)};
    return DLT_OK;
}

/* 7.4: a tensor's name is not __metadata__, alone or behind a `/`, where safetensors keeps something else. */
static int is_header_name(dlt_text name) {
    static const char word[] = "/__metadata__";
    size_t n = sizeof word - 1;
    return is(name, word + 1) || (name.length >= n && memcmp(name.text + name.length - n, word, n) == 0);
}

/* tensors, scaled: map from name to byte string */
static dlt_status read_members(cursor *c, const char *what, member **members, size_t *number) {
    size_t count;
    TRY(read_map(c, &count));
    MAKE(*members, count, c->error);
    for (size_t i = 0; i < count; i++) {
        member *m = &(*members)[i];
        TRY(read_name(c, &m->name));
        TRY(in_order(c, i ? m[-1].name : (dlt_text){0}, m->name, what));
        TRY(read_bytes(c, &m->raw));
        ++*number;
    }
    return DLT_OK;
}

/* sections: array of {checksum: bytes 16, codec, kind, length, offset, raw_length}; 5.2, 5.6, 6.3, 9 */
static dlt_status read_sections(dlt_file *file, cursor *c, uint64_t index_offset) {
    size_t count;
    uint64_t codec, kind, next = PAGE, raw = 0, decoded = 0;
    int behind = 0;
    TRY(read_array(c, &count));
    MAKE(file->sections, count, c->error);
    file->raw_sections.p = c->p;
    for (size_t i = 0; i < count; i++) {
        section *s = &file->sections[i];
        const uint8_t *start = c->p;
        TRY(expect_map(c, 6));
        TRY(expect_key(c, "checksum"));
        TRY(read_digest(c, 16, &s->checksum));
        TRY(expect_key(c, "codec"));
        TRY(read_integer(c, "a section's codec", 0, 1, &codec));
        TRY(expect_key(c, "kind"));
        TRY(read_integer(c, "a section's kind", OF_TENSORS, SERVED_END, &kind));
        TRY(expect_key(c, "length"));
        TRY(read_integer(c, "a section's length", 0, file->size, &s->length));
        TRY(expect_key(c, "offset"));
        TRY(read_integer(c, "a section's offset", 0, UINT64_MAX, &s->offset));
        TRY(expect_key(c, "raw_length"));
        TRY(read_integer(c, "a section's raw length", 0, MAX_RAW, &s->raw_length));
        s->codec = (uint32_t)codec, s->kind = (uint32_t)kind;
        /* The first starts at 4096, every other at the next multiple of 4096 after the end of the one before it. */
        if (s->offset != next) return INVALID(c->error, "section %zu is not where the next section belongs", i);
        next = align(next + s->length, PAGE);
        if (next > index_offset) return INVALID(c->error, "section %zu reaches into the index", i);
        /* raw lengths of all sections, summed: 2^40 */
        raw += s->raw_length;
        if (raw > MAX_RAW) return bad(c, "the sections have more than 2^40 raw bytes");
        if (codec == 0 && s->raw_length != s->length)
            return INVALID(c->error, "section %zu is stored, and its lengths differ", i);
        if (codec == 1) {
            /* a section whose stored length is below 13 bytes a chunk; a section of no raw bytes stores none */
            uint64_t chunks = ceil_div(s->raw_length, CHUNK);
            if (s->length < 13 * chunks || (chunks == 0 && s->length > 0)) {
                return INVALID(c->error, "section %zu cannot have the chunks of its raw length", i);
            }
            decoded += s->raw_length;
        }
        /* In a file of profile hot, sections of kind 1 MUST have codec 0. */
        if (!file->about.cold && codec == 1 && kind == OF_TENSORS)
            return INVALID(c->error, "a hot file has a compressed section of tensors");
        /* 4.4: bit 3 MUST be set if a section has kind 3. 5.7: it MUST have codec 0, and MUST lie behind all of kind 1. */
        if (kind == OF_EXACT && !(file->about.incompatible & FEATURE_EXACT))
            return bad(c, "a section holds exact tensors, and feature bit 3 is not set");
        if (kind == OF_EXACT && codec == 1) return bad(c, "a section of exact tensors is compressed");
        if (kind == OF_TENSORS && behind) return bad(c, "a section of tensors lies behind one of exact tensors");
        behind |= kind == OF_EXACT;
        /* 4.4: bit 4 MUST be set if a section has kind 4. 5.8: a file has at most one. It MUST have codec 0, MUST lie
         * behind all sections of kind 1, and MUST lie before all sections of kind 3. */
        if (kind == OF_TENSORS && file->served) return bad(c, "a section of tensors lies behind the served part");
        if (kind == SERVED_END) {
            if (!(file->about.incompatible & FEATURE_PROGRESSIVE))
                return bad(c, "a section ends a served part, and feature bit 4 is not set");
            if (codec == 1) return bad(c, "the section that ends the served part is compressed");
            if (behind || file->served) return bad(c, "a served part ends behind another one, or behind exact tensors");
            file->served = s;
            file->raw_sections.length = (size_t)(start - file->raw_sections.p);
            file->about.served_size = s->offset + s->length;
            /* Its bytes are an index and a trailer. */
            if (s->length > TRAILER) file->about.served_content_id = file->data + s->offset + s->length - TRAILER + 24;
        }
        file->about.sections++;
    }
    /* The index starts where the next section would. */
    if (next != index_offset) return bad(c, "the index is not where the next section belongs");
    if (decoded > file->limits.max_output) {
        return fail(c->error, DLT_LIMIT, "the sections decode to %llu bytes, and max_output is %llu",
                    (unsigned long long)decoded, (unsigned long long)file->limits.max_output);
    }
    return DLT_OK;
}

/* Keys in order: attachments, files, layouts, metadata, parent, profile, removed, scaled, sections, tensors; files,
 * parent and scaled only with their features. */
static dlt_status read_index(dlt_file *file, uint64_t index_offset, dlt_error *error) {
    cursor at = {file->index.p, file->index.p + file->index.length, error, {"the index", 9}}, *c = &at;
    cursor buffers, heads = {0};
    static const char *const profiles[2] = {"hot", "cold"};
    unsigned cold;
    size_t count;
    TRY(read_map(c, &count));
    if (count < 7) return bad(c, "the index lacks a key");
    count -= 7; /* those that it need not have */
    const uint8_t *start = c->p;
    TRY(expect_key(c, "attachments"));
    TRY(read_attachments(file, c, &buffers));
    file->raw_attachments = (slice){start, (size_t)(c->p - start)};
    if (count && is_key(c, "files")) {
        count--;
        TRY(read_files(file, c, &heads));
    }
    TRY(check_folders(file, c));
    start = c->p;
    TRY(expect_key(c, "layouts"));
    TRY(read_layouts(file, c));
    TRY(expect_key(c, "metadata"));
    TRY(read_metadata(file, c));
    if (count && is_key(c, "parent")) {
        count--;
        /* 4.4: bit 5 MUST be set if the index has parent. */
        if (!(file->about.incompatible & FEATURE_PARENT))
            return bad(c, "the index has a parent, and feature bit 5 is not set");
        TRY(read_digest(c, 32, &file->about.parent));
    }
    TRY(expect_key(c, "profile"));
    TRY(read_word(c, "profile", profiles, 2, &cold));
    file->about.cold = (int)cold;
    TRY(expect_key(c, "removed"));
    TRY(read_removed(file, c));
    if (count && is_key(c, "scaled")) {
        count--;
        /* 4.4: bit 2 MUST be set if the index has scaled. */
        if (!(file->about.incompatible & FEATURE_SCALED))
            return bad(c, "the index has scaled, and feature bit 2 is not set");
        TRY(read_members(c, "scaled tensors", &file->scaled, &file->about.scaled));
    }
    if (count) return bad(c, "the index has a key too many");
    file->raw_middle = (slice){start, (size_t)(c->p - start)};
    TRY(expect_key(c, "sections"));
    TRY(read_sections(file, c, index_offset));
    TRY(expect_key(c, "tensors"));
    TRY(read_members(c, "tensors", &file->tensors, &file->about.tensors));
    if (c->p != c->end) return bad(c, "something follows the map");
    for (size_t i = 0; i < file->about.tensors; i++) {
        if (is_header_name(file->tensors[i].name)) return bad(c, "a tensor is named __metadata__");
    }
    for (size_t i = 0; i < file->about.layouts && !cold; i++) {
        const dlt_layout *l = &file->layouts[i].layout;
        /* 11.1: rank: not in the table of a hot file */
        if (l->kind == DLT_NM && l->index == DLT_RANK) return bad(c, "a hot file has a layout with a rank index");
    }
    for (size_t i = 0; i < file->about.removed; i++) {
        if (find_tensor(file, file->removed[i]))
            return INVALID(error, "%s is a tensor and removed", show(file->removed[i]).text);
    }
    TRY(read_attachment_buffers(file, &buffers));
    return read_heads(file, &heads);
}

/* ---- Opening: header (4), trailer (8) ---- */

static dlt_status check_header(dlt_file *file, dlt_error *error) {
    static const uint8_t magic[8] = {0x89, 'D', 'L', 'T', '\r', '\n', 0x1A, '\n'};
    const uint8_t *h = file->data;
    /* 4.1: refuse a file whose magic differs. If bytes 1..4 are right and the rest is not, say that the file was
     * probably transferred in text mode. */
    if (file->size < 8 || memcmp(h, magic, 8) != 0) {
        if (file->size >= 4 && memcmp(h + 1, magic + 1, 3) == 0)
            return INVALID(error, "the file was probably transferred in text mode");
        return INVALID(error, file->size ? "not a deltafmt file" : "the file is empty");
    }
    if (file->size < HEADER) return INVALID(error, "the file is truncated");
    /* 4.2: check the checksum, then refuse a reader version above its own and any incompatible bit that it does not
     * know. */
    if (read64(h + 56) != dlt_xxh3_64(h, 56)) return INVALID(error, "the header's checksum does not match");
    uint32_t version = read32(h + 8);
    uint64_t unknown = read64(h + 16) & ~(uint64_t)FEATURES;
    if (version == 0) return INVALID(error, "the file has version 0");
    if (version > 1) return fail(error, DLT_UNSUPPORTED, "the file needs a reader of version %u", version);
    if (unknown) {
        int bit = 0;
        while (!(unknown >> bit & 1)) bit++;
        return fail(error, DLT_UNSUPPORTED, "the file has the unknown incompatible feature bit %d", bit);
    }
    /* 4.3: header size other than 64 and reserved bytes other than zero. */
    if (read32(h + 12) != HEADER) return INVALID(error, "the header's size is not 64");
    if (!all_zero(h + 32, 24)) return INVALID(error, "reserved bytes of the header are not zero");
    file->about.incompatible = read64(h + 16);
    file->about.compatible = read64(h + 24);
    return DLT_OK;
}

/* 8: the magic, the file's length, that index and trailer end the file, the reserved bytes and the seal. */
static dlt_status check_trailer(dlt_file *file, uint64_t *index_offset, dlt_error *error) {
    if (file->size < PAGE + 1 + TRAILER) return INVALID(error, "the file is truncated");
    const uint8_t *t = file->data + file->size - TRAILER;
    if (memcmp(t + 120, "DLTEND\r\n", 8) != 0)
        return INVALID(error, "the trailer is missing: the file is truncated, or something follows it");
    uint64_t offset = read64(t), length = read64(t + 8);
    if (read64(t + 16) != file->size) return INVALID(error, "the file has another length than its trailer says");
    if (!all_zero(t + 56, 32)) return INVALID(error, "reserved bytes of the trailer are not zero");
    /* 9: index: 67,108,864 bytes */
    if (length > MAX_INDEX) return INVALID(error, "the index is over the limit of 67,108,864 bytes");
    if (offset % PAGE || offset < PAGE || offset > file->size || file->size - offset != length + TRAILER) {
        return INVALID(error, "index and trailer do not end the file");
    }
    file->index = (slice){file->data + offset, (size_t)length};
    /* seal: BLAKE3 of the header (64 bytes), the index, and bytes 0..88 of the trailer */
    blake3 hash;
    uint8_t seal[32];
    dlt_blake3_start(&hash);
    dlt_blake3_add(&hash, file->data, HEADER);
    dlt_blake3_add(&hash, file->index.p, file->index.length);
    dlt_blake3_add(&hash, t, 88);
    dlt_blake3_end(&hash, seal);
    if (memcmp(seal, t + 88, 32) != 0) return INVALID(error, "the seal is not the digest of header, index and trailer");
    file->about.content_id = t + 24;
    *index_offset = offset;
    return DLT_OK;
}

static uint64_t default_limit(uint64_t asked, uint64_t fixed, uint64_t each, uint64_t size) {
    if (asked) return asked;
    return size > (UINT64_MAX - fixed) / each ? UINT64_MAX : fixed + each * size;
}

static dlt_status open_bytes(dlt_file *file, const dlt_limits *limits, dlt_error *error) {
    static const dlt_limits none = {0, 0, 0};
    uint64_t index_offset;
    if (limits == NULL) limits = &none;
    file->limits.max_memory = default_limit(limits->max_memory, UINT64_C(128) << 20, 64, file->size);
    file->limits.max_elements = default_limit(limits->max_elements, UINT64_C(1) << 24, 1 << 15, file->size);
    file->limits.max_output = default_limit(limits->max_output, UINT64_C(32) << 20, 256, file->size);
    file->about.size = file->size;
    TRY(check_header(file, error));
    TRY(check_trailer(file, &index_offset, error));
    /* 3.2: zero padding after the header */
    if (!all_zero(file->data + HEADER, PAGE - HEADER))
        return INVALID(error, "the padding after the header is not zero");
    return read_index(file, index_offset, error);
}

void dlt_close(dlt_file *file) {
    if (file == NULL) return;
    for (size_t i = 0; i < file->about.sections; i++) free(file->sections[i].frames);
    for (size_t i = 0; i < file->about.tensors; i++) free(file->tensors[i].known);
    free(file->sections);
    free(file->tensors);
    free(file->scaled);
    free(file->attachments);
    free(file->files);
    free(file->layouts);
    free(file->metadata);
    free(file->removed);
    free(file->chunk);
    if (file->mapped) munmap((void *)(uintptr_t)file->data, (size_t)file->size);
    free(file);
}

static dlt_status open_data(const void *data, uint64_t size, int mapped, const dlt_limits *limits, dlt_file **out,
                            dlt_error *error) {
    dlt_file *file = calloc(1, sizeof *file);
    *out = NULL;
    if (file == NULL) {
        if (mapped) munmap((void *)(uintptr_t)data, (size_t)size);
        return no_memory(error);
    }
    file->data = data, file->size = size, file->mapped = mapped;
    error->status = DLT_OK, error->message[0] = 0;
    dlt_status status = open_bytes(file, limits, error);
    if (status == DLT_OK) *out = file;
    else dlt_close(file);
    return status;
}

dlt_status dlt_open_memory(const void *data, size_t size, const dlt_limits *limits, dlt_file **out, dlt_error *error) {
    *out = NULL;
    if ((uintptr_t)data % 8) return fail(error, DLT_MISUSE, "the bytes of a file must be aligned to 8 bytes");
    return open_data(data, size, 0, limits, out, error);
}

dlt_status dlt_open(const char *path, const dlt_limits *limits, dlt_file **out, dlt_error *error) {
    struct stat about;
    *out = NULL;
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0 || fstat(fd, &about) != 0) {
        dlt_status status = fail(error, DLT_SYSTEM, "%s", strerror(errno));
        if (fd >= 0) close(fd);
        return status;
    }
    void *data = NULL;
    dlt_status status = DLT_OK;
    if (S_ISDIR(about.st_mode)) status = INVALID(error, "it is a folder, not a delta file");
    else if (!S_ISREG(about.st_mode)) status = fail(error, DLT_SYSTEM, "not a regular file");
    else if (about.st_size == 0) status = INVALID(error, "the file is empty");
    else if ((data = mmap(NULL, (size_t)about.st_size, PROT_READ, MAP_PRIVATE, fd, 0)) == MAP_FAILED) {
        status = fail(error, DLT_SYSTEM, "%s", strerror(errno));
    }
    close(fd);
    return status == DLT_OK ? open_data(data, (uint64_t)about.st_size, 1, limits, out, error) : status;
}

/* ---- What a file holds ---- */

dlt_info dlt_about(const dlt_file *file) { return file->about; }
dlt_text dlt_removed(const dlt_file *file, size_t number) { return file->removed[number]; }
dlt_text dlt_attachment_name(const dlt_file *file, size_t number) { return file->attachments[number].name; }

dlt_text dlt_metadata_key(const dlt_file *file, size_t number, dlt_text *value) {
    *value = file->metadata[number].value;
    return file->metadata[number].key;
}

dlt_status dlt_tensor_at(const dlt_file *file, size_t number, dlt_tensor *tensor, dlt_error *error) {
    if (number >= file->about.tensors) return fail(error, DLT_MISUSE, "there is no tensor %zu", number);
    return read_entry(file, &file->tensors[number], tensor, error);
}

dlt_status dlt_find(const dlt_file *file, const char *name, dlt_tensor *tensor, dlt_error *error) {
    const member *found = find_tensor(file, (dlt_text){name, strlen(name)});
    if (found == NULL)
        return fail(error, DLT_MISUSE, "there is no tensor %s", show((dlt_text){name, strlen(name)}).text);
    return read_entry(file, found, tensor, error);
}

dlt_status dlt_resolve(const dlt_file *file, const dlt_tensor *tensor, dlt_tensor *resolved, dlt_error *error) {
    return read_entry(file, find_tensor(file, tensor->action == DLT_ALIAS ? tensor->target : tensor->name), resolved,
                      error);
}

dlt_part dlt_part_at(const dlt_tensor *tensor, uint32_t number) {
    dlt_error ignored;
    cursor c = {tensor->raw_parts, tensor->raw + tensor->raw_length, &ignored, tensor->name};
    dlt_part part = {{0}, 0, 0};
    size_t count;
    read_array(&c, &count);
    for (uint32_t i = 0; i <= number && i < tensor->part_count; i++) {
        read_array(&c, &count); /* what read_entry has checked */
        read_string(&c, &part.name);
        read_integer(&c, "", 0, UINT64_MAX, &part.start);
        read_integer(&c, "", 0, UINT64_MAX, &part.count);
    }
    return part;
}

dlt_status dlt_scaled_at(const dlt_file *file, size_t number, dlt_scaled *scaled, dlt_error *error) {
    if (number >= file->about.scaled) return fail(error, DLT_MISUSE, "there is no scaled tensor %zu", number);
    return read_scaled(&file->scaled[number], scaled, error);
}

const dlt_bytes *dlt_buffer(const dlt_term *term, const char *name) {
    for (uint32_t i = 0; i < term->buffer_count; i++) {
        if (strcmp(term->buffers[i].name, name) == 0) return &term->buffers[i];
    }
    return NULL;
}

dlt_status dlt_validate(const dlt_file *file, dlt_error *error) {
    dlt_tensor tensor;
    dlt_scaled scaled;
    for (size_t i = 0; i < file->about.tensors; i++) TRY(dlt_tensor_at(file, i, &tensor, error));
    for (size_t i = 0; i < file->about.scaled; i++) TRY(dlt_scaled_at(file, i, &scaled, error));
    return DLT_OK;
}

/* ---- Full fields: those of the code 2^k - 1 ---- */

/* Loops over words, compiled also for processors with AVX2 where the system can choose between two compilations of a
 * function. */
#if defined(VECTORS)
/* the build says */
#elif defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__)
#define VECTORS __attribute__((target_clones("avx2", "default")))
#else
#define VECTORS
#endif

/* Bit 0 of each field of w bits says whether the field is all ones. */
static inline uint32_t full_fields(uint32_t x, unsigned w) {
    if (w == 8) x &= x >> 4;
    if (w >= 4) x &= x >> 2;
    if (w >= 2) x &= x >> 1;
    return x & (w == 8   ? UINT32_C(0x01010101)
                : w == 4 ? UINT32_C(0x11111111)
                : w == 2 ? UINT32_C(0x55555555)
                         : UINT32_MAX);
}

/* Those bits side by side. */
static inline uint32_t gather_bits(uint32_t x, unsigned w) {
    if (w == 2) {
        x = (x | x >> 1) & UINT32_C(0x33333333), x = (x | x >> 2) & UINT32_C(0x0F0F0F0F);
        x = (x | x >> 4) & UINT32_C(0x00FF00FF), x = (x | x >> 8) & 0xFFFF;
    }
    if (w == 4)
        x = (x | x >> 3) & UINT32_C(0x03030303), x = (x | x >> 6) & UINT32_C(0x000F000F), x = (x | x >> 12) & 0xFF;
    if (w == 8) x = (x | x >> 7) & UINT32_C(0x00030003), x = (x | x >> 14) & 0xF;
    return x;
}

/* Whether a field of codes of one plane is all ones, in a multiple of 32 adjacent words. */
#define FULL_FIELDS(w)                                                                   \
    for (uint64_t i = 0; i < n; i += 32) {                                               \
        for (int k = 0; k < 32; k++) found[k] |= full_fields(words[i + (uint64_t)k], w); \
    }

VECTORS static int has_full_field(const uint32_t *words, uint64_t n, unsigned w) {
    uint32_t found[32] = {0}, any = 0;
    if (w == 2) FULL_FIELDS(2)
    else if (w == 4) FULL_FIELDS(4)
    else FULL_FIELDS(8)
    for (int k = 0; k < 32; k++) any |= found[k];
    return any != 0;
}

/* full |= the bits of 32 words of width w, moved to where word i of 32 fields has them. */
#define FULL_WORDS(w) \
    for (int k = 0; k < LANES; k++) full[k] |= gather_bits(full_fields(words[k], w), w) << (32 / w * i)

/* Whether a field of codes of several planes is all ones: the 32 fields from `first` on of the 32 lanes of a tile. */
VECTORS static int has_full_field_of_planes(const uint32_t *tile, const stream *s, uint64_t first) {
    uint32_t found[LANES], any = 0;
    memset(found, 0xFF, sizeof found);
    for (unsigned j = 0; j < s->planes; j++) {
        const unsigned w = s->plane_width[j];
        uint32_t full[LANES] = {0};
        uint64_t word = s->first_word[j] + first / (32 / w), end = j + 1 < s->planes ? s->first_word[j + 1] : s->words;
        for (unsigned i = 0; i < w && word + i < end; i++) {
            const uint32_t *words = tile + LANES * (word + i);
            if (w == 1) FULL_WORDS(1);
            else if (w == 2) FULL_WORDS(2);
            else FULL_WORDS(4);
        }
        for (int k = 0; k < LANES; k++) found[k] &= full[k];
    }
    for (int k = 0; k < LANES; k++) any |= found[k];
    return any != 0;
}

/* ---- Raw bytes of sections (5, 6) ---- */

/* The system's libzstd: three functions of its stable interface. */
static struct {
    size_t (*decompress)(void *, size_t, const void *, size_t);
    size_t (*frame_size)(const void *, size_t);
    unsigned (*is_error)(size_t);
} zstd;
static pthread_once_t zstd_once = PTHREAD_ONCE_INIT;

static void load_zstd(void) {
    static const char *const names[] = {"libzstd.so.1", "libzstd.1.dylib", "libzstd.so"};
    void *library = NULL;
    for (int i = 0; i < 3 && library == NULL; i++) library = dlopen(names[i], RTLD_NOW | RTLD_LOCAL);
    if (library == NULL) return;
    /* POSIX lets dlsym give functions; ISO C has no cast for it. */
    *(void **)&zstd.decompress = dlsym(library, "ZSTD_decompress");
    *(void **)&zstd.frame_size = dlsym(library, "ZSTD_findFrameCompressedSize");
    *(void **)&zstd.is_error = dlsym(library, "ZSTD_isError");
}

static dlt_status need_zstd(dlt_error *error) {
    pthread_once(&zstd_once, load_zstd);
    if (zstd.decompress && zstd.frame_size && zstd.is_error) return DLT_OK;
    return fail(error, DLT_SYSTEM, "the file has compressed sections, and libzstd.so.1 was not found");
}

static uint64_t chunk_length(const section *s, uint64_t number) { return least(CHUNK, s->raw_length - number * CHUNK); }

/* What check_section checks, but for the checksum itself. */
static dlt_status check_outline(dlt_file *file, section *s, dlt_error *error) {
    size_t number = (size_t)(s - file->sections);
    uint64_t end = s->offset + s->length;
    if (!all_zero(file->data + end, align(end, PAGE) - end))
        return INVALID(error, "the padding after section %zu is not zero", number);
    if (s->codec == 0 || s->frames) return DLT_OK;
    /* 6.1: the chunk table: for every chunk the length of its frame, u32. */
    uint64_t chunks = ceil_div(s->raw_length, CHUNK), at = s->offset, table = end - 4 * chunks;
    uint64_t *frames = malloc((size_t)(chunks + 1) * sizeof *frames);
    if (frames == NULL) return no_memory(error);
    for (uint64_t i = 0; i < chunks; i++) {
        frames[i] = at;
        at += read32(file->data + table + 4 * i);
    }
    frames[chunks] = at;
    /* 6.3: the lengths in the table MUST sum to the stored length less the table. */
    if (at != table) {
        free(frames);
        return INVALID(error, "the chunk table of section %zu does not sum to its length", number);
    }
    s->frames = frames;
    return DLT_OK;
}

static dlt_status end_checksum(dlt_file *file, section *s, dlt_error *error) {
    uint8_t checksum[16];
    dlt_xxh3_end(&s->run, file->data + s->offset, (size_t)s->length, checksum);
    if (memcmp(checksum, s->checksum, 16) != 0)
        return INVALID(error, "section %zu does not match its checksum", (size_t)(s - file->sections));
    s->state = CHECKED;
    return DLT_OK;
}

/* 5.3: check the checksum, and the padding after the section, before it uses a section's bytes for the first time. */
static dlt_status check_section(dlt_file *file, section *s, dlt_error *error) {
    if (s->state != UNCHECKED) return DLT_OK;
    dlt_xxh3_start(&s->run);
    TRY(end_checksum(file, s, error));
    s->state = UNCHECKED;
    TRY(check_outline(file, s, error));
    s->state = CHECKED;
    return DLT_OK;
}

/* 6.2: each frame MUST declare its content size, which MUST be its chunk's length; no dictionary, no frame checksum, no
 * window above 2^27 bytes. RFC 8878, 3.1.1.1, has the frame's header. */
static dlt_status check_frame(const uint8_t *p, uint64_t length, uint64_t chunk, dlt_error *error) {
    static const uint8_t sizes[4] = {0, 2, 4, 8}, dictionaries[4] = {0, 1, 2, 4};
    if (length < 6 || read32(p) != UINT32_C(0xFD2FB528)) return INVALID(error, "a chunk is no zstd frame");
    unsigned descriptor = p[4], single = descriptor >> 5 & 1, size = sizes[descriptor >> 6];
    if (size == 0 && single) size = 1;
    if (descriptor & 4) return INVALID(error, "a zstd frame has a checksum");
    if (size == 0) return INVALID(error, "a zstd frame does not declare its size");
    unsigned dictionary = 5 + !single, content = dictionary + dictionaries[descriptor & 3];
    if (length < content + size) return INVALID(error, "a zstd frame is truncated");
    if (!single) {
        uint64_t base = UINT64_C(1) << (10 + (p[5] >> 3));
        if (base + base / 8 * (p[5] & 7) > UINT64_C(1) << 27)
            return INVALID(error, "a zstd frame has a window above 2^27 bytes");
    }
    if (!all_zero(p + dictionary, content - dictionary)) return INVALID(error, "a zstd frame has a dictionary");
    uint64_t declared = 0;
    for (unsigned i = size; i-- > 0;) declared = declared << 8 | p[content + i];
    if (size == 2) declared += 256;
    if (declared == chunk) return DLT_OK;
    return INVALID(error, "a zstd frame declares %llu bytes, and its chunk has %llu", (unsigned long long)declared,
                   (unsigned long long)chunk);
}

/* Decompress a chunk into the file's memory, where the last one stays. */
static dlt_status read_chunk(dlt_file *file, const section *s, uint64_t number, dlt_error *error) {
    if (file->chunk_of == s && file->chunk_number == number) return DLT_OK;
    TRY(need_zstd(error));
    if (file->chunk == NULL && (file->chunk = malloc(CHUNK)) == NULL) return no_memory(error);
    const uint8_t *frame = file->data + s->frames[number];
    uint64_t length = s->frames[number + 1] - s->frames[number], chunk = chunk_length(s, number);
    TRY(check_frame(frame, length, chunk, error));
    file->chunk_of = NULL;
    /* Each MUST end exactly where the table says, with nothing after it. */
    if (zstd.frame_size(frame, (size_t)length) != length)
        return INVALID(error, "a zstd frame does not end where the table says");
    size_t got = zstd.decompress(file->chunk, CHUNK, frame, (size_t)length);
    if (zstd.is_error(got) || got != chunk) return INVALID(error, "a zstd frame does not give its chunk");
    file->chunk_of = s, file->chunk_number = number;
    return DLT_OK;
}

/* The next bytes of a buffer: all of them if its section is stored, otherwise those in one chunk. */
static dlt_status next_piece(dlt_file *file, uint32_t number, uint64_t offset, uint64_t length, slice *out,
                             dlt_error *error) {
    section *s = &file->sections[number];
    TRY(check_section(file, s, error));
    if (s->codec == 0) {
        *out = (slice){file->data + s->offset + offset, (size_t)length};
        return DLT_OK;
    }
    TRY(read_chunk(file, s, offset / CHUNK, error));
    uint64_t within = offset % CHUNK;
    *out = (slice){file->chunk + within, (size_t)least(length, chunk_length(s, offset / CHUNK) - within)};
    return DLT_OK;
}

/* Add bytes that lie in a stored section to a hash, and the same bytes to the section's checksum while they are in the
 * cache. A width other than 0 asks whether one of its fields is full. */
static int hash_stored(dlt_file *file, uint32_t number, uint64_t offset, uint64_t length, unsigned width,
                       blake3 *hash) {
    section *s = &file->sections[number];
    const uint8_t *data = file->data + s->offset;
    int full = 0;
    for (uint64_t done = 0, size; done < length; done += size) {
        size = least(length - done, 1 << 17);
        /* The first look at 4 KiB brings them to the cache of the others. */
        for (uint64_t at = done, few; at < done + size; at += few) {
            few = least(done + size - at, PAGE);
            if (width) full |= has_full_field((const uint32_t *)(const void *)(data + offset + at), few / 4, width);
            if (s->state == CHECKING) dlt_xxh3_advance(&s->run, data, (size_t)s->length, (size_t)(offset + at + few));
        }
        if (done + size < length) dlt_blake3_add_part(hash, data + offset + done, (size_t)size);
        else dlt_blake3_add(hash, data + offset + done, (size_t)size);
    }
    return full;
}

static dlt_status hash_buffer(dlt_file *file, const dlt_bytes *b, blake3 *hash, dlt_error *error) {
    if (file->sections[b->section].codec == 0)
        return hash_stored(file, b->section, b->offset, b->length, 0, hash), DLT_OK;
    slice piece;
    for (uint64_t done = 0; done < b->length; done += piece.length) {
        TRY(next_piece(file, b->section, b->offset + done, b->length - done, &piece, error));
        dlt_blake3_add(hash, piece.p, piece.length);
    }
    return DLT_OK;
}

static dlt_status copy_buffer(dlt_file *file, const dlt_bytes *b, uint8_t *out, dlt_error *error) {
    slice piece;
    for (uint64_t done = 0; done < b->length; done += piece.length) {
        TRY(next_piece(file, b->section, b->offset + done, b->length - done, &piece, error));
        memcpy(out + done, piece.p, piece.length);
    }
    return DLT_OK;
}

static dlt_status load_buffer(dlt_file *file, dlt_tensor *t, dlt_bytes *b, uint64_t *total, dlt_error *error) {
    static const uint64_t nothing = 0;
    section *s = &file->sections[b->section];
    TRY(check_section(file, s, error));
    if (s->codec == 0 || b->length == 0) {
        b->data = b->length ? file->data + s->offset + b->offset : (const void *)&nothing;
        return DLT_OK;
    }
    *total += b->length;
    if (*total > file->limits.max_memory) {
        return fail(error, DLT_LIMIT, "%s: its buffers decode to more than max_memory, %llu bytes", show(t->name).text,
                    (unsigned long long)file->limits.max_memory);
    }
    void *memory = malloc((size_t)b->length);
    if (memory == NULL) return no_memory(error);
    t->memory[t->memory_count++] = memory;
    b->data = memory;
    return copy_buffer(file, b, memory, error);
}

void dlt_unload(dlt_tensor *tensor) {
    for (uint32_t i = 0; i < tensor->memory_count; i++) free(tensor->memory[i]);
    tensor->memory_count = 0;
    tensor->loaded = 0;
}

/* ---- Checks of the kinds (11 to 14) ---- */

/* What is checked: all that reading a tensor needs (section 15), or also that it has its one form (15, on verifying).
 */
typedef enum { TO_READ, TO_VERIFY } purpose;

/* Field i of a row whose words lie `stride` words apart. */
static uint64_t field(const uint32_t *words, size_t stride, const stream *s, uint64_t i) {
    uint64_t value = 0;
    for (unsigned j = 0; j < s->planes; j++) {
        unsigned w = s->plane_width[j];
        /* Field i of a row takes the bits i * w_j to (i + 1) * w_j of the row's plane, lowest bit first. */
        uint64_t word = s->first_word[j] + i / (32 / w), bit = i % (32 / w) * w;
        value |= (words[word * stride] >> bit & (UINT64_MAX >> (64 - w))) << s->shift[j];
    }
    return value;
}

/* Field i of all 32 lanes of a tile. */
static inline void lane_fields(const uint32_t *tile, const stream *s, uint64_t i, uint32_t low[LANES]) {
    memset(low, 0, LANES * sizeof *low);
    for (unsigned j = 0; j < s->planes; j++) {
        unsigned w = s->plane_width[j], bit = (unsigned)(i % (32 / w) * w), shift = s->shift[j];
        const uint32_t *words = tile + LANES * (s->first_word[j] + i / (32 / w)), mask = UINT32_MAX >> (32 - w);
        for (int l = 0; l < LANES; l++) low[l] |= (words[l] >> bit & mask) << shift;
    }
}

/* Lanes of tile t that hold one of n rows (11.2): row r is lane floor((r mod 32v) / v) of tile floor(r / 32v) * v + (r
 * mod v). */
static unsigned lanes_of(uint64_t t, uint32_t v, uint64_t rows) {
    uint64_t first = t / v * LANES * v + t % v;
    return first >= rows ? 0 : (unsigned)least(ceil_div(rows - first, v), LANES);
}

static const uint32_t *row_words(const void *buffer, const stream *s, uint32_t v, uint64_t row) {
    uint64_t tile = row / (LANES * v) * v + row % v, lane = row % (LANES * v) / v;
    return (const uint32_t *)buffer + LANES * tile * s->words + lane;
}

/* Unused bits of the last word of plane j, as a mask; 0 if there is none. */
static uint32_t unused_bits(const stream *s, unsigned j) {
    uint64_t used = s->count % (32 / s->plane_width[j]) * s->plane_width[j];
    return used ? UINT32_MAX << used : 0;
}

static uint64_t last_word(const stream *s, unsigned j) {
    return (j + 1 < s->planes ? s->first_word[j + 1] : s->words) - 1;
}

static dlt_status broken(const dlt_tensor *t, const char *buffer, const char *what, dlt_error *error) {
    return INVALID(error, "%s: %s: %s", show(t->name).text, buffer, what);
}

/* 11.2: unused bits of a plane's last word are zero, words of rows that do not exist are zero; 11.5, 12.3: on the
 * midtread grid the field 2^k - 1 MUST NOT occur. */
static dlt_status check_tiles(const dlt_tensor *t, const dlt_bytes *b, const stream *s, uint64_t tiles, uint32_t v,
                              uint64_t rows, int midtread, dlt_error *error) {
    const uint32_t *words = b->data;
    for (uint64_t tile = 0; tile < tiles && s->words; tile++) {
        const uint32_t *p = words + LANES * s->words * tile;
        unsigned lanes = lanes_of(tile, v, rows);
        uint32_t wrong = 0;
        for (uint64_t w = 0; w < s->words && lanes < LANES; w++) {
            for (unsigned l = lanes; l < LANES; l++) wrong |= p[LANES * w + l];
        }
        if (wrong) return broken(t, b->name, "a row that does not exist has a word", error);
        for (unsigned j = 0; j < s->planes; j++) {
            uint32_t mask = unused_bits(s, j), found = 0;
            const uint32_t *last = p + LANES * last_word(s, j);
            for (int l = 0; l < LANES && mask; l++) found |= last[l];
            if (found & mask) return broken(t, b->name, "unused bits are set", error);
        }
        if (midtread && s->planes > 1) {
            for (uint64_t i = 0; i < s->count; i += 32) {
                if (has_full_field_of_planes(p, s, i)) return broken(t, b->name, "a field is beyond the grid", error);
            }
        }
    }
    return DLT_OK; /* Fields of one plane are looked at while they are hashed. */
}

/* 11.5: a scale MUST be finite and not negative (not even -0): as bits, below those of infinity. */
static int scales_are_good(const void *data, dlt_dtype dtype, uint64_t count) {
    uint32_t worst = 0;
    if (dtype == DLT_BF16) {
        const uint16_t *scales = data;
        uint16_t most = 0;
        for (uint64_t i = 0; i < count; i++) most = scales[i] > most ? scales[i] : most;
        return most < 0x7F80;
    }
    const uint32_t *scales = data;
    for (uint64_t i = 0; i < count; i++) worst = scales[i] > worst ? scales[i] : worst;
    return worst < UINT32_C(0x7F800000);
}

/* Scales in the tiles of 11.2: scale s of lane l of tile t is element 32 (t S + s) + l; those of rows that do not exist
 * are zero. */
static dlt_status check_scales(const dlt_tensor *t, const dlt_bytes *b, const dlt_layout *l, uint64_t tiles,
                               uint64_t each, uint32_t v, uint64_t rows, purpose why, dlt_error *error) {
    uint64_t size = size_of(l->scale_dtype);
    const uint8_t *p = b->data;
    if (!scales_are_good(p, l->scale_dtype, LANES * tiles * each)) {
        for (uint64_t i = 0; i < LANES * tiles * each; i++) {
            if (i % LANES < lanes_of(i / LANES / each, v, rows) && !scales_are_good(p + size * i, l->scale_dtype, 1))
                return broken(t, b->name, "a scale is negative or not finite", error);
        }
    }
    for (uint64_t i = 0; i < tiles * each && why == TO_VERIFY; i++) {
        unsigned lanes = lanes_of(i / each, v, rows);
        if (!all_zero(p + size * (LANES * i + lanes), size * (LANES - lanes)))
            return broken(t, b->name, "a row that does not exist has a scale", error);
    }
    return DLT_OK;
}

/* Whether values of a dtype are all finite. */
static int values_are_finite(const void *data, dlt_dtype dtype, uint64_t count) {
    if (dtype == DLT_F32) {
        const uint32_t *values = data;
        uint32_t worst = 0;
        for (uint64_t i = 0; i < count; i++)
            worst = (values[i] & UINT32_C(0x7FFFFFFF)) > worst ? values[i] & UINT32_C(0x7FFFFFFF) : worst;
        return worst < UINT32_C(0x7F800000);
    }
    const uint16_t *values = data;
    uint16_t worst = 0;
    for (uint64_t i = 0; i < count; i++) worst = (values[i] & 0x7FFF) > worst ? values[i] & 0x7FFF : worst;
    return worst < (dtype == DLT_BF16 ? 0x7F80 : 0x7C00);
}

/* ---- nm (11) ---- */

static uint32_t mix(uint32_t x) {
    x ^= x >> 16, x *= UINT32_C(0x7FEB352D), x ^= x >> 15, x *= UINT32_C(0x846CA68B);
    return x ^ x >> 16;
}

static uint64_t mix64(uint32_t x) {
    x ^= x >> 16;
    uint64_t p = x * UINT64_C(0xCD9E8D57);
    x = (uint32_t)(p >> 32) ^ (uint32_t)p;
    return x * UINT64_C(0xFFFEB2D5);
}

/* What the positions of a term follow from. */
typedef struct {
    const dlt_term *term;
    stream index;
    unsigned log_m, hash_bits; /* seeded: m and L */
    uint64_t *choices;         /* rank: C(p, i) for p up to M - 1, row i */
    uint64_t ranks;            /* C(M, N) */
} index_reader;

static dlt_status start_index(index_reader *p, const dlt_tensor *t, const dlt_term *term, dlt_error *error) {
    const dlt_layout *l = &term->layout;
    memset(p, 0, sizeof *p);
    p->term = term;
    p->log_m = bits_for(l->group);
    /* L: the smallest of 4, 8 and 16 that is at least m (if N = 1) or 2m - 1 (if N > 1) */
    unsigned needed = l->keep == 1 ? p->log_m : 2 * p->log_m - 1;
    p->hash_bits = needed <= 4 ? 4 : needed <= 8 ? 8 : 16;
    if (l->index != DLT_SEEDED) p->index = index_stream(l, l->index, t->columns);
    if (l->index != DLT_RANK) return DLT_OK;
    p->ranks = binomial(l->group, l->keep);
    p->choices = malloc((size_t)(l->keep + 1) * l->group * sizeof *p->choices);
    if (p->choices == NULL) return no_memory(error);
    for (size_t i = 0; i <= l->keep; i++) {
        for (size_t n = 0; n < l->group; n++) {
            uint64_t same = 0, fewer = 0; /* C(n, i) = C(n - 1, i) + C(n - 1, i - 1) */
            if (n > 0) same = p->choices[i * l->group + n - 1];
            if (n > 0 && i > 0) fewer = p->choices[(i - 1) * l->group + n - 1];
            p->choices[i * l->group + n] = i == 0 ? 1 : same > UINT64_MAX - fewer ? UINT64_MAX : same + fewer;
        }
    }
    return DLT_OK;
}

/* The ascending positions p_0 < p_1 < ... whose C(p_0, 1) + C(p_1, 2) + ... is a rank. */
static void unrank(const index_reader *p, uint64_t rank, uint8_t *out) {
    unsigned m = p->term->layout.group, position = m;
    for (unsigned i = p->term->layout.keep; i > 0; i--) {
        const uint64_t *row = p->choices + (size_t)i * m;
        do position--;
        while (row[position] > rank && position > i - 1);
        rank -= row[position];
        out[i - 1] = (uint8_t)position;
    }
}

/* 11.4: the N positions of group g of mask row q. */
static void positions_of(const index_reader *p, uint64_t q, uint64_t g, uint8_t *out) {
    const dlt_layout *l = &p->term->layout;
    if (l->index == DLT_SEEDED) {
        /* key = mix(seed + q * 0x9E3779B1 mod 2^32); h = mix64(key + floor(g / Q) * 0x85EBCA6B mod 2^32); lane = h >>
         * (L * (g mod Q)) */
        uint64_t per_hash = 64 / p->hash_bits;
        uint32_t key = mix(p->term->seed + (uint32_t)q * UINT32_C(0x9E3779B1));
        uint64_t lane = mix64(key + (uint32_t)(g / per_hash) * UINT32_C(0x85EBCA6B)) >> (p->hash_bits * (g % per_hash));
        /* b = lane & (M - 1); a = ((lane >> (m - 1)) & (M - 1)) | 1; entry i is at (a * i + b) mod M */
        uint32_t b = (uint32_t)lane & (l->group - 1), a = ((uint32_t)(lane >> (p->log_m - 1)) & (l->group - 1)) | 1;
        for (uint32_t i = 0; i < l->keep; i++) out[i] = (uint8_t)((a * i + b) & (l->group - 1));
        return;
    }
    const uint32_t *words = row_words(p->term->buffers[1].data, &p->index, 1, q);
    if (l->index == DLT_FIXED) {
        for (uint32_t i = 0; i < l->keep; i++) out[i] = (uint8_t)field(words, LANES, &p->index, g * l->keep + i);
    } else {
        unrank(p, field(words, LANES, &p->index, g), out);
    }
}

/* fixed: positions below M and strictly ascending within a group. Returns a bit for each lane of a tile that breaks
 * this. */
VECTORS static uint32_t wrong_positions(const uint32_t *tile, const stream *s, uint32_t keep, uint32_t m) {
    int32_t wrong[LANES] = {0}, before[LANES] = {0};
    const unsigned w = s->plane_width[0];
    const uint32_t mask = (UINT32_C(1) << w) - 1;
    uint32_t lanes = 0, within = 0;
    for (uint64_t i = 0; i < s->count; i++, within = within + 1 < keep ? within + 1 : 0) {
        int32_t now[LANES];
        if (s->planes == 1) {
            const uint32_t *words = tile + LANES * (i / (32 / w));
            const unsigned bit = (unsigned)(i % (32 / w) * w);
            for (int k = 0; k < LANES; k++) now[k] = (int32_t)(words[k] >> bit & mask);
        } else {
            uint32_t fields[LANES];
            lane_fields(tile, s, i, fields);
            memcpy(now, fields, sizeof now);
        }
        if (within == 0) memset(before, 0xFF, sizeof before); /* -1, below every position */
        for (int k = 0; k < LANES; k++) {
            wrong[k] |= (now[k] <= before[k]) | (now[k] >= (int32_t)m);
            before[k] = now[k];
        }
    }
    for (int k = 0; k < LANES; k++) lanes |= (uint32_t)(wrong[k] & 1) << k;
    return lanes;
}

/* rank: below C(M, N). */
static dlt_status check_index(const dlt_tensor *t, const index_reader *p, uint64_t mask_rows, dlt_error *error) {
    const dlt_layout *l = &p->term->layout;
    const dlt_bytes *b = &p->term->buffers[1];
    for (uint64_t tile = 0; tile < tiles_of(mask_rows, 1); tile++) {
        const uint32_t *words = (const uint32_t *)b->data + LANES * p->index.words * tile;
        unsigned lanes = lanes_of(tile, 1, mask_rows);
        if (l->index == DLT_FIXED) {
            uint32_t wrong = wrong_positions(words, &p->index, l->keep, l->group);
            if (wrong & (UINT32_MAX >> (LANES - lanes)))
                return broken(t, b->name, "positions are not ascending and below M", error);
        }
        for (unsigned k = 0; k < lanes && l->index == DLT_RANK; k++) {
            for (uint64_t g = 0; g < p->index.count; g++) {
                if (field(words + k, LANES, &p->index, g) >= p->ranks)
                    return broken(t, b->name, "a rank is not below C(M, N)", error);
            }
        }
    }
    return DLT_OK;
}

/* 11.4: an entry at or beyond the last column (only in the last group of a row) is ignored; its field MUST be zero. */
static dlt_status check_beyond(const dlt_tensor *t, const index_reader *p, const stream *codes, dlt_error *error) {
    const dlt_layout *l = &p->term->layout;
    uint64_t groups = groups_of(l, t->columns), start = (groups - 1) * l->group;
    uint8_t positions[255];
    if (t->columns % l->group == 0) return DLT_OK;
    for (uint64_t row = 0; row < t->shared_rows; row++) {
        const uint32_t *words = row_words(p->term->buffers[0].data, codes, l->share, row);
        if (row % l->share == 0) positions_of(p, row / l->share, groups - 1, positions);
        for (uint32_t i = 0; i < l->keep; i++) {
            if (start + positions[i] >= t->columns && field(words, LANES, codes, (groups - 1) * l->keep + i) != 0) {
                return broken(t, "codes", "an entry beyond the last column has a field", error);
            }
        }
    }
    return DLT_OK;
}

static dlt_status check_nm_with(const dlt_tensor *t, const index_reader *p, purpose why, dlt_error *error) {
    const dlt_layout *l = &p->term->layout;
    const dlt_term *term = p->term;
    stream codes = codes_stream(l, t->columns);
    uint64_t tiles = tiles_of(t->shared_rows, l->share), mask_rows = ceil_div(t->shared_rows, l->share);
    if (l->index != DLT_SEEDED) TRY(check_index(t, p, mask_rows, error));
    TRY(check_scales(t, dlt_buffer(term, "scales"), l, tiles, scales_of(l, codes.count), l->share, t->shared_rows, why,
                     error));
    if (why == TO_READ) return DLT_OK;
    TRY(check_tiles(t, &term->buffers[0], &codes, tiles, l->share, t->shared_rows, l->grid == DLT_MIDTREAD, error));
    if (l->index != DLT_SEEDED)
        TRY(check_tiles(t, &term->buffers[1], &p->index, tiles_of(mask_rows, 1), 1, mask_rows, 0, error));
    return check_beyond(t, p, &codes, error);
}

static dlt_status check_nm(const dlt_tensor *t, const dlt_term *term, purpose why, dlt_error *error) {
    index_reader p;
    TRY(start_index(&p, t, term, error));
    dlt_status status = check_nm_with(t, &p, why, error);
    free(p.choices);
    return status;
}

/* ---- lowbit (12) ---- */

/* 12.3: no zero point may exceed top = 2^k - 1. */
static dlt_status check_zero_points(const dlt_tensor *t, const dlt_bytes *b, const dlt_layout *l, dlt_error *error) {
    const uint8_t *p = b->data;
    uint8_t worst = 0;
    for (uint64_t i = 0; i < b->length; i++) worst = p[i] > worst ? p[i] : worst;
    return worst < 1u << l->bits ? DLT_OK : broken(t, b->name, "a zero point is beyond the grid", error);
}

static dlt_status check_lowbit(const dlt_tensor *t, const dlt_term *term, purpose why, dlt_error *error) {
    const dlt_layout *l = &term->layout;
    const dlt_bytes *scales = &term->buffers[1], *zeros = dlt_buffer(term, "zero_points");
    stream codes = codes_stream(l, t->columns);
    uint64_t tiles = ceil_div(t->shared_rows, LANES), each = scales_of(l, t->columns);
    if (l->by_column) {
        if (!scales_are_good(scales->data, l->scale_dtype, t->columns))
            return broken(t, scales->name, "a scale is negative or not finite", error);
    } else {
        TRY(check_scales(t, scales, l, tiles, each, 1, t->shared_rows, why, error));
    }
    if (why == TO_READ) return DLT_OK;
    TRY(check_tiles(t, &term->buffers[0], &codes, tiles, 1, t->shared_rows, l->grid == DLT_MIDTREAD, error));
    if (zeros == NULL) return DLT_OK;
    /* 12.2: zero points of rows that do not exist are zero. */
    unsigned lanes = lanes_of(tiles - 1, 1, t->shared_rows);
    for (uint64_t i = (tiles - 1) * each; i < tiles * each; i++) {
        if (!all_zero((const uint8_t *)zeros->data + LANES * i + lanes, LANES - lanes))
            return broken(t, zeros->name, "a row that does not exist has a zero point", error);
    }
    return check_zero_points(t, zeros, l, error);
}

/* ---- lowrank (13) ---- */

static dlt_status check_lowrank(const dlt_tensor *t, const dlt_term *term, purpose why, dlt_error *error) {
    const dlt_layout *l = &term->layout;
    for (int side = 0; side < 2; side++) {
        uint64_t elements = side ? t->columns : t->shared_rows;
        const dlt_bytes *b = &term->buffers[side * (term->buffer_count / 2)];
        if (!l->coded) {
            if (!values_are_finite(b->data, l->values, l->rank * elements))
                return broken(t, b->name, "a value is not finite", error);
            continue;
        }
        if (!scales_are_good(b[1].data, l->scale_dtype, l->rank * scales_of(l, elements)))
            return broken(t, b[1].name, "a scale is negative or not finite", error);
        if (why == TO_READ) continue;
        stream s = stream_of(l->bits, elements);
        for (uint32_t r = 0; r < l->rank; r++) {
            const uint32_t *words = (const uint32_t *)b->data + r * s.words;
            for (unsigned j = 0; j < s.planes; j++) {
                if (words[last_word(&s, j)] & unused_bits(&s, j))
                    return broken(t, b->name, "unused bits are set", error);
            }
            for (uint64_t i = 0; i < elements && l->grid == DLT_MIDTREAD; i++) {
                if (field(words, 1, &s, i) == (1u << l->bits) - 1)
                    return broken(t, b->name, "a field is beyond the grid", error);
            }
        }
        if (l->grid == DLT_ASYMMETRIC) TRY(check_zero_points(t, &b[2], l, error));
    }
    return DLT_OK;
}

/* ---- sparse (14) ---- */

/* 14.3: the slots of one block of a tile. `next` counts from the block's first column and stays below 2^30 behind the
 * block's end. */
static dlt_status check_block(const dlt_tensor *t, const dlt_term *term, const stream *gaps, const stream *codes,
                              uint64_t first, uint64_t last, uint32_t width, unsigned lanes, purpose why,
                              dlt_error *error) {
    const dlt_layout *l = &term->layout;
    const uint32_t filler = (UINT32_C(1) << l->gap_bits) - 1;
    const dlt_bytes *values = dlt_buffer(term, "values");
    uint32_t next[LANES] = {0}, gap[LANES], code[LANES], beyond = 0, ghost = 0, filled = 0, needed = 0;
    for (uint64_t s = first; s < last; s++) {
        lane_fields(dlt_buffer(term, "gaps")->data, gaps, s, gap);
        if (codes) {
            lane_fields(term->buffers[0].data, codes, s, code);
        } else if (l->values == DLT_F32) {
            memcpy(code, (const uint32_t *)values->data + LANES * s, sizeof code);
        } else {
            for (int k = 0; k < LANES; k++) code[k] = ((const uint16_t *)values->data)[LANES * s + (uint64_t)k];
        }
        needed = 0;
        for (unsigned k = 0; k < LANES; k++) {
            uint32_t entry = gap[k] < filler;
            /* An entry MUST lie before the end of its block. */
            beyond |= entry & (next[k] + gap[k] >= width);
            /* Gaps of lanes without a row are fillers. */
            ghost |= entry & (k >= lanes);
            /* The code, or the bits of the value, of a filler MUST be zero. */
            filled |= entry ? 0 : code[k];
            needed |= entry;
            next[k] += gap[k] + entry;
            if (next[k] > UINT32_C(1) << 30) next[k] = UINT32_C(1) << 30;
        }
    }
    if (beyond) return broken(t, "gaps", "an entry lies beyond its block", error);
    if (ghost) return broken(t, "gaps", "a row that does not exist has an entry", error);
    if (filled && why == TO_VERIFY) return broken(t, codes ? "codes" : "values", "a filler has a value", error);
    /* A block has as many slots as its fullest lane needs: its last slot, if it has any, MUST hold an entry. */
    if (last > first && !needed && why == TO_VERIFY)
        return broken(t, "gaps", "a block has a slot that no row needs", error);
    return DLT_OK;
}

static dlt_status check_sparse(const dlt_tensor *t, const dlt_term *term, purpose why, dlt_error *error) {
    const dlt_layout *l = &term->layout;
    const dlt_bytes *starts_buffer = dlt_buffer(term, "starts"), *values = dlt_buffer(term, "values");
    const uint32_t *starts = starts_buffer->data;
    uint64_t tiles = ceil_div(t->shared_rows, LANES), blocks = blocks_of(l, t->columns);
    stream gaps = stream_of(l->gap_bits, term->slots), codes = stream_of(l->coded ? l->bits : 1, term->slots);
    /* starts MUST begin with 0, MUST NOT descend, and MUST end with slots. */
    int wrong = starts[0] != 0 || starts[tiles * blocks] != term->slots;
    for (uint64_t i = 0; i < tiles * blocks; i++) wrong |= starts[i] > starts[i + 1];
    if (wrong) return broken(t, "starts", "they do not ascend from 0 to the number of slots", error);
    for (uint64_t i = 0; i < tiles * blocks; i++) {
        uint32_t width = (uint32_t)least(l->span, t->columns - i % blocks * l->span);
        if (starts[i] == starts[i + 1]) continue;
        TRY(check_block(t, term, &gaps, l->coded ? &codes : NULL, starts[i], starts[i + 1], width,
                        lanes_of(i / blocks, 1, t->shared_rows), why, error));
    }
    if (!l->coded) {
        if (!values_are_finite(values->data, l->values, LANES * term->slots))
            return broken(t, values->name, "a value is not finite", error);
    } else {
        TRY(check_scales(t, dlt_buffer(term, "scales"), l, tiles, 1, 1, t->shared_rows, why, error));
    }
    if (why == TO_READ) return DLT_OK;
    /* codes and gaps are word streams of one tile, whose 32 lanes all exist. */
    TRY(check_tiles(t, dlt_buffer(term, "gaps"), &gaps, 1, 1, LANES, 0, error));
    return l->coded ? check_tiles(t, &term->buffers[0], &codes, 1, 1, LANES, l->grid == DLT_MIDTREAD, error) : DLT_OK;
}

static dlt_status check_term(const dlt_tensor *t, const dlt_term *term, purpose why, dlt_error *error) {
    switch (term->layout.kind) {
    case DLT_NM: return check_nm(t, term, why, error);
    case DLT_LOWBIT: return check_lowbit(t, term, why, error);
    case DLT_LOWRANK: return check_lowrank(t, term, why, error);
    default: return check_sparse(t, term, why, error);
    }
}

static dlt_status check_table(const dlt_file *file, const dlt_tensor *t, dlt_error *error);

/* The chunks of an exact tensor, or of an exact part. Sections of kind 3 have codec 0, so nothing is decompressed. */
static dlt_status load_exact(dlt_file *file, dlt_tensor *t, dlt_error *error) {
    uint64_t total = 0;
    TRY(load_buffer(file, t, &t->exact, &total, error));
    return check_table(file, t, error);
}

static dlt_status load(dlt_file *file, dlt_tensor *t, purpose why, dlt_error *error) {
    uint64_t total = 0;
    if (t->loaded) return DLT_OK;
    for (uint32_t i = 0; i < t->term_count; i++) {
        for (uint32_t j = 0; j < t->terms[i].buffer_count; j++)
            TRY(load_buffer(file, t, &t->terms[i].buffers[j], &total, error));
        TRY(check_term(t, &t->terms[i], why, error));
    }
    /* 17.7: a reader that serves the whole file reads no section behind that of kind 4. */
    if (t->action == DLT_EXACT || (t->has_exact && why == TO_VERIFY)) TRY(load_exact(file, t, error));
    /* A verifier hashes `data` piece by piece and needs it nowhere else. */
    if (t->has_data && why == TO_READ) TRY(load_buffer(file, t, &t->data, &total, error));
    t->loaded = 1;
    return DLT_OK;
}

dlt_status dlt_load(dlt_file *file, dlt_tensor *tensor, dlt_error *error) {
    dlt_status status = load(file, tensor, TO_READ, error);
    if (status != DLT_OK) dlt_unload(tensor);
    return status;
}

/* ---- Floats (10) ---- */

static float float_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}
static uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}

static float widen_f16(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, exponent = half >> 10 & 0x1F, fraction = half & 0x3FF;
    if (exponent == 31) return float_of(sign | UINT32_C(0x7F800000) | fraction << 13);
    if (exponent) return float_of(sign | (exponent + 112) << 23 | fraction << 13);
    /* Subnormal: fraction * 2^-24, which float32 holds exactly. */
    float value = (float)fraction * 0x1p-24f;
    return float_of(sign | bits_of(value));
}

static float widen(const void *data, dlt_dtype dtype, uint64_t i) {
    if (dtype == DLT_F32) return ((const float *)data)[i];
    uint16_t bits = ((const uint16_t *)data)[i];
    return dtype == DLT_BF16 ? float_of((uint32_t)bits << 16) : widen_f16(bits);
}

static int is_nan(uint32_t bits) { return (bits & UINT32_C(0x7FFFFFFF)) > UINT32_C(0x7F800000); }

/* To nearest, ties to even. What is no number is not asked for. */
static uint16_t narrow_bf16(float x) {
    uint32_t bits = bits_of(x);
    return (uint16_t)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

static uint16_t narrow_f16(float x) {
    uint32_t bits = bits_of(x), sign = bits >> 16 & 0x8000, magnitude = bits & UINT32_C(0x7FFFFFFF);
    if (magnitude >= UINT32_C(0x477FF000)) return (uint16_t)(sign | 0x7C00); /* 65520 and more round to infinity */
    if (magnitude < UINT32_C(0x38800000)) {
        /* Below 2^-14: a multiple of 2^-24, which adding 0.5 rounds to: 0.5 has its last bit there. */
        float sum = float_of(magnitude) + 0.5f;
        return (uint16_t)(sign | (bits_of(sum) - UINT32_C(0x3F000000)));
    }
    uint32_t rounded = magnitude + 0xFFF + (magnitude >> 13 & 1);
    return (uint16_t)(sign | (rounded - UINT32_C(0x38000000)) >> 13);
}

/* 10.5: the sign of the base's element, an exponent of ones, the highest bits of its fraction, and the first of them
 * set. */
static uint32_t narrow_nan(uint32_t bits, dlt_dtype dtype) {
    bits |= UINT32_C(0x00400000);
    if (dtype == DLT_F32) return bits;
    return dtype == DLT_BF16 ? bits >> 16 : (bits >> 16 & 0x8000) | 0x7C00 | (bits >> 13 & 0x3FF);
}

/* 10.2 with different dtypes, and 10.3: the bits of a fine-tuned element. */
static uint32_t fine_tuned(float base, float delta, dlt_dtype dtype) {
    static const uint32_t other_nan[3] = {0x7E00, 0x7FC0, UINT32_C(0x7FC00000)};
    if (is_nan(bits_of(base))) return narrow_nan(bits_of(base), dtype);
    float sum = delta == 0 ? base : base + delta;
    if (is_nan(bits_of(sum))) return other_nan[dtype - DLT_F16];
    return dtype == DLT_F32 ? bits_of(sum) : dtype == DLT_BF16 ? narrow_bf16(sum) : narrow_f16(sum);
}

/* ---- Values and matrices of the kinds (11.5, 11.6, 12.3, 13.3, 14.4) ---- */

static float scale_at(const void *scales, dlt_dtype dtype, uint64_t i) { return widen(scales, dtype, i); }

/* midtread, midrise: value = float32(2 u - top) * float32(scale * 0.5); asymmetric: float32(u - z) * scale; each
 * rounded to float32. */
static float value_of(const dlt_layout *l, uint32_t u, float scale, uint32_t zero) {
    int32_t top = (int32_t)(1u << l->bits) - (l->grid == DLT_MIDTREAD ? 2 : 1);
    if (l->grid == DLT_ASYMMETRIC) return (float)((int32_t)u - (int32_t)zero) * scale;
    float half = scale * 0.5f;
    return (float)(2 * (int32_t)u - top) * half;
}

/* Rows of the matrix of an nm term (11.6). `marks`, here and below, is NULL, or has a byte for each element of the rows,
 * which becomes 1 where the term has an entry, whatever its value (17.8). */
static dlt_status decode_nm(const dlt_tensor *t, const dlt_term *term, uint64_t start, uint64_t count, float *out,
                            uint8_t *marks, dlt_error *error) {
    const dlt_layout *l = &term->layout;
    stream codes = codes_stream(l, t->columns);
    uint64_t groups = groups_of(l, t->columns), each = scales_of(l, codes.count);
    const void *scales = dlt_buffer(term, "scales")->data;
    uint8_t positions[255];
    index_reader p;
    TRY(start_index(&p, t, term, error));
    memset(out, 0, (size_t)(count * t->columns) * sizeof *out);
    for (uint64_t row = start; row < start + count; row++, out += t->columns) {
        uint64_t tile = row / (LANES * l->share) * l->share + row % l->share,
                 lane = row % (LANES * l->share) / l->share;
        const uint32_t *words = row_words(term->buffers[0].data, &codes, l->share, row);
        for (uint64_t g = 0; g < groups; g++) {
            positions_of(&p, row / l->share, g, positions);
            for (uint32_t i = 0; i < l->keep; i++) {
                /* Entry i of group g stands in column g * M + position; one at or beyond the last column is ignored. */
                uint64_t column = g * l->group + positions[i], e = g * l->keep + i;
                if (column >= t->columns) continue;
                if (marks) marks[(row - start) * t->columns + column] = 1;
                uint64_t s = l->scale_group ? e / l->scale_group : 0;
                float scale = scale_at(scales, l->scale_dtype, LANES * (tile * each + s) + lane);
                out[column] = value_of(l, (uint32_t)field(words, LANES, &codes, e), scale, 0);
            }
        }
    }
    free(p.choices);
    return DLT_OK;
}

static void decode_lowbit(const dlt_tensor *t, const dlt_term *term, uint64_t start, uint64_t count, float *out) {
    const dlt_layout *l = &term->layout;
    stream codes = codes_stream(l, t->columns);
    uint64_t each = scales_of(l, t->columns);
    const dlt_bytes *zeros = dlt_buffer(term, "zero_points");
    for (uint64_t row = start; row < start + count; row++) {
        const uint32_t *words = row_words(term->buffers[0].data, &codes, 1, row);
        for (uint64_t column = 0; column < t->columns; column++) {
            uint64_t s = l->scale_group ? column / l->scale_group : 0;
            s = l->by_column ? column : LANES * (row / LANES * each + s) + row % LANES;
            float scale = scale_at(term->buffers[1].data, l->scale_dtype, s);
            uint32_t zero = zeros ? ((const uint8_t *)zeros->data)[s] : 0;
            *out++ = value_of(l, (uint32_t)field(words, LANES, &codes, column), scale, zero);
        }
    }
}

/* Elements `start` to `start + count` of vector r of one side; `b` is the first buffer of that side. */
static void decode_vector(const dlt_layout *l, const dlt_bytes *b, uint32_t r, uint64_t elements, uint64_t start,
                          uint64_t count, float *out) {
    if (!l->coded) {
        for (uint64_t i = 0; i < count; i++) out[i] = widen(b->data, l->values, r * elements + start + i);
        return;
    }
    stream s = stream_of(l->bits, elements);
    uint64_t each = scales_of(l, elements);
    /* Word w of vector r is word r W + w of the buffer. */
    const uint32_t *words = (const uint32_t *)b->data + r * s.words;
    for (uint64_t i = start; i < start + count; i++) {
        uint64_t n = r * each + (l->scale_group ? i / l->scale_group : 0);
        uint32_t zero = l->grid == DLT_ASYMMETRIC ? ((const uint8_t *)b[2].data)[n] : 0;
        out[i - start] = value_of(l, (uint32_t)field(words, 1, &s, i), scale_at(b[1].data, l->scale_dtype, n), zero);
    }
}

static dlt_status decode_lowrank(const dlt_tensor *t, const dlt_term *term, uint64_t start, uint64_t count, float *out,
                                 dlt_error *error) {
    const dlt_layout *l = &term->layout;
    float *u = malloc((size_t)count * sizeof *u), *v = malloc((size_t)t->columns * sizeof *v);
    if (u == NULL || v == NULL) return free(u), free(v), no_memory(error);
    memset(out, 0, (size_t)(count * t->columns) * sizeof *out);
    for (uint32_t r = 0; r < l->rank; r++) {
        decode_vector(l, &term->buffers[0], r, t->shared_rows, start, count, u);
        decode_vector(l, &term->buffers[term->buffer_count / 2], r, t->columns, 0, t->columns, v);
        /* m[i, j] = float32(m[i, j] + float32(u_r[i] * v_r[j])) */
        for (uint64_t i = 0; i < count; i++) {
            float *row = out + i * t->columns;
            for (uint64_t j = 0; j < t->columns; j++) {
                float product = u[i] * v[j];
                row[j] = row[j] + product;
            }
        }
    }
    free(u);
    free(v);
    return DLT_OK;
}

static void decode_sparse(const dlt_tensor *t, const dlt_term *term, uint64_t start, uint64_t count, float *out,
                          uint8_t *marks) {
    const dlt_layout *l = &term->layout;
    const uint32_t *starts = dlt_buffer(term, "starts")->data, *gaps = dlt_buffer(term, "gaps")->data;
    const void *scales = l->coded ? dlt_buffer(term, "scales")->data : NULL;
    const void *values = l->coded ? NULL : dlt_buffer(term, "values")->data;
    stream gap_stream = stream_of(l->gap_bits, term->slots), codes = stream_of(l->coded ? l->bits : 1, term->slots);
    uint64_t blocks = blocks_of(l, t->columns), filler = (UINT64_C(1) << l->gap_bits) - 1;
    memset(out, 0, (size_t)(count * t->columns) * sizeof *out);
    for (uint64_t row = start; row < start + count; row++, out += t->columns) {
        uint64_t lane = row % LANES;
        for (uint64_t b = 0; b < blocks; b++) {
            /* the number of the first slot of block b of tile t is element t B + b */
            const uint32_t *bounds = starts + row / LANES * blocks + b;
            uint64_t next = b * l->span;
            for (uint64_t s = bounds[0]; s < bounds[1]; s++) {
                uint64_t gap = field(gaps + lane, LANES, &gap_stream, s);
                if (gap == filler) {
                    next += filler;
                    continue;
                }
                if (marks) marks[(row - start) * t->columns + next + gap] = 1;
                if (l->coded) {
                    uint32_t u = (uint32_t)field((const uint32_t *)term->buffers[0].data + lane, LANES, &codes, s);
                    out[next + gap] = value_of(l, u, scale_at(scales, l->scale_dtype, row), 0);
                } else {
                    out[next + gap] = widen(values, l->values, LANES * s + lane);
                }
                next += gap + 1;
            }
        }
    }
}

static dlt_status decode_term(const dlt_tensor *t, const dlt_term *term, uint64_t start, uint64_t count, float *out,
                              uint8_t *marks, dlt_error *error) {
    switch (term->layout.kind) {
    case DLT_NM: return decode_nm(t, term, start, count, out, marks, error);
    case DLT_LOWBIT: return decode_lowbit(t, term, start, count, out), DLT_OK;
    case DLT_LOWRANK: return decode_lowrank(t, term, start, count, out, error);
    default: return decode_sparse(t, term, start, count, out, marks), DLT_OK;
    }
}

static dlt_status check_rows(const dlt_tensor *t, uint64_t start, uint64_t count, uint64_t rows, dlt_error *error) {
    if (start <= rows && count <= rows - start) return DLT_OK;
    return fail(error, DLT_MISUSE, "%s: rows %llu and %llu more are not among its %llu", show(t->name).text,
                (unsigned long long)start, (unsigned long long)count, (unsigned long long)rows);
}

/* 17.8: each element t of a term's matrix is replaced by float32(c * t), rounded to nearest, ties to even. */
static void multiply(float *matrix, size_t elements, uint32_t factor) {
    float c = float_of(factor);
    for (size_t i = 0; i < elements; i++) matrix[i] = c * matrix[i];
}

/* The sum of the terms; with `marks`, of the terms with their factors (17.8). */
static dlt_status decode_sum(dlt_file *file, const dlt_tensor *t, uint64_t start, uint64_t count, float *out,
                             uint8_t *marks, dlt_error *error) {
    if (t->action != DLT_ADD || !t->loaded) {
        return fail(error, DLT_MISUSE, "%s: %s", show(t->name).text,
                    t->loaded ? "a tensor without a delta" : "dlt_load comes first");
    }
    TRY(check_rows(t, start, count, t->shared_rows, error));
    /* 9: a limit of the user's, before the work starts. */
    uint64_t work = 0;
    for (uint32_t i = 0; i < t->term_count; i++)
        work += t->terms[i].layout.kind == DLT_LOWRANK ? t->terms[i].layout.rank : 1;
    work *= count * t->columns; /* below 2^20 * 2^48 would not fit: */
    if (count * t->columns > (UINT64_MAX >> 21) ||
        work > file->limits.max_elements - least(file->decoded, file->limits.max_elements)) {
        return fail(error, DLT_LIMIT, "%s: its terms have more elements than max_elements, %llu", show(t->name).text,
                    (unsigned long long)file->limits.max_elements);
    }
    file->decoded += work;
    TRY(decode_term(t, &t->terms[0], start, count, out, marks, error));
    size_t elements = (size_t)(count * t->columns);
    if (marks) multiply(out, elements, t->factors[0]);
    if (t->term_count == 1) return DLT_OK;
    float *more = malloc((elements ? elements : 1) * sizeof *more);
    if (more == NULL) return no_memory(error);
    dlt_status status = DLT_OK;
    for (uint32_t i = 1; i < t->term_count && status == DLT_OK; i++) {
        status = decode_term(t, &t->terms[i], start, count, more, marks, error);
        if (marks && status == DLT_OK) multiply(more, elements, t->factors[i]);
        /* 10.1: they are added in float32 in the order of the array, each sum rounded to nearest, ties to even. */
        for (size_t j = 0; j < elements && status == DLT_OK; j++) out[j] = out[j] + more[j];
    }
    free(more);
    return status;
}

dlt_status dlt_decode(dlt_file *file, const dlt_tensor *t, uint64_t start, uint64_t count, float *out,
                      dlt_error *error) {
    return decode_sum(file, t, start, count, out, NULL, error);
}

/* Rows that the terms cover: what is served, or, with `marks`, the prediction of an exact part (17.8). */
static dlt_status apply_shared(dlt_file *file, const dlt_tensor *t, uint64_t start, uint64_t count, const void *base,
                               void *out, uint8_t *marks, dlt_error *error) {
    uint64_t elements = count * t->columns;
    float *delta = malloc((size_t)(elements ? elements : 1) * sizeof *delta);
    if (delta == NULL) return no_memory(error);
    dlt_status status = decode_sum(file, t, start, count, delta, marks, error);
    for (uint64_t i = 0; i < elements && status == DLT_OK; i++) {
        uint32_t bits;
        if (delta[i] == 0 && t->dtype == t->base_dtype) {
            /* 10.2: where the delta is zero (of either sign), the fine-tuned element is the base's: with equal dtypes
             * bit for bit. */
            bits = t->dtype == DLT_F32 ? ((const uint32_t *)base)[i] : ((const uint16_t *)base)[i];
        } else {
            bits = fine_tuned(widen(base, t->base_dtype, i), delta[i], t->dtype);
        }
        if (t->dtype == DLT_F32) ((uint32_t *)out)[i] = bits;
        else ((uint16_t *)out)[i] = (uint16_t)bits;
    }
    free(delta);
    return status;
}

/* ---- Exact tensors (17) ---- */

/* 17.2: units of w bytes, n = 8w bits; of floats the lowest bit s and the number e of the bits of the exponent. C64 has
 * two units an element; dtypes whose elements have fewer than 8 bits have units of a byte. */
typedef struct {
    unsigned width, shift, bits;
} unit;

static unit unit_of(dlt_dtype dtype) {
    switch (dtype) {
    case DLT_F8_E4M3:
    case DLT_F8_E4M3FNUZ: return (unit){1, 3, 4};
    case DLT_F8_E5M2:
    case DLT_F8_E5M2FNUZ: return (unit){1, 2, 5};
    case DLT_F16: return (unit){2, 10, 5};
    case DLT_BF16: return (unit){2, 7, 8};
    case DLT_F32:
    case DLT_C64: return (unit){4, 23, 8};
    case DLT_F64: return (unit){8, 52, 11};
    default: return (unit){DTYPE_BITS[dtype] % 8 ? 1 : DTYPE_BITS[dtype] / 8, 0, 0};
    }
}

static uint64_t units_of(dlt_dtype dtype, uint64_t elements) {
    return elements * DTYPE_BITS[dtype] / 8 / unit_of(dtype).width;
}

static uint64_t get_unit(const uint8_t *data, unsigned width, uint64_t i) {
    uint64_t value = 0;
    memcpy(&value, data + width * i, width);
    return value;
}

/* The key of a predicted unit p is floor(p / 2^s) mod 2^e: its exponent, or 0. */
static uint64_t key_of(uint64_t p, unit u) { return p >> u.shift & ((UINT64_C(1) << u.bits) - 1); }

/* 17.3: o(u) = u + 2^(n-1) if u < 2^(n-1), o(u) = 2^n - 1 - u otherwise; of units that are no floats o(u) = u. */
static uint64_t order_of(uint64_t value, unit u, uint64_t most) {
    if (!u.bits) return value;
    uint64_t half = most / 2 + 1;
    return value < half ? value + half : most - value;
}

static uint64_t of_order(uint64_t order, unit u, uint64_t most) {
    if (!u.bits) return order;
    uint64_t half = most / 2 + 1;
    return order >= half ? order - half : most - order;
}

/* z = 2 d if d < 2^(n-1); z = 2^(n+1) - 2 d - 1 otherwise; d = o(u) - o(p); all modulo 2^n. */
static uint64_t moved_by(uint64_t p, uint64_t z, unit u) {
    uint64_t most = u.width == 8 ? UINT64_MAX : (UINT64_C(1) << 8 * u.width) - 1;
    uint64_t d = z & 1 ? UINT64_MAX - z / 2 : z / 2;
    return of_order((order_of(p, u, most) + d) & most, u, most);
}

enum { SAME_UNITS, STORED_UNITS, VALUES, DIFFERENCES, SORTED, SPARSE_UNITS, FORMS };

/* A chunk of a loaded exact tensor. */
typedef struct {
    uint64_t first, count; /* its units */
    const uint8_t *data;
    uint64_t length, checksum;
    uint32_t form;
} chunk;

static dlt_status bad_chunk(const dlt_tensor *t, uint64_t number, const char *what, dlt_error *error) {
    return INVALID(error, "%s: chunk %llu: %s", show(t->name).text, (unsigned long long)number, what);
}

static uint64_t chunks_of(const dlt_tensor *t) { return ceil_div(units_of(t->dtype, t->elements), t->chunk); }

/* 17.4: the chunks' bytes, one after the other, and then a table with 16 bytes a chunk: checksum, u64; length, u32;
 * form, u32. The lengths MUST sum to the length of the buffer less the table. */
static dlt_status check_table(const dlt_file *file, const dlt_tensor *t, dlt_error *error) {
    uint64_t chunks = chunks_of(t), units = units_of(t->dtype, t->elements), sum = 0;
    const uint8_t *data = t->exact.data;
    if (t->exact.length / 16 < chunks)
        return INVALID(error, "%s: its buffer cannot hold a table of its chunks", show(t->name).text);
    const uint8_t *table = data + (t->exact.length - 16 * chunks);
    for (uint64_t i = 0; i < chunks; i++) {
        sum += read32(table + 16 * i + 8);
        if (read32(table + 16 * i + 12) >= FORMS) return bad_chunk(t, i, "an unknown form", error);
    }
    if (sum != t->exact.length - 16 * chunks)
        return INVALID(error, "%s: its chunks do not take the bytes before the table", show(t->name).text);
    if (3 * least(t->chunk, units) * unit_of(t->dtype).width > file->limits.max_memory)
        return fail(error, DLT_LIMIT, "%s: a chunk takes more than max_memory", show(t->name).text);
    return DLT_OK;
}

/* Chunk `number`, where the bytes of those before it take `*at`, which becomes where the next one starts. */
static chunk chunk_at(const dlt_tensor *t, uint64_t number, uint64_t *at) {
    uint64_t chunks = chunks_of(t), units = units_of(t->dtype, t->elements), first = number * t->chunk;
    const uint8_t *data = t->exact.data, *row = data + (t->exact.length - 16 * chunks) + 16 * number;
    chunk c = {first, least(t->chunk, units - first), data + *at, read32(row + 8), read64(row), read32(row + 12)};
    *at += c.length;
    return c;
}

/* 17.5: a plane of zeros MUST have length 0. One of length c is stored as it is. Any other has a length below c, and is
 * one zstd frame that keeps the rules of 6.2. */
static dlt_status read_plane(const uint8_t *data, uint64_t length, uint64_t count, uint8_t *out, dlt_error *error) {
    if (length == 0) return memset(out, 0, (size_t)count), DLT_OK;
    if (length > count) return INVALID(error, "a plane is longer than its content");
    if (length == count) {
        memcpy(out, data, (size_t)count);
    } else {
        TRY(need_zstd(error));
        TRY(check_frame(data, length, count, error));
        if (zstd.frame_size(data, (size_t)length) != length)
            return INVALID(error, "a zstd frame does not end where its plane ends");
        size_t got = zstd.decompress(out, (size_t)count, data, (size_t)length);
        if (zstd.is_error(got) || got != count) return INVALID(error, "a zstd frame does not give its plane");
    }
    return all_zero(out, count) ? INVALID(error, "a plane of zeros is stored") : DLT_OK;
}

/* Planes of c integers of w bytes: w lengths, u32, and then w planes, of which plane 0 has the lowest bytes. */
static dlt_status read_planes(const uint8_t *data, uint64_t length, uint64_t count, unsigned width, uint8_t *out,
                              dlt_error *error) {
    uint64_t at = 4 * width, sum = at;
    if (length < at) return INVALID(error, "its bytes cannot hold the lengths of its planes");
    for (unsigned j = 0; j < width; j++) sum += read32(data + 4 * j);
    if (sum != length) return INVALID(error, "its planes do not take its bytes");
    for (unsigned j = 0; j < width; j++) {
        uint64_t size = read32(data + 4 * j);
        TRY(read_plane(data + at, size, count, out + j * count, error));
        at += size;
    }
    return DLT_OK;
}

static uint64_t joined(const uint8_t *planes, unsigned width, uint64_t count, uint64_t i) {
    uint64_t value = 0;
    for (unsigned j = 0; j < width; j++) value |= (uint64_t)planes[j * count + i] << 8 * j;
    return value;
}

/* Places: m, g and l, u32; l bytes are the one plane, of g gaps. There MUST be m places, all inside the chunk; the last
 * gap MUST NOT be 255; g MUST be at most m + floor(c / 255). `places` and `gaps` have room for as many as there may be. */
static dlt_status read_places(const chunk *c, uint32_t *places, uint64_t *count, uint64_t *used, dlt_error *error) {
    if (c->length < 12) return INVALID(error, "its bytes cannot hold the numbers of its places");
    uint64_t m = read32(c->data), g = read32(c->data + 4), l = read32(c->data + 8), next = 0, found = 0;
    if (m < 1 || m > c->count || g < m || g > m + c->count / 255) return INVALID(error, "it has too many places or gaps");
    if (l > c->length - 12) return INVALID(error, "its gaps do not end inside of it");
    uint8_t *gaps = malloc((size_t)g);
    if (gaps == NULL) return no_memory(error);
    dlt_status status = read_plane(c->data + 12, l, g, gaps, error);
    int ends = status == DLT_OK && gaps[g - 1] != 255;
    for (uint64_t i = 0; i < g && status == DLT_OK; i++) {
        /* gap < 255: the unit at next + gap differs; next = next + gap + 1; gap = 255: next = next + 255 */
        next += gaps[i];
        if (gaps[i] == 255) continue;
        if (found == m || next >= c->count) ends = 0;
        else places[found] = (uint32_t)next;
        found++, next++;
    }
    free(gaps);
    TRY(status);
    if (!ends || found != m) return INVALID(error, "its gaps do not give its places");
    *count = m, *used = 12 + l;
    return DLT_OK;
}

/* What a chunk needs while it is decoded. */
typedef struct {
    uint8_t *planes;
    uint32_t *places;
} chunk_memory;

static dlt_status need_chunk_memory(const dlt_tensor *t, chunk_memory *memory, dlt_error *error) {
    size_t units = (size_t)least(t->chunk, units_of(t->dtype, t->elements)) + 1;
    memory->planes = malloc(units * unit_of(t->dtype).width);
    memory->places = malloc(units * sizeof *memory->places);
    return memory->planes && memory->places ? DLT_OK : no_memory(error);
}

static void free_chunk_memory(chunk_memory *memory) {
    free(memory->planes);
    free(memory->places);
}

/* Read whatever a chunk's bytes say without the prediction: its planes, and its places. */
static dlt_status read_chunk_bytes(const chunk *c, unit u, chunk_memory *memory, uint64_t *places, dlt_error *error) {
    uint64_t used = 0;
    *places = c->count;
    if (c->form == SAME_UNITS) return c->length ? INVALID(error, "it is the prediction, and has bytes") : DLT_OK;
    if (c->form == STORED_UNITS)
        return c->length == c->count * u.width ? DLT_OK : INVALID(error, "it is stored, and has another length");
    if (c->form == SPARSE_UNITS) TRY(read_places(c, memory->places, places, &used, error));
    TRY(read_planes(c->data + used, c->length - used, *places, u.width, memory->planes, error));
    /* No z at a place may be 0. */
    for (uint64_t i = 0; c->form == SPARSE_UNITS && i < *places; i++) {
        if (joined(memory->planes, u.width, *places, i) == 0) return INVALID(error, "a place has no difference");
    }
    return DLT_OK;
}

/* Put the units that the planes give in the place of the predicted ones. Sorted: the z are in ascending order of the
 * keys of their predicted units; those of equal keys keep their order. 17.8: first the units that are not marked, and then
 * those that are. `marks` is NULL, or has a byte for each unit of the chunk. */
static void join_units(const chunk *c, unit u, const chunk_memory *memory, const uint8_t *marks, uint64_t places,
                       uint8_t *units) {
    uint64_t starts[2 << 11], sum = 0, keys = UINT64_C(1) << u.bits;
    int sorted = c->form == SORTED || c->form == SPARSE_UNITS, sparse = c->form == SPARSE_UNITS;
    memset(starts, 0, (size_t)(2 * keys) * sizeof *starts);
    for (uint64_t i = 0; sorted && i < places; i++) {
        uint64_t at = sparse ? memory->places[i] : i;
        starts[key_of(get_unit(units, u.width, at), u) + (marks && marks[at] ? keys : 0)]++;
    }
    for (uint64_t key = 0; sorted && key < 2 * keys; key++) {
        uint64_t here = starts[key];
        starts[key] = sum, sum += here;
    }
    for (uint64_t i = 0; i < places; i++) {
        uint64_t at = sparse ? memory->places[i] : i, p = get_unit(units, u.width, at);
        uint64_t key = key_of(p, u) + (marks && marks[at] ? keys : 0);
        uint64_t z = joined(memory->planes, u.width, places, sorted ? starts[key]++ : i);
        uint64_t value = c->form == VALUES ? z : moved_by(p, z, u);
        memcpy(units + u.width * at, &value, u.width);
    }
}

/* Restore a chunk; `units` holds the prediction, and then the units. Whoever restores one MUST compare the checksum. */
static dlt_status restore_chunk(const dlt_tensor *t, const chunk *c, chunk_memory *memory, const uint8_t *marks,
                                uint8_t *units, dlt_error *error) {
    unit u = unit_of(t->dtype);
    uint64_t places, number = c->first / t->chunk;
    dlt_error why;
    dlt_status status = read_chunk_bytes(c, u, memory, &places, &why);
    if (status != DLT_OK)
        return status == DLT_INVALID ? bad_chunk(t, number, why.message, error) : (*error = why, status);
    if (c->form == STORED_UNITS) memcpy(units, c->data, (size_t)c->length);
    else if (c->form != SAME_UNITS) join_units(c, u, memory, marks, places, units);
    if (dlt_xxh3_64(units, (size_t)(c->count * u.width)) != c->checksum)
        return bad_chunk(t, number, "what it restores is not what was packed", error);
    return DLT_OK;
}

/* 17.6: a verifier without the base checks all of 17.4 and 17.5, and the checksums of chunks of forms 1 and 2. */
static dlt_status check_chunks(const dlt_tensor *t, dlt_error *error) {
    chunk_memory memory = {0};
    unit u = unit_of(t->dtype);
    uint64_t at = 0, chunks = chunks_of(t), places;
    dlt_status status = need_chunk_memory(t, &memory, error);
    uint8_t *units = malloc((size_t)(least(t->chunk, units_of(t->dtype, t->elements)) + 1) * u.width);
    if (status == DLT_OK && units == NULL) status = no_memory(error);
    for (uint64_t i = 0; i < chunks && status == DLT_OK; i++) {
        chunk c = chunk_at(t, i, &at);
        dlt_error why;
        if (c.form == STORED_UNITS || c.form == VALUES) {
            memset(units, 0, (size_t)(c.count * u.width));
            status = restore_chunk(t, &c, &memory, NULL, units, error);
        } else if ((status = read_chunk_bytes(&c, u, &memory, &places, &why)) != DLT_OK) {
            if (status == DLT_INVALID) status = bad_chunk(t, i, why.message, error);
            else *error = why;
        }
    }
    free(units);
    free_chunk_memory(&memory);
    return status;
}

/* 17.1: units that the base has too, counted in C order, are the base's. If the base's dtype is another one, the value
 * is widened to float32 and rounded, and a NaN becomes 0x7FC0 (BF16), 0x7E00 (F16) or 0x7FC00000 (F32). All others are 0,
 * and all are without base. */
static void predict(const dlt_tensor *t, const chunk *c, const uint8_t *base, uint8_t *units) {
    static const uint32_t nans[3] = {0x7E00, 0x7FC0, UINT32_C(0x7FC00000)};
    unsigned width = unit_of(t->dtype).width;
    uint64_t known = 0, elements = 1;
    for (uint32_t i = 0; t->has_base && i < t->base_shape.count; i++) elements *= t->base_shape.sizes[i];
    if (t->has_base) known = units_of(t->base_dtype, elements);
    known = known > c->first ? least(known - c->first, c->count) : 0;
    memset(units + known * width, 0, (size_t)((c->count - known) * width));
    if (t->has_base && t->dtype == t->base_dtype) {
        memcpy(units, base + c->first * width, (size_t)(known * width));
        return;
    }
    for (uint64_t i = 0; i < known; i++) {
        float value = widen(base, t->base_dtype, c->first + i);
        uint32_t bits = is_nan(bits_of(value))  ? nans[t->dtype - DLT_F16]
                        : t->dtype == DLT_F32   ? bits_of(value)
                        : t->dtype == DLT_BF16  ? narrow_bf16(value)
                                                : narrow_f16(value);
        memcpy(units + width * i, &bits, width);
    }
}

/* All chunks. 17.1: the digest is the identity of the fine-tuned tensor. `marks` is that of an exact part, whose
 * prediction `out` holds; without it, chunks are predicted here. */
static dlt_status restore_chunks(const dlt_tensor *t, const uint8_t *base, const uint8_t *marks, uint8_t *out,
                                 dlt_error *error) {
    chunk_memory memory = {0};
    unsigned width = unit_of(t->dtype).width;
    uint64_t at = 0, chunks = chunks_of(t);
    uint8_t digest[32];
    dlt_status status = need_chunk_memory(t, &memory, error);
    for (uint64_t i = 0; i < chunks && status == DLT_OK; i++) {
        chunk c = chunk_at(t, i, &at);
        if (marks == NULL) predict(t, &c, base, out + c.first * width);
        status = restore_chunk(t, &c, &memory, marks ? marks + c.first : NULL, out + c.first * width, error);
    }
    free_chunk_memory(&memory);
    TRY(status);
    dlt_identity(t->dtype, &t->shape, out, units_of(t->dtype, t->elements) * width, digest);
    return memcmp(digest, t->exact_digest, 32) == 0
               ? DLT_OK
               : INVALID(error, "%s: what is restored is not what was packed", show(t->name).text);
}

static dlt_status apply_exact(const dlt_tensor *t, uint64_t start, uint64_t count, const uint8_t *base, uint8_t *out,
                              dlt_error *error) {
    if (start != 0 || count != t->rows)
        return fail(error, DLT_MISUSE, "%s: an exact tensor is restored as a whole", show(t->name).text);
    if (t->has_base && base == NULL)
        return fail(error, DLT_MISUSE, "%s: an exact tensor is restored from its base", show(t->name).text);
    return restore_chunks(t, base, NULL, out, error);
}

/* 17.8: the prediction of the units in rows that base and fine-tune both have is what section 10 makes of the base and of
 * the sum of the terms with their factors. The prediction of the units of all other rows is data. */
static dlt_status predict_part(dlt_file *file, const dlt_tensor *t, const uint8_t *base, uint8_t *marks, uint8_t *out,
                               dlt_error *error) {
    uint64_t width = size_of(t->dtype), base_width = size_of(t->base_dtype), step = 1 + (1 << 20) / t->columns;
    for (uint64_t at = 0; at < t->shared_rows; at += step) {
        uint64_t first = at * t->columns;
        TRY(apply_shared(file, t, at, least(step, t->shared_rows - at), base + first * base_width, out + first * width,
                         marks + first, error));
    }
    if (t->has_data) memcpy(out + t->shared_rows * t->columns * width, t->data.data, (size_t)t->data.length);
    return DLT_OK;
}

dlt_status dlt_apply(dlt_file *file, const dlt_tensor *t, uint64_t start, uint64_t count, const void *base, void *out,
                     dlt_error *error) {
    TRY(check_rows(t, start, count, t->rows, error));
    if (t->action == DLT_ALIAS || !t->loaded) {
        return fail(error, DLT_MISUSE, "%s: %s", show(t->name).text,
                    t->loaded ? "an alias: resolve it first" : "dlt_load comes first");
    }
    if (t->action == DLT_EXACT) return apply_exact(t, start, count, base, out, error);
    uint64_t bits = t->columns * DTYPE_BITS[t->dtype];
    if (bits % 8 && count != t->rows)
        return fail(error, DLT_MISUSE, "%s: its rows are no whole bytes", show(t->name).text);
    uint64_t row = bits / 8;
    if (t->action != DLT_ADD) {
        const uint8_t *from = t->action == DLT_SAME ? base : (const uint8_t *)t->data.data + start * row;
        memcpy(out, from, (size_t)(count == t->rows ? count * bits / 8 : count * row));
        return DLT_OK;
    }
    uint64_t shared = start < t->shared_rows ? least(count, t->shared_rows - start) : 0;
    if (shared) TRY(apply_shared(file, t, start, shared, base, out, NULL, error));
    if (count == shared) return DLT_OK;
    /* 7.4: if the fine-tune has more rows, data holds the others. */
    memcpy((uint8_t *)out + shared * row, (const uint8_t *)t->data.data + (start + shared - t->shared_rows) * row,
           (size_t)((count - shared) * row));
    return DLT_OK;
}

dlt_status dlt_restore(dlt_file *file, dlt_tensor *t, const void *base, void *out, dlt_error *error) {
    if (t->action != DLT_ADD || !t->loaded) return dlt_apply(file, t, 0, t->rows, base, out, error);
    if (!t->has_exact)
        return fail(error, DLT_MISUSE, "%s: it has no exact part: it is served, not restored", show(t->name).text);
    if (base == NULL) return fail(error, DLT_MISUSE, "%s: it is restored from its base", show(t->name).text);
    if (t->elements > file->limits.max_memory)
        return fail(error, DLT_LIMIT, "%s: its marks take more than max_memory", show(t->name).text);
    TRY(load_exact(file, t, error));
    uint8_t *marks = calloc((size_t)t->elements, 1);
    if (marks == NULL) return no_memory(error);
    dlt_status status = predict_part(file, t, base, marks, out, error);
    if (status == DLT_OK) status = restore_chunks(t, base, marks, out, error);
    free(marks);
    return status;
}

/* ---- Scaled tensors of the base (7.8) ---- */

static float widen_f8(uint8_t code, dlt_dtype dtype) {
    if (dtype == DLT_F8_E5M2) return widen_f16((uint16_t)(code << 8)); /* the upper byte of an F16 */
    /* E4M3 of the OCP specification: exponent bias 7, no infinity, 0x7F and 0xFF are NaN. */
    int exponent = code >> 3 & 15, fraction = code & 7;
    float value = (code & 0x7F) == 0x7F ? NAN
                  : exponent            ? ldexpf((float)(8 + fraction), exponent - 10)
                                        : ldexpf((float)fraction, -9);
    return code & 0x80 ? -value : value;
}

static float widen_scale(const void *scales, dlt_dtype dtype, uint64_t i) {
    if (dtype != DLT_F8_E8M0 && dtype != DLT_U8) return widen(scales, dtype, i);
    /* F8_E8M0 is 2^(code - 127), and 0xFF is NaN. */
    uint8_t code = ((const uint8_t *)scales)[i];
    return code == 0xFF ? NAN : ldexpf(1, code - 127);
}

dlt_status dlt_scaled_values(const dlt_scaled *s, const void *codes, const void *scales, uint16_t *out,
                             dlt_error *error) {
    uint64_t elements = 1, at[DLT_MAX_DIMENSIONS] = {0};
    if (s->has_scales != (scales != NULL))
        return fail(error, DLT_MISUSE, "%s: scales are given where there are some", show(s->name).text);
    for (uint32_t i = 0; i < s->shape.count; i++) elements *= s->shape.sizes[i];
    for (uint64_t n = 0; n < elements; n++) {
        /* The element at the indices x_i has the scale of the block floor(x_i / b_i). */
        uint64_t block = 0;
        for (uint32_t i = 0; i < s->shape.count; i++)
            block = block * ceil_div(s->shape.sizes[i], s->block[i]) + at[i] / s->block[i];
        /* value = BF16(float32(float32(code) * float32(scale))), or BF16(float32(code)); a value that is not a number
         * is 0x7FC0. */
        float value = widen_f8(((const uint8_t *)codes)[n], s->codes_dtype);
        if (scales) value = value * widen_scale(scales, s->scales_dtype, block);
        out[n] = isnan(value) ? 0x7FC0 : narrow_bf16(value);
        for (uint32_t i = s->shape.count; i-- > 0 && ++at[i] == s->shape.sizes[i];) at[i] = 0;
    }
    return DLT_OK;
}

/* ---- Digests and the content id (7.5, 7.6) ---- */

void dlt_identity(dlt_dtype dtype, const dlt_shape *shape, const void *bytes, uint64_t length, uint8_t out[32]) {
    char text[32 * (DLT_MAX_DIMENSIONS + 1)];
    size_t n = (size_t)snprintf(text, sizeof text, "deltafmt tensor v1\n%s\n", DTYPES[dtype]);
    for (uint32_t i = 0; i < shape->count; i++) {
        n += (size_t)snprintf(text + n, sizeof text - n, i ? ",%llu" : "%llu", (unsigned long long)shape->sizes[i]);
    }
    text[n++] = '\n';
    blake3 hash;
    dlt_blake3_start(&hash);
    dlt_blake3_add(&hash, text, n);
    dlt_blake3_add(&hash, bytes, (size_t)length);
    dlt_blake3_end(&hash, out);
}

dlt_status dlt_check_base(const dlt_tensor *t, const void *bytes, uint64_t length, dlt_error *error) {
    uint8_t digest[32];
    if (!t->has_base)
        return fail(error, DLT_MISUSE, "%s: it does not come from a tensor of the base", show(t->name).text);
    dlt_identity(t->base_dtype, &t->base_shape, bytes, length, digest);
    if (memcmp(digest, t->base_digest, 32) == 0) return DLT_OK;
    return fail(error, DLT_OTHER_BASE, "%s: the base's tensor is another one", show(t->name).text);
}

/* A rank index enters a digest in its fixed form, which holds the same positions: made here word by word. */
static void hash_as_fixed(const dlt_tensor *t, const index_reader *p, uint64_t mask_rows, blake3 *hash) {
    const dlt_layout *l = &p->term->layout;
    stream fixed = index_stream(l, DLT_FIXED, t->columns);
    for (uint64_t tile = 0; tile < tiles_of(mask_rows, 1); tile++) {
        unsigned lanes = lanes_of(tile, 1, mask_rows);
        for (unsigned j = 0; j < fixed.planes; j++) {
            uint32_t words[LANES] = {0};
            unsigned w = fixed.plane_width[j], bit = 0;
            uint8_t positions[LANES][255];
            for (uint64_t i = 0; i < fixed.count; i++) {
                for (unsigned k = 0; k < lanes && i % l->keep == 0; k++)
                    positions_of(p, tile * LANES + k, i / l->keep, positions[k]);
                for (unsigned k = 0; k < lanes; k++) {
                    words[k] |= ((uint32_t)positions[k][i % l->keep] >> fixed.shift[j] & (UINT32_MAX >> (32 - w)))
                                << bit;
                }
                bit += w;
                if (bit < 32 && i + 1 < fixed.count) continue;
                dlt_blake3_add(hash, words, sizeof words);
                memset(words, 0, sizeof words);
                bit = 0;
            }
        }
    }
}

/* The digest of an entry: the buffers of its terms, those of a term in the order of their names, then data; raw bytes.
 */
static dlt_status check_payload(dlt_file *file, const dlt_tensor *t, dlt_error *error) {
    blake3 hash;
    uint8_t digest[32];
    dlt_blake3_start(&hash);
    for (uint32_t i = 0; i < t->term_count; i++) {
        const dlt_term *term = &t->terms[i];
        for (uint32_t j = 0; j < term->buffer_count; j++) {
            const dlt_bytes *b = &term->buffers[j];
            if (term->layout.kind == DLT_NM && term->layout.index == DLT_RANK && strcmp(b->name, "index") == 0) {
                index_reader p;
                TRY(start_index(&p, t, term, error));
                hash_as_fixed(t, &p, ceil_div(t->shared_rows, term->layout.share), &hash);
                free(p.choices);
                continue;
            }
            int coded = term->layout.kind == DLT_NM || term->layout.kind == DLT_LOWBIT ||
                        (term->layout.kind == DLT_SPARSE && term->layout.coded);
            unsigned bits = term->layout.bits, width = coded && term->layout.grid == DLT_MIDTREAD &&
                                                               !(bits & (bits - 1)) && strcmp(b->name, "codes") == 0
                                                           ? bits
                                                           : 0;
            int full;
            if (file->sections[b->section].codec == 0) {
                full = hash_stored(file, b->section, b->offset, b->length, width, &hash);
            } else {
                full = width && has_full_field(b->data, b->length / 4, width);
                dlt_blake3_add(&hash, b->data, (size_t)b->length);
            }
            if (full) return broken(t, b->name, "a field is beyond the grid", error);
        }
    }
    if (t->has_data) TRY(hash_buffer(file, &t->data, &hash, error));
    dlt_blake3_end(&hash, digest);
    return memcmp(digest, t->digest, 32) == 0
               ? DLT_OK
               : INVALID(error, "%s: the payload has another digest", show(t->name).text);
}

/* Where bytes go that are made anew: into a hash, or beside bytes that must be these. */
typedef struct {
    blake3 hash;
    slice beside; /* what is left of it */
    int compares, differs;
} sink;

static void put(sink *s, const void *bytes, size_t length) {
    if (!s->compares) return dlt_blake3_add(&s->hash, bytes, length);
    if (length > s->beside.length || memcmp(s->beside.p, bytes, length) != 0) s->differs = 1, length = s->beside.length;
    s->beside.p += length, s->beside.length -= length;
}

static void put_slice(sink *s, slice bytes) { put(s, bytes.p, bytes.length); }

static void add_count(sink *s, uint8_t few, uint8_t two, size_t count) {
    uint8_t bytes[5] = {(uint8_t)(two + 1), (uint8_t)(count >> 24), (uint8_t)(count >> 16), (uint8_t)(count >> 8),
                        (uint8_t)count};
    if (count < 16) bytes[0] = (uint8_t)(few + count), put(s, bytes, 1);
    else if (count < 65536) bytes[2] = two, put(s, bytes + 2, 3);
    else put(s, bytes, 5);
}

static void add_string(sink *s, dlt_text text) {
    uint8_t bytes[3] = {0xDA, (uint8_t)(text.length >> 8), (uint8_t)text.length};
    if (text.length < 32) bytes[2] = (uint8_t)(0xA0 + text.length), put(s, bytes + 2, 1);
    else if (text.length < 256) bytes[1] = 0xD9, put(s, bytes + 1, 2);
    else put(s, bytes, 3); /* names have at most 1,024 bytes */
    put(s, text.text, text.length);
}

static void add_word(sink *s, const char *word) { add_string(s, (dlt_text){word, strlen(word)}); }

static void add_integer(sink *s, uint64_t value) {
    uint8_t bytes[5] = {0xCE, (uint8_t)(value >> 24), (uint8_t)(value >> 16), (uint8_t)(value >> 8), (uint8_t)value};
    if (value < 0x80) put(s, bytes + 4, 1);
    else if (value < 0x100) bytes[3] = 0xCC, put(s, bytes + 3, 2);
    else if (value < 0x10000) bytes[2] = 0xCD, put(s, bytes + 2, 3);
    else put(s, bytes, 5); /* seeds and slots are below 2^32 */
}

static void add_digest(sink *s, const uint8_t digest[32]) {
    static const uint8_t head[2] = {0xC4, 32};
    put(s, head, 2);
    put(s, digest, 32);
}

/* The head of a byte string. */
static void add_length(sink *s, size_t length) {
    uint8_t bytes[5] = {0xC6, (uint8_t)(length >> 24), (uint8_t)(length >> 16), (uint8_t)(length >> 8),
                        (uint8_t)length};
    if (length < 0x100) bytes[3] = 0xC4, put(s, bytes + 3, 2);
    else if (length < 0x10000) bytes[2] = 0xC5, put(s, bytes + 2, 3);
    else put(s, bytes, 5);
}

/* The content id is that of the whole file, or of its served part, which has neither files nor exact parts (17.7). */
typedef enum { WHOLE, SERVED } extent;

/* An entry as a map, without data; exact as {digest}; every term as {layout, seed}, with slots where it has them and the
 * layout itself in the place of its number, and index of rank written as fixed. */
static dlt_status add_entry(const dlt_file *file, sink *s, const dlt_tensor *t, extent of, dlt_error *error) {
    cursor c = {t->raw, t->raw + t->raw_length, error, t->name};
    size_t keys;
    TRY(read_map(&c, &keys));
    add_count(s, 0x80, 0xDE, keys - (size_t)t->has_data - (size_t)(t->has_exact && of == SERVED));
    const uint8_t *start = c.p, *end = t->term_count ? t->raw + t->terms_start : c.end;
    if (t->has_data) {
        put(s, start, (size_t)(t->raw + t->data_start - start));
        start = t->raw + t->data_end;
    }
    if (t->has_exact) {
        put(s, start, (size_t)(t->raw + (of == SERVED ? t->exact_key : t->exact_start) - start));
        if (of == WHOLE) {
            add_count(s, 0x80, 0xDE, 1);
            add_word(s, "digest");
            add_digest(s, t->exact_digest);
        }
        start = t->raw + t->exact_end;
    }
    put(s, start, (size_t)(end - start));
    if (t->term_count == 0) return DLT_OK;
    add_word(s, "terms");
    add_count(s, 0x90, 0xDC, t->term_count);
    for (uint32_t i = 0; i < t->term_count; i++) {
        const dlt_term *term = &t->terms[i];
        const layout_entry *l = &file->layouts[term->layout_number];
        int sparse = term->layout.kind == DLT_SPARSE;
        add_count(s, 0x80, 0xDE, sparse ? 3 : 2);
        add_word(s, "layout");
        if (term->layout.kind == DLT_NM && term->layout.index == DLT_RANK) {
            put(s, l->raw.p, l->index_value);
            add_word(s, "fixed");
            size_t after = l->index_value + 1 + strlen("rank");
            put(s, l->raw.p + after, l->raw.length - after);
        } else {
            put_slice(s, l->raw);
        }
        add_word(s, "seed");
        add_integer(s, term->seed);
        if (!sparse) continue;
        add_word(s, "slots");
        add_integer(s, term->slots);
    }
    return DLT_OK;
}

static void add_digests(sink *s, const attachment *all, size_t count) {
    add_count(s, 0x80, 0xDE, count);
    for (size_t i = 0; i < count; i++) {
        add_string(s, all[i].name);
        add_digest(s, all[i].digest);
    }
}

/* The content id: the canonical msgpack of a map with attachments (name to digest), metadata, removed, and tensors, whose
 * entries follow; files (name to digest), parent and scaled, if the index has them. */
static void start_content_id(const dlt_file *file, sink *s, extent of) {
    int files = file->files != NULL && of == WHOLE;
    memset(s, 0, sizeof *s);
    dlt_blake3_start(&s->hash);
    add_count(s, 0x80, 0xDE, (size_t)(4 + files + (file->scaled != NULL) + (file->about.parent != NULL)));
    add_word(s, "attachments");
    add_digests(s, file->attachments, file->about.attachments);
    if (files) {
        add_word(s, "files");
        add_digests(s, file->files, file->about.files);
    }
    add_word(s, "metadata");
    put_slice(s, file->raw_metadata);
    if (file->about.parent) {
        add_word(s, "parent");
        add_digest(s, file->about.parent);
    }
    add_word(s, "removed");
    put_slice(s, file->raw_removed);
    if (file->scaled) {
        add_word(s, "scaled");
        add_count(s, 0x80, 0xDE, file->about.scaled);
        for (size_t i = 0; i < file->about.scaled; i++) {
            add_string(s, file->scaled[i].name);
            put_slice(s, file->scaled[i].raw);
        }
    }
    add_word(s, "tensors");
    add_count(s, 0x80, 0xDE, file->about.tensors);
}

/* ---- Verifying (15) ---- */

typedef struct {
    uint32_t section;
    uint64_t offset, length;
} place;

static int compare_places(const void *a, const void *b) {
    const place *x = a, *y = b;
    if (x->section != y->section) return x->section < y->section ? -1 : 1;
    if (x->offset != y->offset) return x->offset < y->offset ? -1 : 1;
    return (x->length > y->length) - (x->length < y->length);
}

/* 5.4: a buffer starts at the next multiple of 256 after the end of the one before it, the first at 0; the bytes
 * between MUST be zero; the section ends with its last buffer and has at least one. */
static dlt_status check_places(dlt_file *file, place *places, size_t count, dlt_error *error) {
    size_t next = 0;
    if (count) qsort(places, count, sizeof *places, compare_places);
    for (size_t i = 0; i < file->about.sections; i++) {
        uint64_t end = 0;
        size_t first = next;
        /* 5.8: it has no buffers, and 5.4 says nothing about it. */
        if (file->sections[i].kind == SERVED_END) continue;
        for (; next < count && places[next].section == i; next++) {
            uint64_t start = file->sections[i].kind == OF_EXACT ? end : align(end, ALIGNMENT);
            if (places[next].offset != start)
                return INVALID(error, "a buffer of section %zu is not where the next one belongs", i);
            for (slice piece; end < start; end += piece.length) {
                TRY(next_piece(file, (uint32_t)i, end, start - end, &piece, error));
                if (!all_zero(piece.p, piece.length))
                    return INVALID(error, "the padding between buffers of section %zu is not zero", i);
            }
            end = start + places[next].length;
        }
        if (next == first) return INVALID(error, "section %zu has no buffer", i);
        if (end != file->sections[i].raw_length)
            return INVALID(error, "section %zu does not end with its last buffer", i);
    }
    return DLT_OK;
}

/* The places of all buffers, as they are found. */
typedef struct {
    place *list;
    size_t count, room;
} all_places;

static dlt_status add_place(all_places *all, const dlt_bytes *b, dlt_error *error) {
    if (all->count == all->room) {
        size_t room = 2 * all->room + 64;
        place *list = realloc(all->list, room * sizeof *list);
        if (list == NULL) return no_memory(error);
        all->list = list, all->room = room;
    }
    all->list[all->count++] = (place){b->section, b->offset, b->length};
    return DLT_OK;
}

/* Every entry keeps 7.4, and the buffers of all cover the sections. */
static dlt_status add_places(dlt_file *file, all_places *all, dlt_error *error) {
    for (size_t i = 0; i < file->about.tensors; i++) {
        dlt_tensor t;
        TRY(read_entry(file, &file->tensors[i], &t, error));
        for (uint32_t j = 0; j < t.term_count; j++) {
            for (uint32_t k = 0; k < t.terms[j].buffer_count; k++) TRY(add_place(all, &t.terms[j].buffers[k], error));
        }
        if (t.has_data) TRY(add_place(all, &t.data, error));
        if (t.has_exact) TRY(add_place(all, &t.exact, error));
    }
    for (size_t i = 0; i < file->about.files; i++) TRY(add_place(all, &file->files[i].bytes, error));
    for (size_t i = 0; i < file->about.attachments; i++) TRY(add_place(all, &file->attachments[i].bytes, error));
    return check_places(file, all->list, all->count, error);
}

static dlt_status check_coverage(dlt_file *file, dlt_error *error) {
    all_places all = {0};
    dlt_status status = add_places(file, &all, error);
    free(all.list);
    return status;
}

dlt_status dlt_attachment(dlt_file *file, size_t number, void **data, uint64_t *length, dlt_error *error) {
    if (number >= file->about.attachments) return fail(error, DLT_MISUSE, "there is no attachment %zu", number);
    const attachment *a = &file->attachments[number];
    uint8_t digest[32];
    if (a->bytes.length > file->limits.max_memory)
        return fail(error, DLT_LIMIT, "%s has more than max_memory", show(a->name).text);
    *length = a->bytes.length;
    *data = malloc((size_t)(a->bytes.length ? a->bytes.length : 1));
    if (*data == NULL) return no_memory(error);
    dlt_status status = copy_buffer(file, &a->bytes, *data, error);
    if (status == DLT_OK) dlt_blake3_of(*data, (size_t)a->bytes.length, digest);
    if (status == DLT_OK && memcmp(digest, a->digest, 32) != 0)
        status = INVALID(error, "the attachment %s has another digest", show(a->name).text);
    if (status != DLT_OK) free(*data), *data = NULL;
    return status;
}

/* ---- Files that are restored (7.10) ---- */

/* A safetensors header is JSON. The parser reads what such a header has, in any spelling of JSON. */
typedef struct {
    const uint8_t *p, *end;
    char *texts;    /* where strings are decoded to: no string is longer than it is spelled */
    dlt_text *keys; /* of the metadata: room for as many as there may be */
    int has_metadata;
} json;

static void json_space(json *j) {
    while (j->p < j->end && (*j->p == ' ' || *j->p == '\t' || *j->p == '\n' || *j->p == '\r')) j->p++;
}

static int json_next(json *j, char c) { /* whether `c` comes next; it is read then */
    json_space(j);
    return j->p < j->end && *j->p == (uint8_t)c ? (j->p++, 1) : 0;
}

static int json_hex(json *j, uint32_t *out) {
    *out = 0;
    for (int i = 0; i < 4; i++) {
        if (j->p == j->end) return 0;
        unsigned c = *j->p++, digit = c - '0';
        if (c >= 'a' && c <= 'f') digit = c - 'a' + 10;
        else if (c >= 'A' && c <= 'F') digit = c - 'A' + 10;
        else if (digit > 9) return 0;
        *out = *out << 4 | digit;
    }
    return 1;
}

static int json_string(json *j, dlt_text *out) {
    static const char escapes[] = "\"\\/bfnrt", meant[] = "\"\\/\b\f\n\r\t";
    char *start = j->texts;
    if (!json_next(j, '"')) return 0;
    for (;;) {
        if (j->p == j->end || *j->p < 0x20) return 0;
        unsigned c = *j->p++;
        if (c == '"') break;
        if (c != '\\') {
            *j->texts++ = (char)c;
            continue;
        }
        if (j->p == j->end) return 0;
        c = *j->p++;
        const char *found = c ? strchr(escapes, (int)c) : NULL;
        uint32_t point, low;
        if (found) *j->texts++ = meant[found - escapes];
        else if (c != 'u' || !json_hex(j, &point)) return 0;
        else {
            if (point >= 0xD800 && point < 0xDC00) { /* the other half of a pair follows */
                if (j->end - j->p < 6 || *j->p++ != '\\' || *j->p++ != 'u' || !json_hex(j, &low)) return 0;
                if (low < 0xDC00 || low > 0xDFFF) return 0;
                point = 0x10000 + ((point - 0xD800) << 10) + (low - 0xDC00);
            } else if (point >= 0xDC00 && point < 0xE000) {
                return 0;
            }
            if (point < 0x80) {
                *j->texts++ = (char)point;
            } else {
                int more = point < 0x800 ? 1 : point < 0x10000 ? 2 : 3;
                *j->texts++ = (char)((0xF0E0C0 >> 8 * (more - 1) & 0xFF) | point >> 6 * more);
                while (more-- > 0) *j->texts++ = (char)(0x80 | (point >> 6 * more & 0x3F));
            }
        }
    }
    *out = (dlt_text){start, (size_t)(j->texts - start)};
    return 1;
}

static int json_number(json *j, uint64_t *out) {
    int digits = 0;
    *out = 0;
    json_space(j);
    for (; j->p < j->end && *j->p >= '0' && *j->p <= '9'; digits++) {
        if (*out > (UINT64_MAX - 9) / 10 || (digits == 1 && *out == 0)) return 0;
        *out = *out * 10 + (uint64_t)(*j->p++ - '0');
    }
    return digits > 0;
}

static int json_numbers(json *j, uint64_t *out, uint32_t most, uint32_t *count) {
    *count = 0;
    if (!json_next(j, '[')) return 0;
    if (json_next(j, ']')) return 1;
    do {
        if (*count == most || !json_number(j, &out[(*count)++])) return 0;
    } while (json_next(j, ','));
    return json_next(j, ']');
}

static int compare_names(const void *a, const void *b);

/* The map of texts that __metadata__ is. No key stands twice. */
static int json_metadata(json *j) {
    dlt_text value;
    size_t count = 0;
    if (j->has_metadata++ || !json_next(j, '{')) return 0;
    if (json_next(j, '}')) return 1;
    do {
        if (!json_string(j, &j->keys[count++]) || !json_next(j, ':') || !json_string(j, &value)) return 0;
    } while (json_next(j, ','));
    qsort(j->keys, count, sizeof *j->keys, compare_names);
    for (size_t i = 1; i < count; i++) {
        if (same_text(j->keys[i - 1], j->keys[i])) return 0;
    }
    return json_next(j, '}');
}

/* A tensor as a header has it. */
typedef struct {
    dlt_text name, dtype;
    uint64_t sizes[DLT_MAX_DIMENSIONS], places[2];
    uint32_t dimensions;
} row;

static int json_row(json *j, row *r) {
    int seen = 0;
    if (!json_next(j, '{')) return 0;
    do {
        dlt_text key;
        uint32_t two;
        if (!json_string(j, &key) || !json_next(j, ':')) return 0;
        if (is(key, "dtype") && !(seen & 1)) {
            if (!json_string(j, &r->dtype)) return 0;
            seen |= 1;
        } else if (is(key, "shape") && !(seen & 2)) {
            if (!json_numbers(j, r->sizes, DLT_MAX_DIMENSIONS, &r->dimensions)) return 0;
            seen |= 2;
        } else if (is(key, "data_offsets") && !(seen & 4)) {
            if (!json_numbers(j, r->places, 2, &two) || two != 2) return 0;
            seen |= 4;
        } else {
            return 0;
        }
    } while (json_next(j, ','));
    return json_next(j, '}') && seen == 7;
}

static int compare_rows(const void *a, const void *b) {
    const row *x = a, *y = b;
    for (int i = 0; i < 2; i++) {
        if (x->places[i] != y->places[i]) return x->places[i] < y->places[i] ? -1 : 1;
    }
    return compare_texts(x->name, y->name);
}

/* Read the rows of a header into `rows`, which has room for as many as its bytes can hold. */
static int json_header(json *j, row *rows, size_t *count) {
    *count = 0;
    if (!json_next(j, '{')) return 0;
    if (!json_next(j, '}')) {
        do {
            row *r = &rows[*count];
            if (!json_string(j, &r->name) || !json_next(j, ':')) return 0;
            if (is(r->name, "__metadata__")) {
                if (!json_metadata(j)) return 0;
            } else if (json_row(j, r)) {
                ++*count;
            } else {
                return 0;
            }
        } while (json_next(j, ','));
        if (!json_next(j, '}')) return 0;
    }
    json_space(j);
    return j->p == j->end;
}

/* A tensor that the header calls NAME, in a file of the folder FOLDER, is the tensor FOLDER/NAME. */
static member *named_in(const dlt_file *file, dlt_text path, dlt_text name) {
    char whole[2 * MAX_NAME + 1];
    size_t folder = path.length;
    while (folder > 0 && path.text[folder - 1] != '/') folder--; /* with its `/` */
    if (name.length > MAX_NAME) return NULL;
    memcpy(whole, path.text, folder);
    memcpy(whole + folder, name.text, name.length);
    return find_tensor(file, (dlt_text){whole, folder + name.length});
}

/* The header's tensors MUST cover the bytes behind the head exactly, and MUST have the dtypes and shapes of their
 * entries. Every tensor MUST lie in exactly one of the files: `seen` has a byte for each. */
static dlt_status check_rows_of(const dlt_file *file, dlt_text path, const row *rows, size_t count, uint8_t *seen,
                                dlt_error *error) {
    uint64_t position = 0;
    for (size_t i = 0; i < count; i++) {
        const row *r = &rows[i];
        member *m = named_in(file, path, r->name);
        dlt_tensor t;
        if (m == NULL || seen[m - file->tensors]++)
            return INVALID(error, "%s has a tensor that is not in the file, or lies in another", show(path).text);
        TRY(read_entry(file, m, &t, error));
        if (!is(r->dtype, DTYPES[t.dtype]) || r->dimensions != t.shape.count ||
            memcmp(r->sizes, t.shape.sizes, r->dimensions * sizeof r->sizes[0]) != 0)
            return INVALID(error, "%s has another dtype or shape for %s", show(path).text, show(m->name).text);
        uint64_t end = position + t.elements * DTYPE_BITS[t.dtype] / 8;
        if (r->places[0] != position || r->places[1] != end)
            return INVALID(error, "the tensors of %s do not cover its bytes", show(path).text);
        position = end;
    }
    return DLT_OK;
}

/* A weight file begins with its head: a u64, which is the length of the rest of the head, and a safetensors header. */
static dlt_status check_head(dlt_file *file, const attachment *a, uint8_t *seen, dlt_error *error) {
    uint64_t length = a->bytes.length;
    if (length > file->limits.max_memory)
        return fail(error, DLT_LIMIT, "the head of %s has more than max_memory", show(a->name).text);
    uint8_t *head = malloc((size_t)length + 1);
    char *texts = malloc((size_t)length + 1);
    /* `"":{"dtype":"","shape":[],"data_offsets":[0,0]}` and a comma: no tensor takes less. */
    row *rows = malloc((size_t)(length / 40 + 2) * sizeof *rows);
    /* `"":""` and a comma: no key of the metadata takes less. */
    dlt_text *keys = malloc((size_t)(length / 6 + 2) * sizeof *keys);
    size_t count = 0;
    dlt_status status = head && texts && rows && keys ? copy_buffer(file, &a->bytes, head, error) : no_memory(error);
    if (status == DLT_OK) {
        json j = {head + 8, head + length, texts, keys, 0};
        cursor text = {head, head + length, error, a->name};
        if (length < 8 || read64(head) != length - 8 ||
            check_utf8(&text, head + 8, (size_t)length - 8) != DLT_OK || !json_header(&j, rows, &count))
            status = INVALID(error, "the head of %s is none of a weight file", show(a->name).text);
    }
    if (status == DLT_OK) {
        qsort(rows, count, sizeof *rows, compare_rows);
        status = check_rows_of(file, a->name, rows, count, seen, error);
    }
    free(head);
    free(texts);
    free(rows);
    free(keys);
    return status;
}

static dlt_status check_files(dlt_file *file, dlt_error *error) {
    if (file->about.files == 0) return DLT_OK;
    uint8_t *seen = calloc(file->about.tensors + 1, 1);
    dlt_status status = seen ? DLT_OK : no_memory(error);
    for (size_t i = 0; i < file->about.files && status == DLT_OK; i++) {
        if (!is_weight_index(file->files[i].name)) status = check_head(file, &file->files[i], seen, error);
    }
    for (size_t i = 0; i < file->about.tensors && status == DLT_OK; i++) {
        if (!seen[i])
            status = INVALID(error, "the tensor %s lies in no weight file", show(file->tensors[i].name).text);
    }
    free(seen);
    return status;
}

dlt_text dlt_restored_name(const dlt_file *file, size_t number, const uint8_t **digest) {
    if (number >= file->about.files) return (dlt_text){0};
    if (digest) *digest = file->files[number].digest;
    return file->files[number].name;
}

dlt_status dlt_head(dlt_file *file, size_t number, void **data, uint64_t *length, dlt_error *error) {
    if (number >= file->about.files) return fail(error, DLT_MISUSE, "there is no restored file %zu", number);
    const attachment *a = &file->files[number];
    if (a->bytes.length > file->limits.max_memory)
        return fail(error, DLT_LIMIT, "the head of %s has more than max_memory", show(a->name).text);
    *length = a->bytes.length;
    *data = malloc((size_t)(a->bytes.length ? a->bytes.length : 1));
    if (*data == NULL) return no_memory(error);
    dlt_status status = copy_buffer(file, &a->bytes, *data, error);
    if (status != DLT_OK) free(*data), *data = NULL;
    return status;
}

/* 7.7: `weights`, or `weights/COMPONENT`: a name without `/` that ends in `.safetensors` and has more before that; with
 * COMPONENT and
 * `/` in front, it MUST be a path as an attachment's name is one. */
static dlt_status check_weights(const dlt_file *file, dlt_error *error) {
    static const char key[] = "weights", ending[] = ".safetensors";
    size_t n = sizeof key - 1, e = sizeof ending - 1;
    for (size_t i = 0; i < file->about.metadata; i++) {
        const pair *p = &file->metadata[i];
        if (p->key.length < n || memcmp(p->key.text, key, n) != 0 || (p->key.length > n && p->key.text[n] != '/'))
            continue;
        dlt_text component = {p->key.text + n, p->key.length - n}; /* with its `/` in front */
        int good = p->value.length > e && memchr(p->value.text, '/', p->value.length) == NULL && is_path(p->value);
        if (good) good = memcmp(p->value.text + p->value.length - e, ending, e) == 0;
        if (component.length) good &= is_path((dlt_text){component.text + 1, component.length - 1});
        if (!good) return INVALID(error, "the metadata's %s is not the name of a weight file", show(p->key).text);
    }
    return DLT_OK;
}

/* The bytes that chunks become, whatever the base; places are counted where there are few. */
static dlt_status check_decoded(dlt_file *file, dlt_error *error) {
    uint64_t decoded = 0;
    for (size_t i = 0; i < file->about.tensors; i++) {
        dlt_tensor t;
        TRY(read_entry(file, &file->tensors[i], &t, error));
        if (!t.has_exact) continue;
        TRY(load_exact(file, &t, error));
        uint64_t at = 0, chunks = chunks_of(&t);
        for (uint64_t k = 0; k < chunks; k++) {
            chunk c = chunk_at(&t, k, &at);
            if (c.form == VALUES || c.form == DIFFERENCES || c.form == SORTED)
                decoded += c.count * unit_of(t.dtype).width;
        }
        if (decoded > file->limits.max_output)
            return fail(error, DLT_LIMIT, "the chunks of exact tensors and parts become more than max_output, %llu bytes",
                        (unsigned long long)file->limits.max_output);
    }
    return DLT_OK;
}

/* `served` is NULL if the file is not progressive. */
static dlt_status verify_tensor(dlt_file *file, const member *m, sink *content, sink *served, dlt_error *error) {
    dlt_tensor t;
    TRY(read_entry(file, m, &t, error));
    add_string(content, t.name);
    TRY(add_entry(file, content, &t, WHOLE, error));
    if (served) {
        add_string(served, t.name);
        TRY(add_entry(file, served, &t, SERVED, error));
    }
    if (t.digest == NULL && !t.has_exact) return DLT_OK;
    dlt_status status = load(file, &t, TO_VERIFY, error);
    if (status == DLT_OK && t.digest) status = check_payload(file, &t, error);
    if (status == DLT_OK && t.has_exact) status = check_chunks(&t, error);
    dlt_unload(&t);
    return status;
}

/* 17.7: the index of the served part is that of the whole file, with the sections before this one in sections, without
 * files, and without exact in the entries. */
static dlt_status put_served_index(const dlt_file *file, sink *s, dlt_error *error) {
    add_count(s, 0x80, 0xDE, (size_t)(7 + (file->about.parent != NULL) + (file->scaled != NULL)));
    put_slice(s, file->raw_attachments);
    put_slice(s, file->raw_middle);
    add_word(s, "sections");
    add_count(s, 0x90, 0xDC, (size_t)(file->served - file->sections));
    put_slice(s, file->raw_sections);
    add_word(s, "tensors");
    add_count(s, 0x80, 0xDE, file->about.tensors);
    for (size_t i = 0; i < file->about.tensors; i++) {
        dlt_tensor t;
        TRY(read_entry(file, &file->tensors[i], &t, error));
        size_t left_out = t.has_exact ? t.exact_end - t.exact_key : 0;
        add_string(s, t.name);
        add_length(s, t.raw_length - left_out);
        if (!t.has_exact) {
            put(s, t.raw, t.raw_length);
            continue;
        }
        uint8_t head = (uint8_t)(t.raw[0] - 1); /* a map of fewer than 16 keys, which has one key less */
        put(s, &head, 1);
        put(s, t.raw + 1, t.exact_key - 1);
        put(s, t.raw + t.exact_end, t.raw_length - t.exact_end);
    }
    return DLT_OK;
}

/* 17.7: a verifier MUST compare the section's bytes with those that the index asks for: an index, and a trailer that
 * belongs to it (8). */
static dlt_status check_served(const dlt_file *file, const uint8_t content_id[32], dlt_error *error) {
    const section *s = file->served;
    const uint8_t *data = file->data + s->offset;
    if (s->length <= TRAILER) return INVALID(error, "the section of kind 4 has no room for an index and a trailer");
    size_t length = (size_t)s->length - TRAILER;
    sink index = {.beside = {data, length}, .compares = 1};
    TRY(put_served_index(file, &index, error));
    if (index.differs || index.beside.length) return INVALID(error, "the index of the served part is another one");
    uint8_t trailer[TRAILER] = {0};
    uint64_t numbers[3] = {s->offset, length, s->offset + s->length};
    blake3 seal;
    memcpy(trailer, numbers, sizeof numbers);
    memcpy(trailer + 24, content_id, 32);
    dlt_blake3_start(&seal);
    dlt_blake3_add(&seal, file->data, HEADER);
    dlt_blake3_add(&seal, data, length);
    dlt_blake3_add(&seal, trailer, 88);
    dlt_blake3_end(&seal, trailer + 88);
    memcpy(trailer + 120, "DLTEND\r\n", 8);
    return memcmp(data + length, trailer, TRAILER) == 0 ? DLT_OK
                                                        : INVALID(error, "the trailer of the served part is another one");
}

static dlt_status verify_attachment(dlt_file *file, const attachment *a, dlt_error *error) {
    blake3 hash;
    uint8_t digest[32];
    dlt_blake3_start(&hash);
    TRY(hash_buffer(file, &a->bytes, &hash, error));
    dlt_blake3_end(&hash, digest);
    if (memcmp(digest, a->digest, 32) == 0) return DLT_OK;
    return INVALID(error, "the attachment %s has another digest", show(a->name).text);
}

static dlt_status verify(dlt_file *file, dlt_error *error) {
    sink content, served;
    uint8_t id[32];
    dlt_scaled scaled;
    TRY(check_coverage(file, error));
    for (size_t i = 0; i < file->about.scaled; i++) TRY(dlt_scaled_at(file, i, &scaled, error));
    TRY(check_weights(file, error));
    if (file->about.incompatible & FEATURE_EXACT) TRY(check_decoded(file, error));
    TRY(check_files(file, error));
    start_content_id(file, &content, WHOLE);
    if (file->served) start_content_id(file, &served, SERVED);
    for (size_t i = 0; i < file->about.tensors; i++)
        TRY(verify_tensor(file, &file->tensors[i], &content, file->served ? &served : NULL, error));
    for (size_t i = 0; i < file->about.attachments; i++) TRY(verify_attachment(file, &file->attachments[i], error));
    if (file->served) {
        dlt_blake3_end(&served.hash, id);
        TRY(check_served(file, id, error));
    }
    dlt_blake3_end(&content.hash, id);
    return memcmp(id, file->about.content_id, 32) == 0 ? DLT_OK
                                                       : INVALID(error, "the content id is not that of the content");
}

dlt_status dlt_verify(dlt_file *file, dlt_error *error) {
    /* The checksums of stored sections are taken while the digests are, and a wrong one is told before whatever else it
     * caused. */
    for (size_t i = 0; i < file->about.sections; i++) {
        section *s = &file->sections[i];
        if (s->codec == 1) {
            TRY(check_section(file, s, error));
        } else if (s->state == UNCHECKED) {
            TRY(check_outline(file, s, error));
            dlt_xxh3_start(&s->run);
            s->state = CHECKING;
        }
    }
    dlt_error found;
    dlt_status status = verify(file, &found);
    for (size_t i = 0; i < file->about.sections; i++) {
        section *s = &file->sections[i];
        if (s->state != CHECKING) continue;
        s->state = UNCHECKED;
        TRY(end_checksum(file, s, error));
    }
    if (status != DLT_OK) *error = found;
    return status;
}
