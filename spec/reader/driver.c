/* A process that reads delta files for the differential test and the fuzzer, under sanitizers where it is built with
 * them.
 *
 * Standard input: for each file its length, u64, and its bytes. Standard output: for each file the length of a report,
 * u32, and the report: status of opening, status of verifying, the message of the first that failed (u8 length, text),
 * the content id (32 bytes), the number of tensors (u32), and for each tensor the status of reading it and two digests:
 * BLAKE3 of its delta, or of its data, and of the fine-tuned bytes over a base made by `made_up`. Of a tensor with an exact
 * part the second covers what is served and then what is restored: where the chunks are those of another base, the
 * prediction, with the first of the chunks that do not fit. A report of a tensor that is too large to decode has status
 * 255.
 *
 * With the argument `deltas`, the deltas of a file that verifies follow, for test vectors (add_deltas).
 *
 * Compiled with -DDELTAFMT_LIBFUZZER, it is a libFuzzer harness in place of that.
 */
#include "blake3.h"
#include "deltafmt.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { TOO_LARGE = 255 };
static const uint64_t MOST_ELEMENTS = 1 << 18, MOST_WORK = 1 << 22;

/* The bytes of a base that both sides of the test make. */
static void made_up(uint8_t *out, uint64_t length) {
    for (uint64_t i = 0; i < length; i++) out[i] = (uint8_t)((uint32_t)i * UINT32_C(2654435761) >> 15);
}

/* The bits of a NaN in a delta are not specified: all become one. */
static void one_nan(float *data, uint64_t elements) {
    static const uint32_t nan = 0x7FC00000;
    for (uint64_t i = 0; i < elements; i++) {
        if (data[i] != data[i]) memcpy(&data[i], &nan, sizeof nan);
    }
}

static void *need(uint64_t bytes) {
    void *memory = malloc((size_t)(bytes ? bytes : 1));
    if (memory == NULL) abort();
    return memory;
}

/* Decode a tensor in two runs of rows, and add it to a base; restore it from its exact part. */
static int decode(dlt_file *file, dlt_tensor *t, uint8_t digests[64], dlt_error *error) {
    uint64_t elements = t->shared_rows * t->columns, work = elements, all = t->rows * t->columns;
    for (uint32_t i = 0; i < t->term_count; i++) work += elements * t->terms[i].layout.rank;
    if (elements > MOST_ELEMENTS || all > MOST_ELEMENTS || work > MOST_WORK) return TOO_LARGE;
    uint64_t size = dlt_dtype_bits(t->dtype) / 8, base_size = dlt_dtype_bits(t->base_dtype) / 8,
             first = t->shared_rows / 3;
    float *delta = need(4 * elements);
    uint8_t *base = need(base_size * all), *out = need(2 * size * all);
    uint64_t length = size * all * (t->has_exact ? 2 : 1);
    memset(out, 0, 2 * size * all);
    made_up(base, base_size * elements);
    dlt_status status = dlt_decode(file, t, 0, first, delta, error);
    if (!status) status = dlt_decode(file, t, first, t->shared_rows - first, delta + first * t->columns, error);
    if (!status) status = dlt_apply(file, t, 0, t->rows, base, out, error);
    if (!status) {
        one_nan(delta, elements);
        dlt_blake3_of(delta, (size_t)(4 * elements), digests);
        if (t->has_exact) status = dlt_restore(file, t, base, out + size * all, error);
        if (status == DLT_INVALID) status = DLT_OK; /* of another base; a verifier says what else is wrong */
        dlt_blake3_of(out, (size_t)length, digests + 32);
    }
    free(delta);
    free(base);
    free(out);
    return (int)status;
}

/* Restore an exact tensor over a base; of one that is refused for this base, the digest is zeros. */
static int restore(dlt_file *file, dlt_tensor *t, uint8_t digests[64], dlt_error *error) {
    uint64_t elements = 1, bytes = t->elements * dlt_dtype_bits(t->dtype) / 8;
    for (uint32_t i = 0; t->has_base && i < t->base_shape.count; i++) elements *= t->base_shape.sizes[i];
    if (elements > MOST_ELEMENTS || t->elements > MOST_ELEMENTS) return TOO_LARGE;
    uint64_t base_bytes = t->has_base ? elements * dlt_dtype_bits(t->base_dtype) / 8 : 0;
    uint8_t *base = need(base_bytes), *out = need(bytes);
    made_up(base, base_bytes);
    dlt_blake3_of(t->exact.data, (size_t)t->exact.length, digests);
    dlt_status status = dlt_apply(file, t, 0, t->rows, base, out, error);
    if (!status) dlt_blake3_of(out, (size_t)bytes, digests + 32);
    free(base);
    free(out);
    return status == DLT_INVALID ? DLT_OK : (int)status;
}

static int read_tensor(dlt_file *file, size_t number, uint8_t digests[64]) {
    dlt_error error;
    dlt_tensor t;
    memset(digests, 0, 64);
    int status = (int)dlt_tensor_at(file, number, &t, &error);
    if (status) return status;
    status = (int)dlt_load(file, &t, &error);
    if (status) return status;
    if (t.action == DLT_ADD) status = decode(file, &t, digests, &error);
    if (t.action == DLT_EXACT) status = restore(file, &t, digests, &error);
    if (t.action == DLT_REPLACE) dlt_blake3_of(t.data.data, (size_t)t.data.length, digests);
    dlt_unload(&t);
    return status;
}

typedef struct {
    uint8_t *data;
    size_t length, room;
} report;

static void add(report *r, const void *data, size_t length) {
    if (r->length + length > r->room) {
        r->room = 2 * (r->length + length);
        r->data = realloc(r->data, r->room);
        if (r->data == NULL) abort();
    }
    if (length) memcpy(r->data + r->length, data, length);
    r->length += length;
}

static void read_file(const uint8_t *data, size_t length, report *r) {
    const dlt_limits limits = {.max_output = 1 << 24};
    dlt_error error;
    dlt_file *file;
    uint8_t opened = (uint8_t)dlt_open_memory(data, length, &limits, &file, &error), verified = opened;
    if (file) verified = (uint8_t)dlt_verify(file, &error);
    uint8_t said = verified ? (uint8_t)strlen(error.message) : 0;
    add(r, &opened, 1);
    add(r, &verified, 1);
    add(r, &said, 1);
    add(r, error.message, said);
    if (file == NULL) return;
    dlt_info about = dlt_about(file);
    uint32_t count = (uint32_t)about.tensors;
    add(r, about.content_id, 32);
    add(r, &count, 4);
    for (uint32_t i = 0; i < count; i++) {
        uint8_t digests[64], status = (uint8_t)read_tensor(file, i, digests);
        add(r, &status, 1);
        add(r, digests, 64);
    }
    for (size_t i = 0; i < about.attachments; i++) {
        void *bytes;
        uint64_t size;
        if (!dlt_attachment(file, i, &bytes, &size, &error)) free(bytes);
    }
    for (size_t i = 0; i < about.files; i++) {
        void *bytes;
        uint64_t size;
        if (!dlt_head(file, i, &bytes, &size, &error)) free(bytes);
    }
    for (size_t i = 0; i < about.scaled; i++) {
        dlt_scaled scaled;
        (void)dlt_scaled_at(file, i, &scaled, &error);
    }
    dlt_close(file);
}

#ifdef DELTAFMT_LIBFUZZER
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t length);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t length) {
    report r = {0};
    uint8_t *copy = need(length);
    if (length) memcpy(copy, data, length);
    read_file(copy, length, &r);
    free(copy);
    free(r.data);
    return 0;
}
#else
/* The delta of a tensor as a test vector has it (16): in the shape of the tensor, zero in rows that only the fine-tune
 * has. */
static void add_delta(dlt_file *file, size_t number, report *r) {
    dlt_error error;
    dlt_tensor t, target;
    uint32_t name = 0;
    if (dlt_tensor_at(file, number, &t, &error) || dlt_resolve(file, &t, &target, &error)) abort();
    if (target.action != DLT_ADD) return add(r, &name, 4);
    uint64_t elements = target.rows * target.columns;
    float *delta = need(4 * elements);
    memset(delta, 0, 4 * elements);
    if (dlt_load(file, &target, &error) || dlt_decode(file, &target, 0, target.shared_rows, delta, &error)) abort();
    name = (uint32_t)t.name.length;
    add(r, &name, 4);
    add(r, t.name.text, name);
    add(r, &elements, 8);
    add(r, delta, 4 * elements);
    free(delta);
    dlt_unload(&target);
}

/* Of a file that verifies: for each tensor the length of its name, u32 (0: no delta), name, elements (u64) and delta.
 */
static void add_deltas(const uint8_t *data, size_t length, report *r) {
    dlt_error error;
    dlt_file *file;
    if (dlt_open_memory(data, length, NULL, &file, &error)) return;
    for (size_t i = 0; i < dlt_about(file).tensors && dlt_verify(file, &error) == DLT_OK; i++) add_delta(file, i, r);
    dlt_close(file);
}

int main(int count, char **arguments) {
    report r = {0};
    uint64_t length;
    int deltas = count > 1 && strcmp(arguments[1], "deltas") == 0;
    while (fread(&length, sizeof length, 1, stdin) == 1) {
        uint8_t *data = need(length);
        if (fread(data, 1, (size_t)length, stdin) != length) return 1;
        r.length = 0;
        read_file(data, (size_t)length, &r);
        if (deltas) add_deltas(data, (size_t)length, &r);
        uint32_t size = (uint32_t)r.length;
        fwrite(&size, sizeof size, 1, stdout);
        fwrite(r.data, 1, size, stdout);
        fflush(stdout);
        free(data);
    }
    free(r.data);
    return 0;
}
#endif
