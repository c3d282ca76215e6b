/* deltafmt-c: looks into delta files with the second reader.
 *
 *     deltafmt-c inspect FILE                        what a file holds
 *     deltafmt-c verify FILE...                      check everything
 *     deltafmt-c decode FILE TENSOR [--base RAW]     write a tensor to standard output
 *     deltafmt-c restore FILE TENSOR [--base RAW]    the same, bit for bit as it was packed
 *
 * decode writes the delta as float32, or, with the raw bytes of the base's tensor, the fine-tuned tensor in its own
 * dtype. restore needs an exact tensor or an exact part. Tensors that are stored whole need no base. Exit codes are those of docs/exit-codes.md.
 */
#include "deltafmt.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static const char usage[] = "usage: deltafmt-c inspect FILE\n"
                            "       deltafmt-c verify FILE...\n"
                            "       deltafmt-c decode FILE TENSOR [--base RAW] > OUT\n"
                            "       deltafmt-c restore FILE TENSOR [--base RAW] > OUT\n";

static int exit_code(dlt_status status) {
    static const int codes[] = {0, 3, 3, 2, 5, 2, 4};
    return codes[status];
}

static int complain(const char *file, const dlt_error *error) {
    fprintf(stderr, "deltafmt-c: %s: %s\n", file, error->message);
    return exit_code(error->status);
}

/* A text from a file, without what a terminal would obey. */
static void print_text(dlt_text text) {
    for (size_t i = 0; i < text.length; i++) {
        unsigned char c = (unsigned char)text.text[i];
        putchar(c < 0x20 || c == 0x7F ? '?' : c);
    }
}

static void print_hex(const uint8_t *bytes, size_t length) {
    for (size_t i = 0; i < length; i++) printf("%02x", bytes[i]);
}

static void print_shape(const dlt_shape *shape) {
    for (uint32_t i = 0; i < shape->count; i++) printf(i ? "x%llu" : "%llu", (unsigned long long)shape->sizes[i]);
    if (shape->count == 0) printf("scalar");
}

static void print_tensor(const dlt_tensor *t) {
    uint64_t bytes = (t->has_data ? t->data.length : 0) + (t->has_exact ? t->exact.length : 0);
    print_text(t->name);
    printf("  %s %s ", dlt_action_name(t->action), dlt_dtype_name(t->dtype));
    print_shape(&t->shape);
    for (uint32_t i = 0; i < t->term_count; i++) {
        printf("%s%s", i ? " + " : "  ", dlt_kind_name(t->terms[i].layout.kind));
        if (t->has_exact && i + 1 == t->term_count) printf(" + exact part");
        for (uint32_t j = 0; j < t->terms[i].buffer_count; j++) bytes += t->terms[i].buffers[j].length;
    }
    if (t->action == DLT_ALIAS) {
        printf("  of ");
        print_text(t->target);
    }
    if (bytes) printf("  %llu bytes", (unsigned long long)bytes);
    putchar('\n');
}

static int inspect(const char *path, dlt_file *file, dlt_error *error) {
    dlt_info about = dlt_about(file);
    printf("%s: %llu bytes, %s, %zu tensors in %zu sections\ncontent id ", path, (unsigned long long)about.size,
           about.cold ? "cold" : "hot", about.tensors, about.sections);
    print_hex(about.content_id, 32);
    putchar('\n');
    if (about.served_size) {
        printf("served part %llu bytes, content id ", (unsigned long long)about.served_size);
        if (about.served_content_id) print_hex(about.served_content_id, 32);
        putchar('\n');
    }
    if (about.parent) {
        printf("parent ");
        print_hex(about.parent, 32);
        putchar('\n');
    }
    for (size_t i = 0; i < about.metadata; i++) {
        dlt_text value, key = dlt_metadata_key(file, i, &value);
        print_text(key);
        printf(": ");
        print_text(value);
        putchar('\n');
    }
    for (size_t i = 0; i < about.tensors; i++) {
        dlt_tensor tensor;
        if (dlt_tensor_at(file, i, &tensor, error)) return complain(path, error);
        print_tensor(&tensor);
    }
    for (size_t i = 0; i < about.attachments; i++) {
        print_text(dlt_attachment_name(file, i));
        printf("  attached\n");
    }
    for (size_t i = 0; i < about.files; i++) {
        print_text(dlt_restored_name(file, i, NULL));
        printf("  restored byte for byte\n");
    }
    for (size_t i = 0; i < about.removed; i++) {
        print_text(dlt_removed(file, i));
        printf("  removed\n");
    }
    return 0;
}

static int verify(const char *path, dlt_file *file, dlt_error *error) {
    dlt_info about = dlt_about(file);
    if (dlt_verify(file, error)) return complain(path, error);
    printf("%s: file intact, %zu tensors in %zu sections\n", path, about.tensors, about.sections);
    return 0;
}

/* A whole file, in memory of its own; NULL if it cannot be read. */
static void *read_all(const char *path, uint64_t *length) {
    FILE *stream = fopen(path, "rb");
    char *data = NULL;
    size_t used = 0, room = 0, got = 1;
    while (stream && got > 0) {
        if (used == room) {
            char *more = realloc(data, room = 2 * room + 65536);
            if (more == NULL) break;
            data = more;
        }
        used += got = fread(data + used, 1, room - used, stream);
    }
    if (stream == NULL || ferror(stream) || got > 0) free(data), data = NULL;
    if (stream) fclose(stream);
    *length = used;
    return data;
}

/* Write the rows of a tensor, some at a time; or what it was packed from. */
static dlt_status write_rows(dlt_file *file, dlt_tensor *t, const char *base, int restores, dlt_error *error) {
    int exact = t->action == DLT_EXACT || restores, whole = base != NULL || t->action == DLT_REPLACE || exact;
    uint64_t rows = whole ? t->rows : t->shared_rows, row = t->columns * (whole ? dlt_dtype_bits(t->dtype) : 32);
    uint64_t base_row = t->columns * dlt_dtype_bits(t->has_base ? t->base_dtype : t->dtype);
    /* Rows of packed elements may end within a byte: then all rows at once. Exact tensors are restored as a whole. */
    uint64_t step = row % 8 || row == 0 || exact ? rows : 1 + (UINT64_C(1) << 25) / row;
    char *out = malloc((size_t)(((step < rows ? step : rows) * row + 7) / 8 + 1));
    dlt_status status = DLT_OK;
    if (out == NULL) return error->status = DLT_SYSTEM, strcpy(error->message, "no memory"), DLT_SYSTEM;
    for (uint64_t at = 0; at < rows && status == DLT_OK; at += step) {
        uint64_t count = rows - at < step ? rows - at : step;
        if (restores) status = dlt_restore(file, t, base, out, error);
        else if (whole) status = dlt_apply(file, t, at, count, base ? base + at * base_row / 8 : NULL, out, error);
        else status = dlt_decode(file, t, at, count, (float *)(void *)out, error);
        if (status == DLT_OK && fwrite(out, 1, (size_t)(count * row / 8), stdout) != count * row / 8) {
            status = error->status = DLT_SYSTEM;
            strcpy(error->message, "the output could not be written");
        }
    }
    free(out);
    return status;
}

static int decode(const char *path, dlt_file *file, const char *name, const char *base_path, int restores,
                  dlt_error *error) {
    dlt_tensor asked, tensor;
    if (dlt_find(file, name, &asked, error) || dlt_resolve(file, &asked, &tensor, error)) return complain(path, error);
    uint64_t length = 0;
    char *base = NULL;
    if (base_path && (base = read_all(base_path, &length)) == NULL) {
        fprintf(stderr, "deltafmt-c: %s: it cannot be read\n", base_path);
        return 5;
    }
    dlt_status status = base ? dlt_check_base(&tensor, base, length, error) : DLT_OK;
    if (status == DLT_OK) status = dlt_load(file, &tensor, error);
    if (status == DLT_OK) status = write_rows(file, &tensor, base, restores, error);
    if (status == DLT_OK && fflush(stdout) != 0) {
        status = error->status = DLT_SYSTEM;
        strcpy(error->message, "the output could not be written");
    }
    dlt_unload(&tensor);
    free(base);
    return status == DLT_OK ? 0 : complain(path, error);
}

/* Say what is wrong with the arguments. */
static int misused(const char *what, const char *word) {
    fprintf(stderr, "deltafmt-c: %s%s (see deltafmt-c --help)\n", what, word);
    return 2;
}

int main(int count, char **arguments) {
    const char *command = count > 1 ? arguments[1] : "";
    int inspects = strcmp(command, "inspect") == 0, verifies = strcmp(command, "verify") == 0,
        restores = strcmp(command, "restore") == 0, decodes = strcmp(command, "decode") == 0 || restores;
    if (strcmp(command, "--help") == 0 || strcmp(command, "-h") == 0) return fputs(usage, stdout), 0;
    if (count == 1) return misused("no command; there are inspect, verify, decode and restore", "");
    if (!inspects && !verifies && !decodes)
        return misused("there are the commands inspect, verify, decode and restore, and not ", command);
    if (count == 2) return misused("FILE is missing", "");
    if (inspects && count > 3) return misused("one argument too many: ", arguments[3]);
    if (decodes && count == 3) return misused("TENSOR is missing", "");
    if (decodes && count > 4 && strcmp(arguments[4], "--base") != 0)
        return misused("one argument too many: ", arguments[4]);
    if (decodes && count == 5) return misused("--base needs a file with the raw bytes of the base's tensor", "");
    if (decodes && count > 6) return misused("one argument too many: ", arguments[6]);
    if (decodes && isatty(STDOUT_FILENO)) return misused("a tensor is not written to a terminal; add > OUT", "");
    int code = 0, last = verifies ? count : 3;
    for (int i = 2; i < last; i++) {
        dlt_error error;
        dlt_file *file;
        int found;
        if (dlt_open(arguments[i], NULL, &file, &error)) {
            found = complain(arguments[i], &error);
        } else {
            found = inspects   ? inspect(arguments[i], file, &error)
                    : verifies ? verify(arguments[i], file, &error)
                               : decode(arguments[i], file, arguments[3], count == 6 ? arguments[5] : NULL, restores, &error);
            dlt_close(file);
        }
        if (code == 0) code = found;
    }
    return code;
}
