/* Checks what the vectors cannot reach: how the interface is misused, limits of the user's, files that the system
 * refuses.
 *
 *     check FOLDER
 *
 * FOLDER holds the files of the vectors (run_vectors.py --unpack).
 */
#include "deltafmt.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char *folder;
static int failures;

#define EXPECT(condition)                                                                     \
    do {                                                                                      \
        if (!(condition)) failures++, fprintf(stderr, "line %d: %s\n", __LINE__, #condition); \
    } while (0)

static dlt_file *opened(const char *name, const dlt_limits *limits, dlt_status expected, const char *words) {
    char path[4096];
    dlt_error error = {DLT_OK, ""};
    dlt_file *file;
    snprintf(path, sizeof path, "%s/%s", folder, name);
    dlt_status status = dlt_open(path, limits, &file, &error);
    EXPECT(status == expected && (status == DLT_OK) == (file != NULL));
    EXPECT(words == NULL || strstr(error.message, words));
    if (file == NULL && expected == DLT_OK) fprintf(stderr, "%s: %s\n", path, error.message), exit(1);
    return file;
}

static void check_opening(void) {
    static const dlt_limits small = {.max_output = 1};
    uint64_t bytes[8] = {0};
    dlt_error error;
    dlt_file *file;
    opened("absent", NULL, DLT_SYSTEM, "No such file");
    opened(".", NULL, DLT_INVALID, "a folder");
    opened("../../../../../../../../../../dev/null", NULL, DLT_SYSTEM, "not a regular file");
    opened("empty-file.deltafmt", NULL, DLT_INVALID, "empty");
    opened("lowrank-33-k2-cold.deltafmt", &small, DLT_LIMIT, "max_output");
    EXPECT(dlt_open_memory((uint8_t *)bytes + 1, 8, NULL, &file, &error) == DLT_MISUSE && file == NULL);
    EXPECT(dlt_open_memory(bytes, 8, NULL, &file, &error) == DLT_INVALID && file == NULL);
    EXPECT(dlt_open_memory(bytes, 0, NULL, &file, &error) == DLT_INVALID);
    dlt_close(NULL);
}

static void check_names(void) {
    dlt_file *file = opened("every-action.deltafmt", NULL, DLT_OK, NULL);
    dlt_info about = dlt_about(file);
    dlt_error error;
    dlt_tensor t, target;
    EXPECT(about.removed == 1 && about.attachments == 1 && !about.cold);
    EXPECT(dlt_removed(file, 0).length > 0 && dlt_attachment_name(file, 0).length > 0);
    EXPECT(dlt_tensor_at(file, about.tensors, &t, &error) == DLT_MISUSE);
    EXPECT(dlt_find(file, "no such tensor, whose name has more than seventy bytes, and is cut where a message shows it",
                    &t, &error) == DLT_MISUSE);
    EXPECT(strstr(error.message, "...") != NULL);
    EXPECT(dlt_find(file, "tied", &t, &error) == DLT_OK && t.action == DLT_ALIAS);
    EXPECT(dlt_resolve(file, &t, &target, &error) == DLT_OK && target.action == DLT_ADD);
    EXPECT(dlt_load(file, &t, &error) == DLT_OK && dlt_apply(file, &t, 0, 1, NULL, NULL, &error) == DLT_MISUSE);
    EXPECT(dlt_check_base(&t, NULL, 0, &error) == DLT_MISUSE);
    EXPECT(dlt_validate(file, &error) == DLT_OK);
    EXPECT(strcmp(dlt_action_name(DLT_ADD), "add") == 0 && strcmp(dlt_kind_name(DLT_NM), "nm") == 0);
    EXPECT(strcmp(dlt_dtype_name(DLT_BF16), "BF16") == 0 && dlt_dtype_bits(DLT_F4) == 4);
    for (size_t i = 0; i < about.metadata; i++) {
        dlt_text value, key = dlt_metadata_key(file, i, &value);
        EXPECT(key.text != NULL && value.text != NULL);
    }
    void *data;
    uint64_t length;
    EXPECT(dlt_attachment(file, 0, &data, &length, &error) == DLT_OK && length > 0);
    free(data);
    EXPECT(dlt_attachment(file, 1, &data, &length, &error) == DLT_MISUSE);
    dlt_close(file);
    static const dlt_limits small = {.max_memory = 1};
    file = opened("every-action.deltafmt", &small, DLT_OK, NULL);
    EXPECT(dlt_attachment(file, 0, &data, &length, &error) == DLT_LIMIT);
    dlt_close(file);
}

static void check_decoding(void) {
    static const dlt_limits few = {.max_elements = 100}, small = {.max_memory = 100};
    dlt_error error;
    dlt_tensor t;
    dlt_file *file = opened("seeded-4-16-k4.deltafmt", NULL, DLT_OK, NULL);
    EXPECT(dlt_find(file, "w", &t, &error) == DLT_OK);
    float *rows = calloc((size_t)(t.rows * t.columns), sizeof *rows);
    EXPECT(dlt_decode(file, &t, 0, 1, rows, &error) == DLT_MISUSE); /* not loaded */
    EXPECT(dlt_apply(file, &t, 0, 1, rows, rows, &error) == DLT_MISUSE);
    EXPECT(dlt_load(file, &t, &error) == DLT_OK && dlt_load(file, &t, &error) == DLT_OK);
    EXPECT(dlt_decode(file, &t, t.rows, 1, rows, &error) == DLT_MISUSE);
    EXPECT(dlt_decode(file, &t, 1, UINT64_MAX, rows, &error) == DLT_MISUSE);
    EXPECT(dlt_decode(file, &t, t.rows, 0, rows, &error) == DLT_OK);
    EXPECT(dlt_decode(file, &t, 0, t.rows, rows, &error) == DLT_OK);
    EXPECT(dlt_buffer(&t.terms[0], "codes")->data != NULL && dlt_buffer(&t.terms[0], "gaps") == NULL);
    EXPECT(dlt_check_base(&t, rows, 4, &error) == DLT_OTHER_BASE);
    dlt_unload(&t);
    dlt_close(file);
    file = opened("seeded-4-16-k4.deltafmt", &few, DLT_OK, NULL);
    EXPECT(dlt_find(file, "w", &t, &error) == DLT_OK && dlt_load(file, &t, &error) == DLT_OK);
    EXPECT(dlt_decode(file, &t, 0, t.rows, rows, &error) == DLT_LIMIT && strstr(error.message, "max_elements"));
    dlt_unload(&t);
    dlt_close(file);
    free(rows);
    file = opened("lowrank-33-k2-cold.deltafmt", &small, DLT_OK, NULL);
    EXPECT(dlt_find(file, "w", &t, &error) == DLT_OK);
    EXPECT(dlt_load(file, &t, &error) == DLT_LIMIT && strstr(error.message, "max_memory"));
    EXPECT(dlt_verify(file, &error) == DLT_LIMIT);
    dlt_close(file);
    file = opened("payload-digest.deltafmt", NULL, DLT_OK, NULL);
    EXPECT(dlt_verify(file, &error) == DLT_INVALID && dlt_verify(file, &error) == DLT_INVALID);
    dlt_close(file);
}

static float code_value(int code) { /* E4M3, from its definition */
    int exponent = code >> 3 & 15, fraction = code & 7;
    double value = exponent ? ldexp(1 + fraction / 8.0, exponent - 7) : ldexp(fraction / 8.0, -6);
    if ((code & 0x7F) == 0x7F) value = NAN;
    return (float)(code & 0x80 ? -value : value);
}

static float bf16_value(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, 4);
    return value;
}

/* Every code, with scales of every dtype: a value is within half a step of the product, and exact where the scale is a
 * power of two. */
static void check_scaled(void) {
    uint8_t codes[256];
    uint16_t values[256];
    float wide[2] = {0.5f, 3.14159f};
    uint16_t brain[2] = {0x3F00, 0x4049}, half[2] = {0x3800, 0x4248};
    uint8_t powers[2] = {126, 0xFF};
    const struct {
        dlt_dtype dtype;
        const void *scales;
        float second;
    } cases[5] = {{DLT_F32, wide, 3.14159f},
                  {DLT_BF16, brain, 3.140625f},
                  {DLT_F16, half, 3.140625f},
                  {DLT_F8_E8M0, powers, NAN},
                  {DLT_U8, powers, NAN}};
    dlt_error error;
    for (int i = 0; i < 256; i++) codes[i] = (uint8_t)i;
    for (int k = 0; k < 5; k++) {
        dlt_scaled s = {.codes_dtype = DLT_F8_E4M3, .has_scales = 1, .scales_dtype = cases[k].dtype};
        s.shape = (dlt_shape){2, {128, 2}};
        s.block[0] = 128, s.block[1] = 1; /* a scale for each column */
        EXPECT(dlt_scaled_values(&s, codes, NULL, values, &error) == DLT_MISUSE);
        EXPECT(dlt_scaled_values(&s, codes, cases[k].scales, values, &error) == DLT_OK);
        for (int i = 0; i < 256; i++) {
            float product = code_value(i) * (i % 2 ? cases[k].second : 0.5f), found = bf16_value(values[i]);
            if (isnan(product)) EXPECT(values[i] == 0x7FC0);
            else EXPECT(fabsf(found - product) <= fabsf(product) / 256 && (i % 2 || found == product));
        }
    }
    dlt_scaled s = {.codes_dtype = DLT_F8_E5M2};
    s.shape = (dlt_shape){1, {256}};
    s.block[0] = 256;
    EXPECT(dlt_scaled_values(&s, codes, NULL, values, &error) == DLT_OK);
    EXPECT(values[0x3C] == 0x3F80 && values[0xC0] == 0xC000 && values[0x7C] == 0x7F80 && values[0x7D] == 0x7FC0);
    EXPECT(bf16_value(values[1]) == ldexpf(1, -16)); /* subnormal */
    dlt_file *file = opened("scaled-base.deltafmt", NULL, DLT_OK, NULL);
    EXPECT(dlt_scaled_at(file, 0, &s, &error) == DLT_OK && dlt_scaled_at(file, 99, &s, &error) == DLT_MISUSE);
    dlt_close(file);
}

/* Exact tensors are restored as a whole, from their base; files have heads. */
static void check_exact(void) {
    dlt_error error;
    dlt_tensor t;
    uint8_t bytes[4096] = {0};
    dlt_file *file = opened("exact-forms.deltafmt", NULL, DLT_OK, NULL);
    EXPECT(dlt_find(file, "form0", &t, &error) == DLT_OK && t.action == DLT_EXACT && t.has_base && t.chunk == 256);
    EXPECT(strcmp(dlt_action_name(t.action), "exact") == 0);
    EXPECT(dlt_apply(file, &t, 0, t.rows, bytes, bytes, &error) == DLT_MISUSE); /* dlt_load comes first */
    EXPECT(dlt_load(file, &t, &error) == DLT_OK && t.exact.data != NULL);
    EXPECT(dlt_apply(file, &t, 0, t.rows, NULL, bytes, &error) == DLT_MISUSE);
    EXPECT(dlt_apply(file, &t, t.rows, 0, bytes, bytes, &error) == DLT_MISUSE);
    EXPECT(dlt_decode(file, &t, 0, 1, (float *)(void *)bytes, &error) == DLT_MISUSE);
    EXPECT(dlt_apply(file, &t, 0, t.rows, bytes, bytes, &error) == DLT_INVALID); /* another base */
    EXPECT(dlt_about(file).parent == NULL);
    dlt_unload(&t);
    dlt_close(file);
    file = opened("restored-files.deltafmt", NULL, DLT_OK, NULL);
    const uint8_t *digest = NULL;
    void *head;
    uint64_t length;
    EXPECT(dlt_about(file).files > 0 && dlt_restored_name(file, 0, &digest).length > 0 && digest != NULL);
    EXPECT(dlt_restored_name(file, 99, &digest).text == NULL);
    EXPECT(dlt_head(file, 0, &head, &length, &error) == DLT_OK && length > 0);
    free(head);
    EXPECT(dlt_head(file, 99, &head, &length, &error) == DLT_MISUSE);
    dlt_close(file);
    file = opened("parent.deltafmt", NULL, DLT_OK, NULL);
    EXPECT(dlt_about(file).parent != NULL && dlt_about(file).parent[31] == 31);
    dlt_close(file);
}

/* A progressive file is served without a look behind its served part, and restored from its base. */
static void check_progressive(void) {
    static const dlt_limits small = {.max_memory = 300}, little = {.max_output = 100};
    dlt_error error;
    dlt_tensor t;
    uint8_t base[800] = {0}, out[960], served[960], served_id[32];
    dlt_file *file = opened("progressive.deltafmt", NULL, DLT_OK, NULL);
    dlt_info about = dlt_about(file);
    EXPECT(about.served_size > 0 && about.served_size < about.size && about.served_content_id != NULL);
    memcpy(served_id, about.served_content_id, 32);
    EXPECT(memcmp(served_id, about.content_id, 32) != 0);
    EXPECT(dlt_find(file, "seeded", &t, &error) == DLT_OK && t.has_exact && t.factor_count == t.term_count);
    EXPECT(dlt_restore(file, &t, base, out, &error) == DLT_MISUSE); /* dlt_load comes first */
    EXPECT(dlt_load(file, &t, &error) == DLT_OK && t.exact.data == NULL);
    EXPECT(dlt_apply(file, &t, 0, t.rows, base, served, &error) == DLT_OK && t.exact.data == NULL);
    EXPECT(dlt_restore(file, &t, NULL, out, &error) == DLT_MISUSE);
    EXPECT(dlt_restore(file, &t, base, out, &error) == DLT_INVALID); /* another base */
    EXPECT(dlt_apply(file, &t, 0, t.rows, base, out, &error) == DLT_OK && memcmp(out, served, 800) == 0);
    dlt_unload(&t);
    dlt_close(file);
    file = opened("progressive.deltafmt", &small, DLT_OK, NULL);
    EXPECT(dlt_find(file, "seeded", &t, &error) == DLT_OK && dlt_load(file, &t, &error) == DLT_OK);
    EXPECT(dlt_restore(file, &t, base, out, &error) == DLT_LIMIT && strstr(error.message, "marks"));
    EXPECT(dlt_verify(file, &error) == DLT_LIMIT && strstr(error.message, "a chunk takes more"));
    dlt_unload(&t);
    dlt_close(file);
    file = opened("progressive.deltafmt", &little, DLT_OK, NULL);
    EXPECT(dlt_verify(file, &error) == DLT_LIMIT && strstr(error.message, "max_output"));
    dlt_close(file);
    file = opened("progressive-cut.deltafmt", NULL, DLT_OK, NULL);
    EXPECT(memcmp(dlt_about(file).content_id, served_id, 32) == 0 && dlt_about(file).served_size == 0);
    EXPECT(dlt_find(file, "seeded", &t, &error) == DLT_OK && !t.has_exact && dlt_load(file, &t, &error) == DLT_OK);
    EXPECT(dlt_restore(file, &t, base, out, &error) == DLT_MISUSE && strstr(error.message, "no exact part"));
    dlt_unload(&t);
    dlt_close(file);
    static const dlt_limits least = {.max_memory = 10};
    void *head;
    uint64_t length;
    file = opened("restored-files.deltafmt", &least, DLT_OK, NULL);
    EXPECT(dlt_head(file, 0, &head, &length, &error) == DLT_LIMIT && strstr(error.message, "max_memory"));
    dlt_close(file);
}

int main(int count, char **arguments) {
    if (count != 2) return fprintf(stderr, "usage: check FOLDER\n"), 2;
    folder = arguments[1];
    check_opening();
    check_names();
    check_decoding();
    check_scaled();
    check_exact();
    check_progressive();
    printf(failures ? "%d expectations failed\n" : "the interface is as described\n", failures);
    return failures ? 1 : 0;
}
