/* Applies a delta file to a base, for test vectors: apply FILE BASE, with BASE a file of tensors.
 *
 * BASE holds for each tensor: the length of its name (u32) and the name, the number of its dtype and of its sizes (u32
 * each), the sizes (u64), the number of bytes (u64) and the bytes. Standard output gets for each fine-tuned tensor the
 * length of its name, the name, the number of bytes (u64) and the bytes. Exit codes are those of deltafmt-c: 4 if the
 * base is another one.
 */
#include "deltafmt.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
    char *name;
    dlt_dtype dtype;
    dlt_shape shape;
    uint8_t *bytes;
    uint64_t length;
} tensor;

static tensor *base;
static size_t base_count;

static int stop(const char *why, int code) {
    fprintf(stderr, "apply: %s\n", why);
    exit(code);
}

static void *need(uint64_t bytes) {
    void *memory = malloc((size_t)(bytes ? bytes : 1));
    if (memory == NULL) stop("no memory", 5);
    return memory;
}

static void take(FILE *stream, void *out, uint64_t length) {
    if (length && fread(out, 1, (size_t)length, stream) != length) stop("the base is cut off", 5);
}

static void read_base(const char *path) {
    FILE *stream = fopen(path, "rb");
    uint32_t number;
    if (stream == NULL) stop("the base cannot be read", 5);
    while (fread(&number, 4, 1, stream) == 1) {
        tensor t;
        t.name = need(number + 1);
        take(stream, t.name, number);
        t.name[number] = 0;
        take(stream, &number, 4);
        t.dtype = (dlt_dtype)number;
        take(stream, &t.shape.count, 4);
        if (t.dtype >= DLT_DTYPES || t.shape.count > DLT_MAX_DIMENSIONS) stop("the base is no list of tensors", 5);
        take(stream, t.shape.sizes, 8 * t.shape.count);
        take(stream, &t.length, 8);
        t.bytes = need(t.length);
        take(stream, t.bytes, t.length);
        base = realloc(base, (base_count + 1) * sizeof *base);
        if (base == NULL) stop("no memory", 5);
        base[base_count++] = t;
    }
    fclose(stream);
}

static tensor *find(dlt_text name) {
    for (size_t i = 0; i < base_count; i++) {
        if (strlen(base[i].name) == name.length && memcmp(base[i].name, name.text, name.length) == 0) return &base[i];
    }
    return NULL;
}

static int has_digest(const tensor *t, const uint8_t *digest) {
    uint8_t found[32];
    dlt_identity(t->dtype, &t->shape, t->bytes, t->length, found);
    return memcmp(found, digest, 32) == 0;
}

/* 7.8: the base keeps some tensors as 8-bit floats: put their values in the place of the codes. */
static void widen_scaled(dlt_file *file) {
    for (size_t i = 0; i < dlt_about(file).scaled; i++) {
        dlt_error error;
        dlt_scaled scaled;
        if (dlt_scaled_at(file, i, &scaled, &error)) stop(error.message, 3);
        tensor *codes = find(scaled.name), *scales = scaled.has_scales ? find(scaled.scales_name) : NULL;
        if (codes == NULL || codes->dtype == DLT_BF16) continue; /* not there, or the values themselves */
        if (scaled.has_scales && scales == NULL) stop("the base lacks scales", 4);
        if (!has_digest(codes, scaled.codes_digest) || (scales && !has_digest(scales, scaled.scales_digest))) {
            stop("codes or scales of the base are others", 4);
        }
        uint16_t *values = need(2 * codes->length);
        if (dlt_scaled_values(&scaled, codes->bytes, scales ? scales->bytes : NULL, values, &error))
            stop(error.message, 3);
        free(codes->bytes);
        codes->bytes = (uint8_t *)values, codes->length *= 2, codes->dtype = DLT_BF16;
    }
}

/* The bytes of the base's tensor: its own, or its parts behind each other (7.4). */
static uint8_t *base_bytes(const dlt_tensor *t, uint64_t *length) {
    uint64_t size = dlt_dtype_bits(t->base_dtype) / 8, elements = 1, at = 0;
    if (t->part_count == 0) {
        tensor *found = find(t->name);
        if (found == NULL || found->dtype != t->base_dtype || found->shape.count != t->base_shape.count ||
            memcmp(found->shape.sizes, t->base_shape.sizes, 8 * found->shape.count) != 0) {
            stop("the base lacks a tensor of this dtype and shape", 4);
        }
        uint8_t *out = need(*length = found->length);
        return memcpy(out, found->bytes, (size_t)found->length);
    }
    for (uint32_t i = 0; i < t->base_shape.count; i++) elements *= t->base_shape.sizes[i];
    uint8_t *out = need(*length = elements * size);
    for (uint32_t i = 0; i < t->part_count; i++) {
        dlt_part part = dlt_part_at(t, i);
        tensor *found = find(part.name);
        if (found == NULL || found->dtype != t->base_dtype || found->length / size < part.start + part.count) {
            stop("the base lacks a part", 4);
        }
        memcpy(out + at, found->bytes + part.start * size, (size_t)(part.count * size));
        at += part.count * size;
    }
    return out;
}

static void write_tensor(dlt_file *file, size_t number) {
    dlt_error error;
    dlt_tensor named, t;
    if (dlt_tensor_at(file, number, &named, &error) || dlt_resolve(file, &named, &t, &error)) stop(error.message, 3);
    uint64_t length = 0, bytes = t.elements * dlt_dtype_bits(t.dtype) / 8;
    uint8_t *from = t.has_base ? base_bytes(&t, &length) : NULL, *out = need(bytes);
    if (from && dlt_check_base(&t, from, length, &error)) stop(error.message, 4);
    if (dlt_load(file, &t, &error)) stop(error.message, 3);
    dlt_status status = t.has_exact ? dlt_restore(file, &t, from, out, &error)
                                    : dlt_apply(file, &t, 0, t.rows, from, out, &error);
    if (status) stop(error.message, 3);
    uint32_t name = (uint32_t)named.name.length;
    fwrite(&name, 4, 1, stdout);
    fwrite(named.name.text, 1, name, stdout);
    fwrite(&bytes, 8, 1, stdout);
    fwrite(out, 1, (size_t)bytes, stdout);
    dlt_unload(&t);
    free(from);
    free(out);
}

int main(int count, char **arguments) {
    dlt_error error;
    dlt_file *file;
    if (count != 3) return stop("usage: apply FILE BASE", 2);
    if (dlt_open(arguments[1], NULL, &file, &error) || dlt_verify(file, &error)) return stop(error.message, 3);
    read_base(arguments[2]);
    widen_scaled(file);
    for (size_t i = 0; i < dlt_about(file).tensors; i++) write_tensor(file, i);
    for (size_t i = 0; i < base_count; i++) free(base[i].name), free(base[i].bytes);
    free(base);
    dlt_close(file);
    return 0;
}
