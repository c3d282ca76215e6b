/* deltafmt.h: reads delta files of version 1 (spec/deltafmt-v1.md), in C11 with libc alone.
 *
 * A file is mapped, checked, and handed out as pointers into the map. Every function that can fail returns a status,
 * and writes one line into `error`. An example:
 *
 *     dlt_error error;
 *     dlt_file *file;
 *     if (dlt_open("math.deltafmt", NULL, &file, &error)) return puts(error.message), 1;
 *     dlt_tensor tensor;
 *     if (!dlt_find(file, "model.layers.0.mlp.up_proj.weight", &tensor, &error) && !dlt_load(file, &tensor, &error)) {
 *         const uint32_t *codes = dlt_buffer(&tensor.terms[0], "codes")->data;
 *         ...
 *         dlt_unload(&tensor);
 *     }
 *     dlt_close(file);
 *
 * Threads: one dlt_file serves one thread at a time. Several files may be open at once. A file must not become shorter
 * while it is open: reading what is gone ends the process (SIGBUS). Compressed sections need the system's libzstd,
 * which is loaded when the first of them is read (dlopen); files of profile `hot` need it only for attachments.
 */
#ifndef DELTAFMT_H
#define DELTAFMT_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef enum {
    DLT_OK = 0,
    DLT_INVALID = 1,     /* the file breaks the specification */
    DLT_UNSUPPORTED = 2, /* the file needs a newer reader */
    DLT_LIMIT = 3,       /* the file asks for more than dlt_limits allows */
    DLT_SYSTEM = 4,      /* the operating system or libzstd failed: no such file, no memory, no library */
    DLT_MISUSE = 5,      /* the caller asked for what there is not: a name, a row, an action without a delta */
    DLT_OTHER_BASE = 6   /* the base's tensor is not the one that the delta was made for */
} dlt_status;

typedef struct {
    dlt_status status;
    char message[256]; /* one line, no full stop */
} dlt_error;

/* What a file may cost. A member that is 0 means its default, which follows the file's size. */
typedef struct {
    uint64_t max_memory; /* bytes at once for a buffer or a tensor of compressed sections: 128 MiB and 64 a byte of the
                            file */
    uint64_t max_elements; /* elements that are decoded, for `lowrank` once a vector, in all: 2^24 and 2^15 a byte of
                              the file */
    uint64_t max_output;   /* bytes that the compressed sections decode to: 32 MiB and 256 a byte of the file */
} dlt_limits;

enum { DLT_MAX_DIMENSIONS = 8, DLT_MAX_TERMS = 16, DLT_MAX_BUFFERS = 6 };

/* Names as the specification spells them; dlt_dtype_name gives the text. */
typedef enum {
    DLT_BOOL,
    DLT_U8,
    DLT_I8,
    DLT_U16,
    DLT_I16,
    DLT_U32,
    DLT_I32,
    DLT_U64,
    DLT_I64,
    DLT_F4,
    DLT_F6_E2M3,
    DLT_F6_E3M2,
    DLT_F8_E5M2,
    DLT_F8_E4M3,
    DLT_F8_E8M0,
    DLT_F8_E4M3FNUZ,
    DLT_F8_E5M2FNUZ,
    DLT_F16,
    DLT_BF16,
    DLT_F32,
    DLT_F64,
    DLT_C64,
    DLT_DTYPES
} dlt_dtype;

typedef enum { DLT_SAME, DLT_REPLACE, DLT_ADD, DLT_ALIAS, DLT_EXACT } dlt_action;
typedef enum { DLT_NM, DLT_LOWBIT, DLT_LOWRANK, DLT_SPARSE } dlt_kind;
typedef enum { DLT_MIDTREAD, DLT_MIDRISE, DLT_ASYMMETRIC } dlt_grid;
typedef enum { DLT_SEEDED, DLT_FIXED, DLT_RANK } dlt_index;

/* A text in the file: UTF-8, not ended by a zero. */
typedef struct {
    const char *text;
    size_t length;
} dlt_text;

typedef struct {
    uint32_t count;
    uint64_t sizes[DLT_MAX_DIMENSIONS];
} dlt_shape;

/* A run of raw bytes. `data` is NULL until dlt_load; it is a multiple of 256 from the start of its section, unless it is
 * that of an exact tensor. */
typedef struct {
    const char *name;
    const void *data;
    uint64_t length;
    uint32_t section;
    uint64_t offset; /* in the section's raw bytes */
} dlt_bytes;

/* Parameters of a term (7.3). A kind leaves what it has not at 0. */
typedef struct {
    dlt_kind kind;
    int coded;        /* lowrank, sparse: 1 if vectors or values are codes, 0 if they are values of `values` */
    dlt_dtype values; /* lowrank, sparse, without codes: BF16, F16 or F32 */
    uint32_t bits;    /* k */
    dlt_grid grid;
    dlt_dtype scale_dtype; /* BF16 or F32 */
    uint32_t scale_group;  /* 0: all */
    uint32_t keep, group;  /* nm: N and M */
    uint32_t share;        /* nm: v */
    dlt_index index;       /* nm */
    int by_column;         /* lowbit: 1 if scales belong to columns */
    uint32_t rank;         /* lowrank: vectors on either side */
    uint32_t gap_bits;     /* sparse */
    uint32_t span;         /* sparse: columns of a block */
} dlt_layout;

typedef struct {
    dlt_layout layout;
    uint32_t layout_number;
    uint32_t seed;
    uint64_t slots; /* sparse */
    uint32_t buffer_count;
    dlt_bytes buffers[DLT_MAX_BUFFERS]; /* in the order of their names */
} dlt_term;

/* A tensor of the fine-tune. dlt_tensor_at and dlt_find fill it; it is valid until dlt_close. */
typedef struct {
    dlt_text name;
    dlt_action action;
    dlt_dtype dtype;
    dlt_shape shape;
    uint64_t elements;
    int has_base; /* same, add; exact, if there is one */
    dlt_dtype base_dtype;
    dlt_shape base_shape;
    const uint8_t *base_digest; /* 32 bytes */
    uint32_t part_count;        /* 0: the base's tensor of the same name; otherwise dlt_part gives the parts */
    const uint8_t *digest;      /* 32 bytes; replace, add: of the payload (7.6) */
    dlt_text target;            /* alias */
    uint64_t rows, columns;     /* of the fine-tuned tensor as a matrix */
    uint64_t shared_rows;       /* add: rows that base and fine-tune both have, which the terms cover */
    uint32_t term_count;
    dlt_term terms[DLT_MAX_TERMS];
    int has_data;
    dlt_bytes data; /* replace: all bytes; add: those of the rows that the base has not */
    int has_exact;               /* exact; add, if it has an exact part (17.8): */
    uint32_t chunk;              /* units of a chunk (17.1) */
    dlt_bytes exact;             /* the chunks and their table (17.4); of an add, not read by dlt_load */
    const uint8_t *exact_digest; /* 32 bytes: the identity (7.5) of the tensor that is restored */
    uint32_t factor_count;       /* add: as many as terms */
    uint32_t factors[DLT_MAX_TERMS]; /* add: the bits of a float32 for each term */
    /* Private. */
    const uint8_t *raw, *raw_parts;
    size_t raw_length, data_start, data_end, terms_start, exact_key, exact_start, exact_end;
    void *memory[DLT_MAX_TERMS * DLT_MAX_BUFFERS + 1];
    uint32_t memory_count;
    int loaded;
} dlt_tensor;

typedef struct {
    dlt_text name;
    uint64_t start, count;
} dlt_part;

/* How the base keeps a tensor as 8-bit floats (7.8). */
typedef struct {
    dlt_text name;
    uint64_t block[DLT_MAX_DIMENSIONS];
    dlt_dtype codes_dtype;
    dlt_shape shape;
    const uint8_t *codes_digest;
    int has_scales;
    dlt_text scales_name;
    dlt_dtype scales_dtype;
    dlt_shape scales_shape;
    const uint8_t *scales_digest;
} dlt_scaled;

typedef struct {
    uint64_t size;
    int cold;
    const uint8_t *content_id; /* 32 bytes, as the file says; dlt_verify recomputes it */
    const uint8_t *parent; /* NULL, or 32 bytes: the content id of the file whose result is the base (18). Whoever adds
                              this file's terms to a model compares the base's tensors first: dlt_check_base */
    uint64_t served_size; /* of a progressive file, its first bytes that are a delta file by themselves (17.7); or 0 */
    const uint8_t *served_content_id; /* NULL, or 32 bytes: what that file's trailer says; dlt_verify recomputes it */
    size_t tensors, attachments, files, removed, scaled, metadata, layouts, sections;
    uint64_t incompatible, compatible; /* feature bits */
} dlt_info;

typedef struct dlt_file dlt_file;

/* Open by mmap. Checks what section 15 lists under opening; reads no entry and hashes no section. */
dlt_status dlt_open(const char *path, const dlt_limits *limits, dlt_file **file, dlt_error *error);
/* The same of bytes in memory, which must stay as they are until dlt_close. `data` should be aligned to 8 bytes. */
dlt_status dlt_open_memory(const void *data, size_t size, const dlt_limits *limits, dlt_file **file, dlt_error *error);
void dlt_close(dlt_file *file);

/* Check every entry (7.4) and description (7.8), which opening leaves alone. */
dlt_status dlt_validate(const dlt_file *file, dlt_error *error);

dlt_info dlt_about(const dlt_file *file);
dlt_text dlt_metadata_key(const dlt_file *file, size_t number, dlt_text *value);
dlt_text dlt_removed(const dlt_file *file, size_t number);
dlt_text dlt_attachment_name(const dlt_file *file, size_t number);
dlt_text dlt_restored_name(const dlt_file *file, size_t number, const uint8_t **digest); /* a weight file or index (7.10) */

/* The tensors, in the order of their names. */
dlt_status dlt_tensor_at(const dlt_file *file, size_t number, dlt_tensor *tensor, dlt_error *error);
dlt_status dlt_find(const dlt_file *file, const char *name, dlt_tensor *tensor, dlt_error *error);
/* An alias's target, another tensor itself. */
dlt_status dlt_resolve(const dlt_file *file, const dlt_tensor *tensor, dlt_tensor *resolved, dlt_error *error);
dlt_part dlt_part_at(const dlt_tensor *tensor, uint32_t number);

/* Fill the pointers of a tensor's buffers. Checks the section (5.3) once a file, then what section 15 lists under
 * reading a tensor. Compressed buffers are decompressed into memory of the tensor's own: call dlt_unload. */
dlt_status dlt_load(dlt_file *file, dlt_tensor *tensor, dlt_error *error);
void dlt_unload(dlt_tensor *tensor);
const dlt_bytes *dlt_buffer(const dlt_term *term, const char *name); /* NULL: the term has none of that name */

/* The delta of rows `start` to `start + count` of the shared rows of a loaded `add`: count * columns floats, added in
 * the order of the terms (10.1). A `lowrank` term decodes all of its v vectors in each call: ask for many rows at once.
 */
dlt_status dlt_decode(dlt_file *file, const dlt_tensor *tensor, uint64_t start, uint64_t count, float *out,
                      dlt_error *error);

/* Rows of the fine-tuned tensor (10.2, 10.3): `base` holds the same rows of the base's tensor, `out` takes rows in the
 * fine-tune's dtype. Also rows that the base has not, for which `base` is not read, and tensors of action `same` and
 * `replace`. An `add` with an exact part gives what is served. An `exact` tensor is restored as a whole: `base` is all of the base's tensor, which the caller MUST have
 * checked, and `out` takes all bytes. They are compared with the tensor's digest. */
dlt_status dlt_apply(dlt_file *file, const dlt_tensor *tensor, uint64_t start, uint64_t count, const void *base,
                     void *out, dlt_error *error);

/* The whole fine-tuned tensor as it was packed, bit for bit: an `exact` tensor, an `add` with an exact part, `same` and
 * `replace`. `base` is all of the base's tensor, which the caller MUST have checked. The bytes are compared with the
 * tensor's digest; while they differ, or after any other failure, `out` holds nothing of worth. Of a progressive file,
 * this alone reads sections behind the served part. */
dlt_status dlt_restore(dlt_file *file, dlt_tensor *tensor, const void *base, void *out, dlt_error *error);

/* Compare the base's tensor, whose dtype and shape the caller has compared, with the one that the delta was made for
 * (7.5). `bytes`: the whole tensor, or its parts joined. */
dlt_status dlt_check_base(const dlt_tensor *tensor, const void *bytes, uint64_t length, dlt_error *error);
/* The identity of a tensor (7.5). */
void dlt_identity(dlt_dtype dtype, const dlt_shape *shape, const void *bytes, uint64_t length, uint8_t out[32]);

dlt_status dlt_scaled_at(const dlt_file *file, size_t number, dlt_scaled *scaled, dlt_error *error);
/* The BF16 values that 8-bit floats and their scales mean (7.8); `scales` is NULL if the description has none. */
dlt_status dlt_scaled_values(const dlt_scaled *scaled, const void *codes, const void *scales, uint16_t *out,
                             dlt_error *error);

/* The head of a file that is restored (7.10): the bytes before its tensors, or the whole of an index. Whoever writes the
 * file MUST compare its digest. free(*data) afterwards. */
dlt_status dlt_head(dlt_file *file, size_t number, void **data, uint64_t *length, dlt_error *error);

/* An attachment's bytes, checked against its digest; free(*data) afterwards. */
dlt_status dlt_attachment(dlt_file *file, size_t number, void **data, uint64_t *length, dlt_error *error);

/* All that a verifier must find (15): every section, entry, term, digest, and the content id. No matrix is made. */
dlt_status dlt_verify(dlt_file *file, dlt_error *error);

const char *dlt_dtype_name(dlt_dtype dtype);
uint32_t dlt_dtype_bits(dlt_dtype dtype);
const char *dlt_action_name(dlt_action action);
const char *dlt_kind_name(dlt_kind kind);

#ifdef __cplusplus
}
#endif
#endif
